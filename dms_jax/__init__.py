"""Dynamic Memory Sparsification (arXiv 2506.05345) in JAX."""
