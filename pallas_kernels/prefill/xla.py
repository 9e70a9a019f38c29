"""Prefill attention in plain XLA: blocks of queries against blocks of keys, only as far as there are visible keys."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.common.xla_dot import einsum

# Scores of at most this many queries and keys stand in memory at once.
BLOCK, KEYS = 256, 256


def prefill_attention(q, keys, values, q_pos, k_first, k_last):
  """See `api.prefill_attention`. Invisible keys at the end change nothing, not even a bit, and cost next to nothing."""
  b, t, n, h = q.shape
  k, s = keys.shape[1:3]
  g = n // k
  block, width = min(BLOCK, t), min(KEYS, s)
  pad = -t % block
  # A KV head's queries are rows of one matrix, so that both products are plain batched ones in every layout.
  qg = jnp.moveaxis(q.reshape(b, t, k, g, h), 1, 3)
  qg = jnp.pad(qg, ((0, 0), (0, 0), (0, 0), (0, pad), (0, 0)))
  pos = jnp.pad(q_pos, ((0, 0), (0, pad)), constant_values=-2)
  stop = jnp.max(jnp.where(k_first <= k_last, jnp.arange(1, s + 1, dtype=jnp.int32), 0))

  def one(args):
    qb, pb = args  # [B, K, G, block, H], [B, block]
    rows = qb.shape[3]
    qb = qb.reshape(b, k, g * rows, h)
    pb = pb[:, None, :, None]

    def body(i, state):
      top, total, acc = state
      # The last block starts early enough to lie inside; keys it shares with the one before are masked.
      start = jnp.minimum(i * width, s - width)
      kb, vb, first, last = (lax.dynamic_slice_in_dim(x, start, width, 2) for x in (keys, values, k_first, k_last))
      first = jnp.where(start + jnp.arange(width) >= i * width, first, jnp.iinfo(jnp.int32).max)
      # Keys that no query sees may hold anything, NaN too: scores get masked, but a weight of 0 must not meet a value.
      vb = jnp.where((first > last)[..., None], jnp.zeros((), vb.dtype), vb)
      scores = einsum("bkmh,bksh->bkms", qb, kb) * h**-0.5
      visible = ((first[:, :, None] <= pb) & (pb <= last[:, :, None]))[:, :, None]
      scores = jnp.where(visible, scores.reshape(b, k, g, rows, width), -jnp.inf)
      new_top = jnp.maximum(top, scores.max(axis=-1, keepdims=True))
      safe = jnp.where(new_top == -jnp.inf, 0.0, new_top)
      weights = jnp.exp(scores - safe)
      scale = jnp.exp(top - safe)
      total = total * scale + weights.sum(axis=-1, keepdims=True)
      part = einsum("bkms,bksh->bkmh", weights.astype(vb.dtype).reshape(b, k, g * rows, width), vb)
      return new_top, total, acc * scale + part.reshape(b, k, g, rows, h)

    zeros = jnp.zeros((b, k, g, rows, 1))
    init = (zeros - jnp.inf, zeros, jnp.zeros((b, k, g, rows, h)))
    _, total, acc = lax.fori_loop(0, (stop + width - 1) // width, body, init)
    out = acc / jnp.where(total == 0, 1.0, total)
    return jnp.moveaxis(out.astype(q.dtype), 3, 1)  # [B, block, K, G, H]

  if t == block:
    return one((qg, pos)).reshape(b, t, n, h)
  blocks = (t + pad) // block
  split = lambda x, axis: jnp.moveaxis(x.reshape(*x.shape[:axis], blocks, block, *x.shape[axis + 1 :]), axis, 0)
  out = jax.lax.map(one, (split(qg, 3), split(pos, 1)))
  return jnp.moveaxis(out, 0, 1).reshape(b, t + pad, n, h)[:, :t]
