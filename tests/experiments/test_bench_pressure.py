"""The benchmark of pressure runs on a tiny model: what a short pool costs, and bad settings."""

from __future__ import annotations

import json

import pytest

from dms_jax.policies import DMS
from experiments import bench_pressure
from experiments.common import program


def test_a_short_pool_costs_quality_or_time(tmp_path, monkeypatch, capsys):
  config = bench_pressure.Config(loads=(0.5, 1.5), output=str(tmp_path))
  monkeypatch.setattr(program, "read_flags", lambda prefix, cls: DMS() if cls is DMS else config)
  bench_pressure.main()
  rows = json.loads(capsys.readouterr().out.splitlines()[-1])["rows"]
  assert json.loads((tmp_path / "pressure.json").read_text())["rows"] == rows
  assert [(row["load"], row["mode"]) for row in rows] == [
    (0.0, "unhurried"), (0.5, "preempt"), (0.5, "compress"), (1.5, "preempt"), (1.5, "compress")
  ]  # fmt: skip
  calm, *ample, preempted, compressed = rows
  for row in (calm, *ample, preempted):
    assert row["kl"] == row["compressions"] == row["given_up"] == 0 and row["equal"] == 1
  assert preempted["preemptions"] and compressed["preemptions"] < preempted["preemptions"]
  assert compressed["kl"] > 0 and compressed["given_up"] > 0 and compressed["held"] < calm["held"]
  assert preempted["pages"] == compressed["pages"] == int(calm["pages"] / 1.5)


@pytest.mark.parametrize(
  ("settings", "message"),
  [
    (dict(loads=(0.0,)), "--loads=0.0 must be above 0"),
    (dict(width=0), "--width=0 must be 1 or more"),
    (dict(retrofit="r"), "--retrofit=r is an adapter of a checkpoint: give --checkpoint too"),
  ],
)
def test_bad_settings_are_refused(settings, message):
  with pytest.raises(ValueError, match=message):
    bench_pressure.Config(**settings)
