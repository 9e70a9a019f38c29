"""Prefill attention in plain XLA: blocks of queries against the blocks of keys they can see."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.common.softmax import soft_capped, with_sinks
from pallas_kernels.common.xla_dot import einsum

# At most this many queries and keys have their scores in memory at once.
BLOCK, KEYS = 256, 256
WEIGHTED = 64  # queries at a time in the second pass: fewer, since often only a few last ones have a weight


def prefill_attention(
  q, keys, values, q_pos, k_first, k_last, *, lse: bool = False, query_weights=None, softcap=None, sinks=None
):
  """See `api.prefill_attention`. Invisible keys at the end change nothing, not even a bit, and cost next to nothing.

  The mass takes a second pass over the keys, by blocks of queries that have a weight.
  """
  b, t, n, h = q.shape
  k, s = keys.shape[1:3]
  g = n // k
  width = min(KEYS, s)
  # A KV head's queries are rows of one matrix, so that both products are plain batched ones in every layout.
  qg = jnp.moveaxis(q.reshape(b, t, k, g, h), 1, 3)
  stop = jnp.max(jnp.where(k_first <= k_last, jnp.arange(1, s + 1, dtype=jnp.int32), 0))
  key_blocks = (stop + width - 1) // width
  logs_wanted = lse or query_weights is not None or sinks is not None
  # The last block starts early enough to lie inside; keys it shares with the one before are masked.
  start_of = lambda i: jnp.minimum(i * width, s - width)

  def scores_of(i, qb, pb):
    """Block i of keys: (scores [B, K, G, block, width], -inf where invisible; first, last [B, K, width])."""
    start = start_of(i)
    kb, first, last = (lax.dynamic_slice_in_dim(x, start, width, 2) for x in (keys, k_first, k_last))
    first = jnp.where(start + jnp.arange(width) >= i * width, first, jnp.iinfo(jnp.int32).max)
    rows, pb = qb.shape[3], pb[:, None, :, None]
    scores = einsum("bkmh,bksh->bkms", qb.reshape(b, k, g * rows, h), kb) * h**-0.5
    scores = soft_capped(scores, softcap)
    visible = ((first[:, :, None] <= pb) & (pb <= last[:, :, None]))[:, :, None]
    return jnp.where(visible, scores.reshape(b, k, g, rows, width), -jnp.inf), first, last

  def attend(args):
    qb, pb = args  # [B, K, G, block, H], [B, block]
    rows = qb.shape[3]

    def body(i, state):
      top, total, acc = state
      scores, first, last = scores_of(i, qb, pb)
      vb = lax.dynamic_slice_in_dim(values, start_of(i), width, 2)
      # Keys that no query sees may hold anything, NaN too: scores get masked, but a weight of 0 must not meet a value.
      vb = jnp.where((first > last)[..., None], jnp.zeros((), vb.dtype), vb)
      new_top = jnp.maximum(top, scores.max(axis=-1, keepdims=True))
      safe = jnp.where(new_top == -jnp.inf, 0.0, new_top)
      weights = jnp.exp(scores - safe)
      scale = jnp.exp(top - safe)
      total = total * scale + weights.sum(axis=-1, keepdims=True)
      part = einsum("bkms,bksh->bkmh", weights.astype(vb.dtype).reshape(b, k, g * rows, width), vb)
      return new_top, total, acc * scale + part.reshape(b, k, g, rows, h)

    init = (jnp.full((b, k, g, rows, 1), -jnp.inf), jnp.zeros((b, k, g, rows, 1)), jnp.zeros((b, k, g, rows, h)))
    top, total, acc = lax.fori_loop(0, key_blocks, body, init)
    out = acc / jnp.where(total == 0, 1.0, total)
    logs = (top + jnp.log(total))[..., 0] if logs_wanted else None
    if sinks is not None:
      out, logs = with_sinks(out, logs, sinks.reshape(k, g, 1))
    return jnp.moveaxis(out.astype(q.dtype), 3, 1), logs  # [B, block, K, G, H], [B, K, G, block]

  def add_mass(mass, args):
    """`mass` [B, K, S] and what a block of queries adds to it; `wb` [B, block], `logs` [B, K, G, block]."""
    qb, pb, wb, logs = args
    finite = jnp.where(logs == -jnp.inf, 0.0, logs)[..., None]

    def body(i, mass):
      scores, _, _ = scores_of(i, qb, pb)
      part = jnp.sum(jnp.exp(scores - finite) * wb[:, None, None, :, None], axis=(2, 3))
      before = lax.dynamic_slice_in_dim(mass, start_of(i), width, 2)
      return lax.dynamic_update_slice_in_dim(mass, before + part, start_of(i), 2)

    weighted = jnp.any(wb != 0)
    return lax.cond(weighted, lambda: lax.fori_loop(0, key_blocks, body, mass), lambda: mass), None

  def split(x, axis, block, fill=0):
    """[blocks, ..., block, ...] of x [..., T, ...], padded with `fill`."""
    pad = [(0, -t % block if i == axis else 0) for i in range(x.ndim)]
    x = jnp.pad(x, pad, constant_values=fill)
    return jnp.moveaxis(x.reshape(*x.shape[:axis], -1, block, *x.shape[axis + 1 :]), axis, 0)

  def join(x):
    """[B, T, N, ...] of x [blocks, B, block, K, G, ...]."""
    return jnp.moveaxis(x, 0, 1).reshape(b, -1, n, *x.shape[5:])[:, :t]

  block = min(BLOCK, t)
  if block == t:
    out, logs = jax.tree.map(lambda x: x[None], attend((qg, q_pos)))
  else:
    out, logs = lax.map(attend, (split(qg, 3, block), split(q_pos, 1, block, -2)))
  results = [join(out)]
  logs = join(jnp.moveaxis(logs, 4, 2)) if logs_wanted else None
  if lse:
    results.append(logs)
  if query_weights is not None:
    block = min(WEIGHTED, t)
    logs = jnp.moveaxis(logs.reshape(b, t, k, g), 1, 3)
    parts = split(qg, 3, block), split(q_pos, 1, block, -2), split(query_weights.astype(jnp.float32), 1, block)
    mass, _ = lax.scan(add_mass, jnp.zeros((b, k, s)), (*parts, split(logs, 3, block, -jnp.inf)))
    results.append(mass)
  return tuple(results) if len(results) > 1 else results[0]
