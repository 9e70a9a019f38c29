"""The progress of a long run: the share done, and the time left at the speed so far."""

from __future__ import annotations

import time
from collections.abc import Callable

from experiments.common import program


def duration(seconds: float) -> str:
  """A duration in two units at most: "45 s", "12 min", "3 h 20 min"."""
  if seconds < 90:
    return f"{seconds:.0f} s"
  minutes = round(seconds / 60)
  return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60:02d} min"


class Estimate:
  """Counts work, in tokens read and written, and logs how far the run is and how long the rest takes.

  The speed is that of this run so far. Chains that end early make the rest shorter than estimated.

  Args:
    work: all work to do.
    every: least seconds between two lines.
    now: the clock, in seconds.
  """

  def __init__(
    self, work: int, *, every: float = 5.0, now: Callable[[], float] = time.monotonic,
    log: Callable[[str], None] = program.log,
  ):  # fmt: skip
    self.work, self.every, self.now, self.log = work, every, now, log
    self.done = 0
    self.start = self.shown = now()

  @property
  def speed(self) -> float | None:
    """Work a second so far; None without any."""
    return self.done / (self.now() - self.start) if self.done else None

  def add(self, work: int) -> None:
    """Counts finished work."""
    self.done += work

  def tick(self, what: str, unfinished: int = 0) -> None:
    """Logs a line if the last one was some time ago.

    Args:
      what: what runs now.
      unfinished: work done so far on chains that have not ended.
    """
    now, done = self.now(), min(self.done + unfinished, self.work)
    if now - self.shown < self.every:
      return
    self.shown = now
    left = f", {duration((self.work - done) * (now - self.start) / done)} left" if done else ""
    self.log(f"{what}: {done / max(self.work, 1):.0%} of all{left}")
