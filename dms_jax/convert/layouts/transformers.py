"""The layout of transformers: safetensors, config.json and tokenizer files.

It is read with the gates of every layout that holds a whole model: `gates` tells them apart by their files.
"""

from __future__ import annotations

import dataclasses
import re
import warnings
from pathlib import Path

import numpy as np

from dms_jax import families
from dms_jax.config import DMSConfig, ModelConfig
from dms_jax.convert import mxfp4, pickles
from dms_jax.convert.layouts import fastdms, nvidia
from dms_jax.convert.layouts.keys import Gates
from dms_jax.convert.safetensors_file import GATES, open_tensors
from dms_jax.convert.tensors import Progress, Tensors
from dms_jax.convert.writing import (
  CARD,
  GATES_CONFIG,
  GENERATION,
  PLAIN_NEURON,
  About,
  base_tensors,
  write_card,
  write_configs,
  write_gates,
  write_weights,
)
from dms_jax.decoder import Model
from dms_jax.families.huggingface import config_from_hf
from dms_jax.json_files import from_json, read_json
from dms_jax.tokenizer import TOKENIZER_FILE, Tokenizer

NAME = "transformers"
_ROPE_TABLE = re.compile(r".*\.rotary_emb\.inv_freq")
_HEAD, _EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"


def read(path: str | Path) -> tuple[ModelConfig, DMSConfig | None, Tensors, Tokenizer | None]:
  """Config, gates (None without), tensors and tokenizer (None without tokenizer.json) of a Hugging Face directory.

  Raises:
    ValueError: a file is missing or damaged, or the model is not supported.
  """
  path = Path(path)
  if not (path / "config.json").exists() and (pickled := pickles.find(path)):
    raise ValueError(pickles.refusal(path, pickled))
  values = read_json(path / "config.json")
  if "format" in values and "model_type" not in values:
    raise ValueError(f"{path}: already a dms_jax checkpoint; nothing to convert")
  generation = read_json(path / GENERATION) if (path / GENERATION).exists() else None
  config, found = config_from_hf(values, str(path / "config.json"), generation), gates(path, values)
  tokenizer = Tokenizer.load(path) if (path / TOKENIZER_FILE).exists() else None
  tensors = _with_prefix(mxfp4.widened(open_tensors(path)), families.get(config.family).prefix)
  head, embedding = _head_names(config)
  if config.tie_embeddings and _has_own_head(tensors, head, embedding):
    config = dataclasses.replace(config, tie_embeddings=False)
    differs = f"config.json ties the output head to the embedding, but {head} is there and differs"
    warnings.warn(f"{path}: {differs}: it is used", stacklevel=2)
  return config, None if found is None else found.dms, tensors, tokenizer


def _with_prefix(tensors: Tensors, prefix: str | None) -> Tensors:
  """The tensors under names with the prefix, which files of the model without its head leave out."""
  if prefix is None or any(name.startswith(prefix) for name in tensors.shapes):
    return tensors
  shapes = {prefix + name: shape for name, shape in tensors.shapes.items()}
  return dataclasses.replace(tensors, shapes=shapes, read=lambda name: tensors.read(name.removeprefix(prefix)))


def _head_names(config: ModelConfig) -> tuple[str, str]:
  """Hugging Face's names of the output head and of the embedding."""
  names = families.get(config.family).names
  return names.get("lm_head", _HEAD), names.get("embed", _EMBEDDING)


def _has_own_head(tensors: Tensors, head: str, embedding: str) -> bool:
  """Whether an output head is stored that is not the embedding: as in transformers, it is then used."""
  shapes = [tensors.shapes.get(name) for name in (head, embedding)]
  if None in shapes:
    return False
  return shapes[0] != shapes[1] or not np.array_equal(tensors.read(head), tensors.read(embedding))


def gates(path: Path, values: dict) -> Gates | None:
  """The gates of the directory `path`, whose config.json holds `values`; None without any.

  Raises:
    ValueError: a value cannot be read, or the gates are of another kind.
  """
  if (path / GATES_CONFIG).exists():  # written by `write`
    dms = from_json(DMSConfig, read_json(path / GATES_CONFIG), str(path / GATES_CONFIG))
    return Gates(dms, "dms_torch" if (path / "modeling_dms.py").exists() else NAME, GATES_CONFIG)
  return fastdms.find(path) or nvidia.read(values, str(path))


def base_name(path: Path, values: dict, found: Gates | None) -> str | None:
  """The model that the one in `path` was made from, as its files name it; None if they do not.

  They are dms_metadata.json or training_log.json, the `base_model` of README.md, or `_name_or_path` of config.json.

  Args:
    values: content of config.json.
    found: the gates.
  """
  if found is not None and found.base is not None:
    return found.base
  if (path / CARD).is_file():
    card = (path / CARD).read_text(encoding="utf-8", errors="replace")
    if named := re.search(r"^base_model:\s*(?:-\s*)?[\"']?([\w./-]+)", card, re.MULTILINE):
      return named[1]
  name = values.get("_name_or_path")
  return name if isinstance(name, str) and name else None


def is_ignored(config: ModelConfig, name: str) -> bool:
  """Whether a tensor is redundant, as the RoPE tables and tied output heads that older checkpoints store."""
  ignored = families.get(config.family).ignored
  if ignored is not None and re.fullmatch(ignored, name):
    return True
  return bool(_ROPE_TABLE.fullmatch(name)) or (config.tie_embeddings and name == _head_names(config)[0])


def write(
  directory: Path,
  model: Model,
  tokenizer: Tokenizer | None,
  *,
  dtype: str,
  shard_bytes: int,
  progress: Progress | None = None,
  about: About = About(),
) -> None:
  """Writes the dense model, low-rank updates merged, as transformers loads it, and the gates in files of their own.

  Plain transformers ignores those files: dms_config.json, and dms_gates.safetensors with the gates' tensors in float32,
  under NVIDIA's names. `read` reads both.
  """
  model = model.merged()
  write_weights(directory, base_tensors(model, dtype), shard_bytes, progress)
  write_gates(directory, model)
  write_configs(directory, model, tokenizer, dtype)
  write_card(directory, NAME, model, about, loading=_LOADING, missing=_missing(model))


_LOADING = """    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained("THIS_FOLDER", dtype="auto")
    tokenizer = AutoTokenizer.from_pretrained("THIS_FOLDER")
"""


def _missing(model: Model) -> list[str]:
  """What plain transformers makes nothing of."""
  if model.dms is None:
    return []
  lost = [f"Eviction, for others: plain transformers ignores {GATES_CONFIG} and {GATES}, which hold the gates."]
  if model.dms.gate == "neuron":
    lost.append(PLAIN_NEURON)
  return lost
