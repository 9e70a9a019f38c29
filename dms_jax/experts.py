"""A mixture of experts: a router chooses a few of a layer's MLPs for each token."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int

from dms_jax.config import ModelConfig
from dms_jax.layers import ACTIVATIONS, linear


def expert_mlp(config: ModelConfig, layer: dict, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
  """The chosen experts' SwiGLU outputs, weighted by the router's probabilities.

  No token is dropped, and no expert has a capacity: tokens are sorted by expert, and each expert's rows are multiplied
  by its weights (`jax.lax.ragged_dot`).

  Args:
    layer: `router` [E, D], and `gate_proj`, `up_proj` [E, F, D] and `down_proj` [E, D, F] of E experts.
  """
  c, rows, each = config, x.reshape(-1, x.shape[-1]), config.experts_per_token
  weights, chosen = lax.top_k(jax.nn.softmax(linear(rows, layer["router"], out_dtype=jnp.float32), axis=-1), each)
  if c.norm_experts:
    weights = weights / jnp.sum(weights, axis=-1, keepdims=True)
  order = jnp.argsort(chosen.reshape(-1))  # places of (token, choice) pairs, sorted by expert
  sizes = jnp.bincount(chosen.reshape(-1), length=c.num_experts).astype(jnp.int32)
  sorted_rows = rows[order // each]
  gate = checkpoint_name(_products(sorted_rows, layer["gate_proj"], sizes), "gate_proj")
  up = checkpoint_name(_products(sorted_rows, layer["up_proj"], sizes), "up_proj")
  out = _products(ACTIVATIONS[c.activation](gate) * up, layer["down_proj"], sizes)
  # Back in the order of tokens; a scatter would add at random.
  out = out[jnp.argsort(order)].reshape(len(rows), each, -1)
  return jnp.sum(out.astype(jnp.float32) * weights[..., None], axis=1).astype(x.dtype).reshape(x.shape)


def _products(
  x: Float[Array, "rows in"], weights: Float[Array, "E out in"], sizes: Int[Array, "E"]
) -> Float[Array, "rows out"]:
  """Each expert's rows, `sizes` of them in the order of experts, times its weights; float32 sums, in x's dtype."""
  precision = lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
  turned = jnp.swapaxes(weights, 1, 2)
  return lax.ragged_dot(x, turned, sizes, precision=precision, preferred_element_type=jnp.float32).astype(x.dtype)
