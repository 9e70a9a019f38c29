"""Evaluation: perplexity and KL divergence on text, and the likelihood of given continuations."""
