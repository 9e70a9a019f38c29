"""The container format GGUF: metadata and tensors, every size checked before it is used.

Source: the specification in ggml's docs/gguf.md; versions 2 and 3, little-endian. As in llama.cpp, tensors lie one
after another in the order of their table, each padded to the alignment, and end where the file ends.
"""

from __future__ import annotations

import dataclasses
import math
import mmap
import struct
from pathlib import Path
from typing import Any

import numpy as np

from dms_jax.json_files import damage, is_number, shown

_SCALARS = {  # value type: struct's format
  0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<B", 10: "<Q", 11: "<q", 12: "<d",
}  # fmt: skip
_BOOL, _STRING, _ARRAY = 7, 8, 9
_PLAIN = {"F32": "<f4", "F16": "<f2"}  # tensor types that need no decoding
_MOST_AXES = 4


@dataclasses.dataclass(frozen=True)
class Entry:
  """One tensor: name, shape (outputs first, as numpy's), type, and where its bytes are; rows [..., bytes of a row]."""

  name: str
  shape: tuple[int, ...]
  kind: Any  # gguf.GGMLQuantizationType
  rows: tuple[int, ...]
  file: Path
  offset: int

  @property
  def data(self) -> np.ndarray:
    """The bytes, uint8 of shape `rows`, read from the file: a mapped file would stay in memory, page by page."""
    return np.fromfile(self.file, np.uint8, math.prod(self.rows), offset=self.offset).reshape(self.rows)

  def values(self) -> np.ndarray:
    """The tensor in float32.

    Raises:
      ValueError: its type cannot be decoded.
    """
    if self.kind.name in _PLAIN:
      return self.data.view(_PLAIN[self.kind.name]).astype(np.float32, copy=False).reshape(self.shape)
    from gguf import dequantize

    try:
      with np.errstate(all="ignore"):  # of damaged scales; the caller looks for what is not finite
        return np.asarray(dequantize(self.data, self.kind), np.float32).reshape(self.shape)
    except (NotImplementedError, ValueError) as error:
      raise ValueError(f"tensor {self.name} of type {self.kind.name}: {error}") from None


def read(path: str | Path) -> tuple[dict[str, Any], list[Entry]]:
  """(metadata, tensors) of a GGUF file; a tensor is read when its values are asked for.

  Raises:
    ValueError: the file is not GGUF, is cut short or damaged; the message names it.
  """
  try:
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
  except ImportError:
    raise ValueError(f"{path}: reading GGUF needs the gguf package: pip install 'dms_jax[convert]'") from None
  if Path(path).exists() and not Path(path).is_file():
    raise ValueError(f"{path}: not a readable GGUF file (a folder, a pipe or a device)")
  try:
    with open(path, "rb") as file:
      data = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
  except FileNotFoundError:
    raise ValueError(f"{path}: no such file") from None
  except (OSError, ValueError) as error:  # such as an empty file
    raise ValueError(f"{path}: not a readable GGUF file ({error})") from None
  try:
    return _parse(Path(path), _Stream(data), GGMLQuantizationType, GGML_QUANT_SIZES)
  except ValueError as error:
    raise ValueError(f"{path}: not a readable GGUF file ({error}); {damage(bytes(data[:99]))}") from None


class Fields:
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

  def has(self, key: str) -> bool:
    """Whether the architecture's metadata hold `key`, and not as 0 or as nothing."""
    return self.get(f"{{arch}}.{key}", default=0) not in (0, [], "")

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


