"""Prefill attention in plain XLA: blocks of queries against all keys."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from pallas_kernels.xla_dot import einsum

# Scores of at most this many queries stand in memory at once.
BLOCK = 256


def prefill_attention(q, keys, values, q_pos, k_first, k_last):
  """See `api.prefill_attention`."""
  b, t, n, h = q.shape
  k = keys.shape[1]
  g = n // k
  # Slots invisible to all may hold anything, NaN too: scores get masked, but a weight of 0 must not meet their values.
  values = jnp.where((k_first > k_last)[..., None], jnp.zeros((), values.dtype), values)
  block = min(BLOCK, t)
  pad = -t % block
  # A KV head's queries are rows of one matrix, so that both products are plain batched ones in every layout.
  qg = jnp.moveaxis(q.reshape(b, t, k, g, h), 1, 3)
  qg = jnp.pad(qg, ((0, 0), (0, 0), (0, 0), (0, pad), (0, 0)))
  pos = jnp.pad(q_pos, ((0, 0), (0, pad)), constant_values=-2)

  def one(args):
    qb, pb = args  # [B, K, G, block, H], [B, block]
    rows = qb.shape[3]
    scores = einsum("bkmh,bksh->bkms", qb.reshape(b, k, g * rows, h), keys) * h**-0.5
    pb = pb[:, None, :, None]
    visible = ((k_first[:, :, None] <= pb) & (pb <= k_last[:, :, None]))[:, :, None]
    scores = jnp.where(visible, scores.reshape(b, k, g, rows, -1), -jnp.inf)
    top = scores.max(axis=-1, keepdims=True)
    weights = jnp.exp(scores - jnp.where(top == -jnp.inf, 0.0, top))
    total = weights.sum(axis=-1, keepdims=True)
    weights = weights.astype(values.dtype).reshape(b, k, g * rows, -1)
    out = einsum("bkms,bksh->bkmh", weights, values)
    out = out.reshape(b, k, g, rows, h) / jnp.where(total == 0, 1.0, total)
    return jnp.moveaxis(out.astype(q.dtype), 3, 1)  # [B, block, K, G, H]

  if t == block:
    return one((qg, pos)).reshape(b, t, n, h)
  blocks = (t + pad) // block
  split = lambda x, axis: jnp.moveaxis(x.reshape(*x.shape[:axis], blocks, block, *x.shape[axis + 1 :]), axis, 0)
  out = jax.lax.map(one, (split(qg, 3), split(pos, 1)))
  return jnp.moveaxis(out, 0, 1).reshape(b, t + pad, n, h)[:, :t]
