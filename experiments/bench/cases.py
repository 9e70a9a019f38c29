"""Shared parts of benchmarks that run case by case: names, failures, bars, merged results.

A *case* is a named measurement of a workload (a model, a batch, a length), and its result is a *row*.
"""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from dms_jax.config import ModelConfig
from dms_jax.families.huggingface import config_to_hf
from dms_jax.json_files import read_json
from experiments.common import program, usage


@dataclasses.dataclass(frozen=True)
class Bar:
  """A target for the figure `name`: at least `value`, or at most `value` if `most`."""

  name: str
  value: float
  most: bool = False

  def __str__(self) -> str:
    return f"{self.name} {'<=' if self.most else '>='} {self.value:g}"

  def reached(self, row: dict[str, Any]) -> bool:
    return row[self.name] <= self.value if self.most else row[self.name] >= self.value


def chosen(names: Iterable[str], wanted: tuple[str, ...]) -> list[str]:
  """The names that equal or begin with an entry of `wanted`, in the order of `names`; all if `wanted` is empty.

  Raises:
    ValueError: an entry of `wanted` is no name's beginning.
  """
  names = list(names)
  unknown = [name for name in wanted if not any(key.startswith(name) for key in names)]
  if unknown:
    meant = usage.suggestion(unknown[0], names) or ";"
    raise ValueError(
      f"--cases: no case is called {', '.join(unknown)}, or begins so{meant} there are {', '.join(names)}"
    )
  return [key for key in names if not wanted or any(key.startswith(name) for name in wanted)]


class Runner:
  """Runs cases one by one; the row of a case that fails or would start too late says so."""

  def __init__(self, seconds: float, about: dict | None = None):
    self.end = time.monotonic() + seconds
    self.about = about or {}
    self.rows: dict[str, dict] = {}

  def __call__(self, name: str, about: dict, f: Callable[[], dict]) -> dict:
    row, start = {"name": name} | about, time.monotonic()
    try:
      row |= f() if start < self.end else {"skipped": "out of time"}
    except Exception as error:  # any error of a kernel or its compiler; the other cases go on
      row["error"] = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
    row["took_s"] = round(time.monotonic() - start, 2)
    self.rows[name] = row | self.about
    program.log("  ".join(f"{k}={v:.4g}" if isinstance(v, float) else f"{k}={v}" for k, v in row.items()))
    return row


def apart(module: str, what: dict[str, Any], timeout: float) -> dict[str, Any]:
  """Runs `module.measure(**what)` in a separate process, so that two frameworks do not share a device's memory.

  Arguments and result are JSON objects; the result is {"skipped": why} if it fails or takes over `timeout` seconds.
  """
  source = f"import json, sys, {module} as it; print(json.dumps(it.measure(**json.loads(sys.argv[1]))))"
  try:
    done = subprocess.run(
      [sys.executable, "-c", source, json.dumps(what)], capture_output=True, text=True, timeout=timeout
    )
  except subprocess.TimeoutExpired:
    return {"skipped": f"not done within {timeout:g} s"}
  lines = done.stdout.strip().splitlines()
  if done.returncode or not lines:
    return {"skipped": " ".join((done.stderr.strip().splitlines() or ["no output"])[-1].split())[:300]}
  try:
    return json.loads(lines[-1])
  except json.JSONDecodeError:
    return {"skipped": f"printed no result but: {lines[-1][:200]}"}


def llama_config(config: ModelConfig) -> dict[str, Any]:
  """Arguments of transformers' LlamaConfig for a model of the shape `config`."""
  fields = config_to_hf(config, "float32")
  return {name: x for name, x in fields.items() if name not in ("architectures", "model_type", "torch_dtype", "dtype")}


def measured(row: dict[str, Any]) -> bool:
  """Whether a row holds a result."""
  return not {"error", "skipped"} & row.keys()


def judged(row: dict[str, Any], bars: tuple[Bar, ...]) -> dict[str, Any]:
  """`row` with its bars and whether all are reached; bars without a measured figure are left out."""
  bars = tuple(bar for bar in bars if row.get(bar.name) is not None)
  if not bars:
    return row
  return row | {"bar": ", ".join(map(str, bars)), "reached": all(bar.reached(row) for bar in bars)}


def _rows(path: Path) -> list[dict]:
  """The rows of a file of results; none if it is missing."""
  rows = read_json(path).get("rows") if path.exists() else []
  if not isinstance(rows, list) or not all(isinstance(row, dict) and isinstance(row.get("name"), str) for row in rows):
    raise ValueError(f"--output={path}: no list of rows with names in it; move the file away")
  return rows


def merged(path: Path, rows: dict[str, dict], order: Iterable[str]) -> list[dict]:
  """The rows of the file at `path` merged with `rows`, which replace rows of the same name unless they failed."""
  old = {row["name"]: row for row in _rows(path)}
  for name, row in rows.items():
    if measured(row) or not measured(old.get(name, {"error": "none"})):
      old[name] = row
  place = {name: i for i, name in enumerate(order)}
  return sorted(old.values(), key=lambda row: place.get(row["name"], len(place)))


def check_same(path: Path, about: dict) -> None:
  """Raises ValueError where the file at `path` holds rows of another device or scale, which must not be mixed."""
  for row in _rows(path):
    for name in ("device", "scale"):
      if row.get(name) != about[name]:
        raise ValueError(
          f"--output={path.parent}: row {row['name']} there is of {name} {row.get(name)!r}, this run of "
          f"{about[name]!r}; choose another folder"
        )
