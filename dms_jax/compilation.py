"""Compilation: programs kept on disk for the next run, and a line while the first one takes long."""

from __future__ import annotations

import contextlib
import os
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax

FOLDER = "~/.cache/dms_jax/xla"
PATIENCE = 2.0  # seconds of compiling that need no word
EVENTS = "/jax/core/compile/"  # tracing, lowering, and compiling or reading what was compiled before
PROGRAM = EVENTS + "backend_compile_duration"  # once for each program
_announced = False  # by `keep_compiled`


def keep_compiled(folder: str | Path | None = None) -> Path | None:
  """Keeps what this process compiles on disk, so that the next process reads it instead of compiling again.

  Call it before the first computation. Where the folder cannot be written, a warning says so and nothing is kept. When
  something compiles for more than two seconds, a line on stderr says so, once.

  Args:
    folder: default JAX_COMPILATION_CACHE_DIR, else ~/.cache/dms_jax/xla.

  Returns:
    The folder; None where nothing is kept, as with an empty JAX_COMPILATION_CACHE_DIR.
  """
  global _announced
  kept = keep(folder)
  if not _announced:
    _announced = True
    announce(kept)
  return kept


def keep(folder: str | Path | None = None, say: Callable[[str], None] = warnings.warn) -> Path | None:
  """`keep_compiled` without its line; `say` is told where the folder cannot be written."""
  asked = os.environ.get("JAX_COMPILATION_CACHE_DIR", FOLDER) if folder is None else folder
  if asked == "":
    return None
  try:
    where = Path(asked).expanduser()
  except RuntimeError:
    say(f"{asked}: compiled programs are not kept (no home folder)")
    return None
  try:
    where.mkdir(parents=True, exist_ok=True)
    if not os.access(where, os.W_OK | os.X_OK):
      raise PermissionError("not writable")
  except OSError as error:
    say(f"{where}: compiled programs are not kept ({error.strerror or error})")
    jax.config.update("jax_compilation_cache_dir", None)
    return None
  jax.config.update("jax_compilation_cache_dir", str(where))
  if "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS" not in os.environ:
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)  # many small ones add up
  # A damaged entry or a full disk costs time alone; JAX would say so for every program.
  warnings.filterwarnings("ignore", "Error (reading|writing) persistent compilation cache entry")
  return where


@contextlib.contextmanager
def counted() -> Iterator[Callable[[], int]]:
  """Yields a function that counts the programs compiled, or loaded as compiled before, in this block."""
  count = 0

  def note(event: str, duration: float, **about: str | int) -> None:
    nonlocal count
    count += event == PROGRAM

  jax.monitoring.register_event_duration_secs_listener(note)
  try:
    yield lambda: count
  finally:
    jax.monitoring.unregister_event_duration_listener(note)


def announce(
  kept: Path | None = None, say: Callable[[str], None] = lambda line: print(line, file=sys.stderr, flush=True)
) -> None:
  """Has `say` called once in this process, while something compiles for more than PATIENCE seconds.

  Args:
    kept: what `keep_compiled` returned.
  """
  lock, depth, timer = threading.Lock(), 0, threading.Timer(0, lambda: None)

  def speak() -> None:
    with lock:
      if depth == 0:  # it ended in this moment
        return
      jax.monitoring.unregister_scalar_listener(begins)
      jax.monitoring.unregister_event_duration_listener(ends)
    say(f"compiling{f' (kept in {kept} for the next run)' if kept else ''} ...")

  def begins(event: str, value: Any, **about: str | int) -> None:
    nonlocal depth, timer
    if event.startswith(EVENTS):
      with lock:
        depth += 1
        if depth == 1:
          timer = threading.Timer(PATIENCE, speak)
          timer.daemon = True
          timer.start()

  def ends(event: str, duration: float, **about: str | int) -> None:
    nonlocal depth
    if event.startswith(EVENTS):
      with lock:
        depth = max(depth - 1, 0)
        if depth == 0:
          timer.cancel()

  jax.monitoring.register_scalar_listener(begins)
  jax.monitoring.register_event_duration_secs_listener(ends)
