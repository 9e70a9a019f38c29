"""Configs: their own checks, JSON both ways, and errors that name the culprit."""

from __future__ import annotations

import dataclasses
import json

import pytest

from dms_jax.config import DMSConfig, LoRAConfig, ModelConfig, RopeScaling, from_json, read_json, to_json
from dms_jax.families import PRESETS


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
    (ModelConfig, dict(family="gpt2"), "gpt2"),
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
