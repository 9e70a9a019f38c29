"""Mixtral: Mistral's layers with a mixture of experts. Its GGUF files say "llama" and count experts."""

from __future__ import annotations

from typing import Any

from dms_jax.config import ModelConfig
from dms_jax.families.base import (
  GGUF,
  GGUF_LOCAL_EXPERTS,
  LOCAL_EXPERTS,
  Family,
  read_experts,
  register,
  size,
  write_experts,
)

_LAYER = "model.layers.{layer}.block_sparse_moe."
_MODULES = {"gate": "w1", "up": "w3", "down": "w2"}


def _read(values: dict[str, Any]) -> dict[str, Any]:
  return read_experts({"num_local_experts": 8, "num_experts_per_tok": 2, **values}, LOCAL_EXPERTS)


def _write(config: ModelConfig) -> dict[str, Any]:
  return write_experts(config, LOCAL_EXPERTS)


def _preset(layers: int, d_model: int, d_ff: int, heads: int, longest: int, vocab_size: int = 32000) -> dict[str, Any]:
  return size(
    layers, d_model, d_ff, heads, 8, 128, vocab_size=vocab_size, max_position_embeddings=longest, rope_theta=1e6,
    tie_embeddings=False, num_experts=8, experts_per_token=2, eos_token_ids=(2,),
  )  # fmt: skip


MIXTRAL = register(
  Family(
    name="mixtral",
    architecture="MixtralForCausalLM",
    defaults={
      "max_position_embeddings": 131072,
      "vocab_size": 32000,
      "num_key_value_heads": 8,
      "rope_theta": 1e6,
      "rms_norm_eps": 1e-5,
    },
    own_keys={"sliding_window": None},
    # The softmax over the chosen experts' logits is that over all, divided by the chosen ones' sum.
    fixed={"norm_experts": True},
    read=_read,
    write=_write,
    experts=True,
    names={
      "layers/router": _LAYER + "gate.weight",
      **{f"layers/{name}_proj": f"{_LAYER}experts.{{expert}}.{theirs}.weight" for name, theirs in _MODULES.items()},
    },
    gguf=GGUF("llama", keys=GGUF_LOCAL_EXPERTS, paired_rope=True),
    presets={
      "mixtral-8x7b": _preset(32, 4096, 14336, 32, 32768),
      "mixtral-8x22b": _preset(56, 6144, 16384, 48, 65536),
      "mixtral-8x22b-v0.3": _preset(56, 6144, 16384, 48, 65536, vocab_size=32768),
    },
  )
)
