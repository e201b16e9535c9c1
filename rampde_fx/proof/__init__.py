"""check, and the verification of a rewrite on its first call."""
