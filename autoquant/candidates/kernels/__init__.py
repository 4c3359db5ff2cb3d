"""Kernels of several formats: the project's own for CUDA, and those that libraries tune."""
