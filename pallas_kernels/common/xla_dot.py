"""The matrix product of the XLA implementations."""

from __future__ import annotations

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
