"""Llama and models of its architecture, such as SmolLM2."""

from __future__ import annotations

from dms_jax.config import RopeScaling
from dms_jax.families.base import GGUF, Family, register, size

_LLAMA2 = dict(vocab_size=32000, max_position_embeddings=4096, tie_embeddings=False, eos_token_ids=(2,))
_LLAMA3 = dict(
  vocab_size=128256, max_position_embeddings=8192, rope_theta=500000.0, tie_embeddings=False,
  eos_token_ids=(128001, 128009),
)  # fmt: skip
_LLAMA31 = _LLAMA3 | dict(
  max_position_embeddings=131072, rope_scaling=RopeScaling(factor=8.0), eos_token_ids=(128001, 128008, 128009)
)
_LLAMA32 = _LLAMA31 | dict(rope_scaling=RopeScaling(factor=32.0), tie_embeddings=True)
_SMOLLM2 = dict(vocab_size=49152, max_position_embeddings=8192, rope_theta=100000.0, eos_token_ids=(2,))

LLAMA = register(
  Family(
    name="llama",
    architecture="LlamaForCausalLM",
    defaults={"max_position_embeddings": 2048, "vocab_size": 32000},
    own_keys={"attention_bias": False, "mlp_bias": False},
    gguf=GGUF("llama", paired_rope=True),
    presets={
      "smollm2-135m": size(30, 576, 1536, 9, 3, 64, **_SMOLLM2),
      "llama-2-7b": size(32, 4096, 11008, 32, 32, 128, **_LLAMA2),
      "llama-3-8b": size(32, 4096, 14336, 32, 8, 128, **_LLAMA3),
      "llama-3.1-8b": size(32, 4096, 14336, 32, 8, 128, **_LLAMA31),
      "llama-3.1-70b": size(80, 8192, 28672, 64, 8, 128, **_LLAMA31),
      "llama-3.2-1b": size(16, 2048, 8192, 32, 8, 64, **_LLAMA32),
      "llama-3.2-3b": size(28, 3072, 8192, 24, 8, 128, **_LLAMA32),
    },
  )
)
