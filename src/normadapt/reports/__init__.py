"""What an adapted model says about itself, as plain data: what a report shows is changed here."""
