"""Layouts of PyTorch checkpoints: `transformers` has the weights, `nvidia` and `fastdms` the settings of gates."""
