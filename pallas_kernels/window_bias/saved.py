"""What the backward pass needs of the forward one, by name, so that callers who recompute can leave attention out."""

from __future__ import annotations

from jax.ad_checkpoint import checkpoint_name

SAVED = "window_bias_attention"


def saved(results):
  """`results` of the forward kernel, under `SAVED` for `jax.checkpoint_policies.save_only_these_names`."""
  return checkpoint_name(results, SAVED)
