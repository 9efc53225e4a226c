"""A model's normalization layers: found, read and written. A new kind of layer, or a new way to read one, goes here."""
