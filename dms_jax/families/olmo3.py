"""OLMo 3: OLMo 2's layers, three sliding ones for each global one; YaRN in the global layers alone.

Its GGUF files say "olmo2" and have a sliding window.
"""

from __future__ import annotations

from typing import Any

from dms_jax.config import ModelConfig, RopeScaling
from dms_jax.families.base import GGUF, Family, pattern, read_sliding, register, size, sliding_theta, write_sliding
from dms_jax.families.olmo2 import OLMO2

_PERIOD = 4  # every fourth layer sees the whole text
_THETA = 500000.0


def _read(values: dict[str, Any]) -> dict[str, Any]:
  theta, fields = sliding_theta(values, "rope_theta", _THETA), read_sliding(values, _PERIOD)
  return fields | ({"local_rope_theta": theta} if "sliding_layers" in fields else {})


def _write(config: ModelConfig) -> dict[str, Any]:
  # transformers 5 reads `rope_theta` for the global layers alone.
  theta = config.rope_theta if config.local_rope_theta is None else config.local_rope_theta
  by_kind = {"full_attention": config.rope_theta, "sliding_attention": theta}
  settings = {kind: {"rope_type": "default", "rope_theta": theta} for kind, theta in by_kind.items()}
  return {**write_sliding(config), "rope_parameters": settings}


def _preset(layers: int, d_model: int, d_ff: int, heads: int, kv_heads: int) -> dict[str, Any]:
  return size(
    layers, d_model, d_ff, heads, kv_heads, 128, vocab_size=100278, max_position_embeddings=65536, rope_theta=_THETA,
    local_rope_theta=_THETA, rms_norm_eps=1e-6, tie_embeddings=False, eos_token_ids=(100257,), sliding_window=4096,
    rope_scaling=RopeScaling(8.0, original_max_position_embeddings=8192, kind="yarn"),
    sliding_layers=pattern(layers, _PERIOD),
  )  # fmt: skip


OLMO3 = register(
  Family(
    name="olmo3",
    architecture="Olmo3ForCausalLM",
    defaults={**OLMO2.defaults, "rope_theta": _THETA, "sliding_window": 4096},
    own_keys=OLMO2.own_keys,
    fixed=OLMO2.fixed,
    read=_read,
    write=_write,
    slides=True,
    gguf=GGUF("olmo2", keys={"attention.sliding_window": "sliding_window", "rope.freq_base_swa": "rope_theta"}),
    presets={"olmo-3-7b": _preset(32, 4096, 11008, 32, 32), "olmo-3-32b": _preset(64, 5120, 27648, 40, 8)},
  )
)
