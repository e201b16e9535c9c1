"""Whether a rewrite computes what the model does: both run in float64, and compared."""
