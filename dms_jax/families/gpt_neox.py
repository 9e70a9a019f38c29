"""GPT-NeoX and Pythia: attention beside the MLP, LayerNorms, biases, RoPE on part of the channels."""

from __future__ import annotations

from typing import Any

from dms_jax.config import ModelConfig
from dms_jax.families.base import GGUF, GGUF_FUSED, Family, register, size, with_biases
from dms_jax.json_files import shown

_LAYER = "gpt_neox.layers.{layer}."
_MODULES = {"o": "attention.dense", "up": "mlp.dense_h_to_4h", "down": "mlp.dense_4h_to_h"}


def _read(values: dict[str, Any]) -> dict[str, Any]:
  if values.get("attention_bias", True) is not True:
    raise ValueError(f"attention_bias={shown(values['attention_bias'])}: not supported")
  return {"parallel": values.get("use_parallel_residual", True) is True}


def _write(config: ModelConfig) -> dict[str, Any]:
  return {"use_parallel_residual": config.parallel}


def _preset(layers: int, d_model: int, heads: int, vocab_size: int = 50304) -> dict[str, Any]:
  return size(
    layers, d_model, 4 * d_model, heads, heads, d_model // heads, vocab_size=vocab_size, max_position_embeddings=2048,
    rms_norm_eps=1e-5, rope_fraction=0.25, tie_embeddings=False, parallel=True, eos_token_ids=(0,),
  )  # fmt: skip


GPT_NEOX = register(
  Family(
    name="gpt_neox",
    architecture="GPTNeoXForCausalLM",
    defaults={
      "max_position_embeddings": 2048,
      "vocab_size": 50432,
      "hidden_act": "gelu",
      "rotary_pct": 0.25,
      "layer_norm_eps": 1e-5,
    },
    own_keys={"num_key_value_heads": ..., "head_dim": ...},
    fixed={"layer_norm": True, "activation": "gelu", "gated_mlp": False, "qkv_bias": True, "proj_bias": True},
    read=_read,
    write=_write,
    partial_rope=True,
    renamed={"rms_norm_eps": "layer_norm_eps", "partial_rotary_factor": "rotary_pct", "rope_theta": "rotary_emb_base"},
    layout="heads",
    ignored=r".*\.attention\.((masked_)?bias|rotary_emb\.inv_freq)",
    names={
      "embed": "gpt_neox.embed_in.weight",
      **with_biases(
        _LAYER,
        _MODULES,
        fused="attention.query_key_value",
        norms=("input_layernorm", "post_attention_layernorm"),
        final_norm="gpt_neox.final_layer_norm",
      ),
      "lm_head": "embed_out.weight",
    },
    gguf=GGUF("gptneox", names=GGUF_FUSED, keys={"use_parallel_residual": "use_parallel_residual"}),
    presets={
      "pythia-70m": _preset(6, 512, 8),
      "pythia-160m": _preset(12, 768, 12),
      "pythia-410m": _preset(24, 1024, 16),
      "pythia-1b": _preset(16, 2048, 8),
      "pythia-1.4b": _preset(24, 2048, 16),
      "pythia-2.8b": _preset(32, 2560, 32),
      "pythia-6.9b": _preset(32, 4096, 32, 50432),
      "pythia-12b": _preset(36, 5120, 40, 50688),
    },
  )
)
