"""Prefill attention in plain XLA: blocks of queries against blocks of keys, only as far as there are visible keys."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.common.xla_dot import einsum

# At most this many queries and keys have their scores in memory at once.
BLOCK, KEYS = 256, 256


def prefill_attention(q, keys, values, q_pos, k_first, k_last, *, lse: bool = False, query_weights=None):
  """See `api.prefill_attention`. Invisible keys at the end change nothing, not even a bit, and cost next to nothing.

  The mass takes a second pass over the keys, by blocks of queries that have a weight.
  """
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
  key_blocks = (stop + width - 1) // width
  logs_wanted = lse or query_weights is not None
  # The last block starts early enough to lie inside; keys it shares with the one before are masked.
  start_of = lambda i: jnp.minimum(i * width, s - width)

  def scores_of(i, qb, pb):
    """Block i of keys: (scores [B, K, G, block, width], -inf where invisible; first, last [B, K, width])."""
    start = start_of(i)
    kb, first, last = (lax.dynamic_slice_in_dim(x, start, width, 2) for x in (keys, k_first, k_last))
    first = jnp.where(start + jnp.arange(width) >= i * width, first, jnp.iinfo(jnp.int32).max)
    rows, pb = qb.shape[3], pb[:, None, :, None]
    scores = einsum("bkmh,bksh->bkms", qb.reshape(b, k, g * rows, h), kb) * h**-0.5
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

    zeros = jnp.zeros((b, k, g, rows, 1))
    init = (zeros - jnp.inf, zeros, jnp.zeros((b, k, g, rows, h)))
    top, total, acc = lax.fori_loop(0, key_blocks, body, init)
    out = acc / jnp.where(total == 0, 1.0, total)
    out = jnp.moveaxis(out.astype(q.dtype), 3, 1)  # [B, block, K, G, H]
    return out, (top + jnp.log(total))[..., 0] if logs_wanted else None

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

  blocks = (t + pad) // block
  split = lambda x, axis: jnp.moveaxis(x.reshape(*x.shape[:axis], blocks, block, *x.shape[axis + 1 :]), axis, 0)
  join = lambda x: jnp.moveaxis(x, 0, 1).reshape(b, t + pad, *x.shape[3:])[:, :t]
  queries = split(qg, 3), split(pos, 1)
  one = jax.tree.map(lambda x: x[None], attend((qg, pos))) if blocks == 1 else None
  out, logs = one or lax.map(attend, queries)  # [blocks, B, block, K, G, H], [blocks, B, K, G, block]
  results = [join(out).reshape(b, t, n, h)]
  if lse:
    results.append(join(jnp.moveaxis(logs, 4, 2)).reshape(b, t, n))
  if query_weights is not None:
    weights = jnp.pad(query_weights.astype(jnp.float32), ((0, 0), (0, pad)))
    mass, _ = lax.scan(add_mass, jnp.zeros((b, k, s)), (*queries, split(weights, 1), logs))
    results.append(mass)
  return tuple(results) if len(results) > 1 else results[0]
