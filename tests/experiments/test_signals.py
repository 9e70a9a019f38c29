"""SIGINT and SIGTERM to programs at work: one line, the exit code, the same results in the end."""

from __future__ import annotations

import signal
import subprocess
import time
from pathlib import Path

import pytest

from experiments.common import stopping
from tests.experiments import processes

pytestmark = [pytest.mark.slow, pytest.mark.timeout(0)]
PROGRAMS = ("generate", "train_reasoner", "ablate", "hyperscale", "evaluate", "self_text")


@pytest.fixture(scope="module")
def inputs(tmp_path_factory) -> Path:
  return processes.save_inputs(tmp_path_factory.mktemp("signals"))


@pytest.fixture(scope="module", params=PROGRAMS)
def whole(request, inputs, tmp_path_factory):
  """(name, content, writes) of a program's undisturbed run."""
  output = tmp_path_factory.mktemp("whole") / f"whole{'.jsonl' if processes.is_file(request.param) else ''}"
  content, _, writes = processes.whole_run(request.param, inputs, output)
  return request.param, content, writes


def at_a_write(name: str, inputs: Path, output: Path, at: int, action: str) -> subprocess.Popen:
  """A program that has begun its write number `at`."""
  process = processes.start(name, inputs, output, at, action)
  for line in process.stdout:
    if line == "at the write\n":
      return process
  raise AssertionError(f"it ended before: {process.communicate()[1]}")


def ended(process: subprocess.Popen, number: signal.Signals) -> str:
  """What a stopped program said last; within the time that it has, and some for a busy machine."""
  errors = process.communicate(timeout=stopping.GRACE + 30)[1]
  assert process.returncode == 128 + number, errors
  assert "Traceback" not in errors and errors.count("stopped by") == 1, errors
  last = errors.splitlines()[-1]
  assert last.startswith(f"stopped by {number.name}: "), errors
  return last.partition(": ")[2]


def goes_on(name: str, inputs: Path, output: Path) -> None:
  """Runs the same command to its end."""
  process = processes.start(name, inputs, output)
  errors = process.communicate(timeout=900)[1]
  assert process.returncode == 0, errors


@pytest.mark.parametrize("number", stopping.SIGNALS)
def test_it_stops_in_one_line_and_goes_on(whole, inputs, tmp_path, number):
  name, expected, writes = whole
  output = tmp_path / f"run{'.jsonl' if processes.is_file(name) else ''}"
  # Half of the writes of one, a third of those of the other: neither the first nor the last moment.
  at = max(writes // 2 if number == signal.SIGINT else writes // 3, 2)
  process = at_a_write(name, inputs, output, at, "say")
  process.send_signal(number)
  said = ended(process, number)
  assert "the same command" in said or "saved" in said, said
  goes_on(name, inputs, output)
  processes.same(output, expected)


def test_a_second_one_ends_at_once_a_program_that_does_not_answer(whole, inputs, tmp_path):
  name, expected, writes = whole
  output = tmp_path / f"run{'.jsonl' if processes.is_file(name) else ''}"
  process = at_a_write(name, inputs, output, max(writes // 2, 2), "deaf")
  process.send_signal(signal.SIGINT)
  time.sleep(2 * stopping.APART)
  process.send_signal(signal.SIGINT)
  began = time.monotonic()
  said = ended(process, signal.SIGINT)
  assert time.monotonic() - began < stopping.GRACE, said
  goes_on(name, inputs, output)
  processes.same(output, expected)
