"""The benchmark of the kernels runs anywhere at tiny shapes, and one case's failure does not lose the others."""

from __future__ import annotations

import json

import numpy as np
import pytest

from experiments import bench_kernels
from pallas_kernels import bench, prefill


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


@pytest.mark.standard_promotion  # JAX's own dense attention mixes dtypes
def test_a_prefill_case_has_the_compression_asked_for():
  case = bench_kernels.QUICK_TEXT[0]
  dense = bench_kernels.dense_prefill(case)
  rows = [bench_kernels.our_prefill(case, cr, "xla") for cr in (8, 1)]
  assert rows[1]["visible"] == 1 and 0 < rows[0]["visible"] < 0.5
  for row in rows:
    floor = bench_kernels.prefill_floor(dense, row)
    assert floor["of_floor"] == dense["us"] * row["visible"] / row["us"] > 0
  assert bench_kernels.prefill_floor({"error": "no"}, rows[0]) == {}
  text = bench_kernels.PREFILL[0]
  _, last = bench_kernels.evictions(text, 8)
  outside = last[..., : -text.window - 1]
  held = text.window + 1 + (outside == prefill.NEVER).sum(axis=-1).mean()
  assert abs(text.tokens / held - 8) < 0.1
