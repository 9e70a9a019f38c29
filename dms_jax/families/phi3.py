"""Phi-4, and Phi-3's layers: q, k and v in one tensor, gate and up in another, partial RoPE.

Left out: the LongRoPE of Phi-4-mini and of the versions for 128K tokens, and the sliding window of Phi-3-mini-4k.
"""

from __future__ import annotations

from dms_jax.families.base import GGUF, GGUF_FUSED, Family, register, size

_LAYER = "model.layers.{layer}."
_PHI4 = dict(vocab_size=100352, tie_embeddings=False, rope_theta=250000.0)

PHI3 = register(
  Family(
    name="phi3",
    architecture="Phi3ForCausalLM",
    defaults={"max_position_embeddings": 4096, "vocab_size": 32064, "rms_norm_eps": 1e-5},
    # The padding token that transformers assumes is outside a small vocabulary.
    own_keys={"sliding_window": None, "pad_token_id": None},
    names={
      **{f"layers/{name}_proj": _LAYER + "self_attn.qkv_proj.weight" for name in "qkv"},
      **{f"layers/{name}_proj": _LAYER + "mlp.gate_up_proj.weight" for name in ("gate", "up")},
    },
    partial_rope=True,
    rope_types=("default",),
    gguf=GGUF("phi3", names={**GGUF_FUSED, "layers/gate_proj": "ffn_up.weight"}),
    presets={
      "phi-4": size(40, 5120, 17920, 40, 10, 128, max_position_embeddings=16384, eos_token_ids=(100265,), **_PHI4)
    },
  )
)
