"""SIGINT (Ctrl-C) and SIGTERM: a program ends within seconds, in one line, with code 130 or 143.

Python runs its handlers in the main thread, between two of its instructions: not while a program is compiled. An
exception that a handler raises within the callback of a weak reference, of which JAX's caches have many, is lost. So a
thread watches the signals as well. It has a lost exception raised again. It ends a process whose main thread has not
ended GRACE seconds after a signal, and any process at a second signal. Nothing depends on a clean end: every file on
disk is whole at any moment, as after a SIGKILL.
"""

from __future__ import annotations

import _thread
import contextlib
import os
import select
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator

GRACE = 3.0  # seconds for the main thread to end by itself
APART = 0.5  # seconds; a wrapper such as make passes on the Ctrl-C that the terminal sends to its program, too
SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Stopped(KeyboardInterrupt):
  """The program was asked to end; the message says what is kept, by default what `leaving` said."""

  def __init__(self, message: str = "", number: int | None = None):
    super().__init__(message)
    self.number = number or _state.number or signal.SIGTERM


class _State:
  """Of this process.

  Fields:
    phase: "none" before `install`; "start" until `run`, while nothing is at stake; "run"; "end" after the last line.
    number: of the first signal; 0 before it.
    saves: whether a loop runs that looks at `number` and saves what it has.
    lost: whether a `Stopped` was raised in vain.
    forward: a handler that takes SIGINT in place of this process; None: none does.
    kept: what an interruption leaves behind, the innermost last.
  """

  def __init__(self):
    self.phase, self.number, self.saves, self.lost = "none", 0, False, False
    self.forward: Callable[[], None] | None = None
    self.kept: list[str] = []


_state = _State()


def install() -> None:
  """Takes SIGINT and SIGTERM in the main thread, but for one that the process was started to ignore (nohup, &)."""
  if _state.phase != "none" or threading.current_thread() is not threading.main_thread():
    return
  ends = os.pipe()
  os.set_blocking(ends[1], False)
  signal.set_wakeup_fd(ends[1], warn_on_full_buffer=False)
  for number in SIGNALS:
    if signal.getsignal(number) is not signal.SIG_IGN:
      signal.signal(number, _handle)
  sys.unraisablehook = _unraisable(sys.unraisablehook)
  _state.phase = "start"
  threading.Thread(target=_watch, args=(ends[0],), name="signals", daemon=True).start()


def run() -> None:
  """From now on, a signal raises `Stopped` in the main thread."""
  install()
  _state.phase = "run"


def end() -> None:
  """From now on, the process has said its last line."""
  _state.phase = "end"


def leave(code: int) -> None:
  """Ends the process, whose last line is said, at once: Python would wait for threads, and die of another signal."""
  end()
  _unlink_semaphores()
  with contextlib.suppress(Exception):
    sys.stdout.flush()
  os._exit(code)


def line(stop: KeyboardInterrupt) -> str:
  """What a program says last."""
  number = stop.number if isinstance(stop, Stopped) else signal.SIGINT
  return _line(number, str(stop))


def _line(number: int, message: str = "") -> str:
  kept = message or (_state.kept[-1] if _state.kept else "nothing was written; run the command again")
  return f"stopped by {signal.Signals(number).name}: {kept}"


@contextlib.contextmanager
def leaving(text: str) -> Iterator[None]:
  """In this block an interruption leaves behind what `text` says."""
  _state.kept.append(text)
  try:
    yield
  except KeyboardInterrupt as stop:
    if not str(stop):
      stop.args = (text,)
    raise
  finally:
    _state.kept.remove(text)


@contextlib.contextmanager
def saving(forward: Callable[[], None] | None = None) -> Iterator[Callable[[], bool]]:
  """In this block a loop saves what it has once it is asked to stop: yields a function that tells whether it is.

  The loop calls it before its first step and after every step. Until the first step is done there is nothing to save,
  and a signal, which may come while the step is compiled, ends the program as elsewhere. A second signal always does.

  Args:
    forward: called at SIGINT instead, where several processes have to agree on a step.
  """
  calls = 0

  def asked() -> bool:
    nonlocal calls
    calls += 1
    _state.saves = calls > 1 and _state.phase == "run" and forward is None
    return forward is None and _state.number != 0

  _state.forward = forward
  try:
    yield asked
  finally:
    _state.saves, _state.forward = False, None


@contextlib.contextmanager
def held_back() -> Iterator[None]:
  """Signals wait in this thread; a process started in this block never gets those that it does not take up itself."""
  if not hasattr(signal, "pthread_sigmask"):
    yield
    return
  before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
  try:
    yield
  finally:
    signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _say(text: str) -> None:
  with contextlib.suppress(OSError):  # print is not reentrant, and a signal may come within one
    os.write(sys.stderr.fileno() if sys.stderr else 2, f"{text}\n".encode())


def _handle(number: int, frame) -> None:
  if _state.phase in ("start", "end"):
    if _state.phase == "start":
      _say(_line(number, "it had not begun; run the command again"))
    os._exit(128 + number)
  if _state.number and not _state.lost:  # the watching thread decides
    return
  if _state.forward is not None and number == signal.SIGINT:
    _state.forward()
    return
  _state.number, _state.lost = _state.number or number, False
  if _state.saves:
    _say(f"{signal.Signals(number).name}: saving after this step; once more ends at once")
    return
  raise Stopped(number=_state.number)


def _unraisable(before: Callable) -> Callable:
  """A hook for exceptions that Python cannot raise, which keeps quiet about `Stopped`."""

  def hook(lost) -> None:
    if isinstance(lost.exc_value, Stopped):
      _state.lost = True  # raised here, it would be lost again
    else:
      before(lost)

  return hook


def _watch(pipe: int) -> None:
  """Runs in a thread: ends the process at a second signal, or GRACE seconds after one that the main thread missed."""
  first, since, again = 0, 0.0, 0  # `again` signals of our own are on their way through the pipe
  while True:
    if first and not _state.saves:
      since = since or time.monotonic()
      if time.monotonic() - since > GRACE:
        _leave(first)
      if _state.lost:
        again += 1
        _thread.interrupt_main(first)
    if not select.select([pipe], [], [], 0.05 if first else None)[0]:
      continue
    for number in os.read(pipe, 64):
      if number not in SIGNALS or _state.forward is not None:
        continue
      if not first:
        first, began = number, time.monotonic()
      elif again:
        again -= 1
      elif time.monotonic() - began > APART:
        _leave(number)


def _leave(number: int) -> None:
  _unlink_semaphores()
  if _state.phase != "end":
    _say(_line(number))
  os._exit(128 + number)


def _unlink_semaphores() -> None:
  """Those shared with worker processes, which multiprocessing would report as leaked, after the last line."""
  util, synchronize = (sys.modules.get(f"multiprocessing.{name}") for name in ("util", "synchronize"))
  with contextlib.suppress(Exception):
    for finalizer in list(util._finalizer_registry.values()):
      if finalizer._callback is synchronize.SemLock._cleanup:
        finalizer()