class _Stream:
  """Reads a file from start to end; nothing is read or counted beyond its end."""

  def __init__(self, data: memoryview):
    self.data, self.place = data, 0

  @property
  def left(self) -> int:
    return len(self.data) - self.place

  def take(self, count: int) -> memoryview:
    if count > self.left:
      raise ValueError(f"{count} bytes wanted at byte {self.place}, and {self.left} are left")
    self.place += count
    return self.data[self.place - count : self.place]

  def scalar(self, form: str) -> Any:
    return struct.unpack(form, self.take(struct.calcsize(form)))[0]

  def count(self, least: int, what: str) -> int:
    """A number of things of at least `least` bytes each."""
    number = self.scalar("<Q")
    if number > self.left // least:
      raise ValueError(f"{number} {what} at byte {self.place}, and {self.left} bytes are left")
    return number

  def string(self) -> str:
    return str(self.take(self.count(1, "characters")), "utf-8")

  def name(self) -> str:
    """A string that names something."""
    if not (name := self.string()).isprintable():
      raise ValueError(f"the name {shown(name)} before byte {self.place}")
    return name

  def value(self) -> Any:
    kind = self.scalar("<I")
    if kind != _ARRAY:
      return self._one(kind)
    kind = self.scalar("<I")
    if kind == _STRING:
      return [self.string() for _ in range(self.count(8, "strings"))]
    if kind not in _SCALARS:
      raise ValueError(f"an array of type {kind} at byte {self.place}")
    form = _SCALARS[kind]
    size = struct.calcsize(form)
    values = np.frombuffer(self.take(self.count(size, "values") * size), np.dtype(form[0] + _numpy(form))).tolist()
    return [bool(v) for v in values] if kind == _BOOL else values

  def _one(self, kind: int) -> Any:
    if kind == _STRING:
      return self.string()
    if kind not in _SCALARS:
      raise ValueError(f"a value of type {kind} at byte {self.place}")
    value = self.scalar(_SCALARS[kind])
    return bool(value) if kind == _BOOL else value


def _numpy(form: str) -> str:
  return ("f" if form[1] in "fd" else "i" if form[1].islower() else "u") + str(struct.calcsize(form))


def _parse(file: Path, stream: _Stream, kinds: Any, sizes: dict) -> tuple[dict[str, Any], list[Entry]]:
  if bytes(stream.take(4)) != b"GGUF":
    raise ValueError("it does not start with GGUF")
  version = stream.scalar("<I")
  if version not in (2, 3):
    big = " (big-endian)" if version.to_bytes(4, "big")[0] in (2, 3) else ""
    raise ValueError(f"version {version}{big}; versions 2 and 3, little-endian, are read")
  tensors = stream.count(24, "tensors")
  metadata: dict[str, Any] = {}
  for _ in range(stream.count(13, "metadata keys")):
    key = stream.name()
    if key in metadata:
      raise ValueError(f"metadata key {key} is there twice")
    metadata[key] = stream.value()
  table: dict[str, tuple] = {}
  for _ in range(tensors):
    name = stream.name()
    if (axes := stream.scalar("<I")) > _MOST_AXES:
      raise ValueError(f"tensor {name} has {axes} axes")
    shape = tuple(reversed([stream.scalar("<Q") for _ in range(axes)]))
    kind, offset = kinds(stream.scalar("<I")), stream.scalar("<Q")
    if name in table:
      raise ValueError(f"tensor {name} is there twice")
    table[name] = (shape, kind, offset)
  alignment = metadata.get("general.alignment", 32)
  if not isinstance(alignment, int) or not 0 < alignment <= 2**20 or alignment & (alignment - 1):
    raise ValueError(f"general.alignment={alignment!r} is not a power of two")
  stream.take(min(-stream.place % alignment, stream.left))
  return metadata, _entries(file, stream.place, stream.left, table, alignment, sizes)


def _entries(file: Path, start: int, held: int, table: dict[str, tuple], alignment: int, sizes: dict) -> list[Entry]:
  """The tensors of `table`, {name: (shape, kind, offset)}, in the `held` bytes from `start`, which they must fill."""
  entries, expected, end = [], 0, 0
  for name, (shape, kind, offset) in table.items():
    block, size = sizes[kind]
    elements = 1
    for axis in shape:
      elements *= axis
    if (shape[-1] if shape else 1) % block:
      raise ValueError(f"tensor {name} has rows of {shape[-1]}, and {kind.name} needs multiples of {block}")
    if offset != expected:
      raise ValueError(f"tensor {name} is at {offset} and should be at {expected}")
    end = offset + elements // block * size
    if end > held:
      raise ValueError(f"tensor {name} ends at {end}, and the file has {held} bytes of tensors")
    rows = (*shape[:-1], shape[-1] // block * size) if shape else (size,)
    entries.append(Entry(name, shape, kind, rows, file, start + offset))
    expected = end + -end % alignment
  if held > expected:
    raise ValueError(f"its tensors end at {end}, and the file has {held} bytes of tensors")
  return entries
