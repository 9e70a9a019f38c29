"""Prefill attention in plain XLA: blocks of queries against all keys."""

from __future__ import annotations

import jax
import jax.numpy as jnp

# Scores of at most this many queries stand in memory at once.
BLOCK = 256


def prefill_attention(q, keys, values, q_pos, k_first, k_last):
  """See `api.prefill_attention`."""
  b, t, n, h = q.shape
  k = keys.shape[1]
  never = (k_first > k_last)[..., None]  # invisible to all: such slots may hold anything, NaN too
  keys, values = (jnp.where(never, jnp.zeros((), x.dtype), x) for x in (keys, values))
  block = min(BLOCK, t)
  pad = -t % block
  qg = (q * jnp.asarray(h**-0.5, q.dtype)).reshape(b, t, k, n // k, h)
  qg = jnp.pad(qg, ((0, 0), (0, pad), (0, 0), (0, 0), (0, 0)))
  pos = jnp.pad(q_pos, ((0, 0), (0, pad)), constant_values=-2)

  def one(args):
    qb, pb = args  # [B, block, K, G, H], [B, block]
    scores = jnp.einsum("btkgh,bksh->bkgts", qb, keys, preferred_element_type=jnp.float32)
    pb = pb[:, None, :, None]
    visible = ((k_first[:, :, None] <= pb) & (pb <= k_last[:, :, None]))[:, :, None]
    scores = jnp.where(visible, scores, -jnp.inf)
    top = scores.max(axis=-1, keepdims=True)
    weights = jnp.exp(scores - jnp.where(top == -jnp.inf, 0.0, top))
    total = jnp.moveaxis(weights.sum(axis=-1), 3, 1)
    out = jnp.einsum("bkgts,bksh->btkgh", weights.astype(values.dtype), values, preferred_element_type=jnp.float32)
    return (out / jnp.where(total == 0, 1.0, total)[..., None]).astype(q.dtype)

  if t == block:
    return one((qg, pos)).reshape(b, t, n, h)
  blocks = (t + pad) // block
  split = lambda x: jnp.moveaxis(x.reshape(b, blocks, block, *x.shape[2:]), 1, 0)
  out = jax.lax.map(one, (split(qg), split(pos)))
  return jnp.moveaxis(out, 0, 1).reshape(b, t + pad, n, h)[:, :t]
