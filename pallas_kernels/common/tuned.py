"""Fastest measured block sizes by kind of device, operation and class of shapes: tuned.json.

Each entry holds the fastest sizes, their time `us` in microseconds, and where that was measured.
`experiments.bench_kernels --tune` measures candidates and writes the file. Without an entry a kernel uses its own
heuristic.
"""

from __future__ import annotations

import dataclasses
import functools
import json
from pathlib import Path
from typing import Any, TypeVar

import jax
from jax.experimental import pallas as pl

from pallas_kernels.common import compat, dispatch
from pallas_kernels.common.platform import platform

FILE = Path(__file__).with_name("tuned.json")
T = TypeVar("T")


@functools.cache
def table(path: Path = FILE) -> dict[str, Any]:
  """{kind of device: {operation: {class of shapes: {"blocks": sizes, "us": microseconds, ...}}}}."""
  return json.loads(path.read_text(encoding="utf-8"))


def shape_class(**sizes: int | str) -> str:
  """Name of shapes whose sizes agree up to the next power of two: "K8 S8192"."""
  up = lambda size: size if isinstance(size, str) or size <= 1 else pl.next_power_of_2(size)
  return " ".join(f"{name}{up(size)}" for name, size in sizes.items())


def blocks(operation: str, shapes: str, default: T) -> T:
  """`default`, a frozen dataclass of sizes, updated by measurements on this kind of device; logs each miss once."""
  if compat.interpreting() or platform() == "cpu" or jax.default_backend() != platform():
    return default
  kind = jax.devices()[0].device_kind
  entry = table().get(kind, {}).get(operation, {}).get(shapes)
  if entry is None:
    dispatch.log_once(f"{operation}: nothing measured for {shapes} on {kind}; sizes by heuristic: {default}")
    return default
  return dataclasses.replace(default, **entry["blocks"])


def merged(old: dict[str, Any], kind: str, operation: str, shapes: str, entry: dict[str, Any]) -> dict[str, Any]:
  """The table `old` with one entry added or replaced."""
  of_kind = old.get(kind, {})
  return old | {kind: of_kind | {operation: of_kind.get(operation, {}) | {shapes: entry}}}
