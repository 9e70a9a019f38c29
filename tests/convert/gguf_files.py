"""GGUF files of tiny models, written as llama.cpp's converter writes them, for tests."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGMLQuantizationType, GGUFWriter, quants

from dms_jax import checkpoint, families
from dms_jax import testing as tiny
from dms_jax.config import ModelConfig
from dms_jax.convert import convert, gguf
from dms_jax.convert.tensors import Tensors, from_params, to_params
from dms_jax.families.huggingface import config_to_hf
from dms_jax.params import flatten
from dms_jax.tokenizer import _char_of_byte
from tests.helpers import OTHER_FAMILIES, family

TOKENS = [*_char_of_byte(), "Ġt", "he", "12", "123", "1234", "<user>", "<bos>", "<eos>", "<eot>"]
MERGES = ["Ġ t", "h e", "1 2", "12 3", "123 4"]
USER, BOS, EOS, EOT = range(len(TOKENS) - 4, len(TOKENS))
TYPES = [1] * 256 + [1] * 5 + [4, 3, 3, 3]
SIZES = dict(d_model=64, d_ff=96, vocab_size=len(TOKENS), eos_token_ids=(EOS,))
FAMILIES = {
  "llama": tiny.config(tie_embeddings=False, **SIZES),
  "llama-tied": tiny.config(head_dim=32, num_kv_heads=1, **SIZES),
  "qwen2": tiny.config(family="qwen2", qkv_bias=True, rms_norm_eps=1e-6, rope_theta=1e6, **SIZES),
  "qwen3": tiny.config(family="qwen3", qk_norm=True, tie_embeddings=False, head_dim=32, **SIZES),
}
LARGE = tiny.config(**SIZES | dict(vocab_size=400))
OTHERS = {
  "mistral": family("mistral", **SIZES),
  "phi3": family("phi3", tie_embeddings=False, **SIZES),
  "phi3-partial": family("phi3", rope_fraction=0.75, **SIZES),
  "olmo2": family("olmo2", tie_embeddings=False, **SIZES),
  "granite": family("granite", embed_scale=3.0, residual_scale=0.4, attention_scale=0.1, logit_divisor=2.0, **SIZES),
  "smollm3": family("smollm3", num_layers=4, rope_layers=(True, True, True, False), **SIZES),
  **{
    name: dataclasses.replace(OTHER_FAMILIES[name], **SIZES, **changes)
    for name, changes in {
      "mixtral": {},
      "qwen3_moe": {},
      "olmo3": dict(rope_scaling=None),
      "gpt_oss": dict(swiglu_limit=7.0, rope_scaling=None),
      "gpt2": dict(),
      "gpt_neox": {},
      "gemma2": dict(embed_scale=8.0, attention_scale=8**-0.5),
      "gemma3": dict(embed_scale=8.0, attention_scale=8**-0.5, rope_scaling=None),
    }.items()
  },
}
PRE = {
  "llama": "smollm", "mistral": "tekken", "mixtral": "llama-bpe", "qwen2": "qwen2", "qwen3": "qwen2",
  "qwen3_moe": "qwen2", "phi3": "dbrx", "olmo2": "dbrx", "olmo3": "dbrx", "granite": "refact", "smollm3": "smaug-bpe",
  "gpt2": "gpt-2", "gpt_neox": "olmo", "gpt_oss": "gpt-4o", "gemma2": "smollm", "gemma3_text": "smollm",
}  # fmt: skip


def stated(c: ModelConfig) -> dict[str, Any]:
  """The metadata of a model, but for its tokenizer."""
  own = families.get(c.family).gguf
  arch = own.architecture
  layer_norm = families.get(c.family).fixed.get("layer_norm")
  values = {
    f"{arch}.block_count": c.num_layers, f"{arch}.context_length": c.max_position_embeddings,
    f"{arch}.embedding_length": c.d_model,
    f"{arch}.{'expert_' if c.family in ('qwen3_moe', 'gpt_oss') else ''}feed_forward_length": c.d_ff,
    f"{arch}.attention.head_count": c.num_heads, f"{arch}.attention.head_count_kv": c.num_kv_heads,
    f"{arch}.attention.key_length": c.head_dim, f"{arch}.rope.freq_base": c.rope_theta,
    f"{arch}.attention.layer_norm_{'epsilon' if layer_norm else 'rms_epsilon'}": c.rms_norm_eps,
  }  # fmt: skip
  hf = config_to_hf(c, "float32")
  local = {f"{arch}.rope.freq_base_swa": c.local_rope_theta}
  values |= {f"{arch}.{key}": hf[theirs] for key, theirs in own.keys.items() if theirs != "rope_theta"}
  values |= local if c.local_rope_theta is not None else {}
  values |= {f"{arch}.rope.dimension_count": c.rotated} if 0 < c.rope_fraction < 1 else {}
  if c.sliding_layers:
    values[f"{arch}.attention.sliding_window_pattern"] = list(c.sliding_layers)
  return values


def write(
  path: Path,
  config: ModelConfig,
  *,
  quantize=None,
  pre: str | None = None,
  drop=(),
  tensors=None,
  without=(),
  blocks=(),
  vocabulary=None,
  **metadata,
) -> dict[str, np.ndarray]:
  """Writes a random model as llama.cpp's converter would; returns its tensors in our layout, as they were written.

  Args:
    quantize: type of the matrices; others stay float32.
    drop: metadata keys to leave out, by suffix.
    tensors: more tensors; `without` leaves out some; `blocks`, {name: (bytes, type)}, are quantised already.
    vocabulary: tokens, and scores if they are SentencePiece's, in the place of `TOKENS`.
    metadata: more keys, "__" for "." and "arch" for the architecture.
  """
  c, own = config, families.get(config.family).gguf
  arch = own.architecture
  writer = GGUFWriter(str(path), arch)
  values = stated(c) | {
    "tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": pre or PRE[c.family],
    "tokenizer.ggml.bos_token_id": BOS, "tokenizer.ggml.eos_token_id": EOS,
  }  # fmt: skip
  vocabulary = {"tokens": TOKENS, "token_type": TYPES, **(vocabulary or {})}
  if "scores" in vocabulary:
    specials = {"tokenizer.ggml.bos_token_id": 1, "tokenizer.ggml.eos_token_id": 2}
    values |= {"tokenizer.ggml.model": "llama", "tokenizer.ggml.pre": "default", **specials}
    writer.add_token_scores(vocabulary["scores"])
  values |= {k.replace("__", ".").replace("arch.", f"{arch}."): v for k, v in metadata.items()}
  for key, value in values.items():
    if key.endswith(tuple(drop)) and drop:
      continue
    kinds = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}
    (writer.add_array if isinstance(value, list) else kinds[type(value)])(key, value)
  writer.add_token_list(vocabulary["tokens"])
  writer.add_token_types(vocabulary["token_type"])
  writer.add_token_merges(MERGES)
  table, stored = gguf.table(c), {}
  heads = {"attn_q.weight": c.num_heads, "attn_k.weight": c.num_kv_heads} if own.paired_rope else {}
  for label, shape, _, read in from_params(table, tiny.model(c).params):
    matrix = read()
    paired = heads.get(label.split(".", 2)[-1])
    if paired:  # as llama.cpp's convert_hf_to_gguf.py does
      matrix = matrix.reshape(paired, 2, c.head_dim // 2, -1).swapaxes(1, 2).reshape(shape)
    plus = np.float32(c.norm_plus_one and label.endswith("_norm.weight"))
    if quantize is not None and matrix.ndim > 1:
      data = quants.quantize(matrix, quantize)
      back = quants.dequantize(data, quantize)
      if label not in without:
        writer.add_tensor(label, data, raw_dtype=quantize)
    else:
      back = matrix + plus
      if label not in without:
        writer.add_tensor(label, back)
      back = back - plus
    if paired:
      back = back.reshape(paired, c.head_dim // 2, 2, -1).swapaxes(1, 2).reshape(shape)
    stored[label] = back
  written = flatten(to_params(table, Tensors("", {n: v.shape for n, v in stored.items()}, stored.get, ""), np.float32))
  for label, value in (tensors or {}).items():
    writer.add_tensor(label, value)
  for label, (value, kind) in dict(blocks).items():
    writer.add_tensor(label, value, raw_dtype=GGMLQuantizationType[kind])
  writer.write_header_to_file()
  writer.write_kv_data_to_file()
  writer.write_tensors_to_file()
  writer.close()
  return written


def loaded(path: Path, folder: Path, **kwargs):
  return checkpoint.load(convert(str(path), folder / "ours", **kwargs))
