"""What earlier schemas wrote is still read: checkpoints, retrofits, runs, settings of retrofits."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

import dms_jax
from dms_jax import checkpoint, formats
from dms_jax import testing as tiny
from dms_jax.config import DMSConfig, LoRAConfig
from dms_jax.json_files import from_json, read_json, to_json
from dms_jax.params import flatten
from dms_jax.retrofit import LossConfig, OptimizerConfig, RetrofitConfig, ScheduleConfig
from dms_jax.retrofit.config import DataConfig
from dms_jax.retrofit.data import Packer, load_sources
from dms_jax.retrofit.loop import Run, train
from dms_jax.tokenizer import byte_tokenizer
from tests.helpers import GOLDENS, changed
from tests.programs import read

# The folders that versions of dms_jax wrote, and the schemas of what is in them.
SAMPLES = {"v0_1": 1, "v0_2": 1, "schema_2": 2}
RESULTS = Path(__file__).parents[1] / "experiments" / "results" / "retrofit"
RETROFITS = sorted(RESULTS.glob("*/config.json"))


@pytest.mark.parametrize("sample", SAMPLES)
def test_checkpoint_and_retrofit(sample):
  """Both load: the base with the numbers of its seed, gates that decide both ways."""
  folder = GOLDENS / sample
  dense, tokenizer = dms_jax.load(folder / "checkpoint")
  assert dense.dms is None and tokenizer.encode("a") == [97]
  assert formats.check("checkpoint", read_json(folder / "checkpoint" / "config.json"), folder) == SAMPLES[sample]
  if sample != "v0_1":  # its seed made other numbers
    wanted = flatten(tiny.model(dense.config).params)
    for name, value in flatten(checkpoint.load(folder / "checkpoint").params).items():
      np.testing.assert_array_equal(value, wanted[name], err_msg=name)
  model, _ = dms_jax.load(folder / "checkpoint", retrofit=folder / "retrofit", merge=False)
  assert model.dms == tiny.dms(offset=4.0) and model.lora.rank == 2 and model.lora.scale == 1.5
  stacked = checkpoint.load(folder / "checkpoint", retrofit=folder / "retrofit")
  _, logits = read(stacked, np.arange(40)[None] % 250)
  assert 0 < np.mean(logits > 0) < 1


@pytest.mark.standard_promotion  # of optax
@pytest.mark.parametrize("sample", ["v0_2", "schema_2"])
def test_a_run_goes_on(sample, tmp_path, monkeypatch):
  """A run that stopped after step 3 of 6 ends with the losses that its own version logged for steps 3 to 5."""
  shutil.copytree(GOLDENS / sample, tmp_path / "run")
  monkeypatch.chdir(tmp_path / "run")  # run.json names the text as it was given
  settings = read_json("run/run.json")
  dms, lora = from_json(DMSConfig, settings["dms"]), from_json(LoRAConfig, settings["lora"])
  config, data = from_json(RetrofitConfig, settings["retrofit"]), from_json(DataConfig, settings["data"])
  run = Run(checkpoint.load("checkpoint"), dms, lora, config, data, Path("run"))
  train(run, Packer(load_sources(data, byte_tokenizer()), data, config))
  lines = lambda name: [json.loads(line) for line in Path(name).read_text().splitlines()]
  found, wanted = lines("run/log.jsonl"), lines("run_expected.jsonl")
  assert [line["step"] for line in found] == list(range(6))
  for ours, theirs in zip(found, wanted, strict=True):
    # In bfloat16 one of 256 decisions may flip from machine to machine; a state that is not resumed is off by 0.3.
    np.testing.assert_allclose(ours["compression_loss"], theirs["compression_loss"], atol=0.02)
    np.testing.assert_allclose(ours["kl"], theirs["kl"], rtol=0.1, atol=1e-5)
  assert checkpoint.load("checkpoint", retrofit="run/final").dms == dms


@pytest.mark.parametrize("path", RETROFITS, ids=lambda path: path.parent.name)
def test_retrofits_of_the_repository(path):
  values, model, dms, _ = checkpoint.read_config(path.parent)
  assert model == dms_jax.PRESETS["smollm2-135m"] and dms.window == 64
  settings = from_json(RetrofitConfig, values["metadata"]["retrofit"], str(path))
  flat = values["metadata"]["retrofit"]
  if "schedule" in flat:  # by sections, since 0.2
    assert {name: to_json(settings)[name] for name in flat} == flat
    return
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
