"""Decode attention compiled for absent TPUs: the kernel is in the program, and no cache is copied."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.decode import Pages, decode_attention, tpu
from pallas_kernels.paged import write_pages
from tests.tpu import TOPOLOGIES, devices

pytestmark = pytest.mark.tpu
pytest.importorskip("libtpu", reason="libtpu is not installed (make test-tpu installs it)")

# layers, batch, KV heads, group, head size, slots of the cache, slots a page, slots in pages (a quarter of them exist),
# and the pages' dtype, if not the queries'
SHAPES = {
  "llama-8b": (2, 32, 8, 4, 128, 8192, 0, 0),
  "smollm2": (30, 8, 3, 3, 64, 8192, 0, 0),
  "a shard of 70b": (2, 32, 1, 8, 128, 8192, 0, 0),
  "many chains": (2, 2048, 2, 3, 64, 2048, 0, 0),
  "llama-8b, pages": (2, 32, 8, 4, 128, 0, 16, 8192),
  "llama-8b, ring and pages": (2, 32, 8, 4, 128, 272, 64, 8192),
  "smollm2, ring and pages": (30, 8, 3, 3, 64, 80, 128, 8192),
  "llama-8b, ring and pages of int8": (2, 32, 8, 4, 128, 272, 64, 8192, "int8"),
  "smollm2, pages of float8": (30, 8, 3, 3, 64, 0, 128, 8192, "float8_e4m3fn"),
}


@pytest.fixture(scope="module", params=TOPOLOGIES)
def device(request):
  return devices(request.param)[0]


def compiled(device, shape, dtype, attend):
  """(the compiled program, bytes of cache and pool)."""
  layers, batch, heads, group, h, slots, page, archive, *stored = shape
  sharding = jax.sharding.SingleDeviceSharding(device)
  array = lambda shape, dtype: jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)
  numbers = array((batch, heads), jnp.int32)
  kv = array((layers, batch, heads, slots, 2 * h), dtype) if slots else None
  pages = None
  if page:
    most = archive // page
    number = layers * batch * heads * most // 4
    pool = array((number, page, 2 * h), jnp.dtype(stored[0]) if stored else dtype)
    scales = array((number, 1, 2 * page), jnp.float32) if stored else None
    pages = Pages(pool, array((layers, batch, heads, most), jnp.int32), numbers, scales)
  q = array((batch, heads * group, h), dtype)
  lowered = jax.jit(attend).lower(q, kv, array((), jnp.int32), numbers if slots else None, pages)
  size = sum(int(np.prod(x.shape)) * x.dtype.itemsize for x in (kv, pages and pages.pool) if x is not None)
  return lowered.compile(), size


def check(device, name, dtype, attend, most=0.01):
  """The program has the kernel, and temporaries below a share `most` of the cache."""
  program, size = compiled(device, SHAPES[name], dtype, attend)
  memory = program.memory_analysis()
  print(f"{device.device_kind}, {name}: {memory.temp_size_in_bytes:,} bytes of temporaries beside {size:,}")
  text = program.as_text()
  assert "tpu_custom_call" in text and "decode_" in text
  assert memory.temp_size_in_bytes < most * size, f"{memory.temp_size_in_bytes:,} bytes beside {size:,}"


@pytest.mark.parametrize("name", SHAPES)
def test_decode_attention_compiles(device, name):
  """As dispatch chooses it, with its log-sum-exp."""
  attend = lambda q, kv, layer, lengths, pages: decode_attention(q, kv, layer, lengths, pages=pages, lse=True)
  check(device, name, jnp.bfloat16, attend)


@pytest.mark.parametrize("name", ["llama-8b", "smollm2, ring and pages"])
def test_decode_attention_with_mass_compiles(device, name):
  """One layer's scores are temporaries."""
  attend = partial(decode_attention, mass=True, implementation="tpu")
  check(device, name, jnp.bfloat16, lambda *args: attend(*args[:4], pages=args[4]), most=0.1)


@pytest.mark.parametrize("name", ["llama-8b", "smollm2, ring and pages"])
def test_decode_attention_of_two_cores_compiles(device, name):
  """Chunks and their merge, as if two cores share a kernel."""
  blocks = tpu.default_blocks(SHAPES[name][4], jnp.bfloat16, workers=2)
  attend = lambda q, kv, layer, lengths, pages: tpu.decode_attention(q, kv, layer, lengths, pages=pages, blocks=blocks)
  check(device, name, jnp.bfloat16, attend)


@pytest.mark.parametrize("most, stored", [(1, jnp.int8), (1, jnp.float8_e4m3fn), (321, jnp.int8)])
def test_writing_slots_compiles(device, most, stored):
  """A step's and a chunk's, in place: no temporary of the pool's size, only the chunk in whole tiles."""
  sharding = jax.sharding.SingleDeviceSharding(device)
  array = lambda shape, dtype: jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)
  archives, number, page, width = 64, 20000, 64, 256
  arguments = (
    array((number, page, width), stored),
    array((archives, 40), jnp.int32),
    array((archives, most), jnp.int32),
    array((archives, most, width), stored),
  )
  lowered = jax.jit(partial(write_pages, implementation="tpu"), donate_argnums=0).lower(*arguments)
  memory, size = lowered.compile().memory_analysis(), number * page * width
  print(f"{device.device_kind}, {most} slots: {memory.temp_size_in_bytes:,} bytes of temporaries beside {size:,}")
  assert memory.alias_size_in_bytes >= size
  assert memory.temp_size_in_bytes < 0.01 * size + (3 * archives * (most + 63) * width if most > 1 else 0)


def test_decode_attention_in_float32_compiles(device):
  attend = partial(decode_attention, implementation="tpu")
  check(device, "smollm2", jnp.float32, lambda q, kv, layer, lengths, pages: attend(q, kv, layer, lengths))


def test_ring_of_any_size_compiles(device):
  """With 65 slots it does, but XLA may lay out such an array otherwise and copy it: rings should be whole tiles."""
  attend = lambda q, kv, layer, lengths, pages: decode_attention(q, kv, layer, lengths, pages=pages)
  for h in (64, 128):
    program, _ = compiled(device, (2, 8, 3, 3, h, 65, 64, 1024), jnp.bfloat16, attend)
    assert "tpu_custom_call" in program.as_text()
