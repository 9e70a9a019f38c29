"""Memory of a step by the compiler's count: little more than a donated cache."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dms_jax import cache as caches
from dms_jax import policies
from dms_jax import testing as tiny
from dms_jax.config import DMSConfig
from dms_jax.families import PRESETS
from dms_jax.layers import rope_frequencies
from dms_jax.model import Eviction, Model, cached_forward, check_policy, forward
from dms_jax.params import abstract_params, param_table
from dms_jax.policies.triattention import Calibration


def abstract_step(cfg, dtype, *, batch, capacity, window, listed, kind="contiguous", width=1):
  """The step of `width` tokens compiled for shapes alone: (memory analysis, bytes of the cache or of its rings)."""
  dms = DMSConfig(window=window)
  params = abstract_params(param_table(cfg, dms), dtype)
  if listed:
    layer = {name: jax.ShapeDtypeStruct(w.shape[1:], w.dtype) for name, w in params["layers"].items()}
    params = {**params, "layers": [layer] * cfg.num_layers}
  make = functools.partial(caches.create, kind, cfg, batch=batch, capacity=capacity, window=window, lag=1)
  cache = jax.eval_shape(lambda: make(dtype=dtype))
  lowered = jax.jit(cached_forward, donate_argnums=2).lower(
    Model(params, cfg, dms),
    policies.DMS(window=window),
    cache,
    jax.ShapeDtypeStruct((batch, width), jnp.int32),
    jax.ShapeDtypeStruct((batch,), jnp.int32),
  )
  return lowered.compile().memory_analysis(), cache.kv.size * cache.kv.dtype.itemsize


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("listed", [False, True], ids=["scan", "loop"])
def test_a_decode_step_copies_no_cache(dtype, listed):
  """Temporaries below 1 % of a cache of 16 rows of 8,192 slots, which is donated and written in place.

  The model is thin so that what is measured is the cache: XLA's CPU backend keeps copies of stacked weights.
  """
  cfg = tiny.config(num_layers=8, d_model=64, d_ff=64, num_heads=8, num_kv_heads=4, head_dim=64)
  memory, size = abstract_step(cfg, dtype, batch=16, capacity=8192, window=256, listed=listed)
  assert memory.temp_size_in_bytes < 0.01 * size, f"{memory.temp_size_in_bytes:,} bytes beside a cache of {size:,}"
  assert memory.alias_size_in_bytes >= size


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_a_decode_step_of_smollm2_copies_no_cache(dtype):
  """The real shape: what 4,096 more slots a head add to the temporaries is nothing."""
  cfg = dataclasses.replace(PRESETS["smollm2-135m"], num_layers=2)
  small, large = (abstract_step(cfg, dtype, batch=8, capacity=s, window=256, listed=True) for s in (4096, 8192))
  assert large[0].temp_size_in_bytes - small[0].temp_size_in_bytes < 1e-3 * (large[1] - small[1])


@pytest.mark.parametrize("kind", ["contiguous", "paged"])
def test_layers_that_slide_copy_no_cache_and_hold_no_more_than_their_window(kind):
  """A chunk overwrites what it reads in such layers; its temporaries are those of a model without them, within 5 %."""
  one = tiny.config(num_layers=8, d_model=64, d_ff=64, num_heads=8, num_kv_heads=4, head_dim=64)
  two = dataclasses.replace(one, sliding_window=1024, sliding_layers=(True, True, True, False) * 2)
  found = [abstract_step(cfg, jnp.bfloat16, batch=4, capacity=4096, window=64, listed=True, kind=kind, width=64)
           for cfg in (one, two)]  # fmt: skip
  (plain, _), (sliding, _) = found
  assert sliding.temp_size_in_bytes < 1.05 * plain.temp_size_in_bytes
  if kind == "paged":  # 6 layers of 1,024 slots and 2 of 4,096
    assert sliding.alias_size_in_bytes < 0.45 * plain.alias_size_in_bytes


LAYERS, ROWS, SLOTS = 4, 8, 8192


def with_budget(name: str, cfg) -> policies.Policy:
  """The policy called `name`; one that takes a budget has half of the slots."""
  cls = policies.get(name)
  if name == "streamingllm":
    return cls(window=255, sinks=4)
  policy = cls(**({"budget": SLOTS // 2} if "budget" in {field.name for field in dataclasses.fields(cls)} else {}))
  if name == "triattention":
    shape = cfg.num_layers, cfg.num_heads, cfg.head_dim
    norms = np.ones((*shape[:2], cfg.head_dim // 2), np.float32)
    tables = Calibration(np.ones(shape, np.float32), norms, np.asarray(rope_frequencies(cfg))[None])
    policy = policy.replace(tables=tables)
  return policy


FAST = [("keydiff", "loop"), ("h2o", "loop"), ("keydiff", "scan")]


@pytest.mark.parametrize("name, form", [
  case if case in FAST else pytest.param(*case, marks=pytest.mark.slow)
  for case in itertools.product(sorted(policies.REGISTRY), ("scan", "loop"))
])  # fmt: skip
def test_no_policy_copies_the_cache_in_a_decode_step(name, form):
  """Temporaries below 1 % of the cache, and as many as the policy's numbers of each slot, which it compares.

  Where a policy asks for mass, attention keeps the scores and weights of one layer, two float32 a query head and slot.
  On a CPU a sum over keys is a call of a library, for which KeyDiff's keys of one layer are copied. A cut, which comes
  every 64 or 128 steps, takes the space of six layers. Nothing as large as all keys and values is copied in any step.
  """
  cfg = tiny.config(num_layers=LAYERS, d_model=64, d_ff=64, num_heads=8, num_kv_heads=4, head_dim=64)
  policy = with_budget(name, cfg)
  model = tiny.model(cfg, DMSConfig(window=64, objective=policy.objective) if policy.uses_gates else None)
  model = model.unstacked() if form == "loop" else model
  policy = check_policy(model, policy)
  cache = jax.eval_shape(lambda: caches.for_model(model, policy, batch=ROWS, capacity=SLOTS, kind="contiguous"))
  tokens, lengths = jax.ShapeDtypeStruct((ROWS, 1), jnp.int32), jax.ShapeDtypeStruct((ROWS,), jnp.int32)
  program = jax.jit(cached_forward, donate_argnums=2).lower(model, policy, cache, tokens, lengths).compile()
  size = cache.kv.size * cache.kv.dtype.itemsize
  allowed = 0.01 * size + sum(stat.size * stat.dtype.itemsize for stat in cache.stats.values())
  if "mass" in policy.observes:
    allowed += 2 * ROWS * cfg.num_heads * SLOTS * 4
  if "keys" in policy.observes:
    allowed += 0.55 * size / LAYERS
  if policy.prunes:
    allowed += 6 * size / LAYERS
  taken = program.memory_analysis().temp_size_in_bytes
  assert taken < allowed, f"{taken:,} bytes beside a cache of {size:,}"
  assert program.memory_analysis().alias_size_in_bytes >= size
  whole = ",".join(map(str, cache.kv.shape))
  assert not re.findall(rf"= \w+\[{whole}\]\S* copy\(", program.as_text())


def test_the_backward_pass_keeps_products_and_attention_alone():
  """Beside what it takes when layers keep nothing, by the compiler's count."""
  cfg = tiny.config(num_layers=8, d_model=64, d_ff=256, num_heads=4, num_kv_heads=2, head_dim=16)
  model, tokens = tiny.model(cfg, tiny.dms()), jnp.zeros((4, 256), jnp.int32)

  def taken(remat):
    def loss(params):
      noise = jnp.zeros((8, 4, 2, 256))
      hidden, z = forward(model.replace(params=params), tokens, eviction=Eviction(noise=noise), remat=remat)
      return hidden.sum() + z.sum()

    compiled = jax.jit(jax.grad(loss), compiler_options=tiny.QUICK).lower(model.params).compile()
    return compiled.memory_analysis().temp_size_in_bytes

  channels = 64 + 2 * 32 + 64 + 64 + 2 * 256  # q, k and v, attention, o, gate and up
  assert 0 < taken(False) - taken(True) <= 8 * 4 * 256 * channels * 4
