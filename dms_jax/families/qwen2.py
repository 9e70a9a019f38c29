"""Qwen2 and Qwen2.5: biases on q, k and v. The R1 distillations of Qwen2.5 share its shapes."""

from __future__ import annotations

from dms_jax.families.base import GGUF, Family, register, size

_QWEN25 = dict(
  vocab_size=152064, max_position_embeddings=32768, rope_theta=1e6, rms_norm_eps=1e-6, tie_embeddings=False,
  eos_token_ids=(151645, 151643),
)  # fmt: skip
_SMALL = _QWEN25 | dict(vocab_size=151936, tie_embeddings=True)
_R1 = _QWEN25 | dict(max_position_embeddings=131072, eos_token_ids=(151643,))

QWEN2 = register(
  Family(
    name="qwen2",
    architecture="Qwen2ForCausalLM",
    # config.json may give the width of a sliding window that is switched off, or that starts behind the last layer.
    defaults={
      "max_position_embeddings": 32768,
      "vocab_size": 151936,
      "use_sliding_window": False,
      "sliding_window": 4096,
      "max_window_layers": 28,
    },
    own_keys={"use_sliding_window": False},
    fixed={"qkv_bias": True},
    gguf=GGUF("qwen2"),
    presets={
      "qwen2.5-0.5b": size(24, 896, 4864, 14, 2, 64, **_SMALL),
      "qwen2.5-1.5b": size(28, 1536, 8960, 12, 2, 128, **_SMALL),
      "qwen2.5-7b": size(28, 3584, 18944, 28, 4, 128, **_QWEN25),
      "qwen2.5-32b": size(64, 5120, 27648, 40, 8, 128, **_QWEN25),
      "qwen-r1-1.5b": size(28, 1536, 8960, 12, 2, 128, **_R1 | dict(vocab_size=151936, rope_theta=1e4)),
      "qwen-r1-7b": size(28, 3584, 18944, 28, 4, 128, **_R1 | dict(rope_theta=1e4)),
      "qwen-r1-32b": size(64, 5120, 27648, 40, 8, 128, **_R1),
    },
  )
)
