"""Generation on a mesh equals one device, in processes of eight simulated devices."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from dms_jax.testing import QUICK
from tests.mesh_cases import CASES

ROOT = Path(__file__).parents[2]
SLOW = {"other_policies", "a_large_model"}


@pytest.mark.parametrize("name", [pytest.param(n, marks=[pytest.mark.slow] * (n in SLOW)) for n in CASES])
def test_on_eight_devices(name):
  quick = [f"--{flag}={str(value).lower()}" for flag, value in QUICK.items()]
  flags = " ".join(["--xla_force_host_platform_device_count=8", *quick])
  env = {**os.environ, "XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
  command = [sys.executable, "-W", "error", "-m", "tests.mesh_cases", name]
  done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=600)
  assert done.returncode == 0 and "equal" in done.stdout, done.stderr[-3000:]
