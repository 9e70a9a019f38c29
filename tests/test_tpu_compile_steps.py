"""Whole training and decode steps compiled for one absent TPU and for four (make test-tpu)."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, SingleDeviceSharding
from jax.sharding import PartitionSpec as P

from dms_jax import cache as caches
from dms_jax import policies
from dms_jax.config import DMSConfig, LoRAConfig
from dms_jax.families import PRESETS
from dms_jax.model import Model, cached_forward, last_logits
from dms_jax.params import abstract_params, count_params, param_table
from dms_jax.retrofit.config import MemoryConfig, RetrofitConfig
from dms_jax.retrofit.loop import prepare
from dms_jax.retrofit.step import Batch, init_state, train_step
from dms_jax.sharding import cache_shardings, make_mesh, param_shardings, row_and_head_axes, tree_shardings
from tests import tpu

pytestmark = pytest.mark.tpu
pytest.importorskip("libtpu", reason="libtpu is not installed (make test-tpu installs it)")

TOPOLOGY, HBM = "v5e:2x2", 16 * 2**30  # bytes a device
WINDOW = 256
KERNELS = {"train": ("window_bias_forward", "window_bias_dq", "window_bias_dkv"), "decode": ("decode_",)}


@pytest.fixture(scope="module")
def devices():
  return tpu.devices(TOPOLOGY)


def placed(tree, shardings):
  """Shapes and dtypes of `tree` with their shardings: a tree of them, or one for all."""
  if isinstance(shardings, jax.sharding.Sharding):
    shardings = jax.tree.map(lambda _: shardings, tree)
  return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), tree, shardings)


def memory_of(program, kind, what):
  """Bytes per device, printed; the kernels of this kind of step are in the program."""
  text = program.as_text()
  assert "tpu_custom_call" in text and all(name in text for name in KERNELS[kind])
  memory = program.memory_analysis()
  sizes = {
    "arguments": memory.argument_size_in_bytes,
    "outputs": memory.output_size_in_bytes,
    "aliased": memory.alias_size_in_bytes,
    "temporaries": memory.temp_size_in_bytes,
  }
  print(f"{what}, {TOPOLOGY}: " + ", ".join(f"{n} {size / 2**20:,.1f} MiB" for n, size in sizes.items()) + " a device")
  return sizes


def retrofit_step(preset, config):
  """(state, student, teacher, batch, key) of a retrofit of gates and low-rank updates, as shapes."""
  dms, lora = DMSConfig(window=WINDOW), LoRAConfig(rank=16)
  base = Model(abstract_params(param_table(PRESETS[preset]), jnp.dtype(config.memory.compute_dtype)), PRESETS[preset])
  student, teacher, trained = jax.eval_shape(partial(prepare, dms=dms, lora=lora, config=config), base)
  state = jax.eval_shape(partial(init_state, config), trained)
  tokens = jax.ShapeDtypeStruct((config.batch_size, config.seq_len), jnp.int32)
  return state, student, teacher, Batch(tokens, tokens), jax.eval_shape(lambda: jax.random.key(0))


@pytest.mark.standard_promotion  # optax mixes dtypes
def test_retrofit_step_compiles_for_one_device(devices):
  """SmolLM2: gates and low-rank updates at 4,096 tokens, packed documents."""
  config = RetrofitConfig(batch_size=2, seq_len=4096, memory=MemoryConfig(remat=True))
  args = placed(retrofit_step("smollm2-135m", config), SingleDeviceSharding(devices[0]))
  program = train_step.lower(*args, config=config).compile()
  sizes = memory_of(program, "train", "retrofit step of SmolLM2 on one device, batch 2 x 4096")
  assert sizes["arguments"] > 2 * count_params(param_table(PRESETS["smollm2-135m"]))
  assert sizes["arguments"] + sizes["temporaries"] < HBM


@pytest.mark.standard_promotion
@pytest.mark.parametrize("preset, rows", [("smollm2-135m", 4), ("llama-3.1-8b", 1)])
def test_retrofit_step_compiles_for_four_devices(devices, preset, rows):
  """Under shard_map: by rows for SmolLM2, whose 3 KV heads a mesh of 4 does not divide, and by the 8 heads of Llama."""
  config = RetrofitConfig(batch_size=rows, seq_len=4096, memory=MemoryConfig(remat=True))
  table = param_table(PRESETS[preset], DMSConfig(window=WINDOW), LoRAConfig(rank=16))
  mesh = make_mesh(tensor=4, devices=devices)
  with jax.set_mesh(mesh):
    axes = row_and_head_axes(rows, PRESETS[preset].num_kv_heads)
    assert axes == ((("tensor",), None) if preset == "smollm2-135m" else ((), "tensor"))
    args = retrofit_step(preset, config)
    args = placed(args, tree_shardings(args, mesh, table))
    program = train_step.lower(*args, config=config).compile()
  sizes = memory_of(program, "train", f"retrofit step of {preset} on four devices, batch {rows} x 4096")
  assert sizes["arguments"] + sizes["temporaries"] < HBM


def decode_step(devices, preset, batch, capacity):
  """(program, bytes of the cache) of one token a row on a mesh of four, `capacity` slots a head."""
  config, dms = PRESETS[preset], DMSConfig(window=WINDOW)
  mesh, table = make_mesh(tensor=4, devices=devices), param_table(config, dms)
  make = partial(caches.create, "contiguous", config, batch=batch, capacity=capacity, window=WINDOW, lag=1)
  cache = jax.eval_shape(partial(make, dtype=jnp.bfloat16))
  size = sum(int(np.prod(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(cache))
  whole = NamedSharding(mesh, P())
  model = Model(placed(abstract_params(table, jnp.bfloat16), param_shardings(mesh, table)), config, dms)
  policy = policies.DMS(window=WINDOW, threshold=placed(jax.ShapeDtypeStruct((), jnp.float32), whole))
  cache = placed(cache, cache_shardings(mesh, cache, config.num_kv_heads))
  tokens, lengths = (placed(jax.ShapeDtypeStruct(s, jnp.int32), whole) for s in ((batch, 1), (batch,)))

  @partial(jax.jit, donate_argnames="cache")
  def step(model, policy, cache, tokens, lengths):
    out, cache = cached_forward(model, policy, cache, tokens, lengths)
    return last_logits(model, out), out.seen, cache

  with jax.set_mesh(mesh):
    return step.lower(model, policy, cache, tokens, lengths).compile(), size


@pytest.mark.parametrize("preset, batch, slots", [("smollm2-135m", 8, 8192), ("llama-3.1-8b", 64, 32768 // 8)])
def test_decode_step_compiles_for_four_devices(devices, preset, batch, slots):
  """Each device holds a quarter of the cache and copies none of it. 64 rows of Llama at 32K tokens and CR 8 fit."""
  program, size = decode_step(devices, preset, batch, slots)
  sizes = memory_of(program, "decode", f"decode step of {preset} on four devices, batch {batch}, {slots} slots")
  assert sizes["temporaries"] < 0.01 * size / 4 and sizes["aliased"] >= size / 4
  assert sizes["arguments"] + sizes["temporaries"] < HBM


def test_decode_step_of_a_dense_cache_compiles_for_no_four_devices(devices):
  """32 rows of Llama at 32K tokens and nothing evicted: the compiler refuses."""
  with pytest.raises(jax.errors.JaxRuntimeError, match="RESOURCE_EXHAUSTED"):
    decode_step(devices, "llama-3.1-8b", 32, 32768)
