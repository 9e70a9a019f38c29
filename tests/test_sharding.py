"""Shardings of every parameter, and a sharded forward pass equal to one device's, in a process with 8 devices."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from pathlib import Path

import jax
import pytest

from dms_jax.config import PRESETS, DMSConfig, LoRAConfig
from dms_jax.params import flatten, param_table
from dms_jax.sharding import ShardingRules, make_mesh, param_shardings

ROOT = Path(__file__).parent.parent
EIGHT = {**os.environ, "XLA_FLAGS": "--xla_force_host_platform_device_count=8", "JAX_PLATFORMS": "cpu"}

FORWARD = """
import jax, numpy as np
from dms_jax.model import Eviction, forward, unembed
from dms_jax.params import flatten, param_table
from dms_jax.sharding import make_mesh, shard_params
from tests import tiny
assert jax.device_count() == 8
model = tiny.model(gates=tiny.dms())
tokens = tiny.tokens(model.config, 4, 24)
run = jax.jit(lambda m, t: unembed(m, forward(m, t, eviction=Eviction())[0]))
want = run(model, tokens)
mesh = make_mesh(data=4, tensor=2)
sharded = model.replace(params=shard_params(model.params, mesh, param_table(model.config, model.dms)))
q = sharded.params["layers"]["q_proj"]
assert q.addressable_shards[0].data.size * 8 == q.size, q.sharding
# Sums over a split axis are taken in another order: float32 rounding of logits of order 1.
np.testing.assert_allclose(run(sharded, tokens), want, atol=2e-5)
print("equal")
"""

TABLES = """
import math
from dms_jax.config import PRESETS
from dms_jax.params import flatten, param_table
from dms_jax.sharding import make_mesh, param_shardings
mesh = make_mesh(data=2, tensor=4)
for name, least in (("smollm2-135m", 0.5), ("llama-3.1-8b", 0.99), ("qwen3-8b", 0.99)):
  table = param_table(PRESETS[name])
  shardings = flatten(param_shardings(mesh, table))
  split = whole = 0
  for path, spec in table.items():
    shard = shardings[path].shard_shape(spec.shape)  # raises where a part would be uneven
    whole += math.prod(spec.shape)
    split += math.prod(spec.shape) * (math.prod(shard) * 8 <= math.prod(spec.shape))
  assert split / whole > least, (name, split / whole)
print("equal")
"""


@pytest.mark.parametrize("program", [FORWARD, TABLES], ids=["forward", "tables"])
def test_on_eight_devices(program):
  done = subprocess.run(
    [sys.executable, "-c", program], cwd=ROOT, env=EIGHT, capture_output=True, text=True, timeout=300
  )
  assert done.returncode == 0 and "equal" in done.stdout, done.stderr


def test_rules_name_every_logical_axis():
  table = param_table(PRESETS["qwen3-0.6b"], DMSConfig(), LoRAConfig(rank=4)) | param_table(PRESETS["llama-3.1-8b"])
  assert {axis for spec in table.values() for axis in spec.axes} <= set(vars(ShardingRules()))


def test_one_device_replicates_and_too_few_are_an_error():
  table = param_table(PRESETS["smollm2-135m"])
  for path, sharding in flatten(param_shardings(make_mesh(), table)).items():
    assert math.prod(sharding.shard_shape(table[path].shape)) == math.prod(table[path].shape)
  with pytest.raises(ValueError, match=f"there are {jax.device_count()}"):
    make_mesh(data=64)
