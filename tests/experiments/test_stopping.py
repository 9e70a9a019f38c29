"""SIGINT and SIGTERM: a program ends within seconds, even where its main thread does not answer."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from experiments.common import stopping

ROOT = Path(__file__).parents[2]
KEPT = "all of it is kept; the same command goes on"

# A program reduced to its signals: it says "ready" once it does what its case is about.
PROGRAM = f"""
import sys, threading, time
from experiments.common import stopping

def ready():
  print("ready", flush=True)

def steps(first):
  with stopping.saving() as asked:
    asked()
    for step in range(1000):
      if step >= first:
        ready()
      time.sleep(0.3)
      if asked():
        raise stopping.Stopped(f"saved after step {{step}}")
      first = first if step < first else 1000

def work(case):
  if case == "python":
    ready()
    time.sleep(60)
  if case == "deaf":  # as within a callback of a library, which loses the exception
    ready()
    end = time.monotonic() + 60
    while time.monotonic() < end:
      try:
        time.sleep(1)
      except BaseException:
        pass
  if case == "weak":
    import weakref

    class Thing:
      pass

    def slow(reference):
      ready()
      time.sleep(1)

    thing = Thing()
    reference = weakref.ref(thing, slow)
    del thing
    time.sleep(60)
  if case == "saving":
    steps(1)
  if case == "first step":  # such as its compilation
    with stopping.saving() as asked:
      asked()
      ready()
      time.sleep(60)
  if case == "stuck":
    with stopping.saving() as asked:
      asked(), asked()
      ready()
      time.sleep(60)

stopping.install()
if sys.argv[1] == "semaphore":
  import multiprocessing
  held = multiprocessing.get_context("spawn").Semaphore()
  sys.argv[1] = "deaf"
if sys.argv[1] == "start":
  ready()
  time.sleep(60)
stopping.run()
try:
  with stopping.leaving({KEPT!r}):
    work(sys.argv[1])
except KeyboardInterrupt as stop:
  print(stopping.line(stop), file=sys.stderr, flush=True)
  sys.exit(128 + stop.number)
"""


CASES = ("python", "deaf", "weak", "first step")
SIGNALLED = [  # all at once, because most of them wait
  *((case, number) for case in CASES for number in stopping.SIGNALS), ("semaphore", signal.SIGTERM),
  ("start", signal.SIGINT), *(("saving", number) for number in stopping.SIGNALS), ("stuck", signal.SIGTERM),
]  # fmt: skip


def open_process(case: str) -> subprocess.Popen:
  return subprocess.Popen(
    [sys.executable, "-c", PROGRAM, case], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
  )


def when_ready(process: subprocess.Popen) -> subprocess.Popen:
  assert process.stdout.readline() == "ready\n", process.communicate()[1]
  return process


@pytest.fixture(scope="module")
def signalled():
  """Processes by case and signal, that got it as soon as they were ready."""
  processes = {key: open_process(key[0]) for key in SIGNALLED}
  for (case, number), process in processes.items():
    when_ready(process).send_signal(number)
    if case == "saving":  # within half a second: the same Ctrl-C, by way of a wrapper
      process.send_signal(number)
  yield processes
  for process in processes.values():
    process.kill()
    process.communicate()


def ended(process: subprocess.Popen) -> tuple[int, list[str]]:
  """(exit code, lines on stderr) within the time that a program has, and some for a busy machine."""
  errors = process.communicate(timeout=stopping.GRACE + 20)[1]
  return process.returncode, errors.splitlines()


@pytest.mark.parametrize("number", stopping.SIGNALS)
@pytest.mark.parametrize("case", CASES)
def test_it_ends_in_one_line_that_says_what_is_kept(case, number, signalled):
  assert ended(signalled[case, number]) == (128 + number, [f"stopped by {number.name}: {KEPT}"])


def test_a_semaphore_is_no_further_line(signalled):
  """multiprocessing reports those shared with workers that a process did not unlink."""
  assert ended(signalled["semaphore", signal.SIGTERM]) == (143, [f"stopped by SIGTERM: {KEPT}"])


def test_before_it_has_begun_nothing_is_at_stake(signalled):
  code, (line,) = ended(signalled["start", signal.SIGINT])
  assert code == 130 and line == "stopped by SIGINT: it had not begun; run the command again"


@pytest.mark.parametrize("number", stopping.SIGNALS)
def test_a_loop_that_saves_ends_after_its_step(number, signalled):
  code, lines = ended(signalled["saving", number])
  assert code == 128 + number and len(lines) == 2
  assert lines[0] == f"{number.name}: saving after this step; once more ends at once"
  assert lines[1].startswith(f"stopped by {number.name}: saved after step ")


def test_a_second_one_ends_a_loop_that_is_stuck(signalled):
  process = signalled["stuck", signal.SIGTERM]
  with pytest.raises(subprocess.TimeoutExpired):  # a loop that saves has all the time it needs
    process.wait(stopping.GRACE + 1)
  process.send_signal(signal.SIGINT)
  code, lines = ended(process)
  assert code == 130 and lines[-1] == f"stopped by SIGINT: {KEPT}"


def test_a_signal_that_the_process_was_started_to_ignore_stays_ignored():
  before = signal.signal(signal.SIGINT, signal.SIG_IGN)  # is inherited; JAX warns of functions run after a fork
  try:
    process = when_ready(open_process("python"))
  finally:
    signal.signal(signal.SIGINT, before)
  process.send_signal(signal.SIGINT)
  time.sleep(0.5)
  assert process.poll() is None
  process.send_signal(signal.SIGTERM)
  assert ended(process)[0] == 143


def test_a_process_started_while_signals_are_held_back_ends_with_the_program_alone():
  with stopping.held_back():
    child = subprocess.Popen([sys.executable, "-c", "print('ready', flush=True); input()"], stdin=subprocess.PIPE,
                             stdout=subprocess.PIPE, text=True)  # fmt: skip
  assert child.stdout.readline() == "ready\n"
  for number in stopping.SIGNALS:
    os.kill(child.pid, number)
  time.sleep(0.3)
  assert child.poll() is None
  child.communicate("\n", timeout=20)
  assert child.returncode == 0


def test_a_process_that_installed_nothing_is_left_alone():
  """Such as one that imports a program."""
  before = [signal.getsignal(number) for number in stopping.SIGNALS]
  with stopping.saving() as asked:
    assert not asked() and not asked()
  assert [signal.getsignal(number) for number in stopping.SIGNALS] == before
