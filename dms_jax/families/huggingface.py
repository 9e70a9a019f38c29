"""Hugging Face's config.json <-> `ModelConfig`, for every family; other models are refused by name.

Both spellings are read: transformers 4 (`rope_theta`, `rope_scaling`, `torch_dtype`) and transformers 5
(`rope_parameters`, `dtype`). The spelling of transformers 4 is written, because both versions accept it.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from dms_jax.config import ModelConfig, RopeScaling
from dms_jax.families import base


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
  if problems := _unsupported(values, family):
    raise ValueError(f"{source}: not supported: {'; '.join(problems)}")
  problems = []

  def number(name: str, kind: type, default: Any = None):
    value = values.get(name)
    value = default if value is None else value
    wrong = isinstance(value, bool) or not isinstance(value, int if kind is int else int | float) or value <= 0
    if wrong:
      problems.append(f"{name} should be a positive number, found {value!r}")
      return kind(1)
    return kind(value)

  heads, width = number("num_attention_heads", int), number("hidden_size", int)
  theta, scaling = _rope(values, problems)
  fields = dict(
    num_layers=number("num_hidden_layers", int),
    d_model=width,
    d_ff=number("intermediate_size", int),
    num_heads=heads,
    num_kv_heads=number("num_key_value_heads", int, heads),
    head_dim=number("head_dim", int, max(width // heads, 1)),
    vocab_size=number("vocab_size", int),
    max_position_embeddings=number("max_position_embeddings", int),
    rope_theta=theta,
    rope_scaling=scaling,
    rms_norm_eps=number("rms_norm_eps", float, 1e-6),
    tie_embeddings=bool(values.get("tie_word_embeddings", False)),
    eos_token_ids=_token_ids((generation or {}).get("eos_token_id")) or _token_ids(values.get("eos_token_id")),
  )
  if problems:
    raise ValueError(f"{source}: {'; '.join(problems)}")
  try:
    return family.config(**fields)
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
    "hidden_size": c.d_model,
    "intermediate_size": c.d_ff,
    "num_hidden_layers": c.num_layers,
    "num_attention_heads": c.num_heads,
    "num_key_value_heads": c.num_kv_heads,
    "head_dim": c.head_dim,
    "vocab_size": c.vocab_size,
    "max_position_embeddings": c.max_position_embeddings,
    "rope_theta": c.rope_theta,
    "rope_scaling": None if c.rope_scaling is None else {"rope_type": "llama3", **dataclasses.asdict(c.rope_scaling)},
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
  reasons = []
  name = values.get("model_type")
  experts = [
    k for k in ("num_experts", "num_local_experts", "n_routed_experts", "moe_intermediate_size") if values.get(k)
  ]
  if experts or "moe" in str(name).lower() or name == "mixtral":
    reasons.append(f"mixture of experts ({', '.join(experts) or f'model_type {name!r}'})")
  if latent := [k for k in ("kv_lora_rank", "q_lora_rank", "qk_rope_head_dim") if values.get(k)]:
    reasons.append(f"multi-head latent attention, MLA ({', '.join(latent)})")
  if family is None:
    reasons.append(f"model_type {name!r}; supported are {', '.join(base.FAMILIES)}")
  layer_types = values.get("layer_types") or []
  slides = values.get("sliding_window") is not None and values.get("use_sliding_window", True)
  if slides or values.get("use_sliding_window") or any(t != "full_attention" for t in layer_types):
    reasons.append(f"sliding window attention (sliding_window={values.get('sliding_window')})")
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
  theta = settings.get("rope_theta", values.get("rope_theta", 10000.0))
  if isinstance(theta, bool) or not isinstance(theta, int | float) or theta <= 0:
    problems.append(f"rope_theta should be a positive number, found {theta!r}")
    theta = 1.0
  if _rope_type(values) != "llama3":
    return float(theta), None
  names = [f.name for f in dataclasses.fields(RopeScaling)]
  if bad := [n for n in names if isinstance(settings.get(n), bool) or not isinstance(settings.get(n), int | float)]:
    problems.append(f"rope_scaling of type llama3 needs the number(s) {bad}")
    return float(theta), None
  numbers = {n: settings[n] for n in names}
  return float(theta), RopeScaling(
    **{n: int(v) if n == "original_max_position_embeddings" else float(v) for n, v in numbers.items()}
  )


def _token_ids(value: Any) -> tuple[int, ...]:
  """The ids of an eos_token_id, which is null, one id or a list."""
  return () if value is None else tuple(int(i) for i in value) if isinstance(value, list) else (int(value),)
