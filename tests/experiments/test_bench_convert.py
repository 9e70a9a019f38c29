"""The benchmark of conversion: its source converts, memory is the process's, needs add up."""

from __future__ import annotations

import sys

import jax.numpy as jnp
import pytest

from dms_jax import checkpoint
from dms_jax import testing as tiny
from dms_jax.convert import convert
from dms_jax.families import PRESETS
from dms_jax.params import flatten
from experiments import bench_convert


def test_the_source_converts(tmp_path):
  """Shards of at most the size asked for, unless one tensor is larger."""
  model = tiny.config(num_layers=3, vocab_size=400)
  largest = bench_convert.write_source(tmp_path / "source", model, 20_000)
  shards = sorted(file.stat().st_size for file in (tmp_path / "source").glob("*.safetensors"))
  embedding = 400 * 32 * 2
  assert largest == shards[-1] and embedding < largest < embedding + 1000 and shards[-2] < 20_000 + 5000
  loaded = checkpoint.load(convert(str(tmp_path / "source"), tmp_path / "ours"))
  assert loaded.config == model and loaded.dtype == jnp.bfloat16
  assert all(0.01 < float(jnp.std(value.astype(jnp.float32))) < 0.03 for value in flatten(loaded.params).values())


def test_memory_is_the_process_s():
  """64 MB of ones are seen, mapped or not, and a command that fails is named."""
  quiet = bench_convert.watched([sys.executable, "-c", "import time; time.sleep(0.3)"])
  hold = "import time; x = b'1' * 2**26; time.sleep(0.3)"
  loud = bench_convert.watched([sys.executable, "-c", hold])
  for name in ("peak", "anonymous"):
    assert 2**26 * 0.95 < loud[name] - quiet[name] < 2**26 * 1.2
  with pytest.raises(RuntimeError, match="no such luck"):
    bench_convert.watched([sys.executable, "-c", "raise SystemExit('no such luck')"])


def test_needs_of_a_70b():
  """Against arithmetic by hand: 70.55e9 parameters of two bytes; up_proj [80, 28672, 8192]."""
  found = bench_convert.needed(PRESETS["llama-3.1-70b"])
  assert found["weights"] == pytest.approx(2 * 70.55, rel=1e-3)
  assert found["largest_parameter"] == 2 * 80 * 28672 * 8192 / 1e9
  assert found["largest_slice"] == 2 * 128256 * 8192 / 1e9
  assert found["layer"] == pytest.approx(2 * (2 * 8192**2 + 2 * 1024 * 8192 + 3 * 28672 * 8192 + 2 * 8192) / 1e9)
  assert 2 * found["largest_slice"] < found["need"] < found["bar"] < 64
  with pytest.raises(ValueError, match="--preset='llama-9' is not one of"):
    bench_convert.Config(preset="llama-9")
