"""The matrix product, the soft-capping and the attention sinks of the XLA implementations."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from pallas_kernels.common.platform import platform


def einsum(subscripts: str, a: Float[Array, "..."], b: Float[Array, "..."]) -> Array:
  """`jnp.einsum` of two arrays of one dtype, summed and returned in float32; float32 operands are not rounded first."""
  if a.dtype == jnp.bfloat16 and platform() == "cpu":
    # XLA's CPU backend before jax 0.11 fails at run time on some batched bfloat16 products, and converts the others to
    # float32 itself.
    a, b = a.astype(jnp.float32), b.astype(jnp.float32)
  precision = lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
  return jnp.einsum(subscripts, a, b, preferred_element_type=jnp.float32, precision=precision)


def soft_capped(scores, softcap: float | None):
  """Scores within -softcap .. softcap: softcap tanh(scores / softcap); None leaves them."""
  return scores if softcap is None else softcap * jnp.tanh(scores / softcap)


def no_scores(sinks, shape: tuple[int, int, int]) -> tuple[Array, Array]:
  """(maximum, sum of exponentials over it) of a softmax that has seen no score, float32 [B, K, G] = `shape`.

  Args:
    sinks: logits of query heads [K * G], each of which is in its head's sum from the start; None without.
  """
  if sinks is None:
    return jnp.full(shape, -jnp.inf), jnp.zeros(shape)
  return jnp.broadcast_to(sinks.astype(jnp.float32).reshape(shape[1:]), shape), jnp.ones(shape)


def softmax(scores: Float[Array, "B K G T S"], sinks) -> Float[Array, "B K G T S"]:
  """Of each query's scores, some of which are finite, over their sum and its head's sink's; see `no_scores`."""
  if sinks is None:
    return jax.nn.softmax(scores, axis=-1)
  sink = sinks.astype(jnp.float32).reshape(*scores.shape[1:3], 1, 1)
  top = lax.stop_gradient(jnp.maximum(scores.max(axis=-1, keepdims=True), sink))
  weights = jnp.exp(scores - top)
  return weights / (weights.sum(axis=-1, keepdims=True) + jnp.exp(sink - top))
