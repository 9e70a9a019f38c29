"""A mixture of experts: a router chooses a few of a layer's MLPs for each token."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int

from dms_jax.collectives import summed
from dms_jax.config import ModelConfig
from dms_jax.layers import ACTIVATIONS, biased, linear


def expert_mlp(config: ModelConfig, layer: dict, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
  """The chosen experts' outputs, weighted by the router's probabilities; summed over the devices that share them.

  No token is dropped, and no expert has a capacity: tokens are sorted by expert, and each expert's rows are multiplied
  by its weights (`jax.lax.ragged_dot`).

  Args:
    layer: `router` [E, D], and `gate_proj`, `up_proj` [E, F, D] and `down_proj` [E, D, F] of E experts; where the model
      has biases, `router_bias` [E], `gate_bias` and `up_bias` [E, F] and `down_bias` [E, D].
  """
  c, rows, each = config, x.reshape(-1, x.shape[-1]), config.experts_per_token
  logits = biased(linear(rows, layer["router"], out_dtype=jnp.float32), layer, "router_bias")
  weights, chosen = lax.top_k(jax.nn.softmax(logits, axis=-1), each)
  if c.norm_experts:
    weights = weights / jnp.sum(weights, axis=-1, keepdims=True)
  order = jnp.argsort(chosen.reshape(-1))  # places of (token, choice) pairs, sorted by expert
  sizes = jnp.bincount(chosen.reshape(-1), length=c.num_experts).astype(jnp.int32)
  sorted_rows = rows[order // each]

  def project(x: Array, name: str) -> Array:
    y = checkpoint_name(_products(x, layer[f"{name}_proj"], sizes), f"{name}_proj")
    bias = layer.get(f"{name}_bias")
    return y if bias is None else y + bias[chosen.reshape(-1)[order]].astype(y.dtype)

  out = _products(_hidden(c, project(sorted_rows, "gate"), project(sorted_rows, "up")), layer["down_proj"], sizes)
  # Back in the order of tokens; a scatter would add at random.
  out = out[jnp.argsort(order)].reshape(len(rows), each, -1)
  out = summed(jnp.sum(out.astype(jnp.float32) * weights[..., None], axis=1).astype(x.dtype))
  if "down_bias" in layer:  # of the whole sum: each device has it
    bias = layer["down_bias"][chosen].astype(jnp.float32)
    out = out + jnp.sum(bias * weights[..., None], axis=1).astype(x.dtype)
  return out.reshape(x.shape)


def _hidden(config: ModelConfig, gate: Float[Array, "rows F"], up: Float[Array, "rows F"]) -> Float[Array, "rows F"]:
  """Hidden units of experts: SwiGLU, clamped if the config says so."""
  if (limit := config.swiglu_limit) is None:
    return ACTIVATIONS[config.activation](gate) * up
  gate, up = jnp.minimum(gate, limit), jnp.clip(up, -limit, limit)
  return gate * jax.nn.sigmoid(config.swiglu_alpha * gate) * (up + 1)


def _products(
  x: Float[Array, "rows in"], weights: Float[Array, "E out in"], sizes: Int[Array, "E"]
) -> Float[Array, "rows out"]:
  """Each expert's rows, `sizes` of them in the order of experts, times its weights; float32 sums, in x's dtype."""
  precision = lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
  turned = jnp.swapaxes(weights, 1, 2)
  return lax.ragged_dot(x, turned, sizes, precision=precision, preferred_element_type=jnp.float32).astype(x.dtype)
