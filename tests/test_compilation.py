"""Compilation: the folder of compiled programs, and the line about one that takes long."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import jax
import pytest

from dms_jax import compilation

ROOT = Path(__file__).parents[1]


@pytest.fixture
def config_restored():
  names = ("jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs")
  before = {name: getattr(jax.config, name) for name in names}
  yield
  for name, value in before.items():
    jax.config.update(name, value)


def test_a_folder_is_made_and_named(config_restored, tmp_path, monkeypatch):
  assert compilation.keep(tmp_path / "new") == tmp_path / "new" == Path(jax.config.jax_compilation_cache_dir)
  monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", "")
  assert compilation.keep() is None
  monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path / "asked"))
  assert compilation.keep() == tmp_path / "asked"


def test_a_folder_that_cannot_be_is_one_warning(config_restored, tmp_path):
  (tmp_path / "file").write_text("")
  with pytest.warns(UserWarning, match="file/xla: compiled programs are not kept"):
    assert compilation.keep(tmp_path / "file" / "xla") is None
  assert jax.config.jax_compilation_cache_dir is None


SLOW = """
import sys, time
import dms_jax
from dms_jax import compilation
import jax, jax.numpy as jnp

compilation.PATIENCE = 0.0
for _ in range(2):
  dms_jax.keep_compiled(sys.argv[1])

@jax.jit
def slow(x):
  time.sleep(0.1)
  return x + 1

for size in (2, 3):
  slow(jnp.zeros(size))
"""


def test_what_takes_long_is_said_once_and_kept(tmp_path):
  env = {**os.environ, "PYTHONPATH": str(ROOT), "JAX_ENABLE_COMPILATION_CACHE": "true"}
  command = [sys.executable, "-c", SLOW, str(tmp_path)]
  done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=300)
  assert done.returncode == 0 and done.stderr.count("compiling (kept in ") == 1, done.stderr
  assert any("slow" in path.name for path in tmp_path.iterdir())
