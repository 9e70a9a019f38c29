"""Decode attention in plain XLA: blocks of slots, only up to the longest live prefix."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.xla_dot import einsum

# Slots read at a time. The block is the only copy made of the cache, so it bounds the operation's temporaries.
BLOCK = 128


def decode_attention(q, kv, layer, lengths, *, lse: bool = False):
  """See `api.decode_attention`. A block past a row's prefix changes nothing, not even a bit, in that row."""
  b, n, h = q.shape
  _, _, k, s, _ = kv.shape
  block = min(BLOCK, s)
  qg = q.reshape(b, k, n // k, h)

  def body(i, state):
    top, total, acc = state
    # The last block starts early enough to lie inside the cache; slots it shares with the one before are masked.
    start = jnp.minimum(i * block, s - block)
    slots = lax.dynamic_slice(kv, (layer, 0, 0, start, 0), (1, b, k, block, 2 * h))[0]
    if slots.dtype == jnp.uint16:
      slots = lax.bitcast_convert_type(slots, jnp.bfloat16)
    index = start + jnp.arange(block)
    live = (index >= i * block) & (index < lengths[..., None])
    slots = jnp.where(live[..., None], slots, jnp.zeros((), slots.dtype))  # dead slots may hold anything, NaN too
    scores = einsum("bkgh,bksh->bkgs", qg, slots[..., :h]) * h**-0.5
    scores = jnp.where(live[:, :, None], scores, -jnp.inf)
    new_top = jnp.maximum(top, scores.max(axis=-1))
    safe = jnp.where(new_top == -jnp.inf, 0.0, new_top)
    weights = jnp.exp(scores - safe[..., None])
    scale = jnp.exp(top - safe)
    part = einsum("bkgs,bksh->bkgh", weights.astype(slots.dtype), slots[..., h:])
    return new_top, total * scale + weights.sum(axis=-1), acc * scale[..., None] + part

  init = (jnp.full((b, k, n // k), -jnp.inf), jnp.zeros((b, k, n // k)), jnp.zeros((b, k, n // k, h)))
  blocks = (lengths.max() + block - 1) // block
  top, total, acc = lax.fori_loop(0, blocks, body, init)
  out = acc / jnp.where(total == 0, 1.0, total)[..., None]
  out = jax.lax.reshape(out, (b, n, h)).astype(q.dtype)
  return (out, (top + jnp.log(total)).reshape(b, n)) if lse else out
