"""The benchmark of the kernels runs anywhere at tiny shapes, and one case's failure does not lose the others."""

from __future__ import annotations

import json

import numpy as np

from experiments import bench_kernels
from pallas_kernels import bench


def test_ragged_lengths_have_the_mean_asked_for():
  lengths = bench.ragged_lengths(32, 8, 8192, 8)
  assert lengths.shape == (32, 8) and lengths.dtype == np.int32
  assert abs(lengths.mean() / 1024 - 1) < 0.01 and lengths.min() >= 1 and lengths.max() <= 8192
  assert (bench.ragged_lengths(2, 2, 64, 1) == 64).all()


def test_cases_are_guarded():
  run = bench_kernels.Runner(seconds=60)
  run({"case": "bad"}, lambda: 1 / 0)
  run({"case": "good"}, lambda: {"us": 1.0})
  run.end = 0.0
  run({"case": "late"}, lambda: {"us": 1.0})
  assert [set(row) - {"case"} for row in run.rows] == [{"error"}, {"us"}, {"skipped"}]
  text = bench_kernels.table(run.rows)
  assert "ZeroDivisionError" in text and "out of time" in text


def test_a_decode_case_measures_time_and_floor(tmp_path):
  case = bench_kernels.QUICK_DECODE[0]
  row = bench_kernels.our_decode(case, 4, 1e10, "xla")
  assert row["us"] > 0 and row["of_floor"] == row["floor_us"] / row["us"]
  rows = [row | {"axis": "CR", "value": 4}, row | {"axis": "CR", "value": 8}]
  path = bench_kernels.picture(tmp_path / "decode.png", rows, "cpu")
  assert path is None or (tmp_path / "decode.png").stat().st_size > 0
  json.dumps(rows)
