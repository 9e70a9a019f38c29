"""Qwen3: an RMSNorm of each query and key head."""

from __future__ import annotations

from dms_jax.families.base import GGUF, Family, register, size

_QWEN3 = dict(
  vocab_size=151936, max_position_embeddings=40960, rope_theta=1e6, rms_norm_eps=1e-6, tie_embeddings=False,
  eos_token_ids=(151645, 151643),
)  # fmt: skip
_SMALL = _QWEN3 | dict(tie_embeddings=True)

QWEN3 = register(
  Family(
    name="qwen3",
    architecture="Qwen3ForCausalLM",
    # config.json may give the width of a sliding window that is switched off, or that starts behind the last layer.
    defaults={
      "max_position_embeddings": 32768,
      "vocab_size": 151936,
      "head_dim": 128,
      "use_sliding_window": False,
      "sliding_window": 4096,
      "max_window_layers": 28,
    },
    own_keys={"attention_bias": False, "use_sliding_window": False},
    fixed={"qk_norm": True},
    gguf=GGUF("qwen3"),
    presets={
      "qwen3-0.6b": size(28, 1024, 3072, 16, 8, 128, **_SMALL),
      "qwen3-1.7b": size(28, 2048, 6144, 16, 8, 128, **_SMALL),
      "qwen3-4b": size(36, 2560, 9728, 32, 8, 128, **_SMALL),
      "qwen3-8b": size(36, 4096, 12288, 32, 8, 128, **_QWEN3),
      "qwen3-14b": size(40, 5120, 17408, 40, 8, 128, **_QWEN3),
      "qwen3-32b": size(64, 5120, 25600, 64, 8, 128, **_QWEN3),
    },
  )
)
