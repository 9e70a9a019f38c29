"""What version 0.1 wrote is still read: a checkpoint, a retrofit, and the settings of retrofits."""

from __future__ import annotations

import json
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

import dms_jax
from dms_jax import checkpoint
from dms_jax import testing as tiny
from dms_jax.config import from_json, to_json
from dms_jax.model import Eviction, forward
from dms_jax.retrofit import LossConfig, OptimizerConfig, RetrofitConfig, ScheduleConfig
from tests.helpers import GOLDENS, changed

OLD = GOLDENS / "v0_1"
RESULTS = Path(__file__).parents[1] / "experiments" / "results" / "retrofit"
RETROFITS = sorted(RESULTS.glob("*/config.json"))


def test_checkpoint_and_retrofit():
  """Both load; the base is that of the seed it was made with, and the gates decide both ways."""
  dense, tokenizer = dms_jax.load(OLD / "checkpoint")
  assert dense.dms is None and tokenizer.encode("a") == [97]
  model, _ = dms_jax.load(OLD / "checkpoint", retrofit=OLD / "retrofit", merge=False)
  assert model.dms == tiny.dms(offset=4.0) and model.lora.rank == 2 and model.lora.scale == 1.5
  stacked = checkpoint.load(OLD / "checkpoint", retrofit=OLD / "retrofit")
  _, logits = forward(stacked, jnp.arange(40)[None] % 250, eviction=Eviction(threshold=0.0))
  assert 0 < np.mean(logits > 0) < 1


@pytest.mark.parametrize("path", RETROFITS, ids=lambda path: path.parent.name)
def test_retrofits_of_the_repository(path):
  values, model, dms, _ = checkpoint.read_config(path.parent)
  assert model == dms_jax.PRESETS["smollm2-135m"] and dms.window == 64
  settings = from_json(RetrofitConfig, values["metadata"]["retrofit"], str(path))
  flat = values["metadata"]["retrofit"]
  assert settings.schedule.final_cr == flat["final_cr"] and settings.optimizer.decay_steps == flat["decay_steps"]
  assert settings.memory.loss_chunk == flat["loss_chunk"] and settings.saving.save_every == flat["save_every"]
  assert settings.loss == LossConfig() and settings.trainable == flat["trainable"]


def test_settings_with_and_without_sections():
  config = changed(
    RetrofitConfig(batch_size=4, schedule=ScheduleConfig(steps=7), optimizer=OptimizerConfig(beta1=0.5)),
    loss__kind="lm", loss__bound=9.0, saving__export="model",
  )  # fmt: skip
  nested = json.loads(json.dumps(to_json(config)))
  assert from_json(RetrofitConfig, nested) == config
  flat = {"batch_size": 4, "steps": 7, "beta1": 0.5, "loss": "lm", "loss_bound": 9.0, "export": "model"}
  assert from_json(RetrofitConfig, flat) == config
  assert from_json(RetrofitConfig, {"kl": "forward"}).loss.kind == "forward_kl"
  with pytest.raises(ValueError, match=r"x: unknown field\(s\) \['stepps'\] for RetrofitConfig"):
    from_json(RetrofitConfig, {"stepps": 3}, "x")
  with pytest.raises(ValueError, match=r"x: schedule: unknown field\(s\) \['stepps'\] for ScheduleConfig"):
    from_json(RetrofitConfig, {"schedule": {"stepps": 3}}, "x")
  with pytest.raises(ValueError, match=r"x: retrofit\.schedule\.steps=-1 must be at least 1"):
    from_json(RetrofitConfig, {"steps": -1}, "x")
