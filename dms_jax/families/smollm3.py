"""SmolLM3: Llama's layers, every fourth without RoPE."""

from __future__ import annotations

from typing import Any

from dms_jax.config import ModelConfig
from dms_jax.families.base import GGUF, Family, register, size
from dms_jax.json_files import is_number, shown

_INTERVAL = 4  # transformers' default: every fourth layer has no RoPE


def _read(values: dict[str, Any]) -> dict[str, Any]:
  """`rope_layers`: from `no_rope_layers`, in which 1 means a layer with RoPE, or else from the interval."""
  layers, interval = values["num_hidden_layers"], values.get("no_rope_layer_interval", _INTERVAL)
  if (listed := values.get("no_rope_layers")) is None:
    if not is_number(interval, int) or interval < 1:
      raise ValueError(f"no_rope_layer_interval should be a positive number, found {shown(interval)}")
    listed = [index % interval != 0 for index in range(1, layers + 1)]
  if not isinstance(listed, list) or any(turns not in (0, 1) for turns in listed):
    raise ValueError(f"no_rope_layers should be a list of 0 and 1, found {shown(listed)}")
  return {"rope_layers": tuple(bool(turns) for turns in listed)}


def _write(config: ModelConfig) -> dict[str, Any]:
  return {"no_rope_layers": [int(turns) for turns in config.rope_layers or (True,) * config.num_layers]}


SMOLLM3 = register(
  Family(
    name="smollm3",
    architecture="SmolLM3ForCausalLM",
    defaults={
      "max_position_embeddings": 32768,
      "vocab_size": 128256,
      "num_key_value_heads": 4,
      "rope_theta": 2e6,
      "tie_word_embeddings": True,
      "use_sliding_window": False,
    },
    own_keys={"attention_bias": False, "mlp_bias": False, "use_sliding_window": False, "pad_token_id": None},
    read=_read,
    write=_write,
    gguf=GGUF("smollm3", paired_rope=True),
    presets={
      "smollm3-3b": size(
        36, 2048, 11008, 16, 4, 128, vocab_size=128256, max_position_embeddings=65536, rope_theta=5e6,
        rms_norm_eps=1e-6, tie_embeddings=True, rope_layers=(True, True, True, False) * 9, eos_token_ids=(128012,),
      ),
    },
  )
)  # fmt: skip
