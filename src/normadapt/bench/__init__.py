"""The benchmark: every rule on every stream, against the limit."""
