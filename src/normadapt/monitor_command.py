"""`normadapt report`: a thin shell around the report page."""
