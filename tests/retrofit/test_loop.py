"""The training program: a killed run resumes with the same numbers; its checkpoints load."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from dms_jax import checkpoint
from dms_jax import testing as tiny
from dms_jax.tokenizer import byte_tokenizer

ROOT = Path(__file__).parents[2]
STEPS = 24


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
  folder = tmp_path_factory.mktemp("retrofit")
  tokenizer = byte_tokenizer()
  checkpoint.save(folder / "model", tiny.model(tiny.config(vocab_size=tokenizer.vocab_size)), tokenizer)
  text = " ".join(f"{i} and {i * i % 97} make {i + i * i % 97}." for i in range(400))
  (folder / "text.txt").write_text(text)
  return folder


def command(inputs: Path, output: Path, *flags: str) -> list[str]:
  return [
    sys.executable, "-m", "experiments.retrofit", f"--checkpoint={inputs / 'model'}", f"--output={output}",
    f"--data.paths={inputs / 'text.txt'}", "--retrofit.seq_len=32", "--dms.window=3", "--lora.rank=2",
    f"--retrofit.schedule.steps={STEPS}", "--retrofit.schedule.steps_per_cr=8", "--retrofit.schedule.final_cr=3",
    "--retrofit.saving.save_every=5", "--retrofit.saving.ema_decay=0.9", "--retrofit.optimizer.learning_rate=0.01",
    *flags,
  ]  # fmt: skip


# Kills itself with SIGKILL at the n-th time it opens, creates or renames a path that contains a given word.
KILLED_WHILE_WRITING = """
import os, runpy, signal, sys
count, word = int(sys.argv[1]), sys.argv[2]
def hook(event, args):
  global count
  writes = event in ("os.rename", "os.mkdir") or event == "open" and args[1] and set(str(args[1])) & set("wax")
  if writes and word in str(args[0]):
    count -= 1
    if count == 0:
      os.kill(os.getpid(), signal.SIGKILL)
sys.argv = sys.argv[3:]
sys.addaudithook(hook)
runpy.run_module("experiments.retrofit", run_name="__main__")
"""


def run(*args) -> subprocess.CompletedProcess:
  return subprocess.run(command(*args), cwd=ROOT, capture_output=True, text=True, timeout=300)


def log(output: Path) -> list[dict]:
  lines = [json.loads(line) for line in (output / "log.jsonl").read_text().splitlines()]
  return [{k: v for k, v in line.items() if k != "seconds"} for line in lines]


def weights(path: Path, base: Path):
  return checkpoint.load(base, retrofit=path, merge=False).params["layers"]


@pytest.fixture(scope="module")
def whole(inputs):
  """An uninterrupted run."""
  done = run(inputs, inputs / "whole")
  assert done.returncode == 0, done.stderr
  result = json.loads(done.stdout.splitlines()[-1])
  assert result["last"]["step"] == STEPS - 1
  return inputs / "whole"


def test_a_killed_run_goes_on_with_the_same_numbers(inputs, whole):
  """After SIGKILL during the writing of the state, and of a retrofit, log and weights end bit-equal."""
  output = inputs / "killed"
  # The state is written while training goes on, until the next is due.
  for count, word, steps in ((2, "state/10", range(10, 16)), (3, ".cr3", (16,))):
    killed = [sys.executable, "-c", KILLED_WHILE_WRITING, str(count), f"{output}/{word}", "retrofit"]
    done = subprocess.run(
      [*killed, *command(inputs, output)[3:]], cwd=ROOT, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert len(log(output)) in steps and not (output / "cr3").exists()
    assert [p for p in (output / word).parent.iterdir() if p.name.startswith(Path(word).name)]  # half-written
  done = run(inputs, output)
  assert done.returncode == 0, done.stderr
  assert log(output) == log(whole)
  for name in ("cr2", "cr3", "final"):
    want, got = weights(whole / name, inputs / "model"), weights(output / name, inputs / "model")
    for key in want:
      np.testing.assert_array_equal(np.asarray(got[key], np.float32), np.asarray(want[key], np.float32))


def test_what_a_run_leaves_behind(inputs, whole):
  assert [line["step"] for line in log(whole)] == list(range(STEPS))
  assert {p.name for p in whole.iterdir()} >= {"run.json", "log.jsonl", "state", "cr2", "cr3", "final"}
  model = checkpoint.load(inputs / "model", retrofit=whole / "final")
  assert model.dms.window == 3 and model.lora is None
  assert checkpoint.load(inputs / "model", retrofit=whole / "cr2", merge=False).lora.rank == 2


def test_finished_run_is_left_alone_and_other_settings_are_refused(inputs, whole):
  before = (whole / "log.jsonl").read_text()
  assert run(inputs, whole).returncode == 0
  assert (whole / "log.jsonl").read_text() == before
  other = run(inputs, whole, "--retrofit.seed=5")
  assert other.returncode == 1 and "retrofit.seed: 0 there, 5 now" in other.stderr and "Traceback" not in other.stderr


def test_an_unknown_flag_is_an_error(inputs):
  done = run(inputs, inputs / "unknown", "--retrofit.stepps=3")
  assert done.returncode != 0 and "retrofit.stepps" in done.stderr + done.stdout
  assert not (inputs / "unknown").exists()


def test_sigterm_saves_first_and_says_so(inputs):
  """A long run, terminated: exit code 143, a line with the reason, and a state to resume from."""
  output = inputs / "terminated"
  process = subprocess.Popen(
    command(inputs, output, "--retrofit.schedule.steps=100000", "--retrofit.saving.save_every=100000"),
    cwd=ROOT,
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    text=True,
  )
  path = output / "log.jsonl"
  while process.poll() is None and not (path.exists() and path.stat().st_size):
    time.sleep(0.05)
  process.send_signal(signal.SIGTERM)
  _, errors = process.communicate(timeout=300)
  steps = len(log(output))
  assert process.returncode == 143 and f"stopped after step {steps - 1} and saved" in errors, errors
  assert [p.name for p in (output / "state").iterdir() if p.name.isdigit()] == [str(steps)]
