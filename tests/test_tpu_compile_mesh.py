"""Generation on a mesh of four absent TPUs: what devices send, and what each holds (make test-tpu)."""

from __future__ import annotations

import dataclasses
import math
import re

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from dms_jax import cache as caches
from dms_jax import spmd
from dms_jax import testing as tiny
from dms_jax.config import DMSConfig, ModelConfig
from dms_jax.families import PRESETS
from dms_jax.generation.decode import DecodeState, StopCriteria, decode_block, prefill_chunk
from dms_jax.generation.sampling import Sampling
from dms_jax.model import Model, check_policy
from dms_jax.params import abstract_params, param_table
from dms_jax.sharding import make_mesh
from experiments.bench import synthetic
from tests import tpu

pytestmark = pytest.mark.tpu
pytest.importorskip("libtpu", reason="libtpu is not installed (make test-tpu installs it)")

TOPOLOGY, HBM = "v5e:2x2", 16 * 2**30  # bytes a device
WINDOW, TOKENS, CR = 256, 8192, 8
SMALL = tiny.config(
  num_layers=4, d_model=1024, d_ff=2048, num_heads=16, num_kv_heads=8, head_dim=128, vocab_size=4096
)  # fmt: skip
OLMO2 = dataclasses.replace(SMALL, family="olmo2", norms="after", qk_norm=True, qk_norm_over="all")
COLLECTIVES = r"= (.*?) (all-[a-z-]+?|reduce-scatter|collective-[a-z]+?|ragged-all-to-all)(?:-start)?\("


def placed(mesh, tree, specs):
  """Shapes and dtypes of `tree` on a mesh; `specs`: a tree of partitions, or one for all."""
  put = lambda x, spec: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, spec))
  if isinstance(specs, P):
    return jax.tree.map(lambda x: put(x, specs), tree)
  return jax.tree.map(put, tree, specs)


