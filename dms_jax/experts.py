"""A mixture of experts: a router chooses a few of a layer's MLPs for each token.

Generation on a mesh gives each device along "tensor" whole experts, E / devices of them; where the devices do not
divide E, each has F / devices hidden units of every expert (`sharding.DECODING`). Both need one sum over devices and
hold the same bytes. They differ in:

- The weights of the experts that a decode step chooses. Split, each device reads its share; whole, the busiest device
  reads more, if few tokens decode together. GiB a step in all layers, bfloat16, random routing, four devices, whole and
  split (`experiments.mesh_memory` counts them; a kernel that reads other experts too reads the same both ways):

      tokens decoded    Qwen3-30B-A3B    Mixtral 8x7B    gpt-oss-120b
      1                  1.5    0.8      11.8     5.3     3.6     1.7
      8                  6.6    5.4      21.0    19.0    16.0    12.0
      32                12.6   11.8      21.0    21.0    38.7    34.1
      128               13.5   13.5      21.0    21.0    53.4    52.5

- Temporaries. XLA's `ragged_dot` on a CPU reads all experts of a device and repeats the rows for each: of a chunk of
  1,024 tokens, whole experts need 3.3 times less for Qwen3-30B-A3B on 4 devices, 2.7 times less for gpt-oss-120b on 8.
  For a TPU XLA copies all experts of a device before each product. There the hidden units of a chunk are
  larger with whole experts: rows of other devices' experts have F channels, too (Mixtral on 8 devices, v5e: 8 times).
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int

from dms_jax.collectives import first_own, joined, own_rows, parted
from dms_jax.config import ModelConfig
from dms_jax.layers import ACTIVATIONS, biased, linear


def expert_mlp(config: ModelConfig, layer: dict, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
  """The chosen experts' outputs, weighted by the router's probabilities; summed over the devices that share them.

  No token is dropped, and no expert has a capacity: tokens are sorted by expert, and each expert's rows are multiplied
  by its weights (`jax.lax.ragged_dot`).

  On a mesh every device has the same tokens and router; where each has rows of its own, these are gathered first
  (`collectives.joined`). A device that holds some of the experts computes the rows of these alone; the sum over devices
  adds the others' rows.

  Args:
    layer: `router` [E, D], and `gate_proj`, `up_proj` [E, F, D] and `down_proj` [E, D, F] of E experts; where the model
      has biases, `router_bias` [E], `gate_bias` and `up_bias` [E, F] and `down_bias` [E, D]. All but the router's may
      be this device's: E / devices experts, or F / devices hidden units of each (`sharding.DECODING`).
  """
  c, rows, each = config, joined(x).reshape(-1, x.shape[-1]), config.experts_per_token
  logits = biased(linear(rows, layer["router"], out_dtype=jnp.float32), layer, "router_bias")
  weights, chosen = lax.top_k(jax.nn.softmax(logits, axis=-1), each)
  if c.norm_experts:
    weights = weights / jnp.sum(weights, axis=-1, keepdims=True)
  own = len(layer["up_proj"])  # experts of this device, numbered from 0; the others' follow
  expert = (chosen.reshape(-1) - first_own(own, c.num_experts)) % c.num_experts
  order = jnp.argsort(expert)  # places of (token, choice) pairs, sorted by expert
  sizes = jnp.bincount(expert, length=c.num_experts)[:own].astype(jnp.int32)
  sorted_rows, mine = rows[order // each], expert < own

  def project(x: Array, name: str) -> Array:
    y = checkpoint_name(_products(x, layer[f"{name}_proj"], sizes), f"{name}_proj")
    bias = layer.get(f"{name}_bias")
    return y if bias is None else y + bias[expert[order]].astype(y.dtype)

  def weighted(x: Array) -> Array:
    """Sums over a token's choices [B T, D], of [B T each, D]; 0 for other devices' experts, whatever stands there."""
    x = x if own == c.num_experts else jnp.where(mine[:, None], x, 0)
    x = x.reshape(len(rows), each, -1).astype(jnp.float32)
    return jnp.sum(x * weights[..., None], axis=1).astype(rows.dtype)

  out = _products(_hidden(c, project(sorted_rows, "gate"), project(sorted_rows, "up")), layer["down_proj"], sizes)
  out = weighted(out[jnp.argsort(order)])  # back in the order of tokens; a scatter would add at random
  bias = weighted(layer["down_bias"][expert]) if "down_bias" in layer else None
  if bias is not None and own < c.num_experts:
    return parted(out + bias).reshape(x.shape)
  out = parted(out)  # of hidden units: each device has the biases of the whole sum
  return (out if bias is None else out + own_rows(bias)).reshape(x.shape)


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
