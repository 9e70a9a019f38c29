"""Qwen3's mixtures of experts: a router and many small MLPs in each layer.

Left out: models in which some layers have one MLP (`mlp_only_layers`, `decoder_sparse_step`).
"""

from __future__ import annotations

from typing import Any

from dms_jax.config import ModelConfig
from dms_jax.families.base import GGUF, Family, read_experts, register, size, write_experts
from dms_jax.json_files import shown

_KEYS = {"num_experts": "num_experts", "num_experts_per_tok": "experts_per_token"}
_QWEN3 = dict(
  vocab_size=151936, max_position_embeddings=40960, rope_theta=1e6, rms_norm_eps=1e-6, tie_embeddings=False,
  num_experts=128, experts_per_token=8, norm_experts=True, eos_token_ids=(151645, 151643),
)  # fmt: skip


def _read(values: dict[str, Any]) -> dict[str, Any]:
  if values.get("decoder_sparse_step", 1) != 1 or values.get("mlp_only_layers"):
    raise ValueError("layers with one MLP (decoder_sparse_step, mlp_only_layers) beside experts: not supported")
  count = values.get("num_local_experts", 128)  # transformers 5 writes this name
  counts = read_experts({"num_experts": count, "num_experts_per_tok": 8, **values}, _KEYS)
  if not isinstance(norm := values.get("norm_topk_prob", False), bool):
    raise ValueError(f"norm_topk_prob should be true or false, found {shown(norm)}")
  return {**counts, "norm_experts": norm}


def _write(config: ModelConfig) -> dict[str, Any]:
  others = {"norm_topk_prob": config.norm_experts, "decoder_sparse_step": 1, "mlp_only_layers": []}
  return {**write_experts(config, _KEYS), **others}


QWEN3_MOE = register(
  Family(
    name="qwen3_moe",
    architecture="Qwen3MoeForCausalLM",
    defaults={
      "max_position_embeddings": 32768,
      "vocab_size": 151936,
      "num_key_value_heads": 4,
      "moe_intermediate_size": 768,
      "use_sliding_window": False,
      "sliding_window": 4096,
    },
    own_keys={"attention_bias": False, "use_sliding_window": False},
    fixed={"qk_norm": True},
    read=_read,
    write=_write,
    renamed={"intermediate_size": "moe_intermediate_size"},
    experts=True,
    gguf=GGUF(
      "qwen3moe",
      keys={"expert_count": "num_experts", "expert_used_count": "num_experts_per_tok"},
      unwritten=lambda values: {"norm_topk_prob": True},
    ),
    presets={
      "qwen3-30b-a3b": size(48, 2048, 768, 32, 4, 128, **_QWEN3),
      "qwen3-235b-a22b": size(94, 4096, 1536, 64, 4, 128, **_QWEN3),
    },
  )
)
