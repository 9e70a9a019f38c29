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
from pallas_kernels.common.platform import platform


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
    norm, weight = (layer[name].astype(jnp.float32) for name in ("dms_norm", "dms_proj"))
    if x.shape[1] == 1 and platform() == "gpu":
      raw = _adapter_in_one_pass(x, norm * weight, config.rms_norm_eps)
    else:
      normed = rms_norm(x.astype(jnp.float32), norm, config.rms_norm_eps)
      raw = jnp.einsum("btd,kd->bkt", normed, weight, precision=jax.lax.Precision.HIGHEST)
  return _logits(dms, raw)


def step_gate_logits(
  config: ModelConfig, dms: DMSConfig, layers: list[dict], x: Float[Array, "L B 1 D"]
) -> Float[Array, "L B K 1"]:
  """`gate_logits` of the adapters of all layers in a decode step; on a GPU one kernel instead of one a layer."""
  norm, weight = (jnp.stack([layer[n] for layer in layers]).astype(jnp.float32) for n in ("dms_norm", "dms_proj"))
  return _logits(dms, _adapter_in_one_pass(x, norm[:, None] * weight, config.rms_norm_eps))


def _logits(dms: DMSConfig, raw: Float[Array, "*L B K T"]) -> Float[Array, "*L B K T"]:
  if dms.granularity == "layer":
    raw = jnp.broadcast_to(raw[..., :1, :], raw.shape)
  return dms.scale * raw - dms.offset


def _adapter_in_one_pass(
  x: Float[Array, "*L B 1 D"], weight: Float[Array, "*L K D"], eps: float
) -> Float[Array, "*L B K 1"]:
  """RMSNorm and projection in float32 as one reduction, of the product and of the squares: one small kernel of a GPU
  instead of three."""
  x, weight = jnp.broadcast_arrays(x.astype(jnp.float32), weight[..., None, :, :])
  zeros, add = (jnp.float32(0), jnp.float32(0)), lambda a, b: (a[0] + b[0], a[1] + b[1])
  product, square = jax.lax.reduce((x * weight, x * x), zeros, add, (x.ndim - 1,))
  return (product * jax.lax.rsqrt(square / x.shape[-1] + eps))[..., None]


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
