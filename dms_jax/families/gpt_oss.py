"""gpt-oss: attention sinks, every other layer slides, experts with biases and a clamped SwiGLU.

Its public files hold the experts in MXFP4, which is widened as they are read.
"""

from __future__ import annotations

from typing import Any

from dms_jax.config import ModelConfig, RopeScaling
from dms_jax.families.base import (
  GGUF,
  GGUF_LOCAL_EXPERTS,
  LOCAL_EXPERTS,
  Family,
  pattern,
  read_experts,
  read_sliding,
  register,
  size,
  write_experts,
  write_sliding,
)
from dms_jax.json_files import is_number, shown

_PERIOD = 2  # every other layer sees the whole text
_SWIGLU = {"swiglu_alpha": 1.702, "swiglu_limit": 7.0}  # our names are config.json's
_ATTENTION, _MLP = "model.layers.{layer}.self_attn.", "model.layers.{layer}.mlp."
_YARN = dict(factor=32.0, original_max_position_embeddings=4096, truncate=False)


def _read(values: dict[str, Any]) -> dict[str, Any]:
  numbers = {name: values.get(name, usual) for name, usual in _SWIGLU.items()}
  if bad := [name for name, value in numbers.items() if not is_number(value)]:
    raise ValueError(f"{bad[0]} should be a number, found {shown(numbers[bad[0]])}")
  counts = read_experts({"num_local_experts": 128, "num_experts_per_tok": 4, **values}, LOCAL_EXPERTS)
  return {**counts, **read_sliding(values, _PERIOD), **{name: float(value) for name, value in numbers.items()}}


def _write(config: ModelConfig) -> dict[str, Any]:
  numbers = {name: getattr(config, name) for name in _SWIGLU}
  # Without settings transformers would scale RoPE.
  plain = {"rope_parameters": {"rope_type": "default", "rope_theta": config.rope_theta}}
  return {
    **write_experts(config, LOCAL_EXPERTS),
    **write_sliding(config),
    **numbers,
    **({} if config.rope_scaling else plain),
  }


def _preset(layers: int, experts: int) -> dict[str, Any]:
  return size(
    layers, 2880, 2880, 64, 8, 64, vocab_size=201088, max_position_embeddings=131072, rope_theta=150000.0,
    rope_scaling=RopeScaling(kind="yarn", **_YARN), tie_embeddings=False, num_experts=experts, experts_per_token=4,
    sliding_window=128, sliding_layers=pattern(layers, _PERIOD), eos_token_ids=(200002, 199999, 200012), **_SWIGLU,
  )  # fmt: skip


GPT_OSS = register(
  Family(
    name="gpt_oss",
    architecture="GptOssForCausalLM",
    defaults={
      "max_position_embeddings": 131072,
      "vocab_size": 201088,
      "num_key_value_heads": 8,
      "head_dim": 64,
      "rms_norm_eps": 1e-5,
      "rope_theta": 150000.0,
      "rope_parameters": {"rope_type": "yarn", **_YARN},
      "sliding_window": 128,
    },
    own_keys={"attention_bias": True},
    fixed={"qkv_bias": True, "proj_bias": True, "attention_sinks": True, "norm_experts": True},
    read=_read,
    write=_write,
    slides=True,
    experts=True,
    quantised=("mxfp4",),
    rope_types=("default", "yarn"),
    names={
      "layers/o_bias": _ATTENTION + "o_proj.bias",
      "layers/router": _MLP + "router.weight",
      "layers/router_bias": _MLP + "router.bias",
      **{f"layers/{name}_proj": _MLP + "experts.gate_up_proj" for name in ("gate", "up")},
      **{f"layers/{name}_bias": _MLP + "experts.gate_up_proj_bias" for name in ("gate", "up")},
      "layers/down_proj": _MLP + "experts.down_proj",
      "layers/down_bias": _MLP + "experts.down_proj_bias",
    },
    gguf=GGUF(
      "gpt-oss",
      names={"layers/mlp_norm": "post_attention_norm.weight"},
      keys={**GGUF_LOCAL_EXPERTS, "attention.sliding_window": "sliding_window"},
    ),
    presets={"gpt-oss-20b": _preset(24, 32), "gpt-oss-120b": _preset(36, 128)},
  )
)