def generation(mesh, config: ModelConfig, rows: int):
  """(model, policy, paged cache) of `rows` rows of 8,192 tokens at CR 8, as shapes on a mesh."""
  dms = DMSConfig(window=WINDOW)
  model = Model(abstract_params(param_table(config, dms), jnp.bfloat16), config, dms, mesh=mesh)
  spmd.check(model, mesh)
  model = model.replace(params=placed(mesh, model.params, spmd.model_specs(model, mesh)))
  policy = jax.eval_shape(lambda: check_policy(model, None))
  sizes = dict(batch=rows, capacity=TOKENS // CR, longest=TOKENS, kind="paged")
  cache = jax.eval_shape(lambda: caches.for_model(model, check_policy(model, None), **sizes))
  return model, placed(mesh, policy, P()), placed(mesh, cache, spmd.CACHE)


@pytest.fixture(scope="module")
def devices():
  return tpu.devices(TOPOLOGY)


def decode_program(mesh, config: ModelConfig, rows: int):
  """(compiled program, cache) of eight decode steps."""
  model, policy, cache = generation(mesh, config, rows)
  column = jax.ShapeDtypeStruct((rows,), jnp.int32)
  state = placed(mesh, DecodeState(column, None, column, column, column, column), cache.split.spec(spmd.ROWS))
  stop = StopCriteria(placed(mesh, jax.ShapeDtypeStruct((1,), jnp.int32), P()))
  return decode_block.lower(model, policy, cache, state, Sampling(), stop, steps=8, history=False).compile(), cache


def chunk_program(mesh, config: ModelConfig, rows: int, length: int):
  """(compiled program, cache) of a chunk of `length` tokens of each row's prompt."""
  model, policy, cache = generation(mesh, config, rows)
  array = lambda *shape, dtype=jnp.int32: placed(mesh, jax.ShapeDtypeStruct(shape, dtype), spmd.ROWS)
  logits = array(rows, config.vocab_size, dtype=jnp.float32)
  lowered = prefill_chunk.lower(model, policy, cache, array(rows, length), array(rows), array(rows), logits)
  return lowered.compile(), cache


def computations(text: str) -> dict[str, str]:
  """The computations of a compiled program, by name."""
  return dict(re.findall(r"^(?:ENTRY )?(%\S+) [^\n]*\{\n(.*?)^\}", text, re.S | re.M))


def check_collectives(program, config: ModelConfig, rows: int) -> None:
  """Two sums in a layer, those of two projections, and a few in a step, none of the cache's size; `rows` a device.

  A norm over all heads takes a third in a layer, of two numbers a row.
  """
  text, activation = program.as_text(), f"bf16[{rows},1,{config.d_model}]"
  found = {name: re.findall(COLLECTIVES, body) for name, body in computations(text).items()}
  every = re.findall(COLLECTIVES, text)
  assert {kind for _, kind in every} == {"all-reduce", "all-gather"} and len(every) == sum(map(len, found.values()))
  sums = [shape.split("{")[0] for shape, kind in every if kind == "all-reduce"]
  assert sums.count(activation) == 3  # two in a layer, and the embeddings
  (layer,) = (name for name, those in found.items() if sum(shape.startswith(activation) for shape, _ in those) == 2)
  norms, squares = config.qk_norm_over == "all", f"f32[{rows},1,2]"
  assert len(found[layer]) == 2 + norms and f"body={layer}" in text  # of the scan over layers
  assert sums.count(squares) == norms
  numbers = rf"\(?s32\[(\d+,)?{rows}\]"  # one a row: whether it had room, and counts
  assert all(shape in (activation, squares) or re.fullmatch(numbers, shape) for shape in sums), sums
  (logits,) = (shape for shape, kind in every if kind == "all-gather")
  sizes = re.match(r"f32\[([\d,]+)\]", logits)[1].split(",")
  assert math.prod(map(int, sizes)) == rows * config.vocab_size


def check_groups(program, data: int, tensor: int) -> None:
  """Devices of one row of the mesh alone exchange anything, however this version of XLA writes that."""
  groups = set(re.findall(r"replica_groups=(mesh\[.*?\] \{.*?\}|\{\{.*?\}\}|\[\S+?\]<=\[\d+\])", program.as_text()))
  rows = ",".join("{" + ",".join(str(row * tensor + i) for i in range(tensor)) + "}" for row in range(data))
  named = f"mesh['data'={data},'tensor'={tensor}] {{'tensor'}}"
  assert groups and groups <= {named, f"{{{rows}}}", f"[{data},{tensor}]<=[{data * tensor}]"}, groups


@pytest.mark.parametrize("data, tensor", [(1, 4), (2, 2)])
@pytest.mark.parametrize("name", ["small", "small-olmo2", "llama-3.1-8b"])
def test_decode_block_compiles_for_four_devices(devices, name, data, tensor):
  """Each device reads its own rows' and heads' pages by the kernel, and copies none of its cache."""
  config, rows = (PRESETS[name], 32) if name in PRESETS else (SMALL if name == "small" else OLMO2, 8)
  program, cache = decode_program(make_mesh(data, tensor, devices=devices), config, rows)
  memory, size = program.memory_analysis(), synthetic.nbytes(cache.shards) // len(devices)
  print(
    f"decode block of {name}, data {data} x tensor {tensor} of {TOPOLOGY}, {rows} rows: arguments "
    f"{memory.argument_size_in_bytes / 2**30:.3f} GiB (cache {size / 2**30:.3f}), temporaries "
    f"{memory.temp_size_in_bytes / 2**30:.4f} GiB a device"
  )
  check_collectives(program, config, rows // data)
  check_groups(program, data, tensor)
  assert re.search(r"%decode_\S+ = \S+ custom-call\(", program.as_text())
  assert memory.alias_size_in_bytes >= size and memory.temp_size_in_bytes < 0.1 * size
  assert memory.argument_size_in_bytes + memory.temp_size_in_bytes < HBM


def test_decode_block_by_rows_compiles_for_four_devices(devices):
  """Three KV heads, which two devices do not share: they exchange rows before a feed-forward, and its sums."""
  config, rows = dataclasses.replace(SMALL, num_heads=6, num_kv_heads=3), 32
  program, cache = decode_program(make_mesh(2, 2, devices=devices), config, rows)
  memory, size, width = program.memory_analysis(), synthetic.nbytes(cache.shards) // 4, config.d_model
  found = [(shape.split("{")[0], kind) for shape, kind in re.findall(COLLECTIVES, program.as_text())]
  of = lambda name: [shape for shape, kind in found if kind == name]
  assert of("reduce-scatter") == [f"bf16[8,1,{width}]"] * 2  # in a layer, and the embeddings
  assert set(of("all-gather")) == {f"bf16[16,1,{width}]", f"bf16[16,{width}]"}  # in a layer, and the last states
  assert len(of("all-to-all")) == 1 and set(of("all-reduce")) <= {"s32[16]"}  # logits, tokens
  assert {kind for _, kind in found} <= {"reduce-scatter", "all-gather", "all-to-all", "all-reduce"}
  check_groups(program, 2, 2)
  assert re.search(r"%decode_\S+ = \S+ custom-call\(", program.as_text())
  assert memory.alias_size_in_bytes >= size and memory.temp_size_in_bytes < 0.1 * size


def test_prompt_chunk_compiles_for_four_devices(devices):
  """Its sums are those of a step; the cache is written in place."""
  mesh, length = make_mesh(2, 2, devices=devices), 64
  program, cache = chunk_program(mesh, SMALL, 8, length)
  memory, size = program.memory_analysis(), synthetic.nbytes(cache.shards) // len(devices)
  print(f"chunk: temporaries {memory.temp_size_in_bytes:,} bytes a device, cache {size:,}")
  found = re.findall(COLLECTIVES, program.as_text())
  activations = [kind for shape, kind in found if shape.startswith(f"bf16[4,{length},{SMALL.d_model}]")]
  assert activations == ["all-reduce"] * 3 and sum(kind == "all-gather" for _, kind in found) == 1
  check_groups(program, 2, 2)
  assert memory.alias_size_in_bytes >= size
