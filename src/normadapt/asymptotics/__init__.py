"""Pure mathematics on float64 tensors: knows no module, no file and no policy."""
