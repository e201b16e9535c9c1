"""What runs inside of a compiled loop: operators, scales, counts and what a monitor records."""
