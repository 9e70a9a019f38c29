"""The benchmark of a mesh runs on two simulated devices, and its bars."""

from __future__ import annotations

import json
import subprocess
import sys
import types

import pytest

from experiments.bench_mesh import CASES, Config, Pair, llama, share
from tests.programs import finished, on_devices


def test_devices_do_what_one_does(tmp_path):
  """Rows or heads that are divided hold as many tokens as on one device."""
  command = [sys.executable, "-m", "experiments.bench_mesh", "--scale=small", f"--output={tmp_path}"]
  options = dict(env=on_devices(2), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
  [(status, out, err)] = finished(subprocess.Popen(command, **options))
  assert status == 0, err[-3000:]
  rows = json.loads(out.splitlines()[-1])["rows"]
  saved = json.loads((tmp_path / "mesh.json").read_text())["rows"]
  assert [row["name"] for row in rows] == [row["name"] for row in saved] == list(CASES)
  for row in rows:
    assert row["speedup"] == pytest.approx(row["tokens_per_s"] / row["one_tokens_per_s"])
    assert row["time_ratio"] == pytest.approx(row["ms"] / row["one_ms"]) and "bar" not in row
    assert row["CR"] == pytest.approx(1 if row["name"] in ("tensor_8b", "share_8b") else 4, rel=0.15)
    if row["mesh"] == "data 2":
      assert row["cache_bytes"] == 2 * row["one_cache_bytes"]
    if row["mesh"] == "share 2":
      assert row["cache_bytes"] == pytest.approx(row["one_cache_bytes"] / 2, rel=0.2)


def test_a_share_of_the_8b_shape_is_a_model():
  config = share(llama(), 2).config
  assert (config.num_heads, config.num_kv_heads, config.d_ff, config.vocab_size) == (16, 4, 7168, 64128)


def test_bars():
  """1.9 times the tokens, 0.65 of the time; for more devices only the first has a meaning."""
  bars = [str(case.bar(2)) for case in CASES.values()]
  assert bars == ["speedup >= 1.9"] * 2 + ["time_ratio <= 0.65"] * 2 + ["None"] * 2
  assert str(CASES["data_8b"].bar(4)) == "speedup >= 3.8" and CASES["tensor_8b"].bar(4) is None
  with pytest.raises(ValueError, match="--devices=1 must be 2 or more"):
    Config(devices=1)
  with pytest.raises(ValueError, match="--devices=3 does not divide the 8 KV heads"):
    Pair(CASES["tensor_8b"], types.SimpleNamespace(shape=llama()), Config(devices=3))
