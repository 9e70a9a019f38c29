"""Evaluation: perplexity and KL divergence on a text, and the likelihood of given continuations."""
