"""The benchmark of reading prompts runs at tiny shapes; policies it cannot compare are refused."""

from __future__ import annotations

import json

import pytest

from experiments import bench_policies
from experiments.common import program


def run(config, monkeypatch, capsys):
  monkeypatch.setattr(program, "read_flags", lambda prefix, cls: config)
  monkeypatch.setattr(program, "flag_values", lambda changed_only=False: {})
  bench_policies.main()
  rows = json.loads(capsys.readouterr().out.splitlines()[-1])["rows"]
  assert json.loads((config.output / "policies.json").read_text())["rows"] == rows
  return rows


def test_both_ways_of_reading_are_timed(tmp_path, monkeypatch, capsys):
  rows = run(bench_policies.Config(cases=("prefill",), scale="small", output=tmp_path), monkeypatch, capsys)
  assert [row["name"] for row in rows] == ["prefill_h2o", "prefill_tova"]
  for row in rows:
    assert row["ratio"] == pytest.approx(row["exact_ms"] / row["ms"]) and row["CR"] == 48 / 12 and "bar" not in row


def test_steps_hold_the_budget(tmp_path, monkeypatch, capsys):
  """Quest reads the budget and holds all tokens; the last two cut their heads every few steps."""
  wanted = {"step_h2o_paged": 8, "step_quest_paged": 1, "step_rkv_paged": 8, "step_triattention_paged": 8}
  config = bench_policies.Config(cases=tuple(wanted), scale="small", output=tmp_path, seconds=1e4)
  rows = {row["name"]: row for row in run(config, monkeypatch, capsys)}
  assert set(rows) == set(wanted)
  for name, row in rows.items():
    assert row["CR"] == pytest.approx(wanted[name]) and row["dense_ratio"] == row["dense_ms"] / row["ms"]


def test_policies_that_read_in_one_way_are_refused():
  with pytest.raises(ValueError, match="--policies: Vanilla has no budget"):
    bench_policies.pair("vanilla", 8)
  config = bench_policies.Config(step_policies=("vanilla",))
  with pytest.raises(ValueError, match="--step_policies=vanilla: not one of "):
    bench_policies.measurements(config, config)
  with pytest.raises(ValueError, match="--preset='gpt-5'"):
    bench_policies.Config(preset="gpt-5")
  with pytest.raises(ValueError, match="--rows=0"):
    bench_policies.Config(rows=0)
