"""Shared by implementations of window-bias attention: names of saved results, segment bounds."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name

SAVED = "window_bias_attention"


def saved(results):
  """`results` of the forward kernel, under the name `SAVED` for `jax.checkpoint_policies.save_only_these_names`.

  The backward pass needs them: callers who recompute everything else can leave attention out.
  """
  return checkpoint_name(results, SAVED)


def padded(x: jax.Array | None, axis: int, pad: int, **how) -> jax.Array | None:
  """`x` with `pad` more entries behind its last along one axis, zeros unless `how` says otherwise; None stays None."""
  return None if x is None else jnp.pad(x, [(0, pad if i == axis else 0) for i in range(x.ndim)], **how)


def segment_bounds(segment_ids: jax.Array) -> tuple[jax.Array, jax.Array]:
  """First position of each token's segment and the one past its last, int32 [B, T] each."""
  t = segment_ids.shape[1]
  positions = jnp.arange(t, dtype=jnp.int32)[None]
  change = segment_ids[:, 1:] != segment_ids[:, :-1]
  first = jnp.pad(change, ((0, 0), (1, 0)), constant_values=True)
  last = jnp.pad(change, ((0, 0), (0, 1)), constant_values=True)
  start = lax.cummax(jnp.where(first, positions, 0), axis=1)
  end = lax.cummin(jnp.where(last, positions + 1, t), axis=1, reverse=True)
  return start, end
