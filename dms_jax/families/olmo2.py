"""OLMo 2: norms after attention and MLP, not before; one norm for all queries, one for all keys."""

from __future__ import annotations

from dms_jax.families.base import GGUF, Family, register, size

_OLMO2 = dict(
  vocab_size=100352, max_position_embeddings=4096, rope_theta=500000.0, rms_norm_eps=1e-6, tie_embeddings=False,
  eos_token_ids=(100257,),
)  # fmt: skip

OLMO2 = register(
  Family(
    name="olmo2",
    architecture="Olmo2ForCausalLM",
    defaults={"max_position_embeddings": 2048, "vocab_size": 50304, "rms_norm_eps": 1e-5},
    own_keys={"attention_bias": False, "pad_token_id": None},
    fixed={"norms": "after", "qk_norm": True, "qk_norm_over": "all"},
    gguf=GGUF("olmo2"),
    presets={
      "olmo-2-1b": size(16, 2048, 8192, 16, 16, 128, **_OLMO2),
      "olmo-2-7b": size(32, 4096, 11008, 32, 32, 128, **_OLMO2),
      "olmo-2-13b": size(40, 5120, 13824, 40, 40, 128, **_OLMO2),
      "olmo-2-32b": size(64, 5120, 27648, 40, 8, 128, **_OLMO2),
    },
  )
)
