"""What several formats compute with: the project's own CUDA kernels, libraries that tune theirs, and where both are kept."""
