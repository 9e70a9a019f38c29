"""Window-bias attention in plain XLA: blocks of queries, recomputed in the backward pass."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.common.softmax import soft_capped
from pallas_kernels.common.xla_dot import einsum
from pallas_kernels.window_bias.common import padded, saved

# Queries whose scores are in memory at once, and the number of unrolled stages. Within a stage every block reads the
# same prefix of keys (shapes are static), so at most 1/STAGES of the causal half is wasted.
BLOCK = 512
STAGES = 8


def in_stages(one: Callable[..., Any], blocks: int, block: int, *xs: jax.Array) -> Any:
  """Results of `one(*x, number, end)` for each block `number` of queries, one after another along a first axis.

  Keys below `end` are all that the block may see; `x` are its entries of `xs`. Blocks follow one another, and the
  backward pass calls `one` again.
  """
  stage, outs = -(-blocks // STAGES), []
  for first in range(0, blocks, stage):
    last = min(first + stage, blocks)
    again = jax.checkpoint(lambda args, end=last * block: one(*args, end))
    outs.append(jax.lax.map(again, (*(x[first:last] for x in xs), jnp.arange(first, last))))
  return jax.tree.map(lambda *parts: jnp.concatenate(parts), *outs)


def window_bias_attention(q, k, v, bias, window, segment_ids, lse=False, softcap=None, by_age=False):
  """See `api.window_bias_attention`."""
  b, t, n, h = q.shape
  heads = k.shape[2]
  block = min(BLOCK, t)
  pad = -t % block
  if pad:
    q, k, v = (padded(x, 1, pad) for x in (q, k, v))
    bias, segment_ids = padded(bias, 2, pad), padded(segment_ids, 1, pad)
  blocks = (t + pad) // block
  qg = jnp.moveaxis(q.reshape(b, blocks, block, heads, n // heads, h), 1, 0)

  def one(qb, number, end):
    """Queries of block `number` against keys 0 .. end-1."""
    scores = einsum("btkgh,bskh->bkgts", qb, k[:, :end]) * h**-0.5
    scores = soft_capped(scores, softcap)
    i = number * block + jnp.arange(block)[:, None]
    j = jnp.arange(end)[None]
    visible = (j <= i)[None]
    if segment_ids is not None:
      mine = jax.lax.dynamic_slice_in_dim(segment_ids, number * block, block, axis=1)
      visible = visible & (mine[:, :, None] == segment_ids[:, None, :end])
    if bias is not None:
      added = bias[:, :, None, None, :end] * (i - j).astype(jnp.float32) if by_age else bias[:, :, None, None, :end]
      scores = scores + jnp.where(i - j > window, added, 0.0)
    scores = jnp.where(visible[:, None, None], scores, -jnp.inf)
    weights = jax.nn.softmax(scores, axis=-1)  # every query sees itself: no empty row
    logs = jnp.moveaxis(jax.nn.logsumexp(scores, axis=-1), 3, 1) if lse else None
    return einsum("bkgts,bskh->btkgh", weights.astype(v.dtype), v[:, :end]), logs

  found = in_stages(one, blocks, block, qg)
  out, logs = jax.tree.map(lambda x: jnp.moveaxis(x, 0, 1).reshape(b, t + pad, n, -1)[:, :t], found)
  out = out.astype(q.dtype)
  return saved((out, logs[..., 0]) if lse else out)
