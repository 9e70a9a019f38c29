"""FastDMS's layout: a neuron gate in a file of its own; each token decides about itself.

Released checkpoints hold dms_metadata.json. FastDMS's trainer writes the weights to OUT/final/, with a plain
config.json, and the settings of the gates to OUT/training_log.json. As in its loader, either file comes before the keys
of config.json.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from dms_jax.convert.layouts import keys
from dms_jax.convert.layouts.keys import Gates
from dms_jax.convert.tensors import Progress
from dms_jax.convert.writing import (
  PLAIN_NEURON,
  About,
  base_tensors,
  one_ratio,
  require,
  whole,
  write_card,
  write_configs,
  write_json,
  write_weights,
)
from dms_jax.decoder import Model
from dms_jax.json_files import read_json, shown
from dms_jax.tokenizer import Tokenizer

NAME = "fastdms"
METADATA, LOG = "dms_metadata.json", "training_log.json"
_NAMES = {
  "window": ("window_size", "dms_window_size"),
  "scale": ("alpha_scale", "dms_alpha_scale"),
  "offset": ("alpha_offset", "dms_alpha_offset", "dms_initial_alpha_offset"),
  "shift": ("shift", "dms_shift"),
  "cr": ("target_cr", "dms_cr"),
}
_LOADING = """    from fastdms import LLM

    llm = LLM("THIS_FOLDER", compact_kv_enabled=True, compact_kv_retention_mode="dms")
"""
_MISSING = (
  "Low-rank updates apart from the weights: they are merged.",
  "Eviction at every step: FastDMS evicts in batches and may hold a token longer than dms_jax does.",
  PLAIN_NEURON,
)


def find(path: Path) -> Gates | None:
  """The gates of the checkpoint folder `path`; None without a file that holds them.

  Raises:
    ValueError: as `read`.
  """
  if (path / METADATA).exists():
    return read(read_json(path / METADATA), str(path))
  log = path.absolute().parent / LOG
  if not log.is_file():
    return None
  try:
    settings = read_json(log).get("config")
  except ValueError:  # other trainers write files of this name, too
    return None
  if isinstance(settings, dict) and {"alpha_scale", "alpha_offset", "window_size"} & set(settings):
    return read({"config": settings}, str(log), file=LOG)
  return None


def read(metadata: dict, source: str, file: str = METADATA) -> Gates:
  """The gates of dms_metadata.json; `metadata` is its content, with the settings at the top or under "config".

  Args:
    source: name of the checkpoint, for errors.

  Raises:
    ValueError: a value cannot be read, or the gates are of another kind.
  """
  if "sidecar" in metadata or metadata.get("schema_version", 1) not in (1, None):
    version = shown(metadata.get("schema_version"))
    raise ValueError(f"{source}: {METADATA} of schema {version}: sidecar gates differ")
  if not isinstance(metadata.get("config", {}), dict):
    raise ValueError(f"{source}: {METADATA}: config should be an object, found {shown(metadata['config'])}")
  values = {**metadata, **metadata.get("config", {})}
  found = keys.read(
    values, source, _NAMES, layout=NAME, file=file, gate="neuron", shift=0, window=256,
    shift_rule="FastDMS decides about the token itself",
  )  # fmt: skip
  base = next((values[name] for name in ("base_model", "model") if isinstance(values.get(name), str)), None)
  return dataclasses.replace(found, base=base)


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
  """Writes the dense weights, low-rank updates merged; the gate's settings in dms_metadata.json and in config.json.

  A gate of shift 1 is refused: its decision about token t is computed from token t + 1, which FastDMS has not read when
  it decides. No change of weights makes the two equal.

  Raises:
    ValueError: the gate is not the neuron of shift 0 for each head, eviction is off, or the family is not in FastDMS.
  """
  model = one_ratio(model, about)
  dms = require(NAME, model, families=("llama", "qwen3"), gate="neuron", shift=0)
  model = model.merged()
  settings: dict[str, Any] = {"window_size": dms.window, "alpha_scale": dms.scale, "alpha_offset": dms.offset}
  config = {
    "dms_window_size": dms.window, "dms_alpha_scale": dms.scale, "dms_initial_alpha_offset": dms.offset, "dms_shift": 0,
  }  # fmt: skip
  if about.cr is not None:
    settings["target_cr"] = config["dms_cr"] = whole(about.cr)
  if about.base is not None:
    settings["base_model"] = about.base
  write_weights(directory, base_tensors(model, dtype), shard_bytes, progress)
  write_configs(directory, model, tokenizer, dtype, **config)
  write_json(directory / METADATA, {**settings, "shift": 0})
  write_card(directory, NAME, model, about, loading=_LOADING, missing=_MISSING)
