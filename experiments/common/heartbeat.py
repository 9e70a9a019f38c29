"""A line where a program would be silent, every ten seconds."""

from __future__ import annotations

import re
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

PATIENCE = 10.0  # seconds

silent = False  # another process of the run speaks for this one
_last: list[Any] = [0.0, ""]  # when this process last said something, by time.monotonic, and what


def spoke(message: str = "") -> None:
  """Notes that something was shown just now; `message`, if any, is what a later line goes back to."""
  _last[0] = time.monotonic()
  if message:
    _last[1] = re.split(r"[:(\n]", message, maxsplit=1)[0].strip(" .")[:60]


class Heartbeat:
  """Within it a silent program says every ten seconds for how long it has been at work, and since which line.

  Args:
    say: prints a line; it must not call `spoke` with a message.
    patience: seconds.
  """

  def __init__(self, say: Callable[[str], None], patience: float = PATIENCE):
    self.say, self.patience, self.end = say, patience, threading.Event()

  def __enter__(self) -> Heartbeat:
    spoke("the start")
    threading.Thread(target=self._watch, name="heartbeat", daemon=True).start()
    return self

  def __exit__(self, *_) -> None:
    self.end.set()

  def _watch(self) -> None:
    said = 0.0  # when this thread spoke last
    while not self.end.wait(max(0.05, min(self.patience, max(_last[0], said) + self.patience - time.monotonic()))):
      now, since = time.monotonic(), _last[0]
      if now - max(since, said) >= self.patience and not self.end.is_set():
        said = now
        self.say(f"... at work, {now - since:.0f} s since {_last[1]!r}")


def line(message: str) -> None:
  """Prints one line of a heartbeat."""
  if not silent:
    print(message, file=sys.stderr, flush=True)
