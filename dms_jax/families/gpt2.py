"""GPT-2: learned positions, LayerNorms, biases, q, k and v in one tensor, an MLP without a gate."""

from __future__ import annotations

from typing import Any

from dms_jax.families.base import GGUF, GGUF_FUSED, Family, register, size, with_biases

_LAYER = "transformer.h.{layer}."
_MODULES = {"o": "attn.c_proj", "up": "mlp.c_fc", "down": "mlp.c_proj"}
_SWITCHES = {"scale_attn_weights": True, "scale_attn_by_inverse_layer_idx": False, "add_cross_attention": False}


def _read(values: dict[str, Any]) -> dict[str, Any]:
  for name, usual in _SWITCHES.items():
    if values.get(name, usual) is not usual:
      raise ValueError(f"{name}={values[name]}: not supported")
  return {}


def _preset(layers: int, d_model: int, heads: int) -> dict[str, Any]:
  return size(
    layers, d_model, 4 * d_model, heads, heads, 64, vocab_size=50257, max_position_embeddings=1024, rms_norm_eps=1e-5,
    tie_embeddings=True, eos_token_ids=(50256,),
  )  # fmt: skip


GPT2 = register(
  Family(
    name="gpt2",
    architecture="GPT2LMHeadModel",
    defaults={
      "n_positions": 1024,
      "vocab_size": 50257,
      "layer_norm_epsilon": 1e-5,
      "activation_function": "gelu_new",
      "tie_word_embeddings": True,
    },
    # The class has no such keys.
    own_keys=dict.fromkeys(("num_key_value_heads", "head_dim", "rope_theta", "rope_scaling", "attention_dropout"), ...),
    fixed={
      "layer_norm": True,
      "activation": "gelu_tanh",
      "gated_mlp": False,
      "qkv_bias": True,
      "proj_bias": True,
      "learned_positions": True,
      "rope_fraction": 0.0,
    },
    read=_read,
    renamed={
      "hidden_size": "n_embd",
      "num_hidden_layers": "n_layer",
      "num_attention_heads": "n_head",
      "intermediate_size": "n_inner",
      "max_position_embeddings": "n_positions",
      "rms_norm_eps": "layer_norm_epsilon",
      "hidden_act": "activation_function",
    },
    wide=4,
    layout="columns",
    prefix="transformer.",
    ignored=r".*\.attn\.(masked_)?bias",
    names={
      "embed": "transformer.wte.weight",
      "positions": "transformer.wpe.weight",
      **with_biases(_LAYER, _MODULES, fused="attn.c_attn", norms=("ln_1", "ln_2"), final_norm="transformer.ln_f"),
    },
    gguf=GGUF("gpt2", names=GGUF_FUSED),
    presets={
      "gpt2": _preset(12, 768, 12),
      "gpt2-medium": _preset(24, 1024, 16),
      "gpt2-large": _preset(36, 1280, 20),
      "gpt2-xl": _preset(48, 1600, 25),
    },
  )
)
