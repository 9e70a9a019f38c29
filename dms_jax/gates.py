"""Eviction gates: one logit per KV head and token, about the token `shift` places before.

Source: arXiv 2506.05345; the scale of 100 is the released code's. Logits are always computed in float32: at a scale of
100, bfloat16 rounding would flip decisions. `DMSConfig.objective` says what another method's gates mean.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from dms_jax.config import DMSConfig, ModelConfig
from dms_jax.layers import rms_norm

# Of an MLP gate's hidden layer, by objective: TRIM-KV takes the model's, KVzap's is GELU.
ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
  "dms": jax.nn.silu,
  "trimkv": jax.nn.silu,
  "dmc": jax.nn.silu,
  "kvzap": partial(jax.nn.gelu, approximate=False),
}


def convention(dms: DMSConfig) -> dict[str, str]:
  """What the numbers of `dms` mean, as checkpoints state it: a reader that means something else would evict others."""
  meaning = {"logit": "scale * raw - offset", "about": "token t - shift, by token t"}
  if dms.gate == "neuron":
    meaning["raw"] = "last channel of the first query head of a group, after its norm and before RoPE; then 0"
  if dms.objective == "dms":
    meaning |= {"evicted": "logit > threshold", "visible": "j <= i and (i - j <= window or not evicted[j])"}
  return meaning


def gate_logits(
  config: ModelConfig,
  dms: DMSConfig,
  layer: dict,
  x: Float[Array, "B T D"],
  q: Float[Array, "B T N H"],
  *,
  fused: bool = False,
) -> Float[Array, "B K T"]:
  """Gate logits of one layer, `scale * raw - offset`, float32; 2 K a token for the objective "dmc".

  Args:
    layer: the layer's parameters; the adapter gate reads `dms_norm` [D] and `dms_proj` [K, D], a linear gate also
      `dms_bias` [K], and an MLP `dms_fc` [E, D], `dms_fc_bias` [E], `dms_proj` [K, E] and `dms_bias`.
    x: the residual stream before the attention's norm.
    q: queries after q_norm and before RoPE, float32 for the neuron gate.
    fused: computes norm and projection in one reduction, for T = 1 (`Execution.fused_gate`).
  """
  if dms.gate == "neuron":
    raw = jnp.moveaxis(q[:, :, :: config.group_size, -1].astype(jnp.float32), 1, 2)
  else:
    norm, weight = (layer[name].astype(jnp.float32) for name in ("dms_norm", "dms_proj"))
    if fused and dms.gate == "adapter":
      raw = _fused_adapter(x, norm * weight, config.rms_norm_eps)
    else:
      inputs = rms_norm(x.astype(jnp.float32), norm, config.rms_norm_eps)
      if dms.gate == "mlp":
        fc, bias = (layer[name].astype(jnp.float32) for name in ("dms_fc", "dms_fc_bias"))
        hidden = jnp.einsum("btd,ed->bte", inputs, fc, precision=jax.lax.Precision.HIGHEST) + bias
        inputs = ACTIVATIONS[dms.objective](hidden)
      raw = jnp.einsum("btd,kd->bkt", inputs, weight, precision=jax.lax.Precision.HIGHEST)
      if dms.gate != "adapter":
        raw = raw + layer["dms_bias"].astype(jnp.float32)[:, None]
  return _logits(dms, raw)


def step_gate_logits(
  config: ModelConfig, dms: DMSConfig, layers: list[dict], x: Float[Array, "L B 1 D"]
) -> Float[Array, "L B K 1"]:
  """`gate_logits` of all layers' adapters in a decode step, from each layer's x: see `Execution.late_gates`."""
  norm, weight = (jnp.stack([layer[n] for layer in layers]).astype(jnp.float32) for n in ("dms_norm", "dms_proj"))
  return _logits(dms, _fused_adapter(x, norm[:, None] * weight, config.rms_norm_eps))


def _logits(dms: DMSConfig, raw: Float[Array, "*L B K T"]) -> Float[Array, "*L B K T"]:
  if dms.granularity == "layer":
    raw = jnp.broadcast_to(raw[..., :1, :], raw.shape)
  return dms.scale * raw - dms.offset


def _fused_adapter(x: Float[Array, "*L B 1 D"], weight: Float[Array, "*L K D"], eps: float) -> Float[Array, "*L B K 1"]:
  """RMSNorm and projection in float32 by one reduction over D, which sums the products and the squares."""
  x, weight = jnp.broadcast_arrays(x.astype(jnp.float32), weight[..., None, :, :])
  zeros, add = (jnp.float32(0), jnp.float32(0)), lambda a, b: (a[0] + b[0], a[1] + b[1])
  product, square = jax.lax.reduce((x * weight, x * x), zeros, add, (x.ndim - 1,))
  return (product * jax.lax.rsqrt(square / x.shape[-1] + eps))[..., None]


def clear_neuron(
  config: ModelConfig, q: Float[Array, "B T N H"], kept: Float[Array, ""] | None = None
) -> Float[Array, "B T N H"]:
  """Sets the neuron gate's channel to 0, the last of each group's first query head; called before and after RoPE.

  Args:
    kept: factor in 0 .. 1 that multiplies the channel while a retrofit fades it out; None means 0.
  """
  heads = jnp.arange(config.num_heads) % config.group_size == 0
  channel = jnp.arange(config.head_dim) == config.head_dim - 1
  rest = jnp.zeros((), q.dtype) if kept is None else q * kept.astype(q.dtype)
  return jnp.where(heads[:, None] & channel, rest, q)
