"""Reads files that a flag names, whole or line by line; writes files whole, or lines at their end."""

from __future__ import annotations

import bz2
import contextlib
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from dms_jax.json_files import HALF_PAIR, has_half_pair, json_value


def cut_half_line(path: Path, start: bytes) -> None:
  """Removes a last line without its end from a file of JSON lines, if it begins as a record does: with `start`.

  Any other unfinished line belongs to another kind of file, and stays.
  """
  data = path.read_bytes() if path.is_file() else b""
  whole = data.rfind(b"\n") + 1
  if (rest := data[whole:]) and rest[: len(start)] == start[: len(rest)]:
    os.truncate(path, whole)


def append_text(path: Path, text: str) -> None:
  """Appends to a file, all or nothing; makes it and its folder if they are missing.

  Raises:
    OSError: it cannot be written, such as on a full disk; names the file.
  """
  path.parent.mkdir(parents=True, exist_ok=True)
  before = path.stat().st_size if path.exists() else None
  try:
    with path.open("a", encoding="utf-8") as file:
      file.write(text)
  except OSError as error:
    with contextlib.suppress(OSError):  # it may not have been made
      path.unlink() if before is None else os.truncate(path, before)
    raise OSError(error.errno, error.strerror, str(path)) from None


def required(flag: str, value: str, what: str) -> Path:
  """The path that a flag gives; `what` describes it in errors.

  Raises:
    ValueError: no path is given, or the path does not exist.
  """
  if not value:
    raise ValueError(f"--{flag}=PATH is needed: {what}")
  path = Path(value)
  if not path.exists():
    raise ValueError(f"--{flag}={value}: nothing there; it should be {what}")
  return path


def check_checkpoint(flag: str, folder: str | Path) -> None:
  """Checks that a folder holds a whole model.

  Raises:
    ValueError: it holds none; names the flag.
  """
  from dms_jax import checkpoint  # here, as most programs that read files load no model

  try:
    groups = checkpoint.read_config(folder)[0]["groups"]
  except ValueError as error:
    raise ValueError(
      f"--{flag}={folder}: not a checkpoint, a folder that experiments.convert_weights writes ({error})"
    ) from None
  if "base" not in groups:
    raise ValueError(f"--{flag}={folder}: a retrofit; give it as --retrofit, and its base model as --{flag}")


def check_retrofit(flag: str, folder: str | Path | None, whole: bool = False) -> None:
  """Checks that a folder, if one is given, holds a retrofit.

  Args:
    whole: a whole model that has gates will do.

  Raises:
    ValueError: it holds none; names the flag.
  """
  if folder is None:
    return
  from dms_jax import checkpoint, shipped  # here, as most programs that read files load no model

  path, where = shipped.find(folder), f"--{flag}={folder}"
  try:
    values, _, gates, _ = checkpoint.read_config(path)
  except ValueError as error:
    final = path / "final"
    advice = f"; the retrofit of this run is {final}" if checkpoint.is_checkpoint(final) else ""
    if not path.exists() and len(path.parts) == 1:
      advice = f"; shipped are {', '.join(shipped.names())}"
    raise ValueError(f"{where}: not a retrofit, a folder that experiments.retrofit writes ({error}){advice}") from None
  if "base" in values["groups"] and not (whole and gates is not None):
    what = "a whole model" if gates is not None else "a model without gates"
    raise ValueError(f"{where}: {what}, not a retrofit; give it as --checkpoint, or leave --{flag} out")


UNPACKED = 100  # most times the size of a .bz2 file that its text may have; texts have about four


def read_text(flag: str, path: str | Path) -> str:
  """The text of a UTF-8 file without a byte order mark, decompressed if it is a .bz2 file.

  Raises:
    ValueError: the file is missing, a folder, damaged, or not UTF-8; names the flag.
  """
  path = Path(path)
  if path.is_dir():
    raise ValueError(f"--{flag}={path}: a folder, where a file is expected")
  if path.is_char_device() and str(path) != os.devnull:  # such as /dev/zero, which has no end
    raise ValueError(f"--{flag}={path}: a device, where a file is expected")
  try:
    data = path.read_bytes()
    data = _unpacked(data) if path.suffix == ".bz2" else data
  except FileNotFoundError:
    raise ValueError(f"--{flag}={path}: no such file") from None
  except (OSError, ValueError) as error:
    raise ValueError(f"--{flag}={path}: cannot be read ({error}); the file is damaged or was cut short") from None
  try:
    return data.decode("utf-8-sig")
  except UnicodeDecodeError as error:
    line = data.count(b"\n", 0, error.start) + 1
    raise ValueError(f"--{flag}={path}: not UTF-8 text in line {line} ({error})") from None


def _unpacked(data: bytes) -> bytes:
  """The content of a .bz2 file, which may hold several streams; never more than `UNPACKED` times its size."""
  most, parts, size = UNPACKED * len(data) + 2**20, [], 0
  while data:
    stream = bz2.BZ2Decompressor()
    try:
      parts.append(stream.decompress(data, most - size + 1))
    except OSError:
      if parts:  # what follows the last stream is no stream: as bz2, it is left out
        break
      raise
    if (size := size + len(parts[-1])) > most:
      raise ValueError(f"it unpacks to more than {UNPACKED} times its size")
    if not stream.eof:
      raise ValueError("it ends early")
    data = stream.unused_data
  return b"".join(parts)


def text_lines(flag: str, path: str | Path) -> Iterator[tuple[str, str]]:
  """(where, line) of each line that is not blank; a line ends with LF or CRLF.

  Raises:
    ValueError: as `read_text`.
  """
  for number, line in enumerate(read_text(flag, path).split("\n"), 1):
    if line.strip():
      yield f"--{flag}={path}, line {number}", line.removesuffix("\r")


def json_records(
  flag: str, path: str | Path, fields: Mapping[str, Any], left_out: list[str] | None = None
) -> Iterator[tuple[str, dict[str, Any]]]:
  """(where, record) of each line of a JSON-lines file that is not blank.

  Args:
    fields: the name and type of each field that every record must hold.
    left_out: gets the places of records that hold half of a surrogate pair, which are then left out.

  Raises:
    ValueError: a line is not a JSON object, a field is missing or of another type, or a text is none; names the flag
      and line.
  """
  for where, line in text_lines(flag, path):
    record = json_value(line, where)
    if "\\ud" in line.lower() and has_half_pair(record):
      if left_out is None:
        raise ValueError(f"{where}: {HALF_PAIR}")
      left_out.append(where)
      continue
    for name, kind in fields.items():
      if not isinstance(record, dict) or not isinstance(record.get(name), kind):
        raise ValueError(f"{where}: a record needs {name!r} ({getattr(kind, '__name__', kind)})")
    if not isinstance(record, dict):
      raise ValueError(f"{where}: expected a JSON object, found {type(record).__name__}")
    yield where, record
