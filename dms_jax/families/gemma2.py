"""Gemma 2: every other layer slides, scores and logits are capped, norms on both sides of a part."""

from __future__ import annotations

from typing import Any

from dms_jax.config import ModelConfig
from dms_jax.families.base import GGUF, Family, pattern, register, size
from dms_jax.families.gemma3 import read_gguf, read_layers, write_layers
from dms_jax.json_files import is_number, shown

PERIOD = 2  # every other layer sees the whole text
_CAPS = {"attn_logit_softcapping": "attention_softcap", "final_logit_softcapping": "logit_softcap"}
_DEFAULTS = {"attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0}


def _read(values: dict[str, Any]) -> dict[str, Any]:
  caps = {}
  for theirs, ours in _CAPS.items():
    value = values.get(theirs, _DEFAULTS[theirs])
    if not (value is None or is_number(value)):
      raise ValueError(f"{theirs} should be a number, found {shown(value)}")
    caps[ours] = None if value is None else float(value)
  return {**read_layers(values, PERIOD), **caps}


def _write(config: ModelConfig) -> dict[str, Any]:
  return {**write_layers(config), **{theirs: getattr(config, ours) for theirs, ours in _CAPS.items()}}


def _preset(layers: int, d_model: int, d_ff: int, heads: int, kv_heads: int, head_dim: int, scalar: int) -> dict:
  return size(
    layers, d_model, d_ff, heads, kv_heads, head_dim, vocab_size=256000, max_position_embeddings=8192,
    rms_norm_eps=1e-6, tie_embeddings=True, sliding_window=4096, sliding_layers=pattern(layers, PERIOD),
    embed_scale=d_model**0.5, attention_scale=scalar**-0.5, attention_softcap=50.0, logit_softcap=30.0,
    eos_token_ids=(1, 107),
  )  # fmt: skip


GEMMA2 = register(
  Family(
    name="gemma2",
    architecture="Gemma2ForCausalLM",
    defaults={
      "max_position_embeddings": 8192,
      "vocab_size": 256000,
      "hidden_size": 2304,
      "num_key_value_heads": 4,
      "head_dim": 256,
      "sliding_window": 4096,
      "tie_word_embeddings": True,
    },
    own_keys={"attention_bias": False},
    fixed={"norms": "both", "norm_plus_one": True, "activation": "gelu_tanh"},
    read=_read,
    write=_write,
    slides=True,
    renamed={"hidden_act": "hidden_activation"},
    rope_types=("default",),
    gguf=GGUF(
      "gemma2",
      keys={"attention.sliding_window": "sliding_window", **{name: name for name in _CAPS}},
      unwritten=lambda values: {"sliding_window": 4096, **read_gguf(values, 46)},
    ),
    presets={
      "gemma-2-2b": _preset(26, 2304, 9216, 8, 4, 256, 256),
      "gemma-2-9b": _preset(42, 3584, 14336, 16, 8, 256, 256),
      "gemma-2-27b": _preset(46, 4608, 36864, 32, 16, 128, 144),
    },
  )
)
