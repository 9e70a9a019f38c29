"""Hugging Face's config.json <-> `ModelConfig`, for every family; other models are refused by name.

Both spellings are read: transformers 4 (`rope_theta`, `rope_scaling`, `torch_dtype`) and transformers 5
(`rope_parameters`, `dtype`). The spelling of transformers 4 is written, because both versions accept it.
"""

from __future__ import annotations

from dataclasses import asdict, fields
from types import UnionType
from typing import Any

from dms_jax.config import ModelConfig, RopeScaling
from dms_jax.families import base

# Sizes: config.json's keys and our fields, in config.json's order.
_SIZES = {
  "hidden_size": "d_model", "intermediate_size": "d_ff", "num_hidden_layers": "num_layers",
  "num_attention_heads": "num_heads", "num_key_value_heads": "num_kv_heads", "head_dim": "head_dim",
  "vocab_size": "vocab_size", "max_position_embeddings": "max_position_embeddings",
}  # fmt: skip


def config_from_hf(values: dict, source: str, generation: dict | None = None) -> ModelConfig:
  """The model that a config.json describes.

  Args:
    values: the file's content.
    source: its name, for errors.
    generation: content of generation_config.json, whose end tokens override config.json's.

  Raises:
    ValueError: lists everything that is missing, malformed or not supported.
  """
  family = base.FAMILIES.get(str(values.get("model_type")))
  if family is not None:
    values = {**family.defaults, **values}
  if reasons := _unsupported(values, family):
    raise ValueError(f"{source}: not supported: {'; '.join(reasons)}")
  problems: list[str] = []
  sizes: dict[str, int] = {}
  for theirs, ours in _SIZES.items():
    heads = sizes.get("num_heads", 1)
    default = {"num_kv_heads": heads, "head_dim": max(sizes.get("d_model", 1) // heads, 1)}.get(ours)
    sizes[ours] = _number(values, theirs, int, problems, default)
  theta, scaling = _rope(values, problems)
  shape = dict(
    **sizes,
    rope_theta=theta,
    rope_scaling=scaling,
    rms_norm_eps=_number(values, "rms_norm_eps", float, problems, 1e-6),
    tie_embeddings=bool(values.get("tie_word_embeddings", False)),
    eos_token_ids=_token_ids((generation or {}).get("eos_token_id")) or _token_ids(values.get("eos_token_id")),
  )
  if problems:
    raise ValueError(f"{source}: {'; '.join(problems)}")
  try:
    return family.config(**shape)
  except ValueError as error:
    raise ValueError(f"{source}: {error}") from None


def config_to_hf(config: ModelConfig, dtype: str) -> dict:
  """The content of config.json for a model of this shape; `config_from_hf` is its inverse.

  Args:
    dtype: dtype of the weights, "float32", "bfloat16" or "float16".
  """
  c, family = config, base.get(config.family)
  eos = list(c.eos_token_ids)
  return {
    "architectures": [family.architecture],
    "model_type": c.family,
    **{theirs: getattr(c, ours) for theirs, ours in _SIZES.items()},
    "rope_theta": c.rope_theta,
    "rope_scaling": None if c.rope_scaling is None else {"rope_type": "llama3", **asdict(c.rope_scaling)},
    "rms_norm_eps": c.rms_norm_eps,
    "tie_word_embeddings": c.tie_embeddings,
    "hidden_act": "silu",
    "attention_dropout": 0.0,
    "bos_token_id": None,
    "eos_token_id": eos[0] if len(eos) == 1 else eos or None,
    "use_cache": True,
    "torch_dtype": dtype,
    **family.own_keys,
  }


def _unsupported(values: dict, family: base.Family | None) -> list[str]:
  """Every reason why this model is not supported, with the keys of config.json."""
  name = values.get("model_type")
  given = lambda *keys: [key for key in keys if values.get(key)]
  experts = given("num_experts", "num_local_experts", "n_routed_experts", "moe_intermediate_size")
  if not experts and ("moe" in str(name).lower() or name == "mixtral"):
    experts = [f"model_type {name!r}"]
  slides = values.get("sliding_window") is not None and values.get("use_sliding_window", True)
  slides = slides or values.get("use_sliding_window")
  slides = slides or any(kind != "full_attention" for kind in values.get("layer_types") or [])
  sliding = [f"sliding_window={values.get('sliding_window')}"] if slides else []
  reasons = base.refusals(experts, given("kv_lora_rank", "q_lora_rank", "qk_rope_head_dim"), sliding)
  if family is None:
    reasons.append(f"model_type {name!r}; supported are {', '.join(base.FAMILIES)}")
  if (rope_type := _rope_type(values)) not in ("default", "llama3"):
    reasons.append(f"RoPE scaling of type {rope_type!r}; supported are 'default' and 'llama3'")
  if values.get("partial_rotary_factor", 1.0) != 1.0:
    reasons.append(f"partial_rotary_factor={values['partial_rotary_factor']}")
  if values.get("attention_bias") and not (family and family.qkv_bias):
    reasons.append("attention_bias=true")
  if values.get("mlp_bias"):
    reasons.append("mlp_bias=true")
  if (activation := values.get("hidden_act", "silu")) not in ("silu", "swish"):
    reasons.append(f"hidden_act={activation!r}; supported is 'silu'")
  if values.get("quantization_config"):
    method = values["quantization_config"]
    method = method.get("quant_method") if isinstance(method, dict) else method
    reasons.append(f"quantized weights (quantization_config, method {method!r}); convert the unquantized model")
  return reasons


def _rope_settings(values: dict) -> dict:
  """transformers 5's rope_parameters, or transformers 4's rope_scaling."""
  settings = values.get("rope_parameters") or values.get("rope_scaling") or {}
  return settings if isinstance(settings, dict) else {"rope_type": settings}


def _rope_type(values: dict) -> str:
  settings = _rope_settings(values)
  return settings.get("rope_type") or settings.get("type") or "default"


def _rope(values: dict, problems: list[str]) -> tuple[float, RopeScaling | None]:
  settings = _rope_settings(values)
  theta = {"rope_theta": values.get("rope_theta", 10000.0), **settings}
  theta = _number(theta, "rope_theta", float, problems)
  if _rope_type(values) != "llama3":
    return theta, None
  kinds = {f.name: int if f.name == "original_max_position_embeddings" else float for f in fields(RopeScaling)}
  if bad := [name for name in kinds if not is_number(settings.get(name))]:
    problems.append(f"rope_scaling of type llama3 needs the number(s) {bad}")
    return theta, None
  return theta, RopeScaling(**{name: kind(settings[name]) for name, kind in kinds.items()})


def is_number(value: Any, kinds: type | UnionType = int | float) -> bool:
  """Whether a value of a JSON file is a number; `true` and `false` are none."""
  return isinstance(value, kinds) and not isinstance(value, bool)


def _number(values: dict, name: str, kind: type, problems: list[str], default: Any = None):
  """A positive number, the default where the value is null or missing; else a line in `problems`, and 1."""
  value = default if values.get(name) is None else values[name]
  if is_number(value, int if kind is int else int | float) and value > 0:
    return kind(value)
  problems.append(f"{name} should be a positive number, found {value!r}")
  return kind(1)


def _token_ids(value: Any) -> tuple[int, ...]:
  """The ids of an eos_token_id, which is null, one id or a list."""
  return () if value is None else tuple(int(i) for i in value) if isinstance(value, list) else (int(value),)
