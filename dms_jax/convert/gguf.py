"""Reads GGUF files: weights, dequantised to float32, config and tokenizer.

Files are read as llama.cpp's convert_hf_to_gguf.py writes them; `families.base.GGUF` says where a family differs. For
families with `paired_rope`, rows of q and k are in pairs, for interleaved RoPE. Reading permutes them back to Hugging
Face's half-split order. Norms that multiply by 1 + their weight (Gemma's) are stored with the 1, and read without.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from dms_jax import families
from dms_jax.config import ModelConfig, RopeScaling
from dms_jax.convert import gguf_file, gguf_tokenizer
from dms_jax.convert.gguf_file import Entry, Fields
from dms_jax.convert.tensors import Tensors, check_layers, hf_names
from dms_jax.families.base import LAYER_KINDS, Family, pattern, refusals
from dms_jax.json_files import is_number, shown
from dms_jax.layers import rope_frequencies
from dms_jax.params import ParamSpec, param_table
from dms_jax.tokenizer import Tokenizer

# GGUF's names of our parameters; those of layers follow "blk.N.", and those of experts have "_exps" before the dot.
_NAMES = {
  "embed": "token_embd.weight", "positions": "position_embd.weight", "final_norm": "output_norm.weight",
  "final_norm_bias": "output_norm.bias", "lm_head": "output.weight",
  "layers/attn_norm": "attn_norm.weight", "layers/mlp_norm": "ffn_norm.weight",
  "layers/attn_norm_bias": "attn_norm.bias", "layers/mlp_norm_bias": "ffn_norm.bias",
  "layers/attn_post_norm": "post_attention_norm.weight", "layers/mlp_post_norm": "post_ffw_norm.weight",
  "layers/q_proj": "attn_q.weight", "layers/k_proj": "attn_k.weight", "layers/v_proj": "attn_v.weight",
  "layers/q_bias": "attn_q.bias", "layers/k_bias": "attn_k.bias", "layers/v_bias": "attn_v.bias",
  "layers/q_norm": "attn_q_norm.weight", "layers/k_norm": "attn_k_norm.weight",
  "layers/o_proj": "attn_output.weight", "layers/o_bias": "attn_output.bias", "layers/sinks": "attn_sinks.weight",
  "layers/router": "ffn_gate_inp.weight", "layers/router_bias": "ffn_gate_inp.bias",
  "layers/gate_proj": "ffn_gate.weight", "layers/up_proj": "ffn_up.weight", "layers/down_proj": "ffn_down.weight",
  "layers/gate_bias": "ffn_gate.bias", "layers/up_bias": "ffn_up.bias", "layers/down_bias": "ffn_down.bias",
}  # fmt: skip
_ROPE_FREQS = "rope_freqs.weight"  # Llama 3.1's scaling, as one divisor for each frequency
_LONG_ROPE = "rope_factors_long.weight"
_ONE_EXPERT = re.compile(r"blk\.\d+\.ffn_(gate|up|down)\.\d+\.weight")  # as converters wrote experts until April 2024
# Metadata that changes what a model computes, with the values that change nothing; refused in families without it.
_NEUTRAL: dict[str, tuple] = {
  "attention.temperature_scale": (0,), "attention.clamp_kqv": (0,), "attn_logit_softcapping": (0,),
  "final_logit_softcapping": (0,), "router_logit_softcapping": (0,), "expert_shared_count": (0,),
  "expert_group_count": (0, 1), "expert_weights_scale": (0, 1), "leading_dense_block_count": (0,),
  "rope.global.freq_base": (0,), "rope.local.freq_base": (0,),  # Ollama's
  "rope.scaling.attn_factor": (1,), "rope.scaling.yarn_ext_factor": (1, -1), "rope.scaling.yarn_log_multiplier": (0,),
}  # fmt: skip
# Tokens that end a turn, which llama.cpp finds by their texts where the metadata do not name them.
_ENDS = ("<end_of_turn>", "<|return|>", "<|call|>")


def read(path: str | Path, *, tokenizer: bool = True) -> tuple[ModelConfig, Tensors, Tokenizer | None]:
  """Config, tensors under their GGUF names (`table`), and tokenizer of a GGUF file.

  Args:
    tokenizer: whether to read the tokenizer.

  Raises:
    ValueError: the file is not GGUF, is cut short or damaged, or its model is not supported.
  """
  metadata, entries = _read_parts(Path(path))
  fields = Fields(metadata, str(path))
  try:
    config = _config(fields, {entry.name: entry for entry in entries})
    tensors = _tensors(entries, config, str(path))
    return config, tensors, gguf_tokenizer.read(fields) if tokenizer else None
  except RecursionError:  # of a tokenizer
    raise ValueError(f"{path}: metadata nested too deep; the file is damaged") from None


def table(config: ModelConfig) -> dict[str, ParamSpec]:
  """The parameter table under GGUF's names; tensors have outputs first, and all experts of a layer before them."""
  gguf = families.get(config.family).gguf
  assert gguf is not None

  def named(path: str, spec: ParamSpec) -> ParamSpec:
    name = gguf.names.get(path, _NAMES[path])
    if spec.of_experts:
      name = name.replace(".", "_exps.")
    name = f"blk.{{layer}}.{name}" if spec.layered else name
    shape = (config.num_experts,) * spec.by_expert + spec.hf_shape
    return dataclasses.replace(spec, hf_name=name, hf_shape=shape, hf_layout="rows")

  return {path: named(path, spec) for path, spec in param_table(config).items()}


