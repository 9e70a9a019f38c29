"""Layouts of PyTorch checkpoints: weights in `transformers`, settings of gates in the others."""
