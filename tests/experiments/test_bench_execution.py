"""The benchmark of execution choices on a tiny model: each choice off, every program runs."""

from __future__ import annotations

import dataclasses

import pytest

from dms_jax import testing as tiny
from dms_jax.execution import Execution
from dms_jax.families import PRESETS
from experiments.bench_execution import BASE, NOT_TIMED, Config, measure, switched_off


def test_switched_off():
  """Each field that is on, at its off value; gates after the layers hide the fused ones, which are tried together."""
  assert switched_off(Execution()) == {BASE: {}}
  every = Execution("loop", 8, True, True, 32, 16, 2, True, True, True, True)
  off = switched_off(every)
  assert set(off) == {BASE, *(f.name for f in dataclasses.fields(Execution))} - {*NOT_TIMED, "fused_gate"} | {
    "late_gates+fused_gate"
  }
  assert (
    off["late_gates+fused_gate"] == {"late_gates": False, "fused_gate": False} and off["layers"]["layers"] == "scan"
  )
  assert list(switched_off(every, ("jitted_attention",))) == [BASE, "jitted_attention"]


@pytest.mark.parametrize("chunk, tricks", [(0, ("layers", "matvec_parts", "bits_storage")), (8, ("weights_left",))])
def test_measure(chunk, tricks, monkeypatch):
  """A row a trick; programs that a trick leaves as they are run once."""
  monkeypatch.setitem(PRESETS, "tiny", tiny.config())
  monkeypatch.setattr("os.cpu_count", lambda: 2)
  config = Config("tiny", (1 if chunk else 2,), 64, 2.0, window=8, steps=2, chunk=chunk, tricks=tricks, workers=2)
  found = measure(dataclasses.replace(config, rounds=1, seconds=1e-4))
  assert [row["off"] for row in found] == [BASE, *tricks]
  for row in found:
    assert row["ms"] > 0 and row["ms_off"] > 0 and (row["tokens"], row["rows"]) == (64, *config.rows)
    assert row["same_program"] == (row["off"] == "matvec_parts")  # acts in float32, for one row
