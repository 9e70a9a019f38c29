"""A stopwatch that stands still while programs are compiled."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator

import jax

COMPILATION = "/jax/core/compile/"  # events of tracing, lowering and compiling, or loading what was compiled before


class Stopwatch:
  """The wall time of its `running` blocks, without compilation, in `seconds`.

  JAX reports how long it traced, lowered and compiled; what it reports while a block runs does not count. The
  first run of a compiled program may still be slower than later ones.
  """

  def __init__(self) -> None:
    self.seconds = 0.0

  @contextlib.contextmanager
  def running(self) -> Iterator[None]:
    """Runs until the block ends. Results must be on the host by then: JAX computes asynchronously."""
    compiling: list[tuple[float, float]] = []  # disjoint spans, in order

    def note(event: str, duration: float, **about: str | int) -> None:
      if event.startswith(COMPILATION):
        end = time.perf_counter()
        start = max(end - duration, begun)
        while compiling and compiling[-1][1] > start:  # it happened within this span
          start = min(start, compiling.pop()[0])
        compiling.append((start, end))

    jax.monitoring.register_event_duration_secs_listener(note)
    begun = time.perf_counter()
    try:
      yield
    finally:
      whole = time.perf_counter() - begun
      jax.monitoring.unregister_event_duration_listener(note)
      self.seconds += whole - sum(end - start for start, end in compiling)
