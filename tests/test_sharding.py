"""Shardings of every parameter; a sharded model equals one device's, in a process with 8 devices."""

from __future__ import annotations

import math
import subprocess
import sys
from pathlib import Path

import jax
import pytest

from dms_jax.config import DMSConfig, LoRAConfig
from dms_jax.families import PRESETS
from dms_jax.params import flatten, param_table
from dms_jax.sharding import ShardingRules, make_mesh, param_shardings
from tests.programs import on_devices

ROOT = Path(__file__).parent.parent

FORWARD = """
import jax, numpy as np
import dms_jax.execution
import dms_jax.model
from dms_jax import cache as caches
from dms_jax.model import Eviction, cached_forward, forward, unembed
from dms_jax.params import flatten, param_table
from dms_jax.policies import DMS
from dms_jax.sharding import make_mesh, shard_params
from pallas_kernels.common.platform import tracing_for
from dms_jax import testing as tiny
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
# Decode steps are not padded or deferred there, as they are on one GPU: rows would move between devices.
def never(*_):
  raise AssertionError("gates of all layers at once on a mesh")
dms_jax.model.step_gate_logits, dms_jax.execution.LEAST_ROWS, model = never, 7, model.unstacked()
cache = caches.create("contiguous", model.config, batch=2, capacity=24, window=5, lag=1, dtype=np.float32)
step = lambda: cached_forward(model, DMS(window=5), cache, tokens[:2, :1], np.ones(2, np.int32))[0].hidden
want = jax.jit(step)()
with jax.set_mesh(make_mesh(data=2)), tracing_for("gpu"):
  assert "[7,1," not in str(jax.make_jaxpr(step)())
  np.testing.assert_allclose(jax.jit(step)(), want, atol=2e-5)
print("equal")
"""