def _read_parts(path: Path) -> tuple[dict[str, Any], list[gguf_file.Entry]]:
  """Metadata and tensors of a file; of its parts, if llama.cpp split it into NAME-00001-of-00005.gguf and so on."""
  metadata, entries = gguf_file.read(path)
  count = metadata.get("split.count", 1)
  if count in (0, 1):
    return metadata, entries
  named = re.fullmatch(r"(.*)-00001-of-(\d{5})\.gguf", path.name)
  if metadata.get("split.no") != 0 or not named or int(named[2]) != count:
    raise ValueError(
      f"{path}: one of {shown(count)} parts of a split GGUF file; pass the first, NAME-00001-of-..., beside the "
      "others, or join them with llama-gguf-split --merge"
    )
  for number in range(2, count + 1):
    part = path.with_name(f"{named[1]}-{number:05}-of-{count:05}.gguf")
    theirs, more = gguf_file.read(part)
    if (theirs.get("split.no"), theirs.get("split.count")) != (number - 1, count):
      raise ValueError(f"{part}: not part {number} of {count}, as its name says")
    entries += more
  wanted, names = metadata.get("split.tensors.count", len(entries)), {entry.name for entry in entries}
  if not len(names) == len(entries) == wanted:
    found = f"{len(entries)}, {len(names)} of them different"
    raise ValueError(f"{path}: {shown(wanted)} tensors in {count} parts wanted, found {found}")
  return metadata, entries


