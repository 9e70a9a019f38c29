"""Eviction gates in PyTorch: both gates, offset, shift and granularity.

Mirrors dms_jax/gates.py. Source: arXiv 2506.05345, section 3.1 (equation 1) and appendix C; the scale of 100 and
the shift are the released code's. A gate gives one logit per KV head and token:

    logit = scale * raw - offset,    a token is evicted where logit > threshold

    neuron:  raw = the last channel of the first query head of the KV head's group, after q_norm, before RoPE
    adapter: raw = Linear(RMSNorm(x)), x the residual stream before the attention's norm; the projection starts at 0

Logits are float32 whatever the model's dtype: at a scale of 100, rounding to bfloat16 would flip decisions.
"""

from __future__ import annotations

import dataclasses

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclasses.dataclass(frozen=True)
class DMSConfig:
  """Settings of the gates; names, meaning and defaults of `dms_jax.DMSConfig`.

  Attributes:
    gate: "adapter" or "neuron".
    window: W, tokens to which an evicted token stays visible.
    shift: the decision computed at token t is about token t - shift; 1 or 0.
    granularity: "head", or "layer": the logit of KV head 0, and in training its noise, decides for all heads.
  """

  gate: str = "adapter"
  window: int = 256
  scale: float = 100.0
  offset: float = 5.0
  shift: int = 1
  granularity: str = "head"

  def __post_init__(self):
    if self.gate not in ("adapter", "neuron") or self.granularity not in ("head", "layer") or self.shift not in (0, 1):
      raise ValueError(f"{self}: gate is 'adapter' or 'neuron', granularity 'head' or 'layer', shift 0 or 1")


def gate_logits(dms: DMSConfig, layer: dict[str, Tensor], x: Tensor, q: Tensor, heads: int, eps: float) -> Tensor:
  """Gate logits of one layer, float32 [B, K, T], indexed by the token that computes them.

  Args:
    layer: the layer's weights; the adapter reads `self_attn.dms_proj_alpha{,_norm}.weight`, [K, D] and [D].
    x: [B, T, D], the residual stream before the attention's norm.
    q: [B, N, T, H], queries after q_norm and before RoPE.
    heads: K.
    eps: the model's RMSNorm epsilon.
  """
  if dms.gate == "neuron":
    raw = q[:, :: q.shape[1] // heads, :, -1].float()
  else:
    normed = F.rms_norm(x.float(), x.shape[-1:], layer["self_attn.dms_proj_alpha_norm.weight"].float(), eps)
    raw = F.linear(normed, layer["self_attn.dms_proj_alpha.weight"].float()).transpose(1, 2)
  return dms.scale * of_each_head(dms, raw) - dms.offset


def of_each_head(dms: DMSConfig, y: Tensor) -> Tensor:
  """Values [..., K, T] by the granularity: each head's own, or KV head 0's for all."""
  return y[..., :1, :].expand_as(y) if dms.granularity == "layer" else y


def clear_neuron(q: Tensor, heads: int, kept: float = 0.0) -> Tensor:
  """Queries [B, N, T, H] without the channel that the neuron gate borrows; called before and again after RoPE.

  The channel is cleared always, with eviction off too. `kept` multiplies it while a retrofit fades it out (phase 1 of
  appendix C).
  """
  factor = torch.ones_like(q[:1, :, :1])
  factor[:, :: q.shape[1] // heads, :, -1] = kept
  return q * factor


def about_key(computed: Tensor, shift: int, fill: float | bool) -> Tensor:
  """Values [..., T] by the token that computed them -> by the token they are about; the last `shift` get `fill`."""
  if shift == 0:
    return computed
  return torch.cat([computed[..., shift:], torch.full_like(computed[..., :shift], fill)], dim=-1)
