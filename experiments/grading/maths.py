"""Maths answers, read and compared by math-verify in a process of its own.

math-verify (extra `maths`) finds the answer in a text and compares it with the reference. The last \\boxed{} counts, or
else what follows "the answer is" or "Answer:". No other number counts, unlike in Open-R1: a text cut short gives
no answer by chance. Boxes joined by a comma, "and" or "or" within 70 characters are a set.

A few symbols, such as 10^{10^{10}} or nested factorials, ask for endless work. Therefore a worker process does it:

- Reading, comparing and simplifying end after `STEP_S` seconds each, by a signal in the worker's main thread.
- Work that no signal interrupts ends after `LIMIT_S` seconds, when the worker is killed. The next text starts another.
- Memory is limited to `MEMORY` bytes.

A request thus ends within LIMIT_S seconds, and START_S more where a worker starts; what takes longer is wrong. Threads
may call the functions; they wait for each other.
"""

from __future__ import annotations

import atexit
import contextlib
import importlib.util
import json
import multiprocessing
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from multiprocessing.connection import Connection

STEP_S = 5  # whole seconds; math-verify's own default
LIMIT_S = 20.0
START_S = 60.0
MEMORY = 4 << 30  # bytes of address space
DIGITS = 10  # significant digits by which numbers are told apart
LONGEST = 1000  # characters of a canonical answer


def check() -> None:
  """Raises ValueError if math-verify is not installed."""
  if importlib.util.find_spec("math_verify") is None:
    raise ValueError("grading of maths answers needs math-verify: pip install 'dms_jax[maths]'")


def correct(text: str, reference: str) -> bool:
  """Whether the answer that `text` gives equals `reference`, LaTeX without dollar signs.

  False if the text gives no answer, or one that cannot be read or takes too long.
  """
  return bool(_WORKER.ask("correct", text, reference))


def answer(text: str) -> str | None:
  """The answer that `text` gives, in canonical form: equal answers are equal strings.

  Numbers are decimals of `DIGITS` significant digits, expressions with variables are simplified and expanded, sets are
  sorted, and of x = 5 only the value counts. An answer that sympy cannot read is its LaTeX without spaces.

  Returns:
    None if the text gives no answer, or one that takes too long or has more than `LONGEST` characters.
  """
  return _WORKER.ask("answer", text)


# The parent's side ----------------------------------------------------------------------------------------------------


class _Worker:
  """A process that answers one request at a time; it is started when needed, and again after it died."""

  def __init__(self):
    self.lock = threading.Lock()
    self.process: subprocess.Popen | None = None
    self.connection: Connection | None = None
    atexit.register(self.close)

  def ask(self, *request: str):
    """The worker's reply; None if it died or took longer than LIMIT_S."""
    message = json.dumps(request).encode()  # lone surrogates are escaped
    with self.lock:
      if self.process is None or self.process.poll() is not None:
        self._start()
      try:
        self.connection.send_bytes(message)
        if self.connection.poll(LIMIT_S):
          return json.loads(self.connection.recv_bytes())
      except (EOFError, OSError):
        pass
      except BaseException:  # interrupted: the reply, which may still come, belongs to no later request
        self.close()
        raise
      self.close()
      return None

  def _start(self) -> None:
    from experiments.common import stopping  # the worker, which runs this file as a script, cannot import it

    self.close()
    check()
    self.connection, theirs = multiprocessing.Pipe()
    with theirs, stopping.held_back():  # Ctrl-C is for this process
      self.process = subprocess.Popen(
        [sys.executable, "-P", "-W", "ignore", __file__, str(theirs.fileno()), str(STEP_S)],
        pass_fds=[theirs.fileno()],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
      )
    with contextlib.suppress(EOFError, OSError):
      if self.connection.poll(START_S) and self.connection.recv_bytes() == b"ready":
        return
    self.close()
    raise OSError(
      f"the process that grades maths answers did not start within {START_S:g} s: is the machine overloaded?"
    )

  def close(self) -> None:
    """Ends the process, if there is one."""
    if self.process is not None:
      self.process.kill()
      self.process.wait()
      self.connection.close()
    self.process = self.connection = None


_WORKER = _Worker()


# The worker's side ----------------------------------------------------------------------------------------------------


