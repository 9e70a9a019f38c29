"""Model families: a Hugging Face config.json <-> `ModelConfig` and `DMSConfig`, and what is refused.

Both spellings are read: transformers 4 (`rope_theta`, `rope_scaling`, `torch_dtype`) and transformers 5
(`rope_parameters`, `dtype`). What is written is the first, which both accept.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from dms_jax.config import FAMILIES, DMSConfig, ModelConfig, RopeScaling

DTYPES = ("float32", "bfloat16", "float16")


def config_from_hf(values: dict, source: str, generation: dict | None = None) -> ModelConfig:
  """The model that a config.json describes.

  Args:
    values: the file's content.
    source: its name, for errors.
    generation: generation_config.json, whose end tokens go before config.json's.

  Raises:
    ValueError: everything that is missing, malformed or not supported, together.
  """
  family = values.get("model_type")
  if problems := _unsupported(values):
    raise ValueError(f"{source}: not supported: {'; '.join(problems)}")
  spec = FAMILIES[family]
  values = {**spec.defaults, **values}
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
    family=family,
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
    qkv_bias=spec.qkv_bias,
    qk_norm=spec.qk_norm,
    eos_token_ids=_token_ids((generation or {}).get("eos_token_id")) or _token_ids(values.get("eos_token_id")),
  )
  if problems:
    raise ValueError(f"{source}: {'; '.join(problems)}")
  try:
    return ModelConfig(**fields)
  except ValueError as error:
    raise ValueError(f"{source}: {error}") from None


def config_to_hf(config: ModelConfig, dtype: str) -> dict:
  """config.json for a model of this shape; `config_from_hf` is its inverse.

  Args:
    dtype: "float32", "bfloat16" or "float16", of the weights beside it.
  """
  c = config
  eos = list(c.eos_token_ids)
  values = {
    "architectures": [FAMILIES[c.family].architecture],
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
  }
  if c.family != "qwen2":  # Qwen2's bias is part of its class
    values["attention_bias"] = False
  if c.family == "llama":
    values["mlp_bias"] = False
  else:
    values["use_sliding_window"] = False
  return values


def dms_from_hf(values: dict, metadata: dict | None, source: str) -> DMSConfig | None:
  """The gates that a checkpoint says it carries, or None.

  NVIDIA's put `dms_*` keys into config.json: the decision computed at t is about t - 1, and `dms_separate_alpha` means
  the adapter. FastDMS writes dms_metadata.json, flat or under "config": the borrowed neuron, about token t itself.

  Args:
    metadata: content of dms_metadata.json where there is one.

  Raises:
    ValueError: a value cannot be read, or the metadata is of another kind.
  """
  if metadata is not None:
    if "sidecar" in metadata or metadata.get("schema_version", 1) not in (1, None):
      raise ValueError(f"{source}: dms_metadata.json of schema {metadata.get('schema_version')}: sidecar gates differ")
    given, shift = {**metadata, **metadata.get("config", {})}, 0
  elif any(name.startswith("dms_") for name in values):
    given, shift = values, 1
  else:
    return None

  def first(default, *names: str):
    value = next((given[n] for n in names if given.get(n) is not None), default)
    if isinstance(value, bool) or not isinstance(value, int | float):
      raise ValueError(f"{source}: {names[0]} should be a number, found {value!r}")
    return value

  window = first(512 if shift else 256, "dms_window_size", "window_size")
  if window != int(window):
    raise ValueError(f"{source}: dms_window_size={window} is not a whole number of tokens")
  return DMSConfig(
    gate="adapter" if shift and given.get("dms_separate_alpha") else "neuron",
    window=int(window),
    scale=float(first(100.0, "dms_alpha_scale", "alpha_scale")),
    offset=float(first(5.0, "dms_initial_alpha_offset", "dms_alpha_offset", "alpha_offset")),
    shift=shift,
    granularity=given.get("dms_alpha_per") or "head",
  )


def _unsupported(values: dict) -> list[str]:
  """Every reason why this model cannot be run, by the name its field has."""
  reasons = []
  family = values.get("model_type")
  experts = [
    k for k in ("num_experts", "num_local_experts", "n_routed_experts", "moe_intermediate_size") if values.get(k)
  ]
  if experts or "moe" in str(family).lower() or family == "mixtral":
    reasons.append(f"mixture of experts ({', '.join(experts) or f'model_type {family!r}'})")
  if latent := [k for k in ("kv_lora_rank", "q_lora_rank", "qk_rope_head_dim") if values.get(k)]:
    reasons.append(f"multi-head latent attention, MLA ({', '.join(latent)})")
  if family not in FAMILIES:
    reasons.append(f"model_type {family!r}; supported are {', '.join(FAMILIES)}")
  layer_types = values.get("layer_types") or []
  # Qwen's files carry a width that `use_sliding_window: false` leaves unused.
  slides = values.get("sliding_window") is not None and values.get(
    "use_sliding_window", family not in ("qwen2", "qwen3")
  )
  if slides or values.get("use_sliding_window") or any(t != "full_attention" for t in layer_types):
    reasons.append(f"sliding window attention (sliding_window={values.get('sliding_window')})")
  if (rope_type := _rope_type(values)) not in ("default", "llama3"):
    reasons.append(f"RoPE scaling of type {rope_type!r}; supported are 'default' and 'llama3'")
  if values.get("partial_rotary_factor", 1.0) != 1.0:
    reasons.append(f"partial_rotary_factor={values['partial_rotary_factor']}")
  if values.get("attention_bias") and family != "qwen2":
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
  """eos_token_id as Hugging Face writes it: nothing, one id or a list."""
  return () if value is None else tuple(int(i) for i in value) if isinstance(value, list) else (int(value),)
