"""JSON of configs and of files: every value is checked, an error is one line and names the file."""

from __future__ import annotations

import dataclasses
import json
import os
import sys
import types
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

HALF_PAIR = "half of a surrogate pair (\\ud800 to \\udfff), which is no character"


def to_json(config: Any) -> dict:
  """A config dataclass as plain JSON values; paths are the same text in every locale."""
  return as_text(json.loads(json.dumps(_written(config))))


def _written(value: Any) -> Any:
  """`dataclasses.asdict` without the fields that are `config._LATER` and have their defaults."""
  if dataclasses.is_dataclass(value):
    pairs = [(field, getattr(value, field.name)) for field in dataclasses.fields(value)]
    return {f.name: _written(own) for f, own in pairs if not (f.metadata.get("later") and own == f.default)}
  if isinstance(value, dict):
    return {key: _written(own) for key, own in value.items()}
  return [_written(own) for own in value] if isinstance(value, list | tuple) else value


def from_json(cls: type, values: Any, source: str = "config") -> Any:
  """Builds config `cls` from JSON values, each of which must be of its field's type.

  A class method `cls.upgraded`, if there is one, first converts older values. A whole number stands for a float. Floats
  are finite.

  Raises:
    ValueError: a key is unknown, a value is of another type, or the config refuses it; the message names `source`.
  """
  if not isinstance(values, dict):
    raise ValueError(f"{source}: should be an object, found {shown(values)}")
  try:
    values = cls.upgraded(values) if hasattr(cls, "upgraded") else dict(values)
  except (AttributeError, KeyError, TypeError) as error:
    raise ValueError(f"{source}: values of an earlier version cannot be read ({error})") from None
  hints = get_type_hints(cls)
  defaults = {f.name: f.default for f in dataclasses.fields(cls)}
  if unknown := sorted(set(values) - set(hints)):
    raise ValueError(f"{source}: unknown field(s) {unknown} for {cls.__name__}; it has {sorted(hints)}")
  for name, value in values.items():
    if value is not None or defaults[name] is not None:
      values[name] = typed(hints[name], value, source, name)
  try:
    return cls(**values)
  except (TypeError, ValueError) as error:
    raise ValueError(f"{source}: {error}") from None


def typed(hint: Any, value: Any, source: str, name: str) -> Any:
  """A JSON value as `hint` means it: lists become tuples, whole numbers floats, objects configs.

  Raises:
    ValueError: the value is of another type, an integer of more than 64 bits, or a float that is not finite.
  """
  kinds = get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)
  for kind in kinds:
    if kind is Any or (kind is type(None) and value is None):
      return value
    if dataclasses.is_dataclass(kind) and isinstance(value, dict):
      return from_json(kind, value, f"{source}: {name}")
    if get_origin(kind) is Literal and type(value) in {type(choice) for choice in get_args(kind)}:
      return value
    if kind in (bool, str) and isinstance(value, kind):
      return value
    if kind is int and is_number(value, int) and abs(value) < 2**63:
      return value
    if get_origin(kind) is tuple and isinstance(value, list | tuple):
      members = get_args(kind)
      if members[-1] is Ellipsis:
        members = members[:1] * len(value)
      if len(members) == len(value):
        return tuple(typed(m, v, source, f"{name}[{i}]") for i, (m, v) in enumerate(zip(members, value, strict=True)))
    if kind is Path and isinstance(value, str | Path):
      return Path(value)
  if float in kinds and is_number(value):
    return float(value)
  wanted = " or ".join(getattr(kind, "__name__", str(kind)) if kind is not type(None) else "null" for kind in kinds)
  raise ValueError(f"{source}: {name} should be {wanted}, found {shown(value)}")


def is_number(value: Any, kinds: type | types.UnionType = int | float) -> bool:
  """Whether a value of a JSON file is a finite number; `true` and `false` are none."""
  return isinstance(value, kinds) and not isinstance(value, bool) and abs(value) < 1e300


