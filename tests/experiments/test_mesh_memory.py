"""Bytes on each device of a mesh: as compiled, as stated, and what fits where."""

from __future__ import annotations

import dataclasses

import pytest

from dms_jax.retrofit.distributed import MeshConfig
from experiments.mesh_memory import Config, measure


def test_a_large_model_fits_compressed():
  one, eight = measure(Config(), MeshConfig()), measure(Config(), MeshConfig(tensor=8))
  assert eight["fits"] and not one["fits"]
  for part in ("weights", "cache"):  # norms and the tables of rows are whole on every device
    assert eight["bytes"][part] == pytest.approx(one["bytes"][part] / 8, rel=0.05)
  assert measure(dataclasses.replace(Config(), device_gib=95), MeshConfig(data=2, tensor=8))["fits"]
  assert not measure(dataclasses.replace(Config(), cr=1), MeshConfig(tensor=8))["fits"]


@pytest.mark.parametrize(
  "devices, message",
  [
    (MeshConfig(data=3), "--mesh.data=3 does not divide --rows=32"),
    (MeshConfig(tensor=16), "mesh.tensor=16 does not divide the 8 KV heads"),
  ],
)
def test_refusals(devices, message):
  with pytest.raises(ValueError, match=message):
    measure(Config(), devices)
  with pytest.raises(ValueError, match="--preset=llama-4"):
    Config(preset="llama-4")
