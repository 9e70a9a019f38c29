"""Texts, likelihoods and traces on a mesh equal one device's, in processes of eight devices."""

from __future__ import annotations

import pytest

from tests import mesh_texts
from tests.programs import run_on_eight_devices

SLOW = [pytest.param(case.__name__, marks=pytest.mark.slow) for case in mesh_texts.SLOW]
TOGETHER = "texts shares_by_position refusals"  # in one process, whose start takes as long as some of them


@pytest.mark.parametrize("names", [TOGETHER, "likelihoods", *SLOW])
def test_on_eight_devices(names):
  run_on_eight_devices("tests.mesh_texts", names)
