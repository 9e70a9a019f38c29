"""Gemma 3 without images: five sliding layers for each global one, norms on both sides of a part.

Left out: the models that read images (model_type "gemma3"), and attention in both directions.
"""

from __future__ import annotations

from typing import Any

from dms_jax.config import ModelConfig
from dms_jax.families.base import GGUF, Family, pattern, read_sliding, register, size, sliding_theta, write_sliding
from dms_jax.json_files import is_number, shown

PERIOD = 6  # every sixth layer sees the whole text


def read_layers(values: dict[str, Any], period: int) -> dict[str, Any]:
  """Fields that Gemma's generations share, from config.json: sliding layers and the scales that its sizes give.

  Args:
    period: that of the layers where the file says nothing of it.

  Raises:
    ValueError: a value is malformed or not supported.
  """
  fields, scalar = read_sliding(values, period), values.get("query_pre_attn_scalar", 256)
  if not is_number(scalar) or scalar <= 0:
    raise ValueError(f"query_pre_attn_scalar should be a positive number, found {shown(scalar)}")
  if values.get("use_bidirectional_attention"):
    raise ValueError("use_bidirectional_attention=true: not supported")
  return {"embed_scale": values["hidden_size"] ** 0.5, "attention_scale": scalar**-0.5, **fields}


def write_layers(config: ModelConfig) -> dict[str, Any]:
  """The inverse of `read_layers`."""
  assert config.attention_scale is not None
  return {**write_sliding(config), "query_pre_attn_scalar": round(config.attention_scale**-2)}


def read_gguf(values: dict[str, Any], large: int) -> dict[str, Any]:
  """`query_pre_attn_scalar`, which GGUF files of Gemma leave out: by llama.cpp, the size of a head.

  Args:
    large: number of layers of the one size in which it is the residual stream's share of a head.
  """
  is_large = values["num_hidden_layers"] == large
  share = values["hidden_size"] // values["num_attention_heads"]
  return {"query_pre_attn_scalar": share if is_large else values["head_dim"]}


def _read_gguf(values: dict[str, Any]) -> dict[str, Any]:
  whole = {} if values.get("sliding_window") else {"layer_types": ["full_attention"] * values["num_hidden_layers"]}
  return {**read_gguf(values, 62), **whole}


def _read(values: dict[str, Any]) -> dict[str, Any]:
  theta, fields = sliding_theta(values, "rope_local_base_freq", 10000.0), read_layers(values, PERIOD)
  return fields | ({"local_rope_theta": theta} if "sliding_layers" in fields else {})


def _write(config: ModelConfig) -> dict[str, Any]:
  return {**write_layers(config), "rope_local_base_freq": config.local_rope_theta or 10000.0}


def _preset(layers: int, d_model: int, d_ff: int, heads: int, kv_heads: int) -> dict[str, Any]:
  return size(
    layers, d_model, d_ff, heads, kv_heads, 256, vocab_size=262144, max_position_embeddings=32768, rope_theta=1e6,
    local_rope_theta=1e4, rms_norm_eps=1e-6, tie_embeddings=True, sliding_window=512,
    sliding_layers=pattern(layers, PERIOD), embed_scale=d_model**0.5, attention_scale=1 / 16, eos_token_ids=(1, 106),
  )  # fmt: skip


GEMMA3 = register(
  Family(
    name="gemma3_text",
    architecture="Gemma3ForCausalLM",
    defaults={
      "max_position_embeddings": 131072,
      "vocab_size": 262208,
      "hidden_size": 2304,
      "num_key_value_heads": 4,
      "head_dim": 256,
      "rope_theta": 1e6,
      "sliding_window": 4096,
      "tie_word_embeddings": True,
    },
    own_keys={"attention_bias": False},
    fixed={"norms": "both", "norm_plus_one": True, "activation": "gelu_tanh", "qk_norm": True},
    read=_read,
    write=_write,
    slides=True,
    renamed={"hidden_act": "hidden_activation"},
    rope_types=("default", "linear"),
    gguf=GGUF(
      "gemma3",
      keys={"attention.sliding_window": "sliding_window", "rope.freq_base_swa": "rope_local_base_freq"},
      unwritten=_read_gguf,
    ),
    presets={"gemma-3-270m": _preset(18, 640, 2048, 4, 1), "gemma-3-1b": _preset(26, 1152, 6912, 4, 1)},
  )
)
