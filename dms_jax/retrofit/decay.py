"""Retention-gated attention of TRIM-KV: a key's score gains log beta (< 0) with every later token.

Source: arXiv 2512.03324. Plain XLA: the scores of one block of queries exist at a time, and the backward pass computes
them again. The objective "dmc" shares `blocks` and `visible`.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from pallas_kernels.common.xla_dot import einsum

BLOCK = 512  # queries whose scores are in memory at once


def blocks(each: Callable[[Int[Array, "Q"]], Array], length: int) -> Array:
  """`each(queries)` for blocks of queries 0 .. length - 1, end to end; its first axis is that of the queries.

  The backward pass calls `each` again. Queries past the end are padding, and their results are dropped.
  """
  block = min(BLOCK, length)
  starts = jnp.arange(-(-length // block)) * block
  out = jax.lax.map(jax.checkpoint(lambda start: each(start + jnp.arange(block))), starts)
  return out.reshape(-1, *out.shape[2:])[:length]


def visible(queries: Int[Array, "Q"], segment_ids: Int[Array, "B T"] | None, length: int) -> Bool[Array, "_ Q T"]:
  """Whether each query sees each key: keys up to itself, of its own document; the first axis is B, or 1."""
  causal = (jnp.arange(length) <= queries[:, None])[None]
  if segment_ids is None:
    return causal
  own = jnp.take(segment_ids, queries, axis=1, mode="clip")
  return causal & (own[:, :, None] == segment_ids[:, None])


def decay_attention(
  q: Float[Array, "B T N H"],
  k: Float[Array, "B T K H"],
  v: Float[Array, "B T K H"],
  log_beta: Float[Array, "B K T"],
  segment_ids: Int[Array, "B T"] | None = None,
) -> Float[Array, "B T N H"]:
  """Causal attention whose scores get (t - i) log beta_i, for query t and key i (equation 3).

  Args:
    log_beta: float32, 0 or less.
    segment_ids: documents that do not see each other, in contiguous runs.
  """
  b, t, n, h = q.shape
  heads = k.shape[2]
  grouped = q.reshape(b, t, heads, n // heads, h)

  def each(queries):
    mine = jnp.take(grouped, queries, axis=1, mode="clip")
    scores = einsum("bqkgh,bskh->bkgqs", mine, k) * h**-0.5
    age = (queries[:, None] - jnp.arange(t)).astype(jnp.float32)
    scores = scores + (age * log_beta[:, :, None])[:, :, None]
    scores = jnp.where(visible(queries, segment_ids, t)[:, None, None], scores, -jnp.inf)
    weights = jax.nn.softmax(scores, axis=-1)  # every query sees itself, and padding the last key
    return einsum("bkgqs,bskh->qbkgh", weights.astype(v.dtype), v)

  return jnp.moveaxis(blocks(each, t), 0, 1).reshape(b, t, n, h).astype(q.dtype)


def soft_sizes(log_beta: Float[Array, "B K T"], segment_ids: Int[Array, "B T"] | None = None) -> Float[Array, "B K T"]:
  """The sum over i <= t of beta_i^(t - i), over the tokens of the same document: a soft cache size."""
  t = log_beta.shape[-1]

  def each(queries):
    age = jnp.maximum(queries[:, None] - jnp.arange(t), 0).astype(jnp.float32)
    kept = jnp.exp(age * log_beta[:, :, None])
    return jnp.moveaxis(jnp.sum(jnp.where(visible(queries, segment_ids, t)[:, None], kept, 0.0), axis=-1), -1, 0)

  return jnp.moveaxis(blocks(each, t), 0, -1)