def shown(value: Any) -> str:
  """A value of a file as a message shows it: short, and on one line."""
  if isinstance(value, dict | list) and value:
    return f"a {type(value).__name__} of {len(value)}"
  text = f"a number of {value.bit_length()} bits" if isinstance(value, int) and abs(value) > 2**64 else repr(value)
  return text if len(text) <= 80 else text[:77] + "..."


def read_json(path: str | Path) -> dict:
  """Reads one JSON object, in UTF-8 whatever the locale. It is the one reader of JSON files in this package.

  Raises:
    ValueError: the file is missing or damaged, or is not a JSON object; the message names it.
  """
  return parse_json(read_file(path), str(path))


def read_file(path: str | Path) -> bytes:
  """The content of a small file that others wrote.

  Raises:
    ValueError: it is missing, or cannot be read, or is a pipe or a device, which may have no end; the message names it.
  """
  try:
    if (path := Path(path)).exists() and not (path.is_file() or path.is_dir()):
      raise ValueError(f"{path}: a pipe or a device, where a file is expected")
    return path.read_bytes()
  except FileNotFoundError:
    raise ValueError(f"{path}: no such file") from None
  except OSError as error:
    raise ValueError(f"{path}: cannot be read ({error.strerror})") from None


def parse_json(data: bytes | str, source: str) -> dict:
  """One JSON object from its text; bytes are UTF-8, with or without a byte order mark.

  Raises:
    ValueError: as `json_value`, or it is not an object; the message names `source`.
  """
  values = json_value(data, source)
  if not isinstance(values, dict):
    raise ValueError(f"{source}: expected a JSON object, found {type(values).__name__}")
  return values


def json_value(data: bytes | str, source: str) -> Any:
  """Any JSON value from its text, such as a line of a file; bytes are UTF-8, with or without a byte order mark.

  Raises:
    ValueError: it is not valid JSON, is nested too deep, or holds a number beyond float64; the message names `source`.
  """
  try:
    return json.loads(data if isinstance(data, str) else data.decode("utf-8-sig"), parse_int=_whole_number)
  except RecursionError:
    raise ValueError(f"{source}: JSON nested too deep; the file is damaged") from None
  except ValueError as error:  # of UTF-8, of JSON, or of a number with too many digits
    reason = f"not valid JSON ({shown(str(error))[1:-1]})"
    raise ValueError(f"{source}: {reason}; {damage(data)}") from None


def damage(content: bytes | str) -> str:
  """What is wrong with a file that cannot be read, and what to do, from its content or the start of it."""
  start = bytes(content[:99], "utf-8", "replace") if isinstance(content, str) else content[:99]
  if start.startswith(b"version https://git-lfs"):
    return "it is a pointer of Git LFS: run git lfs pull in the clone"
  if start.lstrip().lower().startswith((b"<!doctype html", b"<html")):
    return "it is a web page, such as a server answers in place of a file: fetch it again"
  return "the file is damaged or was cut short"


def as_text(value: Any) -> Any:
  """A text of the command line or of standard input, or a JSON value with such texts, as UTF-8 in every locale.

  Where the locale (such as C) cannot decode a character, Python holds its bytes as halves of surrogate pairs.
  """
  if isinstance(value, str):
    try:
      return os.fsencode(value).decode("utf-8")
    except UnicodeError:
      return value
  if isinstance(value, dict):
    return {as_text(key): as_text(each) for key, each in value.items()}
  return [as_text(each) for each in value] if isinstance(value, list | tuple) else value


def _whole_number(text: str) -> int:
  """A whole number of JSON; a ValueError if it has so many digits that no float is as large."""
  if len(text) > sys.float_info.max_10_exp:
    raise ValueError(f"a number of {len(text)} digits")
  return int(text)


def has_half_pair(value: Any) -> bool:
  """Whether a text, or any text in a JSON value, holds half of a surrogate pair: JSON can write it, UTF-8 cannot."""
  try:
    (value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)).encode()
  except UnicodeEncodeError:
    return True
  return False
