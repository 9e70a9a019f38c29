"""The parameter table, and what is derived from it: shapes, initialisation, merging."""

from __future__ import annotations

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dms_jax import families
from dms_jax import testing as tiny
from dms_jax.config import DMSConfig, LoRAConfig
from dms_jax.families import PRESETS
from dms_jax.model import forward
from dms_jax.params import (
  abstract_params,
  count_params,
  flatten,
  init_params,
  join_params,
  merge_lora,
  param_table,
  split_params,
  unflatten,
)

LORA = LoRAConfig(rank=3, scale=0.5, targets=("q_proj", "o_proj", "down_proj"))


def test_table_of_a_llama():
  """Every tensor of a small model, written out."""
  table = param_table(tiny.config(tie_embeddings=False))
  assert {path: spec.shape for path, spec in table.items()} == {
    "embed": (97, 32), "layers/attn_norm": (2, 32), "layers/q_proj": (2, 4, 16, 32), "layers/k_proj": (2, 2, 16, 32),
    "layers/v_proj": (2, 2, 16, 32), "layers/o_proj": (2, 32, 4, 16), "layers/mlp_norm": (2, 32),
    "layers/gate_proj": (2, 48, 32), "layers/up_proj": (2, 48, 32), "layers/down_proj": (2, 32, 48),
    "final_norm": (32,), "lm_head": (97, 32),
  }  # fmt: skip
  assert table["layers/o_proj"].hf_shape == (32, 64) and table["layers/q_proj"].hf_shape == (64, 32)
  assert table["layers/o_proj"].axes == ("layers", "embed", "heads", "head_dim")
  assert "lm_head" not in param_table(tiny.config(tie_embeddings=True))


def test_families_and_groups_add_tensors():
  base = set(param_table(tiny.config()))
  added = lambda *args: {p.removeprefix("layers/") for p in set(param_table(*args)) - base}
  assert added(tiny.config(qkv_bias=True)) == {"q_bias", "k_bias", "v_bias"}
  assert added(tiny.config(qk_norm=True)) == {"q_norm", "k_norm"}
  assert added(tiny.config(), DMSConfig("adapter")) == {"dms_norm", "dms_proj"}
  assert added(tiny.config(), DMSConfig("neuron")) == set()
  assert added(tiny.config(), None, LoRAConfig(rank=0)) == set()
  assert added(tiny.config(), None, LoRAConfig(rank=2)) == {f"{n}_proj_lora_{x}" for n in "qkvo" for x in "ab"}
  table = param_table(tiny.config(), DMSConfig(), LoRAConfig(rank=2))
  assert {s.group for s in table.values()} == {"base", "gate", "lora"}
  assert count_params(table, "gate") == 2 * (32 + 2 * 32)
  assert count_params(table) == sum(count_params(table, g) for g in ("base", "gate", "lora"))


@pytest.mark.parametrize("target", ["attn_norm", "q_bias", "head"])
def test_low_rank_updates_are_of_projections(target):
  with pytest.raises(ValueError, match=f"lora.targets: '{target}'"):
    param_table(tiny.config(), None, LoRAConfig(rank=2, targets=(target,)))


@pytest.mark.parametrize("name", PRESETS)
def test_presets_are_consistent(name):
  """Axes fit shapes, names are unique, and Hugging Face's shapes have the same number of elements."""
  config = PRESETS[name]
  table = param_table(config, DMSConfig(window=config.ring_window or 256), LoRAConfig(rank=4))
  shared = families.get(config.family).names  # several parameters may be rows of one tensor
  names = [spec.hf_name for path, spec in table.items() if spec.hf_name and path not in shared]
  assert len(set(names)) == len(names)
  for path, spec in table.items():
    assert len(spec.axes) == len(spec.shape)
    assert spec.layered == path.startswith("layers/") == bool(spec.hf_name is None or "{layer}" in spec.hf_name)
    per_layer = math.prod(spec.shape) // (spec.shape[0] if spec.layered else 1)
    assert per_layer == math.prod(spec.hf_shape) * (config.num_experts if spec.by_expert else 1)
  leaves = jax.tree.leaves(abstract_params(table, jnp.bfloat16))
  assert sum(leaf.size for leaf in leaves) == count_params(table) and {leaf.dtype.name for leaf in leaves} == {
    "bfloat16"
  }


