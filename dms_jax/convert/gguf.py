"""Reads GGUF files: weights, dequantised to float32, config and tokenizer.

For families with `paired_rope`, llama.cpp stores rows of q and k in pairs, for interleaved RoPE. Reading permutes them
back to Hugging Face's half-split order.
"""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
from tokenizers import Regex, normalizers, pre_tokenizers, processors

from dms_jax import families
from dms_jax.config import ModelConfig, RopeScaling, is_number, shown
from dms_jax.convert import gguf_file
from dms_jax.convert.tensors import Tensors, check_layers, hf_names
from dms_jax.families.base import refusals
from dms_jax.layers import rope_frequencies
from dms_jax.params import param_table
from dms_jax.tokenizer import Tokenizer, bpe_tokenizer

_NAMES = {
  "embed": "token_embd.weight", "final_norm": "output_norm.weight", "lm_head": "output.weight",
  "layers/attn_norm": "attn_norm.weight", "layers/mlp_norm": "ffn_norm.weight",
  "layers/q_proj": "attn_q.weight", "layers/k_proj": "attn_k.weight", "layers/v_proj": "attn_v.weight",
  "layers/q_bias": "attn_q.bias", "layers/k_bias": "attn_k.bias", "layers/v_bias": "attn_v.bias",
  "layers/q_norm": "attn_q_norm.weight", "layers/k_norm": "attn_k_norm.weight",
  "layers/o_proj": "attn_output.weight", "layers/gate_proj": "ffn_gate.weight", "layers/up_proj": "ffn_up.weight",
  "layers/down_proj": "ffn_down.weight",
}  # fmt: skip
_ROPE_FREQS = "rope_freqs.weight"  # Llama 3.1's scaling, as one divisor for each frequency

_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_WORDS = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


@dataclasses.dataclass(frozen=True)
class _PreTokenizer:
  """Rules for one value of `tokenizer.ggml.pre`: how to split text before BPE, and the tokenizer's defaults."""

  split: str | None  # None: single digits first, then GPT-2's own pattern
  nfc: bool = False
  ignore_merges: bool = False
  adds_bos: bool = False

  def build(self):
    if self.split is None:
      digits = pre_tokenizers.Digits(individual_digits=True)
      return pre_tokenizers.Sequence([digits, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)])
    split = pre_tokenizers.Split(Regex(self.split), behavior="isolated")
    return pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


_QWEN2 = _PreTokenizer(rf"{_CONTRACTIONS}|{_WORDS}|\p{{N}}|{_REST}", nfc=True)
_LLAMA3 = _PreTokenizer(rf"{_CONTRACTIONS}|{_WORDS}|\p{{N}}{{1,3}}|{_REST}", ignore_merges=True, adds_bos=True)
_CL100K = _PreTokenizer(_LLAMA3.split)
_PRE_TOKENIZERS = {
  "smollm": _PreTokenizer(None),
  "refact": _PreTokenizer(None),  # Granite's
  "qwen2": _QWEN2,
  "deepseek-r1-qwen": _QWEN2,  # as in llama.cpp; these files ask for BOS themselves
  "llama-bpe": _LLAMA3,
  "llama3": _LLAMA3,
  "llama-v3": _LLAMA3,
  "smaug-bpe": _CL100K,  # SmolLM3's, among others
  "dbrx": _CL100K,  # Phi-4's and OLMo 2's
}
_CONTROL, _USER_DEFINED = 3, 4  # token types


def read(path: str | Path) -> tuple[ModelConfig, Tensors, Tokenizer]:
  """Config, tensors under their Hugging Face names, and tokenizer of a GGUF file.

  Raises:
    ValueError: the file is not GGUF, is cut short or damaged, or its model is not supported.
  """
  metadata, entries = _read_parts(Path(path))
  fields = _Fields(metadata, str(path))
  try:
    config = _config(fields, {entry.name: entry for entry in entries})
    return config, _tensors(entries, config, str(path)), _tokenizer(fields)
  except RecursionError:  # of a tokenizer
    raise ValueError(f"{path}: metadata nested too deep; the file is damaged") from None


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


