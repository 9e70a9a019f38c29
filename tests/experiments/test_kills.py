"""SIGKILL at random moments: the same command then ends with the results of an undisturbed run.

A run is killed at a random moment after it has taken its output, or when it begins a random one of its writes there
(opening a file to write, renaming, making a folder). The next run goes on in the same output and may be killed, too; a
run that ends before it is killed is compared, and the next one starts in an empty output. DMS_KILLS is the number of
kills of each program, DMS_KILLS_SEED the seed of the moments. No temporary file is left.
"""

from __future__ import annotations

import os
import random
import signal
import subprocess
from pathlib import Path

import pytest

from tests.experiments import processes

pytestmark = [pytest.mark.slow, pytest.mark.timeout(0)]

KILLS = int(os.environ.get("DMS_KILLS", "2"))
SEED = int(os.environ.get("DMS_KILLS_SEED", "0"))


@pytest.fixture(scope="module")
def inputs(tmp_path_factory) -> Path:
  return processes.save_inputs(tmp_path_factory.mktemp("kills"))


def killed(process: subprocess.Popen, output: Path, delay: float | None) -> bool:
  """Waits for a run that ends by itself, or kills it `delay` seconds after it has taken its output; whether it was."""
  if delay is not None:
    processes.wait_for_lock(process, output)
    try:
      process.wait(delay)
    except subprocess.TimeoutExpired:
      process.kill()
  errors = process.communicate(timeout=900)[1]
  assert process.returncode in (0, -signal.SIGKILL), errors
  assert "Traceback" not in errors, errors
  return process.returncode != 0


@pytest.mark.parametrize("name", [
  "convert_weights", "generate", "self_text", "retrofit", "evaluate", "hyperscale", "ablate", "train_reasoner",
])  # fmt: skip
def test_killed_again_and_again_it_ends_with_the_same_results(inputs, tmp_path, name):
  kind = ".jsonl" if processes.is_file(name) else ""
  expected, took, writes = processes.whole_run(name, inputs, tmp_path / f"whole{kind}")
  rng = random.Random(f"{SEED} {name}")
  done = runs = 0
  while done < KILLS or runs == 0:
    output = tmp_path / f"run{runs:03d}{kind}"
    while True:
      event = done < KILLS and rng.random() < 0.5
      process = processes.start(name, inputs, output, rng.randint(1, writes) if event else -1)
      if not killed(process, output, rng.random() * took if done < KILLS and not event else None):
        break
      done += 1
      print(f"{name}: kill {done}, {'at a write' if event else 'at a moment'}", flush=True)
    processes.same(output, expected)
    runs += 1
  print(f"\n{name}: {done} kills, {runs} runs to their end, all as the undisturbed one ({took:.0f} s, {writes} writes)")
