"""Retention-gated attention of TRIM-KV: a key's score gains log beta (< 0) with every later token.

Source: arXiv 2512.03324. Attention is the library's, with a bias that grows with a key's age.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from dms_jax.attention import window_bias_attention
from pallas_kernels.window_bias import xla


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
  return window_bias_attention(q, k, v, log_beta, 0, segment_ids, by_age=True)


def soft_sizes(log_beta: Float[Array, "B K T"], segment_ids: Int[Array, "B T"] | None = None) -> Float[Array, "B K T"]:
  """The sum over i <= t of beta_i^(t - i), over the tokens of the same document: a soft cache size.

  The terms of one block of queries exist at a time, and the backward pass computes them again.
  """
  t = log_beta.shape[-1]
  block = min(xla.BLOCK, t)
  blocks = -(-t // block)
  padded = jnp.pad(log_beta, ((0, 0), (0, 0), (0, blocks * block - t)))
  ids = None if segment_ids is None else jnp.pad(segment_ids, ((0, 0), (0, blocks * block - t)))

  def one(number, end):
    """Sizes [B, K, block] at the queries of block `number`, whose keys are among the first `end`."""
    age = number * block + jnp.arange(block)[:, None] - jnp.arange(end)
    visible = (age >= 0)[None, None]
    if ids is not None:
      mine = jax.lax.dynamic_slice_in_dim(ids, number * block, block, axis=1)
      visible = visible & (mine[:, :, None] == ids[:, None, :end])[:, None]
    kept = jnp.exp(jnp.maximum(age, 0).astype(jnp.float32) * padded[:, :, None, :end])
    return jnp.sum(jnp.where(visible, kept, 0.0), axis=-1)

  sizes = xla.in_stages(one, blocks, block)
  return jnp.moveaxis(sizes, 0, 2).reshape(*log_beta.shape[:2], -1)[..., :t]
