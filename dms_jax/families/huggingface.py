"""Hugging Face's config.json <-> `ModelConfig`, for every family; other models are refused by name.

Both spellings are read: transformers 4 (`rope_theta`, `rope_scaling`, `torch_dtype`) and transformers 5
(`rope_parameters`, `dtype`). Where a file holds both, `rope_scaling` is used, as in transformers 5. The spelling of
transformers 4 is written, because both versions accept it.
"""

from __future__ import annotations

import math
from typing import Any

from dms_jax.config import ModelConfig, RopeScaling
from dms_jax.families import base
from dms_jax.json_files import is_number, shown

# Sizes: config.json's keys and our fields, in config.json's order.
_SIZES = {
  "hidden_size": "d_model", "intermediate_size": "d_ff", "num_hidden_layers": "num_layers",
  "num_attention_heads": "num_heads", "num_key_value_heads": "num_kv_heads", "head_dim": "head_dim",
  "vocab_size": "vocab_size", "max_position_embeddings": "max_position_embeddings",
}  # fmt: skip
# Our name and theirs.
_ACTIVATIONS = {"silu": ("silu", "swish"), "gelu_tanh": ("gelu_pytorch_tanh", "gelu_new"), "gelu": ("gelu",)}
# Settings of each `rope_type`: names of fields of `RopeScaling`, which are config.json's, too.
_LENGTH = "original_max_position_embeddings"
_SCALINGS = {
  "llama3": ("factor", "low_freq_factor", "high_freq_factor", _LENGTH),
  "linear": ("factor",),
  "yarn": ("factor", _LENGTH, "beta_fast", "beta_slow", "attention_factor", "truncate"),
}


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
    values |= {key: values[own] for key, own in family.renamed.items() if values.get(own) is not None}
  problems = _wrong_types(values)
  if problems:
    raise ValueError(f"{source}: {'; '.join(problems)}")
  if reasons := _unsupported(values, family):
    raise ValueError(f"{source}: not supported: {'; '.join(reasons)}")
  sizes: dict[str, int] = {}
  for theirs, ours in _SIZES.items():
    heads = sizes.get("num_heads", 1)
    width = sizes.get("d_model", 1)
    default = {"num_kv_heads": heads, "head_dim": max(width // heads, 1)}.get(ours)
    if ours == "d_ff" and family.wide is not None:
      default = family.wide * width
    sizes[ours] = _number(values, theirs, int, problems, default)
  theta, scaling = _rope(values, sizes["max_position_embeddings"], problems)
  generation_eos = _token_ids(generation or {}, "generation_config.json: eos_token_id", problems)
  shape = dict(
    **sizes,
    rope_theta=theta,
    rope_scaling=scaling,
    rms_norm_eps=_number(values, "rms_norm_eps", float, problems, 1e-6),
    tie_embeddings=bool(values.get("tie_word_embeddings")),
    eos_token_ids=_token_ids(values, "eos_token_id", problems) if generation_eos == () else generation_eos,
    **({} if "rope_fraction" in family.fixed else {"rope_fraction": _rotated(values)}),
    **{ours: _number(values, theirs, float, problems, 1.0) for theirs, ours in family.keys.items()},
  )
  if problems:
    lines = "; ".join(problems)
    for name, own in family.renamed.items():
      lines = lines.replace(name, own)
    raise ValueError(f"{source}: {lines}")
  try:
    return family.config(**shape, **family.read(values))
  except ValueError as error:
    raise ValueError(f"{source}: {error}") from None


def config_to_hf(config: ModelConfig, dtype: str) -> dict:
  """The content of config.json for a model of this shape; `config_from_hf` is its inverse.

  Args:
    dtype: dtype of the weights, "float32", "bfloat16" or "float16".
  """
  c, family = config, base.get(config.family)
  eos = list(c.eos_token_ids)
  values = {
    "architectures": [family.architecture],
    "model_type": c.family,
    **{theirs: getattr(c, ours) for theirs, ours in _SIZES.items()},
    "rope_theta": c.rope_theta,
    "rope_scaling": None if (s := c.rope_scaling) is None else {
      "rope_type": s.kind, **{name: getattr(s, name) for name in _SCALINGS[s.kind]},
    },
    "rms_norm_eps": c.rms_norm_eps,
    "tie_word_embeddings": c.tie_embeddings,
    "hidden_act": _ACTIVATIONS[c.activation][0],
    "attention_dropout": 0.0,
    "bos_token_id": None,
    "eos_token_id": eos[0] if len(eos) == 1 else eos or None,
    "use_cache": True,
    "torch_dtype": dtype,
    **({} if c.rope_fraction in (0, 1) else {"partial_rotary_factor": c.rope_fraction}),
    **family.own_keys,
    **{theirs: getattr(c, ours) for theirs, ours in family.keys.items()},
    **family.write(c),
  }  # fmt: skip
  return {family.renamed.get(name, name): value for name, value in values.items() if value is not ...}


_FLAGS = ("tie_word_embeddings", "use_sliding_window", "attention_bias", "mlp_bias", "is_causal")


def _wrong_types(values: dict) -> list[str]:
  """A line for each switch, list or object of the file that is something else: read as true, it would mislead."""
  problems = [
    f"{name} should be true or false, found {shown(values[name])}"
    for name in _FLAGS
    if not isinstance(values.get(name), bool | None)
  ]
  kinds = values.get("layer_types")
  if kinds is not None and not (isinstance(kinds, list) and all(isinstance(kind, str) for kind in kinds)):
    problems.append(f"layer_types should be a list of names, found {shown(kinds)}")
  elif kinds and is_number(values.get("num_hidden_layers"), int) and len(kinds) != values["num_hidden_layers"]:
    problems.append(f"layer_types names {len(kinds)} layers of {values['num_hidden_layers']}")
  for name in ("rope_parameters", "rope_scaling"):
    if not isinstance(values.get(name), dict | None):
      problems.append(f"{name} should be an object, found {shown(values[name])}")
  for name in ("sliding_window", "max_window_layers", "sliding_window_pattern"):
    if not (values.get(name) is None or is_number(values[name], int)):
      problems.append(f"{name} should be a whole number, found {shown(values[name])}")
  return problems


def _unsupported(values: dict, family: base.Family | None) -> list[str]:
  """Every reason why this model is not supported, with the keys of config.json."""
  name = values.get("model_type")
  given = lambda *keys: [key for key in keys if values.get(key)]
  experts = given("num_experts", "num_local_experts", "n_routed_experts", "moe_intermediate_size")
  if family and family.experts:
    experts = []
  elif not experts and "moe" in str(name).lower():
    experts = [f"model_type {shown(name)}"]
  slides = _slides(values) and not (family and family.slides)
  sliding = [f"sliding_window={values.get('sliding_window')}"] if slides else []
  reasons = base.refusals(experts, given("kv_lora_rank", "q_lora_rank", "qk_rope_head_dim"), sliding)
  if other := sorted(set(values.get("layer_types") or ()) - set(base.LAYER_KINDS)):
    reasons.append(f"layers of type {', '.join(map(shown, other))} (layer_types)")
  if family is None:
    reasons.append(f"model_type {shown(name)}; supported are {', '.join(base.FAMILIES)}")
  settings = _rope_settings(values)
  rope_type, rope_types = _rope_type(settings), family.rope_types if family else ("default", *_SCALINGS)
  if rope_type not in rope_types:
    reasons.append(f"RoPE scaling of type {shown(rope_type)}; supported are {', '.join(map(repr, rope_types))}")
  rotated = settings.get("partial_rotary_factor", values.get("partial_rotary_factor"))
  if rotated not in (None, 1, 1.0) and not (family and family.partial_rope and is_number(rotated)):
    reasons.append(f"partial_rotary_factor={shown(rotated)}")
  if values.get("attention_bias") and not (family and family.fixed.get("qkv_bias")):
    reasons.append("attention_bias=true")
  if values.get("mlp_bias"):
    reasons.append("mlp_bias=true")
  if values.get("is_causal") is False:  # of models that embed texts
    reasons.append("is_causal=false: tokens see later ones")
  key, known = (family.renamed.get("hidden_act", "hidden_act"), family.fixed.get("activation", "silu")) if family else (
    "hidden_act", "silu"
  )  # fmt: skip
  if (activation := values.get("hidden_act", _ACTIVATIONS[known][0])) not in _ACTIVATIONS[known]:
    reasons.append(f"{key}={shown(activation)}; supported is {_ACTIVATIONS[known][0]!r}")
  if values.get("quantization_config"):
    method = values["quantization_config"]
    method = method.get("quant_method") if isinstance(method, dict) else method
    if not (family and method in family.quantised):
      reasons.append(f"quantized weights (quantization_config, method {shown(method)}); convert the unquantized model")
  return reasons


def _slides(values: dict) -> bool:
  """Whether any layer has a sliding window: those that `layer_types` names, else those from `max_window_layers` on."""
  if values.get("layer_types"):
    return "sliding_attention" in values["layer_types"]
  if values.get("sliding_window") is None or values.get("use_sliding_window") is False:
    return False
  longest = values.get("max_position_embeddings")
  if is_number(longest, int) and values["sliding_window"] >= longest:  # no text is so long
    return False
  first, layers = values.get("max_window_layers"), values.get("num_hidden_layers")
  return not (is_number(first, int) and is_number(layers, int) and first >= layers)


def _rope_settings(values: dict) -> dict:
  """transformers 4's rope_scaling, else transformers 5's rope_parameters; keyed by layer type, those of full attention.

  transformers reads the keyed form of a Llama as no settings at all; here it is read as it is meant.
  """
  settings = values.get("rope_scaling") or values.get("rope_parameters") or {}
  if isinstance(settings.get("full_attention"), dict):
    return settings["full_attention"]
  if keyed := [name for name, value in settings.items() if isinstance(value, dict)]:
    return {"rope_type": f"{keyed[0]}: ..."}  # of other layers: refused by this name
  return settings


def _rope_type(settings: dict) -> Any:
  return settings.get("rope_type") or settings.get("type") or "default"


def _rotated(values: dict) -> float:
  """The share of a head's channels that RoPE turns."""
  rotated = _rope_settings(values).get("partial_rotary_factor", values.get("partial_rotary_factor"))
  return float(rotated) if is_number(rotated) else 1.0


def _rope(values: dict, longest: int, problems: list[str]) -> tuple[float, RopeScaling | None]:
  """The base frequency and the scaling; `longest`: max_position_embeddings."""
  settings, kind = _rope_settings(values), _rope_type(_rope_settings(values))
  theta = {"rope_theta": values.get("rope_theta")} | {k: v for k, v in settings.items() if v is not None}
  theta = _number(theta, "rope_theta", float, problems, 10000.0)
  if kind not in _SCALINGS:
    return theta, None
  given = {_LENGTH: longest, **settings}
  if values.get(_LENGTH) is not None:
    given[_LENGTH] = values[_LENGTH]
  if kind == "yarn":
    given = _yarn(given, longest)
  wanted = {name: {_LENGTH: int, "truncate": bool}.get(name, float) for name in _SCALINGS[kind]}

  def fits(name: str, kind: type) -> bool:
    value = given.get(name)
    return isinstance(value, bool) if kind is bool else is_number(value) and value == kind(value)

  if bad := [name for name, kind in wanted.items() if not fits(name, kind)]:
    problems.append(f"rope_scaling of type {kind} needs the number(s) {bad}")
    return theta, None
  if kind == "linear" and given["factor"] == 1:  # positions divided by 1
    return theta, None
  try:
    return theta, RopeScaling(kind=kind, **{name: kind(given[name]) for name, kind in wanted.items()})
  except ValueError as error:
    problems.append(str(error))
    return theta, None


def _yarn(given: dict, longest: int) -> dict:
  """YaRN's settings with what may be left out, as transformers fills it in."""
  given = {"truncate": True, **given, "beta_fast": given.get("beta_fast") or 32.0}
  given["beta_slow"] = given.get("beta_slow") or 1.0
  if given.get("factor") is None and is_number(given[_LENGTH]) and given[_LENGTH] > 0:
    given["factor"] = longest / given[_LENGTH]
  factor, scales = given.get("factor"), [given.get(name) for name in ("mscale", "mscale_all_dim")]
  if given.get("attention_factor") is None and is_number(factor) and factor > 0:
    grown = lambda scale: 0.1 * scale * math.log(factor) + 1 if factor > 1 else 1.0
    first, second = (grown(s) for s in scales) if all(is_number(s) and s for s in scales) else (grown(1), 1.0)
    given["attention_factor"] = first / second
  return given


def _number(values: dict, name: str, kind: type, problems: list[str], default: Any = None):
  """A positive number, the default where the value is null or missing; else a line in `problems`, and 1."""
  value = default if values.get(name) is None else values[name]
  if is_number(value, int if kind is int else int | float) and 0 < value and (kind is float or value < 2**31):
    return kind(value)
  problems.append(f"{name} should be a positive number, found {shown(value)}")
  return kind(1)


def _token_ids(values: dict, name: str, problems: list[str]) -> tuple[int, ...]:
  """The ids of an eos_token_id, which is null, one id or a list; `name` ends in the key."""
  value = values.get(name.rpartition(" ")[2])
  ids = () if value is None else tuple(value) if isinstance(value, list) else (value,)
  if all(is_number(i, int) for i in ids):
    return tuple(dict.fromkeys(ids))
  problems.append(f"{name} should be a token id or a list of them, found {shown(value)}")
  return ()
