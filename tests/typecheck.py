"""The type checker of the import hook: functions only.

Dataclass constructors are left alone: JAX rebuilds a pytree with whatever its leaves have become (tracers, specs,
shardings), so the annotation of a field describes it and does not bind it.
"""

from __future__ import annotations

from beartype import beartype


def check(function):
  """`function` with its arguments and result checked against its annotations."""
  return function if function.__name__ == "__init__" else beartype(function)
