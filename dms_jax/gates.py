"""Eviction gates: one logit per KV head and token, about the token `shift` places before.

Source: arXiv 2506.05345, section 3.1 and appendix C; the scale of 100 is the released code's. The logits are computed
in float32 always: at scale 100 a bfloat16 rounding would flip decisions.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from dms_jax.config import DMSConfig, ModelConfig
from dms_jax.layers import rms_norm


def gate_logits(
  config: ModelConfig, dms: DMSConfig, layer: dict, x: Float[Array, "B T D"], q: Float[Array, "B T N H"]
) -> Float[Array, "B K T"]:
  """`scale * raw - offset` in float32.

  Args:
    layer: the layer's parameters; the adapter reads `dms_norm` [D] and `dms_proj` [K, D].
    x: the residual stream before the layer's input norm.
    q: queries after q_norm and before RoPE, in float32 for the neuron gate.
  """
  if dms.gate == "neuron":
    raw = jnp.moveaxis(q[:, :, :: config.group_size, -1].astype(jnp.float32), 1, 2)
  else:
    normed = rms_norm(x.astype(jnp.float32), layer["dms_norm"].astype(jnp.float32), config.rms_norm_eps)
    weight = layer["dms_proj"].astype(jnp.float32)
    raw = jnp.einsum("btd,kd->bkt", normed, weight, precision=jax.lax.Precision.HIGHEST)
  if dms.granularity == "layer":
    raw = jnp.broadcast_to(raw[:, :1], raw.shape)
  return dms.scale * raw - dms.offset


def clear_neuron(
  config: ModelConfig, q: Float[Array, "B T N H"], kept: Float[Array, ""] | None = None
) -> Float[Array, "B T N H"]:
  """Sets the borrowed channel (last of each group's first query head) to 0; done before and again after RoPE.

  Args:
    kept: while a retrofit fades it out, the factor it is multiplied by instead.
  """
  heads = jnp.arange(config.num_heads) % config.group_size == 0
  channel = jnp.arange(config.head_dim) == config.head_dim - 1
  rest = jnp.zeros((), q.dtype) if kept is None else q * kept.astype(q.dtype)
  return jnp.where(heads[:, None] & channel, rest, q)
