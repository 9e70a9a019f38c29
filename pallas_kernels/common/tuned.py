"""Block sizes measured to be the fastest, by kind of device, operation and class of shapes: tuned.json.

Each entry holds the sizes that won, `us`, what they took, and where that was measured. `experiments.bench_kernels
--tune` measures candidates and writes the file. Without an entry a kernel's own heuristic decides.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import logging
from pathlib import Path
from typing import Any, TypeVar

import jax

from pallas_kernels.common import compat
from pallas_kernels.common.platform import platform

FILE = Path(__file__).with_name("tuned.json")
T = TypeVar("T")


@functools.cache
def table(path: Path = FILE) -> dict[str, Any]:
  """{kind of device: {operation: {class of shapes: {"blocks": sizes, "us": microseconds, ...}}}}."""
  return json.loads(path.read_text())


def shape_class(**sizes: int | str) -> str:
  """A name for shapes whose sizes agree up to the next power of two: "K8 S8192"."""
  up = lambda size: size if isinstance(size, str) or size <= 1 else 1 << (size - 1).bit_length()
  return " ".join(f"{name}{up(size)}" for name, size in sizes.items())


@functools.cache
def _tell(message: str) -> None:
  logging.getLogger("pallas_kernels").info("%s", message)


def blocks(operation: str, shapes: str, default: T) -> T:
  """`default`, a frozen dataclass of sizes, with what was measured for the default device; each miss is logged once."""
  if compat.interpreting() or platform() == "cpu" or jax.default_backend() != platform():
    return default
  kind = jax.devices()[0].device_kind
  entry = table().get(kind, {}).get(operation, {}).get(shapes)
  if entry is None:
    _tell(f"{operation}: nothing measured for {shapes} on {kind}; sizes by heuristic: {default}")
    return default
  return dataclasses.replace(default, **entry["blocks"])


def merged(old: dict[str, Any], kind: str, operation: str, shapes: str, entry: dict[str, Any]) -> dict[str, Any]:
  """`old`, a table, with one entry more or another one."""
  of_kind = old.get(kind, {})
  return old | {kind: of_kind | {operation: of_kind.get(operation, {}) | {shapes: entry}}}