class _Fields:
  """The metadata of a GGUF file; errors name the missing or malformed key."""

  def __init__(self, metadata: dict[str, Any], path: str):
    self.path, self._metadata = path, metadata
    self.arch = self.get("general.architecture", str)

  def get(self, key: str, kind: type | tuple = object, default: Any = ...) -> Any:
    key = key.format(arch=getattr(self, "arch", ""))
    if (value := self._metadata.get(key)) is None:
      if default is ...:
        raise ValueError(f"{self.path}: metadata key {key} is missing")
      return default
    if kind is float and is_number(value):
      return float(str(np.float32(value)))  # the shortest decimal: 1e-05, not 9.999999747378752e-06
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
      wanted = f"{type(value).__name__} and should be {kind.__name__}" if kind is not float else f"{value}, no number"
      raise ValueError(f"{self.path}: metadata key {key} is {wanted}")
    return value

  def token_id(self, name: str) -> int | None:
    """The id of a special token; None without, which some files write as -1.

    Raises:
      ValueError: the id is outside the vocabulary.
    """
    index = self.get(f"tokenizer.ggml.{name}_token_id", int, None)
    if index is None or index in (-1, 2**32 - 1):
      return None
    if not 0 <= index < (size := len(self.get("tokenizer.ggml.tokens", list))):
      raise ValueError(f"{self.path}: {name}_token_id {index} is outside the vocabulary of {size}; the file is damaged")
    return index


