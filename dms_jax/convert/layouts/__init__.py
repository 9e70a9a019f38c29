"""Layouts of PyTorch checkpoints: `transformers` reads weights, the others settings of gates."""
