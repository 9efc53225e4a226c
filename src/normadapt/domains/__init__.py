"""Which domain an instance is of: what inputs look like, where they lie, the bank, and changes. No activations here."""
