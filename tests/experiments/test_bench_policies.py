"""The benchmark of reading prompts runs at tiny shapes; policies it cannot compare are refused."""

from __future__ import annotations

import json

import pytest

from experiments import bench_policies
from experiments.common import program


def test_both_ways_of_reading_are_timed(tmp_path, monkeypatch, capsys):
  config = bench_policies.Config(scale="small", output=tmp_path)
  monkeypatch.setattr(program, "read_flags", lambda prefix, cls: config)
  monkeypatch.setattr(program, "flag_values", lambda: {})
  bench_policies.main()
  rows = json.loads(capsys.readouterr().out.splitlines()[-1])["rows"]
  assert [row["name"] for row in rows] == ["prefill_h2o", "prefill_tova"]
  for row in rows:
    assert row["ratio"] == pytest.approx(row["exact_ms"] / row["ms"]) and row["CR"] == 48 / 12 and "bar" not in row
  assert json.loads((tmp_path / "policies.json").read_text())["rows"] == rows


def test_policies_that_read_in_one_way_are_refused():
  with pytest.raises(ValueError, match="--policies: Vanilla has no budget"):
    bench_policies.pair("vanilla", 8)
  with pytest.raises(ValueError, match="--preset='gpt-5'"):
    bench_policies.Config(preset="gpt-5")
  with pytest.raises(ValueError, match="--rows=0"):
    bench_policies.Config(rows=0)
