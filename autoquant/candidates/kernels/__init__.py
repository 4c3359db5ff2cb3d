"""Kernels of several formats: the project's own for CUDA, those of libraries that tune them, and where both are kept."""
