"""Granite 3: Llama's layers with factors of embeddings, residuals, attention scores and logits."""

from __future__ import annotations

from dms_jax.families.base import GGUF, Family, register, size

_GRANITE33 = dict(
  vocab_size=49159, max_position_embeddings=131072, rope_theta=1e7, tie_embeddings=True, embed_scale=12.0,
  residual_scale=0.22, eos_token_ids=(0,),
)  # fmt: skip

GRANITE = register(
  Family(
    name="granite",
    architecture="GraniteForCausalLM",
    defaults={"max_position_embeddings": 2048, "vocab_size": 32000},
    own_keys={"attention_bias": False, "mlp_bias": False},
    keys={
      "embedding_multiplier": "embed_scale",
      "residual_multiplier": "residual_scale",
      "attention_multiplier": "attention_scale",
      "logits_scaling": "logit_divisor",
    },
    gguf=GGUF(
      "granite",
      keys={
        "embedding_scale": "embedding_multiplier",
        "residual_scale": "residual_multiplier",
        "attention.scale": "attention_multiplier",
        "logit_scale": "logits_scaling",
      },
      paired_rope=True,
    ),
    presets={
      "granite-3.3-2b": size(40, 2048, 8192, 32, 8, 64, attention_scale=1 / 64, logit_divisor=8.0, **_GRANITE33),
      "granite-3.3-8b": size(40, 4096, 12800, 32, 8, 128, attention_scale=1 / 128, logit_divisor=16.0, **_GRANITE33),
    },
  )
)
