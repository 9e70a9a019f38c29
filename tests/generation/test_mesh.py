"""Generation on a mesh equals one device, in processes of eight simulated devices."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from dms_jax import testing as tiny
from tests import mesh_cases

ROOT = Path(__file__).parents[2]
SLOW = [pytest.param(case.__name__, marks=pytest.mark.slow) for case in mesh_cases.SLOW]
# In one process, whose start takes as long as some of them.
TOGETHER = "by_rows programs refusals", "whole_experts programs_by_rows caches_of_benchmarks"
QUICK = [name for case in mesh_cases.QUICK if (name := case.__name__) not in " ".join(TOGETHER).split()]


@pytest.mark.parametrize("names", [*TOGETHER, *QUICK, *SLOW])
def test_on_eight_devices(names):
  quick = [f"--{flag}={str(value).lower()}" for flag, value in tiny.QUICK.items()]
  flags = " ".join(["--xla_force_host_platform_device_count=8", *quick])
  env = {**os.environ, "XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
  command = [sys.executable, "-W", "error", "-m", "tests.mesh_cases", *names.split()]
  done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=600)
  assert done.returncode == 0 and "equal" in done.stdout, done.stderr[-3000:]
