"""The kind of device that code is traced for: the default one, or another one inside `tracing_for`."""

from __future__ import annotations

import contextlib
import contextvars
from collections.abc import Iterator
from typing import Any

import jax

_target: contextvars.ContextVar[str | None] = contextvars.ContextVar("platform", default=None)


def platform() -> str:
  """The kind of device: "cpu", "gpu" or "tpu"."""
  return _target.get() or jax.default_backend()


def processors() -> int:
  """Multiprocessors of the GPU; an H100's where there is none."""
  return int(getattr(jax.devices()[0], "core_count", 132)) if jax.default_backend() == "gpu" else 132


def tracing_for(name: str) -> contextlib.AbstractContextManager[None]:
  """Traces for another kind of device than the default, to compile for absent hardware."""
  return setting(_target, name)


@contextlib.contextmanager
def setting(variable: contextvars.ContextVar, value: Any) -> Iterator[None]:
  """`variable` holds `value` inside."""
  token = variable.set(value)
  try:
    yield
  finally:
    variable.reset(token)
