"""Programs compiled for a TPU that is not there: they fit, and a decode step copies no cache (make test-tpu)."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dms_jax import cache as caches
from dms_jax import policies
from dms_jax.config import PRESETS, DMSConfig
from dms_jax.decoding import Ends, Rows, decode_stretch, prefill_chunk
from dms_jax.model import Model, cached_forward, last_logits
from dms_jax.params import map_table, param_table
from dms_jax.sampling import Sampling

pytestmark = pytest.mark.tpu
pytest.importorskip("libtpu", reason="libtpu is not installed (make test-tpu installs it)")

BATCH, CAPACITY, WINDOW = 8, 8192, 64


@pytest.fixture(scope="module", autouse=True)
def no_compilation_cache():
  """Programs compiled for an absent device cannot be read back from disk."""
  jax.config.update("jax_enable_compilation_cache", False)
  yield
  jax.config.update("jax_enable_compilation_cache", True)


@pytest.fixture(scope="module", params=["v5e:2x2", "v6e:2x2"])
def device(request):
  """One device of a topology that is described, not attached."""
  from jax.experimental import topologies

  return topologies.get_topology_desc(platform="tpu", topology_name=request.param).devices[0]


def abstract(tree, device):
  """Shapes and dtypes of `tree` on `device`."""
  sharding = jax.sharding.SingleDeviceSharding(device)
  return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), tree)


def parts(device, capacity=CAPACITY):
  """SmolLM2's shape in bfloat16, with gates; the policy; and a cache of 8 rows and `capacity` slots a head."""
  config, dms = PRESETS["smollm2-135m"], DMSConfig(window=WINDOW)
  shapes = map_table(lambda _, spec: jax.ShapeDtypeStruct(spec.shape, jnp.bfloat16), param_table(config, dms))
  make = partial(caches.create, "slots", config, batch=BATCH, capacity=capacity, window=WINDOW, shift=1)
  cache = abstract(jax.eval_shape(partial(make, dtype=jnp.bfloat16)), device)
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


def test_generation_compiles(device):
  """A prompt's chunk and a stretch of sampled steps."""
  model, policy, cache = parts(device)
  row = partial(array, (BATCH,), device=device)
  logits = array((BATCH, model.config.vocab_size), jnp.float32, device)
  tokens = array((BATCH, 256), jnp.int32, device)
  prefill_chunk.lower(model, policy, cache, tokens, row(jnp.int32), row(jnp.bool_), logits).compile()
  keys = abstract(jax.eval_shape(lambda: jax.random.split(jax.random.key(0), BATCH)), device)
  rows = Rows(row(jnp.int32), keys, *(row(jnp.int32) for _ in range(4)))
  sampling = abstract(Sampling(jnp.float32(0.7), None, jnp.float32(0.95)), device)
  ends = Ends(array((1,), jnp.int32, device))
  decode_stretch.lower(model, policy, cache, rows, sampling, ends, steps=8, history=False).compile()
