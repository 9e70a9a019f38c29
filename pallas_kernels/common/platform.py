"""Which kind of device code is being traced for: the default one, or the one a block of code says."""

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
  """Traces for another kind of device than the default, to compile for one that is not there."""
  token = _target.set(name)
  try:
    yield
  finally:
    _target.reset(token)