def _config(fields: _Fields, tensors: dict) -> ModelConfig:
  reasons = []
  known = [name for name, family in families.FAMILIES.items() if family.gguf is not None]
  if fields.arch not in known:
    reasons.append(f"architecture {fields.arch!r}; supported are {', '.join(known)}")
  given = lambda key: [key] if fields.get(f"{{arch}}.{key}", default=0) not in (0, [], "") else []
  reasons += refusals(*map(given, ("expert_count", "attention.kv_lora_rank", "attention.sliding_window")))
  factor = fields.get("{arch}.rope.scaling.factor", float, 0.0)
  scaling_type = fields.get("{arch}.rope.scaling.type", default="linear" if factor else "none")  # as in llama.cpp
  plain = scaling_type == "linear" and factor in (0, 1)  # divides by 1
  if scaling_type not in ("none", "") and not plain:
    reasons.append(f"RoPE scaling of type {shown(scaling_type)}")
  if (old := fields.get("{arch}.rope.scale_linear", float, 1.0)) not in (0, 1):  # of old files
    reasons.append(f"RoPE scaling by {old}")
  if not fields.get("{arch}.attention.causal", bool, True):
    reasons.append("attention.causal=false: tokens see later ones")
  if reasons:
    raise ValueError(f"{fields.path}: not supported: {'; '.join(reasons)}")
  heads, width = fields.get("{arch}.attention.head_count", int), fields.get("{arch}.embedding_length", int)
  rotated = fields.get("{arch}.rope.dimension_count", int, None)
  head_dim = fields.get("{arch}.attention.key_length", int, rotated or width // max(heads, 1))
  family = families.get(fields.arch)
  if rotated not in (None, head_dim) and not (family.partial_rope and 0 < rotated < head_dim):
    raise ValueError(f"{fields.path}: not supported: RoPE on {rotated} of {head_dim} channels")
  eos = [fields.token_id(name) for name in ("eos", "eot", "eom")]
  tokens = fields.get("tokenizer.ggml.tokens", list)
  values = dict(
    num_layers=fields.get("{arch}.block_count", int),
    d_model=width,
    d_ff=fields.get("{arch}.feed_forward_length", int),
    num_heads=heads,
    num_kv_heads=fields.get("{arch}.attention.head_count_kv", int, heads),
    head_dim=head_dim,
    vocab_size=tensors["token_embd.weight"].shape[0] if "token_embd.weight" in tensors else len(tokens),
    max_position_embeddings=fields.get("{arch}.context_length", int),
    rope_theta=fields.get("{arch}.rope.freq_base", float, 10000.0),
    rms_norm_eps=fields.get("{arch}.attention.layer_norm_rms_epsilon", float),
    tie_embeddings="output.weight" not in tensors,
    eos_token_ids=tuple(dict.fromkeys(i for i in eos if i is not None)),
    **({} if rotated is None else {"rope_fraction": rotated / head_dim}),
    **{ours: fields.get(f"{{arch}}.{theirs}", float) for theirs, ours in family.gguf_keys.items()},
  )
  try:
    config = family.config(**values, **family.read({"num_hidden_layers": values["num_layers"]}))
    if _ROPE_FREQS in tensors:
      config = dataclasses.replace(config, rope_scaling=_scaling(config, tensors[_ROPE_FREQS]))
  except (ValueError, ZeroDivisionError) as error:
    raise ValueError(f"{fields.path}: {error}") from None
  return config


def _scaling(config: ModelConfig, tensor) -> RopeScaling:
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


def _tensors(found: list[gguf_file.Entry], config: ModelConfig, path: str) -> Tensors:
  check_layers(config.num_layers, len(found), path)
  family = families.get(config.family)
  names, paired = _NAMES | (family.gguf or {}), family.paired_rope
  heads = {"layers/q_proj": config.num_heads, "layers/k_proj": config.num_kv_heads} if paired else {}
  of_name = {}  # GGUF name -> (Hugging Face name, number of heads whose rows are in pairs or 0)
  for param, spec in param_table(config).items():
    for name, layer in hf_names(param, spec):
      own = names[param] if layer is None else f"blk.{layer}.{names[param]}"
      of_name[own] = (name, heads.get(param, 0))
  entries, shapes = {}, {}
  for tensor in found:
    if tensor.name == _ROPE_FREQS:
      continue
    name, permuted = of_name.get(tensor.name, (tensor.name, 0))
    entries[name] = (tensor, permuted)
    shapes[name] = tensor.shape

  def read_tensor(name: str) -> np.ndarray:
    tensor, permuted = entries[name]
    try:
      value = tensor.values()
    except ValueError as error:
      raise ValueError(f"{path}: {error}") from None
    if permuted:
      rows, inputs = value.shape
      value = value.reshape(permuted, rows // permuted // 2, 2, inputs).swapaxes(1, 2).reshape(rows, inputs)
    return value

  return Tensors(path, shapes, read_tensor, "float32")


def _tokenizer(fields: _Fields) -> Tokenizer:
  kind, pre = fields.get("tokenizer.ggml.model", str), fields.get("tokenizer.ggml.pre", str, "default")
  if kind != "gpt2" or pre not in _PRE_TOKENIZERS:
    raise ValueError(
      f"{fields.path}: tokenizer {kind!r} with pre-tokenizer {pre!r} is not supported from GGUF (there are gpt2 with "
      f"{', '.join(_PRE_TOKENIZERS)}); convert the model's Hugging Face directory instead"
    )
  rules = _PRE_TOKENIZERS[pre]
  tokens = fields.get("tokenizer.ggml.tokens", list)
  types = fields.get("tokenizer.ggml.token_type", list, [1] * len(tokens))
  merges = fields.get("tokenizer.ggml.merges", list)
  for name, texts in (("tokens", tokens), ("merges", merges)):
    if not all(isinstance(text, str) for text in texts):
      raise ValueError(f"{fields.path}: tokenizer.ggml.{name} are no texts; the file is damaged")
  merges = [tuple(merge.split(" ", 1)) for merge in merges]
  if len(set(tokens)) != len(tokens):
    raise ValueError(f"{fields.path}: {len(tokens) - len(set(tokens))} tokens are there twice; the file is damaged")
  if len(types) != len(tokens):
    raise ValueError(f"{fields.path}: {len(types)} token types for {len(tokens)} tokens; the file is damaged")
  try:
    vocab = {token: index for index, token in enumerate(tokens)}
    normalizer = normalizers.NFC() if rules.nfc else None
    backend = bpe_tokenizer(vocab, merges, rules.build(), normalizer=normalizer, ignore_merges=rules.ignore_merges)
  except Exception as error:  # the library raises plain Exception
    raise ValueError(f"{fields.path}: vocabulary and merges do not fit ({error}); the file is damaged") from None
  for wanted, special in ((_CONTROL, True), (_USER_DEFINED, False)):
    added = [t for t, type_ in zip(tokens, types, strict=True) if type_ == wanted]
    backend.add_tokens([tokenizers.AddedToken(t, special=special, normalized=False) for t in added])
  settings = {
    "tokenizer_class": "PreTrainedTokenizerFast",
    "clean_up_tokenization_spaces": False,
    "model_max_length": fields.get("{arch}.context_length", int),
    "add_bos_token": fields.get("tokenizer.ggml.add_bos_token", bool, rules.adds_bos),
  }
  for name, key in (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding")):
    if (index := fields.token_id(key)) is not None:
      settings[f"{name}_token"] = tokens[index]
  if (template := fields.get("tokenizer.chat_template", str, None)) is not None:
    settings["chat_template"] = template
  tokenizer = Tokenizer(backend, settings)
  if tokenizer.adds_bos:  # for other readers of tokenizer.json
    bos = settings["bos_token"]
    backend.post_processor = processors.TemplateProcessing(
      single=f"{bos} $A", pair=f"{bos} $A {bos} $B", special_tokens=[(bos, tokenizer.bos_token_id)]
    )
  else:
    backend.post_processor = processors.ByteLevel(trim_offsets=False)
  return tokenizer
