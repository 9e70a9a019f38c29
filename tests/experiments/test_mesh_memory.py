"""Bytes on each device of a mesh: as compiled, as stated, and what fits where."""

from __future__ import annotations

import dataclasses
import math

import pytest

from dms_jax.families import PRESETS
from dms_jax.params import param_table
from dms_jax.retrofit.distributed import MeshConfig
from experiments.mesh_memory import Config, chosen_experts, measure


def test_a_large_model_fits_compressed():
  one, eight = measure(Config(), MeshConfig()), measure(Config(), MeshConfig(tensor=8))
  assert eight["fits"] and not one["fits"]
  for part in ("weights", "cache"):  # norms and the tables of rows are whole on every device
    assert eight["bytes"][part] == pytest.approx(one["bytes"][part] / 8, rel=0.05)
  assert measure(dataclasses.replace(Config(), device_gib=95), MeshConfig(data=2, tensor=8))["fits"]
  assert not measure(dataclasses.replace(Config(), cr=1), MeshConfig(tensor=8))["fits"]


@pytest.mark.parametrize("preset", ["qwen3-30b-a3b", "mixtral-8x7b", "gpt-oss-120b"])
def test_experts_are_shared(preset):
  """A device holds its share; it reads its share of those chosen where all are, more where few are; 3 devices split."""
  one, four = (measure(Config(preset), MeshConfig(tensor=tensor)) for tensor in (1, 4))
  assert four["bytes"]["weights"] == pytest.approx(one["bytes"]["weights"] / 4, rel=0.05)
  model = PRESETS[preset]
  few, many = (chosen_experts(model, rows, 4, 2) for rows in (1, 512))
  assert many["whole"] == pytest.approx(many["split"]) and many["whole"] < four["bytes"]["weights"]
  assert few["split"] == pytest.approx(many["split"] * model.experts_per_token / model.num_experts)
  assert few["split"] < few["whole"] < many["whole"]
  assert chosen_experts(model, 1, 3, 2).keys() == {"split"}


@pytest.mark.parametrize("preset, tensor", [("gemma-3-1b", 4), ("smollm2-135m", 2), ("qwen3-30b-a3b", 8)])
def test_a_mesh_that_does_not_divide_the_heads_divides_rows(preset, tensor):
  """Caches and feed-forward are shared, the weights of attention are whole on each device."""
  config, model = Config(preset, tokens=8192), PRESETS[preset]
  one, many = (measure(config, MeshConfig(tensor=tensor))["bytes"] for tensor in (1, tensor))
  assert many["cache"] == pytest.approx(one["cache"] / tensor, rel=0.05)
  table = {path.removeprefix("layers/"): math.prod(spec.shape) for path, spec in param_table(model).items()}
  whole = 2 * sum(table[name] for name in ("q_proj", "k_proj", "v_proj", "o_proj"))
  assert many["weights"] == pytest.approx(whole + (one["weights"] - whole) / tensor, rel=0.05)


@pytest.mark.parametrize(
  "devices, message",
  [
    (MeshConfig(data=3), "--mesh.data=3 does not divide --rows=32"),
    (MeshConfig(data=4, tensor=16), "--mesh.data=4 x --mesh.tensor=16 does not divide --rows=32"),
    (MeshConfig(tensor=11), "mesh.tensor=11 does not divide the 28672 channels"),
  ],
)
def test_refusals(devices, message):
  with pytest.raises(ValueError, match=message):
    measure(Config(), devices)
  with pytest.raises(ValueError, match="--preset=llama-4"):
    Config(preset="llama-4")