def _parsed(text: str) -> list:
  """What math-verify reads: an expression and its LaTeX, the LaTeX alone, or nothing."""
  from math_verify import ExprExtractionConfig, LatexExtractionConfig, parse

  config = ExprExtractionConfig(False), LatexExtractionConfig(False, boxed_match_priority=0)
  return parse(text, config, parsing_timeout=STEP_S)


def _correct(text: str, reference: str) -> bool:
  from math_verify import verify

  return verify(_parsed(f"\\boxed{{{reference}}}"), _parsed(text), timeout_seconds=STEP_S)


def _answer(text: str) -> str | None:
  from math_verify.errors import TimeoutException
  from math_verify.utils import timeout

  if not (found := _parsed(text)):
    return None
  *expressions, latex = found
  canonical = "".join(str(latex).split())
  if expressions:
    with contextlib.suppress(Exception, TimeoutException):  # then the LaTeX stands for itself
      canonical = timeout(STEP_S)(_canonical)(expressions[0])
  return canonical if len(canonical) <= LONGEST else None


def _canonical(value) -> str:
  """The canonical form of a sympy object."""
  import sympy
  from math_verify.grader import get_pct_val, is_assignment_relation, take_last_relation

  if is_assignment_relation(value):
    value = take_last_relation(value).rhs
  value = get_pct_val(value, value)  # 50 % is 50, as for math-verify
  if isinstance(value, sympy.FiniteSet):
    if len(value.args) == 1:  # math-verify takes 5 and {5} as equal
      return _canonical(value.args[0])
    return "{" + ", ".join(sorted(map(_canonical, value.args))) + "}"
  if isinstance(value, sympy.Tuple):
    return "(" + ", ".join(map(_canonical, value.args)) + ")"
  if isinstance(value, sympy.Interval):
    brackets = "(["[not value.left_open], ")]"[not value.right_open]
    return f"{brackets[0]}{_canonical(value.start)}, {_canonical(value.end)}{brackets[1]}"
  if isinstance(value, sympy.MatrixBase):
    return str([[_canonical(each) for each in value.row(row)] for row in range(value.rows)])
  if isinstance(value, sympy.Symbol):
    return value.name if len(value.name) == 1 else value.name.lower()
  if isinstance(value, sympy.logic.boolalg.Boolean):
    return str(value.canonical) if isinstance(value, sympy.core.relational.Relational) else str(value)
  if value.is_infinite or value.free_symbols:
    return str(sympy.expand(sympy.simplify(value)))
  return _decimal(value)


def _decimal(value) -> str:
  """A number as a decimal of DIGITS significant digits; whole numbers of up to 2 DIGITS digits are exact."""
  import sympy

  real, imaginary = value.evalf(3 * DIGITS).as_real_imag()
  if abs(real) < 10 ** (2 * DIGITS) and (real - int(real)).is_zero:  # to sympy a Float never equals an Integer
    shown = str(int(real))
  else:
    shown = str(sympy.Float(real, DIGITS))
    shown = shown.rstrip("0").rstrip(".") if "e" not in shown else shown
  return shown if not imaginary else f"{shown} + {_decimal(imaginary)} i"


def _serve(connection: Connection) -> None:
  """Answers requests until the other side is gone."""
  import logging
  import resource
  import signal

  import math_verify  # noqa: F401  (imported before the process says that it is ready)

  signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent
  logging.disable()  # math-verify logs whole texts
  sys.setrecursionlimit(3000)  # deeper nesting is an error instead of a full stack
  with contextlib.suppress(ValueError, OSError):  # macOS has no such limit
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
  kinds: dict[str, Callable] = {"correct": _correct, "answer": _answer}
  with contextlib.suppress(EOFError, OSError):  # a parent that was killed
    connection.send_bytes(b"ready")
    while True:
      kind, *texts = json.loads(connection.recv_bytes())
      # Should the parent be gone, nobody kills the process: it ends itself by the time that it computes.
      used = sum(os.times()[:2])
      most, hard = int(used + 2 * LIMIT_S), resource.getrlimit(resource.RLIMIT_CPU)[1]
      resource.setrlimit(resource.RLIMIT_CPU, (most if hard == resource.RLIM_INFINITY else min(most, hard), hard))
      try:
        reply = kinds[kind](*texts)
      except Exception:  # of sympy, MemoryError and RecursionError too
        reply = None
      connection.send_bytes(json.dumps(reply).encode())


if __name__ == "__main__":
  STEP_S = int(sys.argv[2])
  _serve(Connection(int(sys.argv[1])))
