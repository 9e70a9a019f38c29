"""The kind of device that code is traced for: the default one, or another one inside `tracing_for`."""

from __future__ import annotations

import contextlib
import contextvars
from collections.abc import Iterator

import jax

_target: contextvars.ContextVar[str | None] = contextvars.ContextVar("platform", default=None)


def platform() -> str:
  """The kind of device: "cpu", "gpu" or "tpu"."""
  return _target.get() or jax.default_backend()


@contextlib.contextmanager
def tracing_for(name: str) -> Iterator[None]:
  """Traces for another kind of device than the default, to compile for absent hardware."""
  token = _target.set(name)
  try:
    yield
  finally:
    _target.reset(token)
