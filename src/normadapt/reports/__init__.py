"""What is said of an adapted model and of its domains: plain numbers and words, made from records, read-only."""
