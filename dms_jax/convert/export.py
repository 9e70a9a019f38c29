"""Exports a model into a directory of one of the layouts of `dms_jax.convert.layouts`."""

from __future__ import annotations

import contextlib
import re
from pathlib import Path

from dms_jax import disk
from dms_jax.checkpoint import nbytes
from dms_jax.convert.layouts import LAYOUTS, peft
from dms_jax.convert.tensors import DTYPES, Progress
from dms_jax.convert.writing import CARD, MARK, SHARD_BYTES, About, one_ratio, refuse
from dms_jax.decoder import Model
from dms_jax.json_files import read_json
from dms_jax.params import param_table
from dms_jax.tokenizer import Tokenizer

_OURS = re.compile(
  r"model.*\.safetensors(\.index\.json)?|(config|generation_config|tokenizer.*|dms_.*|adapter_.*|chat_template)\.\w+"
  r"|(modeling|configuration)_\w+\.py|README\.md"
)


def export(
  path: str | Path,
  model: Model,
  tokenizer: Tokenizer | None = None,
  *,
  layout: str = "transformers",
  dtype: str | None = None,
  overwrite: bool = False,
  shard_bytes: int = SHARD_BYTES,
  progress: Progress | None = None,
  about: About = About(),
) -> Path:
  """Writes a directory of the given layout, atomically; returns `path`.

  Args:
    layout: a name in `layouts.LAYOUTS`.
    dtype: dtype of the weights, "float32", "bfloat16" or "float16"; default the model's (the low-rank updates'
      for "peft").
    overwrite: replace an earlier export.
    shard_bytes: most bytes of one safetensors file.
    progress: called as progress(done, total, file name).
    about: what the files say of the model and no parameter holds.

  Raises:
    ValueError: `path` exists and may not be replaced, the disk has no room, dtype or layout is unknown, or the layout
      cannot hold the model.
  """
  if layout not in LAYOUTS:
    raise ValueError(f"--layout={layout}: must be one of {', '.join(LAYOUTS)}")
  if dtype is None:
    dtype = peft.own_dtype(model) if layout == peft.NAME else str(model.dtype)
  if dtype not in DTYPES:
    raise ValueError(f"dtype={dtype!r} is not one of {DTYPES}")
  if model.lora is not None and model.lora.by_cr:  # no layout scales updates by the row
    model = one_ratio(model, about)
    if model.lora.by_cr:
      low, high = model.dms.elastic
      refuse(layout, [f"low-rank updates by each row's CR (choose one with --cr, from {low:g} to {high:g})"])
  path = Path(path)
  if path.exists() and not overwrite and (not path.is_dir() or any(path.iterdir())):
    raise ValueError(f"{path}: exists already; choose another place or pass --overwrite")
  groups = ("gate", "lora") if layout == peft.NAME else ("base", "gate")
  table = param_table(model.config, model.dms, model.lora)
  disk.check_room(path, nbytes({name: spec for name, spec in table.items() if spec.group in groups}, dtype))
  with disk.atomic_directory(path, replaces=_is_export) as directory:
    LAYOUTS[layout].write(
      directory, model.stacked(), tokenizer, dtype=dtype, shard_bytes=shard_bytes, progress=progress, about=about
    )
  return path


def _is_export(path: Path) -> bool:
  """Whether a directory holds only files that `export` writes."""
  if not all(file.is_file() and _OURS.fullmatch(file.name) for file in path.iterdir()):
    return False
  with contextlib.suppress(OSError, UnicodeDecodeError):
    if MARK in (path / CARD).read_text(encoding="utf-8"):
      return True
  with contextlib.suppress(ValueError):  # exports of version 0.2 have no README.md
    return "architectures" in read_json(path / "config.json")
  return False
