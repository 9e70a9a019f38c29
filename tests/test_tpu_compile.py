"""Programs compiled for absent TPUs: they fit, and no step copies the cache (make test-tpu)."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dms_jax import cache as caches
from dms_jax import policies
from dms_jax import testing as tiny
from dms_jax.config import DMSConfig
from dms_jax.families import PRESETS
from dms_jax.generation.decode import DecodeState, StopCriteria, decode_block, prefill_chunk
from dms_jax.generation.sampling import Sampling
from dms_jax.model import Model, cached_forward, last_logits
from dms_jax.params import abstract_params, param_table
from tests import tpu

pytestmark = pytest.mark.tpu
pytest.importorskip("libtpu", reason="libtpu is not installed (make test-tpu installs it)")

BATCH, CAPACITY, WINDOW = 8, 8192, 64


@pytest.fixture(scope="module", params=["v5e:2x2", "v6e:2x2"])
def device(request):
  """One device of a topology that is described, not attached."""
  return tpu.devices(request.param)[0]


def abstract(tree, device):
  """Shapes and dtypes of `tree` on `device`."""
  sharding = jax.sharding.SingleDeviceSharding(device)
  return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), tree)


def parts(device, capacity=CAPACITY, config=PRESETS["smollm2-135m"], dtype=jnp.bfloat16, listed=False):
  """A model with gates, its policy, and a cache of 8 rows and `capacity` slots a head, as shapes."""
  dms = DMSConfig(window=WINDOW)
  shapes = abstract_params(param_table(config, dms), dtype)
  if listed:
    layer = {name: jax.ShapeDtypeStruct(w.shape[1:], w.dtype) for name, w in shapes["layers"].items()}
    shapes["layers"] = [layer] * config.num_layers
  make = partial(caches.create, "contiguous", config, batch=BATCH, capacity=capacity, window=WINDOW, lag=1)
  cache = abstract(jax.eval_shape(partial(make, dtype=dtype)), device)
  policy = policies.DMS(window=WINDOW, threshold=abstract(jnp.float32(0), device))
  return Model(abstract(shapes, device), config, dms), policy, cache


def array(shape, dtype, device):
  return abstract(jax.ShapeDtypeStruct(shape, dtype), device)


def test_decode_step_copies_no_cache(device):
  """The cache is updated in place, and temporaries do not grow with it: 1 % of what is added at most.

  What does not grow is the tied embedding laid out for the output projection.
  """

  @partial(jax.jit, donate_argnames="cache")
  def step(model, policy, cache, tokens, lengths):
    out, cache = cached_forward(model, policy, cache, tokens, lengths)
    return last_logits(model, out), out.seen, cache

  arguments = (array((BATCH, 1), jnp.int32, device), array((BATCH,), jnp.int32, device))
  temporaries, sizes = [], []
  for capacity in (CAPACITY, 2 * CAPACITY):
    model, policy, cache = parts(device, capacity)
    memory = step.lower(model, policy, cache, *arguments).compile().memory_analysis()
    temporaries.append(memory.temp_size_in_bytes)
    sizes.append(int(np.prod(cache.kv.shape)) * 2)
    assert memory.alias_size_in_bytes >= sizes[-1]
  assert temporaries[1] - temporaries[0] < 0.01 * (sizes[1] - sizes[0]), f"{temporaries} bytes beside {sizes}"


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
@pytest.mark.parametrize("listed", [False, True], ids=["scan", "loop"])
def test_decode_step_has_small_temporaries(device, dtype, listed):
  """Below 1 % of a cache of 32K slots, in both precisions and both forms of the layers.

  A thin model, so that it is the cache. What is temporary does not grow with the cache, as the test above holds; how
  much that is depends on libtpu: 4.4 MB in 0.0.52 and 9.5 MB in 0.0.50.1 for the loop in bfloat16 on v6e.
  """
  config = tiny.config(num_layers=8, d_model=64, d_ff=64, num_heads=8, num_kv_heads=4, head_dim=64)
  model, policy, cache = parts(device, 4 * CAPACITY, config=config, dtype=dtype, listed=listed)
  arguments = (array((BATCH, 1), jnp.int32, device), array((BATCH,), jnp.int32, device))
  step = jax.jit(cached_forward, donate_argnums=2)
  memory = step.lower(model, policy, cache, *arguments).compile().memory_analysis()
  size = cache.kv.size * cache.kv.dtype.itemsize
  assert cache.kv.dtype == dtype and memory.alias_size_in_bytes >= size
  print(f"{memory.temp_size_in_bytes:,} bytes of temporaries beside a cache of {size:,}")
  assert memory.temp_size_in_bytes < 0.01 * size, f"{memory.temp_size_in_bytes:,} bytes beside {size:,}"


@pytest.mark.parametrize("topology", ["v4:2x2x1", "v5p:2x2x1", "tpu7x:2x2x1"])
def test_rings_of_a_paged_cache_are_not_copied(topology):
  """65 slots of a window of 64 lie in whole tiles: in 65, XLA lays the rings out with other axes inmost, and copies."""
  device = tpu.devices(topology)[0]
  config = tiny.config(num_layers=4, d_model=64, d_ff=64, num_heads=8, num_kv_heads=4, head_dim=64)
  model, policy, _ = parts(device, config=config)
  make = partial(caches.create, "paged", config, batch=64, capacity=256, longest=1024, window=WINDOW, lag=1)
  cache = abstract(jax.eval_shape(partial(make, dtype=jnp.bfloat16)), device)
  arguments = (array((64, 1), jnp.int32, device), array((64,), jnp.int32, device))
  memory = jax.jit(cached_forward, donate_argnums=2).lower(model, policy, cache, *arguments).compile().memory_analysis()
  rings = cache.kv.size * cache.kv.dtype.itemsize
  print(f"{topology}: {memory.temp_size_in_bytes:,} bytes of temporaries beside rings of {rings:,}")
  assert cache.kv.shape[3] == 80 and memory.temp_size_in_bytes < rings / 4


@pytest.mark.parametrize(
  "topology, archive, tokens",
  [*((topology, "int8", 1) for topology in tpu.TOPOLOGIES), ("v5e:2x2", "float8", 1), ("v5e:2x2", "int8", 256)],
)
def test_pages_of_eight_bits_are_not_copied(topology, archive, tokens):
  """Their slots are written in place, and a step reads them by the kernel: XLA alone copies the pool in each layer.

  What temporaries grow by with the pool is at most its scales, 3 % of it, laid out otherwise a few times.
  """
  device = tpu.devices(topology)[0]
  config = tiny.config(num_layers=4, d_model=64, d_ff=64, num_heads=8, num_kv_heads=4, head_dim=128)
  model, policy, _ = parts(device, config=config)
  options = dict(batch=BATCH, capacity=256, longest=2048, window=WINDOW, lag=1, dtype=jnp.bfloat16, page_format=archive)
  arguments = (array((BATCH, tokens), jnp.int32, device), array((BATCH,), jnp.int32, device))
  step, temporaries, sizes = jax.jit(cached_forward, donate_argnums=2), [], []
  for pages in (10000, 20000):
    make = lambda pages=pages: caches.create("paged", config, **options).with_pages(pages)
    cache = abstract(jax.eval_shape(make), device)
    assert cache.page_size == 64  # whose scales fill a row of 128 lanes
    memory = step.lower(model, policy, cache, *arguments).compile().memory_analysis()
    temporaries.append(memory.temp_size_in_bytes)
    sizes.append(cache.store.pages.size)
    assert memory.alias_size_in_bytes >= sizes[-1]
  print(f"{topology}: {temporaries} bytes of temporaries beside pages of {sizes}")
  assert temporaries[1] - temporaries[0] < 0.15 * (sizes[1] - sizes[0]), f"{temporaries} bytes beside {sizes}"


def test_generation_compiles(device):
  """A prompt's chunk and a decode block of sampled steps."""
  model, policy, cache = parts(device)
  row = partial(array, (BATCH,), device=device)
  logits = array((BATCH, model.config.vocab_size), jnp.float32, device)
  tokens = array((BATCH, 256), jnp.int32, device)
  prefill_chunk.lower(model, policy, cache, tokens, row(jnp.int32), row(jnp.int32), logits).compile()
  keys = abstract(jax.eval_shape(lambda: jax.random.split(jax.random.key(0), BATCH)), device)
  rows = DecodeState(row(jnp.int32), keys, *(row(jnp.int32) for _ in range(4)))
  sampling = abstract(Sampling(jnp.float32(0.7), None, jnp.float32(0.95)), device)
  stop_criteria = StopCriteria(array((1,), jnp.int32, device))
  decode_block.lower(model, policy, cache, rows, sampling, stop_criteria, steps=8, history=False).compile()
