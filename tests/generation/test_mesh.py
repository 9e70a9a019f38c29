"""Generation on a mesh equals one device, in processes of eight simulated devices."""

from __future__ import annotations

import pytest

from tests import mesh_cases
from tests.programs import run_on_eight_devices

SLOW = [pytest.param(case.__name__, marks=pytest.mark.slow) for case in mesh_cases.SLOW]
# In one process, whose start takes as long as some of them.
TOGETHER = "by_rows programs refusals", "whole_experts programs_by_rows caches_of_benchmarks"
QUICK = [name for case in mesh_cases.QUICK if (name := case.__name__) not in " ".join(TOGETHER).split()]


@pytest.mark.parametrize("names", [*TOGETHER, *QUICK, *SLOW])
def test_on_eight_devices(names):
  run_on_eight_devices("tests.mesh_cases", names)
