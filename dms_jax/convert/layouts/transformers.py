"""The layout of transformers: safetensors, config.json and tokenizer files."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import re
import warnings
from pathlib import Path

import jax.numpy as jnp
import numpy as np

from dms_jax.checkpoint import atomic_directory
from dms_jax.config import DMSConfig, ModelConfig, from_json, read_json, to_json
from dms_jax.convert.layouts import fastdms, nvidia
from dms_jax.convert.safetensors_file import GATES, INDEX, open_tensors
from dms_jax.convert.tensors import DTYPES, Progress, Tensors, from_params, tensor_bytes
from dms_jax.families.huggingface import config_from_hf, config_to_hf
from dms_jax.model import Model
from dms_jax.params import param_table
from dms_jax.tokenizer import TOKENIZER_FILE, Tokenizer

GENERATION, GATES_CONFIG = "generation_config.json", "dms_config.json"
SHARD_BYTES = 5 * 10**9
_ROPE_TABLE = re.compile(r".*\.rotary_emb\.inv_freq")
_HEAD, _EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"


def read(path: str | Path) -> tuple[ModelConfig, DMSConfig | None, Tensors, Tokenizer | None]:
  """Config, gates (None without), tensors and tokenizer (None without tokenizer.json) of a Hugging Face directory.

  Raises:
    ValueError: a file is missing or damaged, or the model is not supported.
  """
  path = Path(path)
  values = read_json(path / "config.json")
  if "format" in values and "model_type" not in values:
    raise ValueError(f"{path}: already a dms_jax checkpoint; nothing to convert")
  generation = read_json(path / GENERATION) if (path / GENERATION).exists() else None
  config, dms = config_from_hf(values, str(path / "config.json"), generation), gates(path, values)
  tokenizer = Tokenizer.load(path) if (path / TOKENIZER_FILE).exists() else None
  tensors = open_tensors(path)
  if config.tie_embeddings and _has_own_head(tensors):
    config = dataclasses.replace(config, tie_embeddings=False)
    differs = f"config.json ties the output head to the embedding, but {_HEAD} is there and differs"
    warnings.warn(f"{path}: {differs}: it is used", stacklevel=2)
  return config, dms, tensors, tokenizer


def _has_own_head(tensors: Tensors) -> bool:
  """Whether an output head is stored that is not the embedding: as in transformers, it is then used."""
  head, embedding = tensors.shapes.get(_HEAD), tensors.shapes.get(_EMBEDDING)
  if head is None or embedding is None:
    return False
  return head != embedding or not np.array_equal(tensors.read(_HEAD), tensors.read(_EMBEDDING))


def gates(path: Path, values: dict) -> DMSConfig | None:
  """The gates of the directory `path`, whose config.json holds `values`; None without any.

  Raises:
    ValueError: a value cannot be read, or the gates are of another kind.
  """
  if (path / GATES_CONFIG).exists():  # written by `export`
    return from_json(DMSConfig, read_json(path / GATES_CONFIG), str(path / GATES_CONFIG))
  return fastdms.find(path) or nvidia.gates(values, str(path))


def is_ignored(config: ModelConfig, name: str) -> bool:
  """Whether a tensor is redundant, as the RoPE tables and tied output heads that older checkpoints store."""
  return bool(_ROPE_TABLE.fullmatch(name)) or (config.tie_embeddings and name == _HEAD)


def export(
  path: str | Path,
  model: Model,
  tokenizer: Tokenizer | None = None,
  *,
  dtype: str | None = None,
  overwrite: bool = False,
  shard_bytes: int = SHARD_BYTES,
  progress: Progress | None = None,
) -> Path:
  """Writes a directory that transformers loads, atomically; returns `path`.

  Low-rank updates are merged. Gates are written to separate files, which plain transformers ignores: dms_config.json,
  and dms_gates.safetensors with the adapter's tensors under NVIDIA's names. `read` reads both.

  Args:
    dtype: dtype of the weights, "float32", "bfloat16" or "float16"; default the model's.
    overwrite: replace an earlier export.
    shard_bytes: most bytes of one safetensors file.
    progress: called as progress(done, total, file name).

  Raises:
    ValueError: `path` exists and may not be replaced, or dtype is unknown.
  """
  try:
    from safetensors.numpy import save_file
  except ImportError:
    raise ValueError("writing safetensors needs the safetensors package: pip install 'dms_jax[convert]'") from None
  model = model.merged()
  dtype = str(model.dtype) if dtype is None else dtype
  if dtype not in DTYPES:
    raise ValueError(f"dtype={dtype!r} is not one of {DTYPES}")
  path = Path(path)
  if path.exists() and not overwrite and (not path.is_dir() or any(path.iterdir())):
    raise ValueError(f"{path}: exists already; choose another place or pass --overwrite")
  table = param_table(model.config, model.dms)
  groups = {g: {n: s for n, s in table.items() if s.group == g} for g in ("base", "gate")}
  with atomic_directory(path, replaces=_is_export) as directory:
    _write_weights(directory, list(from_params(groups["base"], model.params, jnp.dtype(dtype))), shard_bytes, progress)
    if model.dms is not None:
      _write_json(directory / GATES_CONFIG, to_json(model.dms))
    if groups["gate"]:  # float32: they are small, and a rounded logit can flip a decision
      adapter = {name: read_one() for name, _, read_one in from_params(groups["gate"], model.params, jnp.float32)}
      save_file(adapter, directory / GATES, metadata={"format": "pt"})
    values = config_to_hf(model.config, dtype)
    _write_json(directory / GENERATION, {"eos_token_id": values["eos_token_id"]})
    if tokenizer is not None:
      tokenizer.save(directory)
      values["bos_token_id"] = tokenizer.bos_token_id
    _write_json(directory / "config.json", values)
  return path


def _write_weights(directory: Path, tensors: list, shard_bytes: int, progress: Progress | None) -> None:
  from safetensors.numpy import save_file

  dtype = tensors[0][2]().dtype
  shards: list[list] = [[]]
  free = shard_bytes
  for entry in tensors:
    size = tensor_bytes(entry[1], dtype)
    if size > free and shards[-1]:
      shards.append([])
      free = shard_bytes
    shards[-1].append(entry)
    free -= size
  total = len(shards)
  numbered = [f"model-{i + 1:05d}-of-{total:05d}.safetensors" for i in range(total)]
  names = numbered if total > 1 else ["model.safetensors"]
  for i, (name, shard) in enumerate(zip(names, shards, strict=True)):
    save_file({n: read_one() for n, _, read_one in shard}, directory / name, metadata={"format": "pt"})
    if progress is not None:
      progress(i + 1, total, name)
  if total > 1:
    weight_map = {n: name for name, shard in zip(names, shards, strict=True) for n, _, _ in shard}
    size = sum(tensor_bytes(shape, dtype) for _, shape, _ in tensors)
    _write_json(directory / INDEX, {"metadata": {"total_size": size}, "weight_map": weight_map})


def _is_export(path: Path) -> bool:
  """Whether a directory holds only files that `export` writes."""
  ours = re.compile(r"(model.*\.safetensors(\.index\.json)?|(config|generation_config|tokenizer.*|dms_.*)\.\w+)")
  with contextlib.suppress(ValueError):
    return "architectures" in read_json(path / "config.json") and all(ours.fullmatch(f.name) for f in path.iterdir())
  return False


def _write_json(path: Path, values: dict) -> None:
  path.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
