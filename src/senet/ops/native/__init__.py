"""The sweeps and the inference kernels for CPUs in C++, compiled on the user's machine at first use."""
