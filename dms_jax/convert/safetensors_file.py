"""Safetensors files: which of a folder hold the weights; headers, checked; tensors, one at a time."""

from __future__ import annotations

import json
import math
import os
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from dms_jax.checkpoint import first_line
from dms_jax.convert import mxfp4, pickles
from dms_jax.convert.tensors import Output, Tensors
from dms_jax.json_files import damage, read_json, shown

WEIGHTS, INDEX, GATES = "model.safetensors", "model.safetensors.index.json", "dms_gates.safetensors"
_DTYPES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
_BUFFERS = ("I64", "BOOL")  # types of counters, position ids and masks, which no weight has
_OTHERS = re.compile(r"(adapter_model|consolidated(\.\d+)?|dms_gates)\.safetensors")  # beside the model's own


def _weight_files(path: Path) -> list[Path]:
  """The files of weights: one, or the index's; model.safetensors is preferred, as in transformers."""
  gates = [path / GATES] * (path / GATES).is_file()
  if (path / WEIGHTS).is_file():
    return [path / WEIGHTS, *gates]
  if (path / INDEX).exists():
    index = read_json(path / INDEX).get("weight_map")
    if not isinstance(index, dict) or not index or not all(isinstance(name, str) for name in index.values()):
      raise ValueError(f"{path / INDEX}: no weight_map in it; the file is damaged")
    if outside := [name for name in set(index.values()) if name in ("", ".", "..") or Path(name).name != name]:
      raise ValueError(f"{path / INDEX}: {shown(outside[0])} is no name of a file beside it")
    files = [path / name for name in sorted(set(index.values()))]
    if missing := [f.name[:80] for f in files if not os.path.isfile(f)]:  # false for names that no file can have
      more = f" and {len(missing) - 8} more" if len(missing) > 8 else ""
      raise ValueError(f"{path}: shard(s) {missing[:8]}{more} named by {INDEX} are missing; fetch them again")
  else:
    files = sorted(f for f in path.glob("*.safetensors") if f.is_file() and not _OTHERS.fullmatch(f.name))
    if not files:
      pickled = pickles.find(path)
      raise ValueError(pickles.refusal(path, pickled) if pickled else f"{path}: no .safetensors file in it")
    if (n := len(files)) > 1:
      raise ValueError(f"{path}: {n} .safetensors files and no {INDEX} that says what is where; fetch it again")
  return files + gates


def _places(file: Path) -> dict[str, int]:
  """Where each tensor of a file begins, in bytes. The library has checked the header.

  Raises:
    ValueError: the header names a tensor twice, which the library allows, or oddly.
  """
  with file.open("rb") as stream:
    size = int.from_bytes(stream.read(8), "little")
    header = json.loads(stream.read(size), object_pairs_hook=_once)
  return {name: 8 + size + entry["data_offsets"][0] for name, entry in header.items() if name != "__metadata__"}


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
  """A JSON object from its pairs; a ValueError if a key is there twice or is no printable text."""
  found = dict(pairs)
  if len(found) < len(pairs):
    keys = [key for key, _ in pairs]
    raise ValueError(f"its header holds {shown(next(key for key in keys if keys.count(key) > 1))} twice")
  if odd := [key for key in found if not key.isprintable()]:
    raise ValueError(f"its header holds the name {shown(odd[0])}")
  return found


def _plain_name(name: str) -> str:
  """A tensor's name without what torch.compile adds, and with the `model.` that a model without its head leaves out."""
  name = name.replace("_orig_mod.", "")
  return f"model.{name}" if name.startswith(("embed_tokens.", "layers.", "norm.")) else name


def _damage_of(file: Path) -> str:
  try:
    with file.open("rb") as stream:
      return damage(stream.read(99))
  except OSError as error:
    return f"it cannot be read ({error.strerror})"


def open_tensors(path: Path, only: list[Path] | None = None) -> Tensors:
  """The tensors of the safetensors files of a Hugging Face directory; a tensor is read when it is asked for.

  Args:
    only: the files to open; default those of the model's weights and gates.

  Raises:
    ValueError: a file is missing or damaged, or a tensor is of another dtype or is there twice.
  """
  try:
    from safetensors import SafetensorError, safe_open
  except ImportError:
    raise ValueError(f"{path}: reading it needs safetensors: pip install 'dms_jax[convert]'") from None
  where, files, shapes, kinds, sizes, refused = {}, {}, {}, {}, Counter(), []
  for file in _weight_files(path) if only is None else only:
    try:
      with safe_open(file, framework="np") as handle:
        slices = {name: handle.get_slice(name) for name in handle.keys()}
        entries = {name: (one.get_dtype(), tuple(one.get_shape())) for name, one in slices.items()}
      places = _places(file)
    except (SafetensorError, OSError, OverflowError, ValueError) as error:
      reason = f"not a readable safetensors file ({first_line(error)})"
      raise ValueError(f"{file}: {reason}; {_damage_of(file)}") from None
    for stored, (kind, shape) in entries.items():
      name = _plain_name(stored)
      if kind in _BUFFERS and not name.endswith((".weight", ".bias")):
        continue
      if name in where:
        if files[name] == file.name:  # with and without what torch.compile adds
          names = " and ".join(sorted(shown(other) for other in entries if _plain_name(other) == name))
          raise ValueError(f"{file}: tensor {name} is there twice, as {names}; save the model again")
        raise ValueError(f"{path}: tensor {name} is in {files[name]} and in {file.name}; remove the one that is older")
      where[name], files[name], shapes[name] = (file, places[stored]), file.name, shape
      if kind == "U8" and name.endswith((mxfp4.BLOCKS, mxfp4.SCALES)):
        kinds[name] = np.dtype(np.uint8)
      elif kind not in _DTYPES:
        refused.append(f"{name} ({kind})")
      else:
        kinds[name] = jnp.dtype(_DTYPES[kind])
        sizes[_DTYPES[kind]] += math.prod(shape)
  if refused:
    more = f" and {len(refused) - 8} more" if len(refused) > 8 else ""
    raise ValueError(f"{path}: tensors are to be F32, F16 or BF16; found {', '.join(refused[:8])}{more}")
  dtype = sizes.most_common(1)[0][0] if sizes else "float32"

  def read_tensor(name: str) -> np.ndarray:
    file, begin = where[name]
    value = np.empty(shapes[name], kinds[name])
    with file.open("rb") as stream:  # the library maps files instead, which takes ten times as long
      stream.seek(begin)
      if stream.readinto(value.reshape(-1).view(np.uint8)) < value.nbytes:
        raise ValueError(f"{file}: shorter than when it was opened, at tensor {name}; fetch it again")
    return value

  return Tensors(str(path), shapes, read_tensor, dtype)


def write_tensors(path: Path, tensors: Sequence[Output]) -> int:
  """Writes one file; returns the bytes of its tensors. One of them is in memory, where the library would need all."""
  # In the library's order: wide numbers first, so that each tensor begins at a multiple of its dtype's size.
  ordered = sorted(tensors, key=lambda tensor: (-tensor.dtype.itemsize, tensor.name))
  kinds = {name: kind for kind, name in _DTYPES.items()}
  header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
  end = 0
  for tensor in ordered:
    begin, end = end, end + tensor.nbytes
    header[tensor.name] = {"dtype": kinds[tensor.dtype.name], "shape": tensor.shape, "data_offsets": [begin, end]}
  text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
  text += b" " * (-len(text) % 8)
  with path.open("wb") as stream:
    stream.write(len(text).to_bytes(8, "little") + text)
    for tensor in ordered:
      stream.write(tensor.read().reshape(-1).view(np.uint8))
  return end
