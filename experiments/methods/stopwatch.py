"""Times without compilation: a stopwatch, and how long the chains of a generator take."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np

from dms_jax import Generator
from dms_jax.compilation import EVENTS
from dms_jax.generation.recording import News


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
      if event.startswith(EVENTS):
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


class ChainTimes:
  """Steps a generator and keeps when its requests began, and how many tokens each chain had after every step."""

  def __init__(self, generator: Generator):
    self.generator, self.watch = generator, Stopwatch()
    self.begun: dict[int, float] = {}  # by ticket
    self.written: dict[tuple[int, int], tuple[list[int], list[float]]] = {}  # (ticket, chain) -> tokens, seconds

  def warm_up(self, prompt: Sequence[int], most: int, **request: Any) -> None:
    """Writes the first decode block of a request and forgets it: what that compiles is in no chain's time.

    Args:
      most: new tokens of the request itself; `request` as for `Generator.submit`.
    """
    ticket = self.generator.submit(prompt, max_new_tokens=min(most, self.generator.decode_block + 1), **request)
    while self.generator.busy:
      self.generator.step()
    del self.generator.results[ticket]

  def step(self) -> list[News]:
    """A step of the generator; returns its news, which name all chains that have written or ended."""
    start = self.watch.seconds
    with self.watch.running():
      news = self.generator.step()
    for ticket, chain, tokens, _ in news:
      self.begun.setdefault(ticket, start)
      counts, seconds = self.written.setdefault((ticket, chain), ([], []))
      counts.append((counts[-1] if counts else 0) + len(tokens))
      seconds.append(self.watch.seconds)
    return news

  def until(self, ticket: int, chain: int, count: int) -> float:
    """Seconds from the beginning of a chain that has just ended to its first `count` tokens.

    They are linear between decode blocks, and at least those of the first block.
    """
    counts, seconds = self.written[ticket, chain]
    end = self.watch.seconds if count >= counts[-1] else float(np.interp(count, counts, seconds))
    return end - self.begun[ticket]
