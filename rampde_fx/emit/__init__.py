"""The loop that Inductor compiles: a step and its adjoint as scans, segments of them, CUDA graphs."""