def _config(fields: Fields, tensors: Mapping[str, Entry]) -> ModelConfig:
  family = _family(fields)
  if reasons := _unsupported(fields, family, tensors):
    raise ValueError(f"{fields.path}: not supported: {'; '.join(reasons)}")
  assert family is not None and family.gguf is not None
  check_layers(fields.get("{arch}.block_count", int), len(tensors), fields.path)
  heads, width = fields.get("{arch}.attention.head_count", int), fields.get("{arch}.embedding_length", int)
  rotated = fields.get("{arch}.rope.dimension_count", int, None)
  head_dim = fields.get("{arch}.attention.key_length", int, width // max(heads, 1))
  if rotated not in (None, head_dim) and not (family.partial_rope and 0 < rotated < head_dim):
    raise ValueError(f"{fields.path}: not supported: RoPE on {rotated} of {head_dim} channels")
  width_key = "{arch}.feed_forward_length"
  if family.experts and fields.has("expert_feed_forward_length"):
    width_key = "{arch}.expert_feed_forward_length"
  epsilon = "layer_norm_epsilon" if family.fixed.get("layer_norm") else "layer_norm_rms_epsilon"
  tokens = fields.get("tokenizer.ggml.tokens", list)
  values = dict(
    num_layers=fields.get("{arch}.block_count", int),
    d_model=width,
    d_ff=fields.get(width_key, int),
    num_heads=heads,
    num_kv_heads=fields.get("{arch}.attention.head_count_kv", int, heads),
    head_dim=head_dim,
    vocab_size=tensors["token_embd.weight"].shape[0] if "token_embd.weight" in tensors else len(tokens),
    max_position_embeddings=fields.get("{arch}.context_length", int),
    rope_theta=fields.get("{arch}.rope.freq_base", float, 10000.0),
    rms_norm_eps=fields.get(f"{{arch}}.attention.{epsilon}", float),
    tie_embeddings="output.weight" not in tensors,
    eos_token_ids=_eos(fields, tokens),
    **({} if rotated is None or "rope_fraction" in family.fixed else {"rope_fraction": rotated / max(head_dim, 1)}),
    **{
      family.keys[theirs]: fields.get(f"{{arch}}.{key}", float)
      for key, theirs in family.gguf.keys.items()
      if theirs in family.keys
    },
  )
  try:
    scaling = _rope_scaling(fields, family, values["max_position_embeddings"])
    config = family.config(**values, rope_scaling=scaling, **family.read(_as_json(fields, family, values)))
    if _ROPE_FREQS in tensors:
      config = dataclasses.replace(config, rope_scaling=_llama3_scaling(config, tensors[_ROPE_FREQS]))
  except (ValueError, ZeroDivisionError) as error:
    reason = str(error).removeprefix(f"{fields.path}: ")  # errors of `Fields` name the file already
    raise ValueError(f"{fields.path}: {reason}") from None
  return config


def _family(fields: Fields) -> Family | None:
  """The family of a file: of those with its architecture, the one that has experts and sliding layers as it does."""
  own = [f for f in families.FAMILIES.values() if f.gguf is not None and f.gguf.architecture == fields.arch]
  experts, slides = fields.has("expert_count"), _slides(fields)
  return min(own, key=lambda f: (f.experts != experts, f.slides != slides), default=None)


def _slides(fields: Fields) -> bool:
  """Whether a file has a sliding window that some text is longer than."""
  window, longest = (fields.get(f"{{arch}}.{key}", default=0) for key in ("attention.sliding_window", "context_length"))
  numbers = is_number(window, int) and is_number(longest, int)
  return fields.has("attention.sliding_window") and not (numbers and window >= longest > 0)


def _unsupported(fields: Fields, family: Family | None, tensors: Mapping[str, Entry]) -> list[str]:
  """Every reason why this model is not supported, with the keys of its metadata."""
  reasons = []
  if family is None:
    known = sorted({f.gguf.architecture for f in families.FAMILIES.values() if f.gguf is not None})
    reasons.append(f"architecture {fields.arch!r}; supported are {', '.join(known)}")
  given = lambda key, known: [key] if fields.has(key) and not known else []
  reasons += refusals(
    given("expert_count", family and family.experts),
    given("attention.kv_lora_rank", False),
    given("attention.sliding_window", not _slides(fields) or (family and family.slides)),
  )
  reasons += [
    f"{key}={shown(value)}"
    for key, neutral in _NEUTRAL.items()
    if (value := fields.get(f"{{arch}}.{key}", default=neutral[0])) not in neutral
    and not (family and family.gguf and key in family.gguf.keys)
  ]
  local = fields.get("{arch}.rope.freq_base_swa", default=None)
  if local not in (None, fields.get("{arch}.rope.freq_base", default=None)) and not (
    family and family.gguf and "rope.freq_base_swa" in family.gguf.keys
  ):
    reasons.append(f"rope.freq_base_swa={shown(local)}")
  kind, _ = _rope_kind(fields)
  kinds = family.rope_types if family else ("default", "linear", "yarn")
  if _LONG_ROPE in tensors:
    reasons.append(f"RoPE scaling of type 'longrope' ({_LONG_ROPE})")
  elif kind not in kinds or kind == "llama3":
    reasons.append(f"RoPE scaling of type {shown(kind)}")
  if kind != "default" and _ROPE_FREQS in tensors:
    reasons.append(f"{_ROPE_FREQS} beside RoPE scaling of type {shown(kind)}")
  if not fields.get("{arch}.attention.causal", bool, True):
    reasons.append("attention.causal=false: tokens see later ones")
  if single := next((name for name in tensors if _ONE_EXPERT.fullmatch(name)), None):
    reasons.append(
      f"a tensor for each expert ({single}), as llama.cpp wrote them until April 2024; convert the model again"
    )
  return reasons


def _as_json(fields: Fields, family: Family, values: dict[str, Any]) -> dict[str, Any]:
  """The values of config.json that the family's `read` takes, as the metadata have them.

  Raises:
    ValueError: the pattern of sliding layers is malformed.
  """
  assert family.gguf is not None
  layers, (sliding, whole) = values["num_layers"], LAYER_KINDS
  found = {
    "num_hidden_layers": layers, "hidden_size": values["d_model"], "num_attention_heads": values["num_heads"],
    "head_dim": values["head_dim"], "rope_theta": values["rope_theta"],
  }  # fmt: skip
  for key, theirs in family.gguf.keys.items():
    if (value := fields.get(f"{{arch}}.{key}", default=None)) is not None:
      found[theirs] = fields.get(f"{{arch}}.{key}", float) if isinstance(value, float) else value
  if "sliding_window" in found:
    found["sliding_window"] = fields.get("{arch}.attention.sliding_window", int)
  if family.slides and (slides := fields.get("{arch}.attention.sliding_window_pattern", default=None)) is not None:
    if is_number(slides, int) and slides > 0:
      slides = list(pattern(layers, slides))  # a period, as of config.json's key of this name
    if not isinstance(slides, list) or len(slides) != layers or any(one not in (0, 1) for one in slides):
      raise ValueError(f"attention.sliding_window_pattern should name {layers} layers, found {shown(slides)}")
    found["layer_types"] = [sliding if one else whole for one in slides]
  found = {**family.gguf.unwritten(found), **found}
  if family.slides and "sliding_window" not in found and sliding in found.get("layer_types", LAYER_KINDS):
    found["sliding_window"] = fields.get("{arch}.attention.sliding_window", int)
  return found


def _eos(fields: Fields, tokens: list) -> tuple[int, ...]:
  named = [fields.token_id(name) for name in ("eos", "eot", "eom")]
  by_text = [index for index, token in enumerate(tokens) if token in _ENDS]
  return tuple(dict.fromkeys(index for index in (*named, *by_text) if index is not None))


def _rope_kind(fields: Fields) -> tuple[Any, float]:
  """(config.json's `rope_type`, factor); a factor without a type is linear, as in llama.cpp."""
  old = fields.get("{arch}.rope.scale_linear", float, 0.0)
  factor = fields.get("{arch}.rope.scaling.factor", float, old) or 1.0
  kind = fields.get("{arch}.rope.scaling.type", default="linear")
  plain = kind in ("none", "") or (kind == "linear" and factor == 1)  # divided by 1
  return ("default", 1.0) if plain else (kind, factor)


def _rope_scaling(fields: Fields, family: Family, longest: int) -> RopeScaling | None:
  """Linear or YaRN scaling; `longest`: the context length.

  Raises:
    ValueError: a number is out of range.
  """
  kind, factor = _rope_kind(fields)
  if kind != "yarn":
    return None if kind == "default" else RopeScaling(factor, kind=kind)
  key = "{{arch}}.rope.scaling.{}".format
  # No file says whether the blended channels are whole ones; the model's own config does.
  truncate = family.defaults.get("rope_parameters", {}).get("truncate", True)
  scaling = RopeScaling(
    factor,
    original_max_position_embeddings=fields.get(key("original_context_length"), int, longest),
    kind="yarn",
    beta_fast=fields.get(key("yarn_beta_fast"), float, 32.0),
    beta_slow=fields.get(key("yarn_beta_slow"), float, 1.0),
    truncate=truncate,
  )
  given = fields.get(key("yarn_attn_factor"), float, None)
  assert scaling.attention_factor is not None
  if given is None or np.float32(given) == np.float32(scaling.attention_factor):
    return scaling
  return dataclasses.replace(scaling, attention_factor=given)


def _llama3_scaling(config: ModelConfig, tensor: Entry) -> RopeScaling:
  """The llama3 scaling that gives the file's factors; llama.cpp stores one factor a frequency, not the parameters."""
  factors = tensor.values().reshape(-1)
  plain = rope_frequencies(config)
  if factors.shape != plain.shape or not np.isfinite(factors).all():
    raise ValueError(f"{_ROPE_FREQS} is to hold {plain.size} finite factors; the file is damaged")
  scaling = RopeScaling(factor=float(factors.max()))
  expected = plain / rope_frequencies(dataclasses.replace(config, rope_scaling=scaling))
  if not np.allclose(factors, expected, rtol=1e-4):
    raise ValueError(f"{_ROPE_FREQS} is not Llama 3.1's scaling of 8192 trained positions: not supported")
  return scaling


def _tensors(found: list[Entry], config: ModelConfig, path: str) -> Tensors:
  gguf = families.get(config.family).gguf
  assert gguf is not None
  paired = {"layers/q_proj": config.num_heads, "layers/k_proj": config.num_kv_heads} if gguf.paired_rope else {}
  of_name = {name: path for path, spec in table(config).items() for name, _ in hf_names(path, spec)}
  entries = {tensor.name: tensor for tensor in found if tensor.name != _ROPE_FREQS}

  def read_tensor(name: str) -> np.ndarray:
    try:
      value = entries[name].values()
    except ValueError as error:
      raise ValueError(f"{path}: {error}") from None
    param = of_name.get(name, "")
    if heads := paired.get(param):
      value = value.reshape(heads, len(value) // heads // 2, 2, -1).swapaxes(1, 2).reshape(value.shape)
    if config.norm_plus_one and param.endswith("_norm"):
      value = value - np.float32(1)
    return value

  shapes = {name: tensor.shape for name, tensor in entries.items()}
  return Tensors(path, shapes, read_tensor, "float32", "its metadata")
