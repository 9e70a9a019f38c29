"""A Llama, Qwen2 or Qwen3 decoder with gates in PyTorch, float32.

Mirrors dms_jax/{decoder, layers, model}.py. Source of gates and masks: arXiv 2506.05345, section 3.1.

Weights are a flat dictionary under Hugging Face's names: the safetensors files of a checkpoint are all it takes.
Low-rank updates are `NAME.lora_A.weight` [R, in] and `NAME.lora_B.weight` [out, R] beside `NAME.weight`: its
projection becomes W + lora_scale * B A.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from experiments.torch_reference.attention import additive_mask, attend, hard_outside, soft_outside
from experiments.torch_reference.gates import DMSConfig, clear_neuron, gate_logits, of_each_head

Weights = dict[str, Tensor]


@dataclasses.dataclass(frozen=True)
class ModelConfig:
  """Architecture; the names are those of `dms_jax.ModelConfig`.

  Attributes:
    num_layers, num_heads, num_kv_heads, head_dim: L, N, K and H.
    rope_theta, rope_scaling: base of RoPE's frequencies, and Llama 3.1's change of them as in config.json.
    rms_norm_eps: added to the mean square in a norm.
    eos_token_ids: ends of text, whose divergence does not count in training.
    lora_scale: factor of low-rank updates.
  """

  num_layers: int
  num_heads: int
  num_kv_heads: int
  head_dim: int
  rope_theta: float = 10000.0
  rope_scaling: dict | None = None
  rms_norm_eps: float = 1e-6
  eos_token_ids: tuple[int, ...] = ()
  lora_scale: float = 2.0

  @classmethod
  def from_hf(cls, values: dict) -> ModelConfig:
    """From the content of config.json, in the spelling of transformers 4 or 5.

    Raises:
      ValueError: the model is of another family, or its RoPE is scaled in another way than Llama 3.1's.
    """
    rope = {"rope_theta": values.get("rope_theta", 10000.0)} | (values.get("rope_parameters") or {})
    scaling = values.get("rope_scaling") or rope
    kind, scaled = values.get("model_type"), scaling.get("rope_type", "default")
    if kind not in ("llama", "qwen2", "qwen3") or scaled not in ("default", "llama3"):
      raise ValueError(
        f"config.json: model_type={kind!r}, rope_type={scaled!r}: not a Llama, Qwen2 or Qwen3 as they are"
      )
    eos = values.get("eos_token_id")
    return cls(
      num_layers=values["num_hidden_layers"],
      num_heads=values["num_attention_heads"],
      num_kv_heads=values.get("num_key_value_heads", values["num_attention_heads"]),
      head_dim=values.get("head_dim") or values["hidden_size"] // values["num_attention_heads"],
      rope_theta=rope["rope_theta"],
      rope_scaling=scaling if scaled == "llama3" else None,
      rms_norm_eps=values.get("rms_norm_eps", 1e-6),
      eos_token_ids=() if eos is None else (eos,) if isinstance(eos, int) else tuple(eos),
    )


def forward(
  weights: Weights,
  config: ModelConfig,
  dms: DMSConfig | None,
  tokens: Tensor,
  *,
  segments: Tensor | None = None,
  noise: Tensor | None = None,
  tau: float = 0.1,
  evict: bool = True,
  threshold: float = 0.0,
  neuron_kept: float = 0.0,
) -> tuple[Tensor, Tensor | None]:
  """Runs whole texts [B, T] without a cache: the mask is the formula that every cache has to reproduce.

  Args:
    dms: None for a model without gates.
    segments: [B, T], ids of documents in contiguous runs, 0 for padding; positions count from 0 in each.
    noise: float32 [L, B, K, T], logistic; the mask is soft with it, hard without.
    evict: False keeps all keys visible; the neuron gate's channel is cleared all the same.
    threshold: of hard decisions.

  Returns:
    (logits [B, T, V], z). z [L, B, K, T] are the gate logits, or (logits + noise) / tau with noise; None without gates.
  """
  found = []

  def attention(layer: int, q: Tensor, k: Tensor, v: Tensor, logits: Tensor | None) -> Tensor:
    z, outside = logits, torch.zeros_like(k[..., 0])
    if dms is not None and evict and noise is not None:
      z = (logits + of_each_head(dms, noise[layer])) / tau
      outside = soft_outside(z, dms.shift)
    elif dms is not None and evict:
      outside = hard_outside(logits > threshold, dms.shift)
    found.append(z)
    return attend(q, k, v, additive_mask(outside, 0 if dms is None else dms.window, segments))

  logits = run_layers(weights, config, dms, tokens, positions_of(tokens, segments), attention, neuron_kept)
  return logits, None if dms is None else torch.stack(found)


def run_layers(
  weights: Weights,
  config: ModelConfig,
  dms: DMSConfig | None,
  tokens: Tensor,
  positions: Tensor,
  attention: Callable[[int, Tensor, Tensor, Tensor, Tensor | None], Tensor],
  neuron_kept: float = 0.0,
) -> Tensor:
  """The decoder around `attention(layer, q, k, v, gate logits)`; returns logits [B, T, V].

  Args:
    tokens, positions: [B, T].
    attention: gets q [B, N, T, H], k and v [B, K, T, H] after RoPE, and gate logits [B, K, T] or None; returns
      [B, N, T, H].
  """
  norm = lambda y, weight: F.rms_norm(y, y.shape[-1:], weight, config.rms_norm_eps)
  rope = rope_tables(config, positions)
  x = F.embedding(tokens, weights["model.embed_tokens.weight"])
  for index in range(config.num_layers):
    layer = layer_weights(weights, index)
    linear = lambda y, name, layer=layer: project(y, layer, name, config.lora_scale)
    split = lambda y: y.unflatten(-1, (-1, config.head_dim)).transpose(1, 2)  # [B, T, heads H] -> [B, heads, T, H]

    h = norm(x, layer["input_layernorm.weight"])
    q, k, v = (split(linear(h, f"self_attn.{name}_proj")) for name in "qkv")
    if "self_attn.q_norm.weight" in layer:  # Qwen3
      q, k = norm(q, layer["self_attn.q_norm.weight"]), norm(k, layer["self_attn.k_norm.weight"])
    logits = None if dms is None else gate_logits(dms, layer, x, q, config.num_kv_heads, config.rms_norm_eps)
    borrowed = dms is not None and dms.gate == "neuron"
    if borrowed:
      q = clear_neuron(q, config.num_kv_heads, neuron_kept)
    q, k = rotate(q, rope), rotate(k, rope)
    if borrowed:  # the rotation has mixed its pair's other channel into it
      q = clear_neuron(q, config.num_kv_heads, neuron_kept)
    x = x + linear(attention(index, q, k, v, logits).transpose(1, 2).flatten(2), "self_attn.o_proj")

    h = norm(x, layer["post_attention_layernorm.weight"])
    x = x + linear(F.silu(linear(h, "mlp.gate_proj")) * linear(h, "mlp.up_proj"), "mlp.down_proj")
  head = weights.get("lm_head.weight", weights["model.embed_tokens.weight"])  # the embedding where they are tied
  return F.linear(norm(x, weights["model.norm.weight"]), head)


def layer_weights(weights: Weights, index: int) -> Weights:
  """The weights of one layer, their names without `model.layers.INDEX.`"""
  prefix = f"model.layers.{index}."
  return {name.removeprefix(prefix): value for name, value in weights.items() if name.startswith(prefix)}


def project(x: Tensor, layer: Weights, name: str, lora_scale: float) -> Tensor:
  """x W^T, plus the bias and the low-rank update where the layer has them."""
  y = F.linear(x, layer[f"{name}.weight"], layer.get(f"{name}.bias"))
  if f"{name}.lora_A.weight" in layer:
    y = y + lora_scale * F.linear(F.linear(x, layer[f"{name}.lora_A.weight"]), layer[f"{name}.lora_B.weight"])
  return y


def positions_of(tokens: Tensor, segments: Tensor | None) -> Tensor:
  """Positions [B, T] that count from 0 at the start of each run of equal ids."""
  index = torch.arange(tokens.shape[1], device=tokens.device).expand_as(tokens)
  if segments is None:
    return index
  starts = torch.ones_like(segments, dtype=torch.bool)
  starts[:, 1:] = segments[:, 1:] != segments[:, :-1]
  return index - torch.where(starts, index, 0).cummax(dim=1).values


def rope_tables(config: ModelConfig, positions: Tensor) -> tuple[Tensor, Tensor]:
  """(cos, sin) of RoPE, float32 [B, 1, T, H/2], with Llama 3.1's scaling if configured."""
  half = torch.arange(0, config.head_dim, 2, device=positions.device, dtype=torch.float32) / config.head_dim
  frequency = 1.0 / config.rope_theta**half
  if (s := config.rope_scaling) is not None:
    turns = s["original_max_position_embeddings"] * frequency / (2 * math.pi)  # within the original context
    low, high = s["low_freq_factor"], s["high_freq_factor"]
    smooth = ((turns - low) / (high - low)).clamp(0.0, 1.0)  # 0 for slow channels, 1 for fast ones
    frequency = (1.0 - smooth) * frequency / s["factor"] + smooth * frequency
  angle = positions[:, None, :, None].float() * frequency
  return angle.cos(), angle.sin()


def rotate(x: Tensor, tables: tuple[Tensor, Tensor]) -> Tensor:
  """RoPE on [B, heads, T, H]: channels c and c + H/2 are a pair (Hugging Face's half-split convention)."""
  (cos, sin), (a, b) = tables, x.chunk(2, dim=-1)
  return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)
