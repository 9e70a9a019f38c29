"""The matrix product of the XLA implementations."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float


def einsum(subscripts: str, a: Float[Array, "..."], b: Float[Array, "..."], *, exact: bool = False) -> Array:
  """`jnp.einsum` of two arrays of one dtype, summed and returned in float32.

  Args:
    exact: full float32 precision for float32 operands where a device would round them first.
  """
  if a.dtype == jnp.bfloat16 and jax.default_backend() == "cpu":
    # XLA's CPU backend before jax 0.11 fails at run time on some batched bfloat16 products, and where it does not it
    # converts to float32 itself.
    a, b = a.astype(jnp.float32), b.astype(jnp.float32)
  precision = lax.Precision.HIGHEST if exact and a.dtype == jnp.float32 else None
  return jnp.einsum(subscripts, a, b, preferred_element_type=jnp.float32, precision=precision)