TABLES = """
import math
from dms_jax.families import PRESETS
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

ATTENTION = """
import jax, jax.numpy as jnp, numpy as np
from dms_jax.attention import NEVER, decode_attention, prefill_attention, write_pages, window_bias_attention, use
from dms_jax.sharding import make_mesh, row_and_head_axes, rows_per_device
from pallas_kernels.decode import Pages
from pallas_kernels.common.platform import tracing_for
rng = np.random.default_rng(0)
normal = lambda *shape: jnp.asarray(rng.standard_normal(shape), jnp.float32)
whole = lambda high, *shape: jnp.asarray(rng.integers(0, high, shape), jnp.int32)
for heads, rows, data, tensor, expected in (
  (4, 4, 2, 4, (("data",), "tensor")), (3, 8, 2, 4, (("data", "tensor"), None)), (3, 2, 2, 4, (("data",), None)),
  (2, 3, 2, 2, ((), "tensor")), (3, 5, 2, 2, ((), None)), (4, 4, 1, 1, None),
):
  q, k, v = (normal(rows, 9, n, 16) for n in (2 * heads, heads, heads))
  bias, lengths = normal(rows, heads, 9), whole(8, rows, heads)
  ids, kv = jnp.sort(whole(3, rows, 9)), normal(2, rows, heads, 7, 32)
  pages = Pages(normal(11, 4, 32), whole(11, 2, rows, heads, 3), whole(12, rows, heads))
  first, last = whole(9, rows, heads, 9), jnp.full((rows, heads, 9), NEVER)
  position, weights = jnp.broadcast_to(jnp.arange(9), (rows, 9)), normal(rows, 9)
  prompt = q, k.swapaxes(1, 2), v.swapaxes(1, 2), position, first, last
  pages_of_all = rows * heads * 3  # three of each archive's own
  pool = jnp.arange(pages_of_all * 4 * 32, dtype=jnp.float32).reshape(pages_of_all, 4, 32)
  table, slots = jnp.arange(pages_of_all).reshape(rows, heads, 3), jnp.arange(rows * heads).reshape(rows, heads, 1) % 12
  def put():
    with tracing_for("tpu"), use("xla"):
      return write_pages(pool, table, slots, -kv[0, :, :, :1])
  def run():
    loss = lambda *a, ids=None: jnp.sum(jnp.sin(window_bias_attention(*a, 3, ids)))
    return (
      jax.value_and_grad(loss, (0, 1, 2, 3))(q, k, v, bias),
      jax.value_and_grad(lambda *a: loss(*a, bias, ids=ids), (0, 1, 2))(q, k, v),
      window_bias_attention(q, k, v, None, 0, None),
      decode_attention(q[:, 0], kv, jnp.int32(1), lengths),
      decode_attention(q[:, 0], kv, 1, lengths, pages=pages, lse=True, mass=True),
      decode_attention(q[:, 0], None, 1, None, pages=pages, lse=True),
      put(),
      prefill_attention(*prompt), prefill_attention(*prompt, query_weights=weights),
      prefill_attention(*prompt, lse=True), prefill_attention(*prompt, lse=True, query_weights=weights),
    )
  assert row_and_head_axes(rows, heads) is None and rows_per_device(rows) == rows
  want = jax.jit(lambda: run())()
  with jax.set_mesh(make_mesh(data=data, tensor=tensor)):
    assert row_and_head_axes(rows, heads) == expected, (rows, heads, row_and_head_axes(rows, heads))
    got = jax.jit(lambda: run())()
    assert rows_per_device(rows) == (rows if rows % data else rows // data)
    assert (str(jax.make_jaxpr(lambda: run())()).count("shard_map") > 0) == (expected is not None)
  for one, two in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
    np.testing.assert_allclose(one, two, rtol=1e-5, atol=2e-5)
print("equal")
"""

# Arrays without elements, split or not, beside others and alone. Were they handed over, jaxlib 0.11.2 would crash here.
EMPTY = """
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import PartitionSpec as P
from dms_jax.sharding import make_mesh, shard_map
mesh = make_mesh(data=4, tensor=2)
x, none, cells = jnp.arange(32.0).reshape(8, 4), jnp.zeros(0, jnp.int32), jnp.zeros((8, 0, 4), jnp.bfloat16)
def body(tree, flag):
  assert flag is None and tree["none"].dtype == jnp.int32 and tree["none"].shape == (0,), tree
  assert tree["cells"].dtype == jnp.bfloat16 and tree["cells"].shape == (2, 0, 2), tree["cells"]
  return tree["x"] + jnp.any(tree["x"][..., None] == tree["none"]), tree["cells"] + 1, tree["none"]
specs = {"x": P("data"), "none": P(), "cells": P("data", None, "tensor")}, None
out, tree = (P("data"), specs[0]["cells"], P()), {"x": x, "none": none, "cells": cells}
def check(call):
  [mapped] = (eqn for eqn in jax.make_jaxpr(call)(tree, None).eqns if eqn.primitive.name == "shard_map")
  assert [operand.aval.shape for operand in mapped.invars] == [x.shape], mapped.invars
  got, changed, same = jax.jit(call)(tree, None)
  np.testing.assert_array_equal(got, x)
  assert changed.shape == cells.shape and changed.dtype == cells.dtype and same.shape == (0,)
check(shard_map(body, mesh, in_specs=specs, out_specs=out))
one_spec = shard_map(lambda pair, x: x + pair[0].size, mesh, in_specs=(P("data"), P("data")), out_specs=P("data"))
np.testing.assert_array_equal(jax.jit(one_spec)((cells, cells), x), x)  # one partition for several arrays
with jax.set_mesh(mesh):
  check(shard_map(body, in_specs=specs, out_specs=out))
  alone = shard_map(lambda none: jnp.ones(1) + none.sum(), in_specs=(P(),), out_specs=P("data"))
  np.testing.assert_array_equal(jax.jit(alone)(none), np.ones(4))
print("equal")
"""


# In one process, whose start takes as long as some of them; FORWARD changes modules.
@pytest.mark.parametrize("programs", [(TABLES, EMPTY, FORWARD), (ATTENTION,)], ids=["forward", "attention"])
def test_on_eight_devices(programs):
  code = "\n".join(f"exec({program!r}, {{}})" for program in programs)
  done = subprocess.run(
    [sys.executable, "-c", code], cwd=ROOT, env=on_devices(8), capture_output=True, text=True, timeout=300
  )
  assert done.returncode == 0 and done.stdout.split() == ["equal"] * len(programs), done.stderr


def test_rules_name_every_logical_axis():
  table = param_table(PRESETS["qwen3-0.6b"], DMSConfig(), LoRAConfig(rank=4)) | param_table(PRESETS["llama-3.1-8b"])
  assert {axis for spec in table.values() for axis in spec.axes} <= set(vars(ShardingRules()))


def test_one_device_replicates_and_too_few_are_an_error():
  table = param_table(PRESETS["smollm2-135m"])
  for path, sharding in flatten(param_shardings(make_mesh(), table)).items():
    assert math.prod(sharding.shard_shape(table[path].shape)) == math.prod(table[path].shape)
  with pytest.raises(ValueError, match=f"there are {jax.device_count()}"):
    make_mesh(data=64)
  for sizes in (dict(data=0), dict(tensor=-4, data=-1)):
    with pytest.raises(ValueError, match=r"^mesh\.(data|tensor)=\S+ must be a whole number of devices, at least 1$"):
      make_mesh(**sizes)
