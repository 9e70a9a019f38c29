"""Configs: their own checks, JSON both ways, and errors that name the culprit."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys

import pytest

from dms_jax.config import DMSConfig, LoRAConfig, ModelConfig, RopeScaling
from dms_jax.families import PRESETS
from dms_jax.json_files import as_text, from_json, read_json, to_json
from dms_jax.retrofit import DataConfig


@pytest.mark.parametrize(
  "config",
  [*PRESETS.values(), DMSConfig("neuron", 16, 50.0, 1.0, 0, "layer"), LoRAConfig(8, 1.5, ("q_proj",)), RopeScaling()],
  ids=[*PRESETS, "dms", "lora", "rope"],
)
def test_json_both_ways(config):
  values = json.loads(json.dumps(to_json(config)))
  assert from_json(type(config), values) == config
  hash(config)  # static arguments of compiled functions


@pytest.mark.parametrize(
  "cls, values, message",
  [
    (ModelConfig, dict(family="gpt5"), "gpt5"),
    (ModelConfig, dict(num_heads=6, num_kv_heads=4), "num_heads=6.*num_kv_heads=4"),
    (ModelConfig, dict(head_dim=15), "head_dim=15"),
    (DMSConfig, dict(gate="lstm"), "dms.gate='lstm'"),
    (DMSConfig, dict(granularity="token"), "dms.granularity='token'"),
    (DMSConfig, dict(shift=2), "dms.shift=2"),
    (DMSConfig, dict(window=-1), "dms.window=-1"),
    (LoRAConfig, dict(rank=-4), "lora.rank=-4"),
  ],
)
def test_refused_values_are_named(cls, values, message):
  with pytest.raises(ValueError, match=message):
    cls(**values)
  with pytest.raises(ValueError, match=f"run.json: .*{message}"):
    from_json(cls, values, "run.json")


def test_unknown_fields_are_named():
  with pytest.raises(ValueError, match=r"c.json: unknown field\(s\) \['windw'\] for DMSConfig"):
    from_json(DMSConfig, {"windw": 3}, "c.json")
  with pytest.raises(ValueError, match=r"c.json: rope_scaling: unknown field\(s\) \['type'\]"):
    from_json(ModelConfig, {"rope_scaling": {"type": "yarn"}}, "c.json")


def test_files_that_are_no_json_object(tmp_path):
  path = tmp_path / "config.json"
  with pytest.raises(ValueError, match=r"config\.json: no such file"):
    read_json(path)
  whole = json.dumps(to_json(PRESETS["qwen3-8b"]))
  path.write_text(whole)
  assert from_json(ModelConfig, read_json(path)) == PRESETS["qwen3-8b"]
  for content, message in ((whole[:40].encode(), "cut short"), (b"\xff\xfe\x00", "not valid JSON"), (b"[1]", "list")):
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message):
      read_json(path)


def test_configs_are_frozen():
  with pytest.raises(dataclasses.FrozenInstanceError):
    DMSConfig().window = 3
  assert ModelConfig(num_heads=12, num_kv_heads=4).group_size == 3


@pytest.mark.parametrize(
  ("cls", "values", "message"),
  [
    (ModelConfig, dict(num_heads=0), "num_heads=0 must be 1 to"),
    (ModelConfig, dict(d_model=10**12), "d_model=1000000000000 must be 1 to"),
    (ModelConfig, dict(num_layers=2.0), r"num_layers should be int, found 2\.0"),
    (ModelConfig, dict(num_layers=None), "num_layers should be int, found None"),
    (ModelConfig, dict(num_layers=10**40), "num_layers should be int, found a number of 133 bits"),
    (ModelConfig, dict(tie_embeddings="false"), "tie_embeddings should be bool, found 'false'"),
    (ModelConfig, dict(rope_theta=float("nan")), "rope_theta should be float, found nan"),
    (ModelConfig, dict(rope_theta=1e-300), "rope_theta=1e-300 must be between"),
    (ModelConfig, dict(rms_norm_eps=True), "rms_norm_eps should be float, found True"),
    (ModelConfig, dict(eos_token_ids=[256]), r"\[256\] are outside the vocabulary of 256"),
    (ModelConfig, dict(eos_token_ids=[1.5]), r"eos_token_ids\[0\] should be int, found 1\.5"),
    (ModelConfig, dict(eos_token_ids="12"), "eos_token_ids should be tuple"),
    (ModelConfig, dict(family=["llama"]), "family should be str"),
    (ModelConfig, dict(rope_scaling="llama3"), "rope_scaling should be RopeScaling or null, found 'llama3'"),
    (ModelConfig, dict(rope_scaling={"factor": 0.0}), r"rope_scaling: rope_scaling\.factor=0\.0"),
    (DMSConfig, dict(window=2**40), "dms.window=1099511627776: at most"),
    (DMSConfig, dict(scale=float("inf")), "scale should be float, found inf"),
    (DMSConfig, dict(scale=1e200), r"dms\.scale=1e\+200 must be between"),
    (DMSConfig, dict(offset=-1e31), r"dms\.offset=-1e\+31 must be between"),
    (LoRAConfig, dict(scale=1e200), r"lora\.scale=1e\+200 must be between"),
    (DMSConfig, dict(gate=[]), "gate should be .*, found"),
    (LoRAConfig, dict(targets=[1]), r"targets\[0\] should be str, found 1"),
    (LoRAConfig, [1], "c: should be an object, found a list of 1"),
  ],
)
def test_values_of_other_types(cls, values, message):
  with pytest.raises(ValueError, match=message) as error:
    from_json(cls, values, "c")
  assert str(error.value).startswith("c: ") and "\n" not in str(error.value)


def test_whole_numbers_stand_for_floats():
  config = from_json(ModelConfig, {"rope_theta": 10000, "rope_scaling": {"factor": 8}})
  assert type(config.rope_theta) is type(config.rope_scaling.factor) is float


def test_json_that_no_parser_likes(tmp_path):
  path = tmp_path / "c.json"
  for content, message in (
    ("[" * 100_000, "nested too deep"),
    ('{"a":' * 100_000, "nested too deep"),
    ('{"a": ' + "9" * 5000 + "}", "not valid JSON"),
    ('{"a": -' + "9" * 308 + "}", "a number of 309 digits"),
  ):
    path.write_text(content)
    with pytest.raises(ValueError, match=rf"c\.json: .*{message}") as error:
      read_json(path)
    assert "\n" not in str(error.value)
  with pytest.raises(ValueError, match="cannot be read"):
    read_json(tmp_path)
  path.write_text('{"a": ' + "9" * 308 + "}")
  assert float(read_json(path)["a"]) == 1e308  # the largest: each is also a float
  path.write_text('{"a": "é"}', encoding="utf-8-sig")
  assert read_json(path) == {"a": "é"}


def test_a_path_is_the_same_text_in_every_locale():
  """Python holds what a locale cannot decode as halves of surrogate pairs."""
  for held in ("Stra\udcc3\udc9fe", "Straße"):
    assert as_text({held: 1}) == {"Straße": 1}
    assert as_text({"paths": [held], "count": 2, "none": None}) == {"paths": ["Straße"], "count": 2, "none": None}
    assert to_json(DataConfig(paths=(held,)))["paths"] == ["Straße"]
  assert as_text("\ud83d") == "\ud83d" and as_text("\udcff") == "\udcff"


def test_json_is_utf8_in_every_locale(tmp_path):
  path = tmp_path / "c.json"
  path.write_text('{"a": "é你"}', encoding="utf-8")
  code = f"from dms_jax.json_files import read_json; print(ascii(read_json({str(path)!r})['a']))"
  locale = {"LC_ALL": "C", "PYTHONUTF8": "0"}  # without the second, Python 3.7 and later read UTF-8 anyway
  done = subprocess.run([sys.executable, "-c", code], env={**os.environ, **locale}, capture_output=True, text=True)
  assert done.stdout.strip() == r"'\xe9\u4f60'", done.stderr
