"""Mistral without its first version's sliding windows: Llama's layers.

Most GGUF files of it say "llama" and are read as that family. Left out: Ministral 3, whose scores depend on positions.
"""

from __future__ import annotations

from dms_jax.families.base import GGUF, Family, register, size

_TEKKEN = dict(vocab_size=131072, tie_embeddings=False, eos_token_ids=(2,))  # by its tokenizer's name

MISTRAL = register(
  Family(
    name="mistral",
    architecture="MistralForCausalLM",
    # Without the key every layer slides, as in version 0.1; later versions write null.
    defaults={"max_position_embeddings": 131072, "vocab_size": 32000, "num_key_value_heads": 8, "sliding_window": 4096},
    own_keys={"sliding_window": None},
    gguf=GGUF("mistral3", paired_rope=True),
    presets={
      "mistral-7b-v0.3": size(
        32, 4096, 14336, 32, 8, 128, vocab_size=32768, max_position_embeddings=32768, rope_theta=1e6,
        tie_embeddings=False, eos_token_ids=(2,),
      ),
      "mistral-nemo-12b": size(
        40, 5120, 14336, 32, 8, 128, max_position_embeddings=131072, rope_theta=1e6, **_TEKKEN
      ),
      "mistral-small-24b": size(
        40, 5120, 32768, 32, 8, 128, max_position_embeddings=32768, rope_theta=1e8, **_TEKKEN
      ),
    },
  )
)  # fmt: skip
