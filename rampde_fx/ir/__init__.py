"""The intermediate representation: a marked loop as it was captured, rolled up into one step, and lowered in phases."""
