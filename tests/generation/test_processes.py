"""Generation on the devices of two processes equals one device."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from tests import process_cases
from tests.helpers import save_checkpoints
from tests.programs import finished, meeting, on_devices

ROOT = Path(__file__).parents[2]
QUICK = [case.__name__ for case in process_cases.QUICK]
SLOW = [pytest.param(case.__name__, marks=pytest.mark.slow) for case in process_cases.SLOW]


def start(*command: str, devices: int) -> subprocess.Popen:
  return subprocess.Popen(
    [sys.executable, "-W", "error", "-m", *command],
    cwd=ROOT, env=on_devices(devices), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
  )  # fmt: skip


@pytest.mark.parametrize("name", [*QUICK, *SLOW])
def test_on_two_processes(name, tmp_path):
  devices = layers = 1 if name in QUICK else 2
  process_cases.save(tmp_path, layers)
  starts = [start("tests.process_cases", name, str(tmp_path), *meet, devices=devices) for meet in meeting()]
  for code, out, errors in finished(*starts):
    assert code == 0 and "equal" in out, errors[-3000:]


@pytest.mark.slow
def test_requests_of_a_program(tmp_path):
  """Two processes answer as one device does, and one alone of them writes and speaks; the same command goes on."""
  base, retrofit = save_checkpoints(tmp_path)
  lines = [
    {"prompt": "one", "id": "a"}, {"prompt": "another " * 9, "max_new_tokens": 9}, {"prompt": "x", "chains": 2},
    {"prompt": "drawn", "chains": 2, "seed": 7, "temperature": 0.9},
  ]  # fmt: skip
  (tmp_path / "r.jsonl").write_text("\n".join(map(json.dumps, lines)))
  flags = (
    "experiments.generate", f"--checkpoint={base}", f"--retrofit={retrofit}", f"--requests={tmp_path / 'r.jsonl'}",
    "--width=4", "--max_new_tokens=6", "--prefill_chunk=16", "--decode_block=4", "--noeos",
  )  # fmt: skip
  both = lambda: finished(*(start(*flags, f"--output={tmp_path / 'two'}", "--mesh.data=2", "--mesh.tensor=2", *meet,
                                  devices=2) for meet in meeting()))  # fmt: skip
  [(code, _, errors)] = finished(start(*flags, f"--output={tmp_path / 'one'}", devices=1))
  assert code == 0, errors
  (code, out, errors), (other_code, other_out, other_errors) = both()
  assert (code, other_code) == (0, 0), errors + other_errors
  said = lambda text: [line for line in text.splitlines() if "[Gloo]" not in line]
  assert json.loads(said(out)[-1])["rows_now"] == 6 and not said(other_out) and not said(other_errors)
  rows = lambda name: {(r["id"], r["chain"]): r for r in map(json.loads, (tmp_path / name).read_text().splitlines())}
  assert rows("one").keys() == rows("two").keys()
  for key, want in rows("one").items():
    got = rows("two")[key]
    np.testing.assert_allclose(got.pop("mean_logprob"), want.pop("mean_logprob"), atol=3e-5)
    assert got == want
  (code, out, errors), _ = both()
  assert code == 0 and json.loads(said(out)[-1])["rows_now"] == 0, errors
  (tmp_path / "two").write_text("not a result")
  for code, _, errors in both():
    assert code == 1 and "line 1" in errors
