"""A stopwatch that stands still while programs are compiled."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator

import jax

COMPILATION = "/jax/core/compile/"  # events of tracing, lowering and compiling, or loading what was compiled before


class Stopwatch:
  """The wall time of its `running` blocks: `seconds` without compilation, and `compiling`, in seconds too.

  JAX reports how long it traced, lowered and compiled; what it reports while a block runs is compilation. The first run
  of a compiled program is slower than later ones, which JAX does not report: on a CPU by as much as half the time that
  compiling took.
  """

  def __init__(self) -> None:
    self.seconds = self.compiling = 0.0

  @contextlib.contextmanager
  def running(self) -> Iterator[None]:
    """Runs until the block ends. Results must be on the host by then: JAX computes asynchronously."""
    spans: list[tuple[float, float]] = []  # of compilation, disjoint and in order

    def note(event: str, duration: float, **about: str | int) -> None:
      if event.startswith(COMPILATION):
        end = time.perf_counter()
        start = max(end - duration, begun)
        while spans and spans[-1][1] > start:  # it happened within this span
          start = min(start, spans.pop()[0])
        spans.append((start, end))

    jax.monitoring.register_event_duration_secs_listener(note)
    begun = time.perf_counter()
    try:
      yield
    finally:
      whole = time.perf_counter() - begun
      jax.monitoring.unregister_event_duration_listener(note)
      compiling = sum(end - start for start, end in spans)
      self.seconds += whole - compiling
      self.compiling += compiling
