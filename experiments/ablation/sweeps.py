"""Sweeps as text: products of settings, unions of products, and sweep files.

A *group* is one line, such as 'dms.window=0,16 dms.gate=neuron,adapter', and means every combination of its values.
Values are written as on a command line and separated by commas. Values of a field that is itself a list are separated
by `|`: 'lora.targets=q_proj,k_proj|q_proj'. Several groups are a union. Quote a value with spaces.
"""

from __future__ import annotations

import difflib
import itertools
import shlex
import typing
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from experiments.common import program


def _split(group: str, where: str) -> list[str]:
  try:
    return shlex.split(group, comments=True)
  except ValueError as error:
    raise ValueError(f"{where}: {error}") from None


def _known(flag: str, flags: Iterable[str], where: str) -> None:
  flags = list(flags)
  if flag not in flags:
    close = difflib.get_close_matches(flag, flags, 1)
    hint = f"; did you mean {close[0]}?" if close else f"; there are {', '.join(flags)}"
    raise ValueError(f"{where}: unknown field {flag!r}{hint}")


def product(group: str, types: dict[str, Any], where: str = "--sweep") -> list[dict[str, Any]]:
  """Every combination of one group, as {flag: value}; the last field varies fastest.

  Args:
    types: all flags and their annotations.
    where: the group's name in errors.

  Raises:
    ValueError: a field is unknown or comes twice, or a value does not fit its field.
  """
  choices: dict[str, list[Any]] = {}
  for part in _split(group, where):
    flag, equals, text = part.partition("=")
    flag = flag.removeprefix("--")
    _known(flag, types, where)
    if not equals or flag in choices:
      raise ValueError(f"{where}: {part!r} {'comes twice' if equals else 'is no field=value,value'}")
    separator = "|" if typing.get_origin(types[flag]) is tuple else ","
    try:
      choices[flag] = [program.parse_value(types[flag], word.strip()) for word in text.split(separator)]
    except ValueError as error:
      raise ValueError(f"{where}: {flag}={text}: {error}") from None
  return [dict(zip(choices, values, strict=True)) for values in itertools.product(*choices.values())]


def read_file(path: str | Path, flags: Iterable[str]) -> tuple[dict[str, str], list[str]]:
  """({flag: its value's text}, groups) of a sweep file.

  `#` starts a comment. A line `--flag=value` sets a flag that the command line does not set. Any other line is a group.

  Args:
    flags: the flags that the file may set.

  Raises:
    ValueError: there is no such file, or a line is neither a flag nor a group.
  """
  try:
    lines = Path(path).read_text(encoding="utf-8").splitlines()
  except (OSError, UnicodeDecodeError) as error:
    raise ValueError(f"--sweep_file={path}: {error}") from None
  resolved, groups = {}, []
  for number, line in enumerate(lines, 1):
    where = f"{path}:{number}"
    parts = _split(line, where)
    if not parts:
      continue
    if not parts[0].startswith("--"):
      groups.append(line)
      continue
    for part in parts:
      flag, equals, text = part.removeprefix("--").partition("=")
      if not part.startswith("--") or not equals:
        raise ValueError(f"{where}: {part!r} is no --flag=value; a group of values goes on a line of its own")
      _known(flag, flags, where)
      resolved[flag] = text
  return resolved, groups


def varying(runs: Sequence[dict[str, Any]]) -> list[str]:
  """The flags in which `runs` differ; each run is a mapping of all flags to values."""
  return [flag for flag in runs[0] if any(run[flag] != runs[0][flag] for run in runs[1:])] if runs else []


def unique(runs: Iterable[tuple[dict, dict]]) -> list[tuple[dict, dict]]:
  """`runs`, pairs of (swept values, all settings), without those that repeat all settings of an earlier one."""
  kept: list[tuple[dict, dict]] = []
  for said, whole in runs:
    if all(whole != other for _, other in kept):
      kept.append((said, whole))
  return kept


def brief(values: Iterable[str]) -> dict[str, str]:
  """Each of `values` without the folders of its paths, unless two would then be equal."""
  short = {value: ",".join(part.rpartition("/")[2] for part in value.split(",")) for value in values}
  return short if len(set(short.values())) == len(short) else {value: value for value in short}