def test_trees_there_and_back():
  tree = abstract_params(param_table(tiny.config()))
  assert unflatten(flatten(tree)) == tree
  chosen, rest = split_params(tree, lambda path: path.endswith("_proj"))
  assert set(chosen) == {"layers"} and not set(flatten(chosen)) & set(flatten(rest))
  assert flatten(join_params(rest, chosen)) == flatten(tree)
  assert join_params({"a": 1, "b": {"c": 2}}, {"b": {"c": 3}}) == {"a": 1, "b": {"c": 3}}


def test_initialisation():
  """Norms are 1, added tensors do not change the model, and a tensor's numbers depend only on its path."""
  # Few different shapes: JAX compiles its random numbers for each.
  cfg, key = tiny.config(num_heads=4, num_kv_heads=4, d_ff=32), jax.random.key(0)
  plain = init_params(param_table(cfg), key)
  full = init_params(param_table(cfg, DMSConfig(), LORA), key)
  for path, value in flatten(plain).items():
    np.testing.assert_array_equal(flatten(full)[path], value)
  layers = full["layers"]
  assert (layers["attn_norm"] == 1).all() and (layers["dms_norm"] == 1).all()
  assert (layers["dms_proj"] == 0).all() and (layers["q_proj_lora_b"] == 0).all()
  assert 0.019 < float(jnp.std(plain["embed"])) < 0.021
  assert 0.9 < float(jnp.std(layers["q_proj_lora_a"])) * 32**0.5 < 1.1  # unit outputs from unit inputs
  assert 0.9 < float(jnp.std(layers["o_proj_lora_a"])) * 64**0.5 < 1.1
  flat = [np.asarray(v).ravel()[:3].tobytes() for p, v in flatten(plain).items() if p.endswith("proj")]
  assert len(set(flat)) == len(flat)
  assert init_params(param_table(cfg), key, jnp.bfloat16)["embed"].dtype == jnp.bfloat16


def test_merged_low_rank_updates_compute_the_same():
  cfg = tiny.config()
  model, tokens = tiny.model(cfg, tiny.dms(), LORA), tiny.tokens(cfg, 1, 12)
  merged = model.merged()
  assert merged.lora is None and not [p for p in flatten(merged.params) if "lora" in p]
  assert jax.tree.structure(merged.params) == jax.tree.structure(tiny.model(cfg, tiny.dms()).params)
  p = {k: np.asarray(v, np.float64) for k, v in model.params["layers"].items()}
  expected = p["o_proj"] + 0.5 * np.einsum("ldr,lrnh->ldnh", p["o_proj_lora_b"], p["o_proj_lora_a"])
  np.testing.assert_allclose(merged.params["layers"]["o_proj"], expected, rtol=1e-5, atol=1e-6)
  apart, whole = (np.asarray(forward(m, tokens)[0]) for m in (model, merged))
  np.testing.assert_allclose(apart, whole, atol=2e-5 * np.abs(whole).max(), rtol=0)
  without = np.asarray(forward(dataclasses.replace(model, lora=dataclasses.replace(LORA, scale=0.0)), tokens)[0])
  assert np.abs(without - whole).max() > 1e-2


def test_merging_rounds_once():
  """In bfloat16 the sum is taken in float32 and rounded at the end."""
  lora = LoRAConfig(rank=2, targets=("q_proj",))
  model = tiny.model(tiny.config(), None, lora, dtype=jnp.bfloat16)
  exact = merge_lora(jax.tree.map(lambda w: w.astype(jnp.float32), model.params), lora)["layers"]["q_proj"]
  merged = merge_lora(model.params, lora)["layers"]["q_proj"]
  assert merged.dtype == jnp.bfloat16
  np.testing.assert_array_equal(merged, exact.astype(jnp.bfloat16))
