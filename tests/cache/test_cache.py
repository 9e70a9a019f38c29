"""Caches equal the mask they implement, over random shapes, decisions, chunkings and pauses.

Here caches are driven directly (`cache_driver`); `test_model.py` does the same through the layers.
"""

from __future__ import annotations

import os

import hypothesis
import hypothesis.strategies as st
import jax.numpy as jnp
import numpy as np
import pytest

from dms_jax import cache as caches
from dms_jax import policies
from dms_jax.config import DMSConfig, ModelConfig
from tests.cache_driver import ATOL, KINDS, LAYERS, ROWS, SHAPES, Shape, Text, inputs, poison, run, schedule, step


def usual(window: int, shift: int, length: int = 30) -> Shape:
  """One shape where nothing depends on it: its programs are compiled once."""
  return Shape(window, shift, heads=2, group=2, chunk=8, length=length)


@pytest.mark.parametrize("kind", KINDS)
@hypothesis.settings(max_examples=2 if os.environ.get("DMS_QUICK") else 6)
@hypothesis.given(shape=SHAPES, seeds=st.lists(st.integers(0, 2**31), min_size=4, max_size=4))
def test_cache_is_mask(kind, shape, seeds):
  """Outputs, counts and what is held equal the masked formula and the released slot reuse, after every step.

  Dead slots hold NaN before each step and padding is NaN throughout; decisions range from none to all.
  """
  for seed in seeds:
    rng = np.random.default_rng(seed)
    run(kind, shape, Text.draw(shape, rng), schedule(rng, shape))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
  ("window", "shift"),
  [(0, 0), (0, 1), (1, 1), (40, 1), *(pytest.param(window, 0, marks=pytest.mark.slow) for window in (1, 40))],
)
@pytest.mark.parametrize("rate", [0.0, 1.0])
def test_extreme_windows(kind, window, shift, rate):
  """The smallest windows, and one nearly as long as the text; nothing evicted and everything."""
  shape = usual(window, shift, length=30 if window < 30 else 42)
  rng = np.random.default_rng(window)
  cache = run(kind, shape, Text.draw(shape, rng, rate), schedule(rng, shape))
  if kind == "contiguous" and rate == 1.0 and shift == 0:
    assert (cache.live() == np.minimum(cache.seen, window + 1)[None, :, None]).all()


@pytest.mark.parametrize("window", [0, 1, 5])
@pytest.mark.parametrize("shift", [0, 1])
def test_one_token_at_a_time_is_a_chunk(window, shift):
  """The same slots hold the same tokens, bit by bit, whether fed one by one or in chunks of any size."""
  shape = usual(window, shift)
  text = Text.draw(shape, np.random.default_rng(1), 0.5)
  every = np.full(ROWS, 1)
  one = run("contiguous", shape, text, [(1, every)] * 30)
  eight = run("contiguous", shape, text, [(8, 8 * every)] * 3 + [(8, 6 * every)])
  mixed = run("contiguous", shape, text, [(1, every)] * 3 + [(8, 6 * every)] * 4 + [(1, every)] * 3)
  for other in (eight, mixed):
    assert (one.live() == other.live()).all()
    live = (np.arange(one.kv.shape[3]) < one.live()[..., None])[..., None]
    np.testing.assert_array_equal(np.where(live, one.kv, 0), np.where(live, other.kv, 0))
    np.testing.assert_array_equal(one.evicted, other.evicted)
    np.testing.assert_array_equal(one.archived, other.archived)


def rows(cache, row):
  """Everything a cache holds of one row."""
  parts = [cache.kv[:, row], cache.evicted[:, row], cache.seen[row]]
  return [
    np.asarray(x) for x in parts + ([cache.archived[:, row]] if isinstance(cache, caches.ContiguousCache) else [])
  ]


@pytest.mark.parametrize("kind", ["masked", "contiguous"])  # for pages: test_paged.py
@pytest.mark.parametrize("width", [1, 6])
def test_row_without_room_sits_out_and_resumes(kind, width):
  """Row 1 keeps everything and fills its slots; it is left bitwise alone until the cache is grown, then goes on."""
  shape = Shape(3, 1, heads=2, group=2, chunk=6, length=36)
  text = Text.draw(shape, np.random.default_rng(2), 1.0)
  text.evict[:, 1] = False
  text.evict[0, 1] = True  # full in one layer only
  expected, _ = text.expected(3, 1)
  policy, cache = policies.DMS(window=3), shape.create(kind, 20 if kind == "contiguous" else 36)
  if kind == "masked":  # rows fill by length: let row 1 alone run ahead
    cache = shape.create(kind, 20)
    text.evict[:] = False
    expected, _ = text.expected(3, 1)
  start, stalls = np.zeros(ROWS, int), 0
  for _ in range(36 // width):
    lengths = np.full(ROWS, width)
    if kind == "masked":
      lengths = np.array([width if start[0] + width <= 12 else 0, width, 0])
    before = rows(cache, 1)
    out, _, stalled, cache = step(poison(cache), policy, *inputs(text, start, lengths, width))
    if stalled[1]:
      stalls += 1
      kv, *rest = rows(cache, 1)
      np.testing.assert_array_equal(np.nan_to_num(kv), np.nan_to_num(before[0]))
      assert all((a == b).all() for a, b in zip(rest, before[1:], strict=True))
    lengths = np.where(np.asarray(stalled), 0, lengths)
    for b in range(ROWS):
      np.testing.assert_allclose(
        out[:, b, : lengths[b]], expected[:, b, start[b] : start[b] + lengths[b]], atol=ATOL, rtol=ATOL
      )
    start = start + lengths
  assert stalls and start[1] < 36 and (kind == "masked" or (start[[0, 2]] == 36).all())
  with pytest.raises(ValueError, match="shrink"):
    cache.grow(cache.kv.shape[3] - 1)
  cache = cache.grow(40)
  while start[1] < 36:
    lengths = np.array([0, min(width, 36 - start[1]), 0])
    out, _, stalled, cache = step(poison(cache), policy, *inputs(text, start, lengths, width))
    assert not stalled.any()
    np.testing.assert_allclose(
      out[:, 1, : lengths[1]], expected[:, 1, start[1] : start[1] + lengths[1]], atol=ATOL, rtol=ATOL
    )
    start = start + lengths


@pytest.mark.parametrize("kind", KINDS)
def test_room_is_what_a_chunk_may_take(kind):
  """`room()` tokens are accepted for sure, also when nothing is evicted; one more is refused."""
  shape = Shape(4, 1, heads=2, group=1, chunk=8, length=40)
  text = Text.draw(shape, np.random.default_rng(3), 0.0)
  policy, cache = policies.DMS(window=4), shape.create(kind, 20)
  start = np.zeros(ROWS, int)
  for lengths in ([3, 0, 8], [8, 2, 8]):
    *_, stalled, cache = step(cache, policy, *inputs(text, start, np.array(lengths), 8))
    assert not stalled.any()
    start = start + lengths
  if kind != "paged":  # which shares its free pages out
    np.testing.assert_array_equal(cache.free_tokens(policy), 20 - start)
  for extra in (0,) if kind == "paged" else (0, 1):
    lengths = np.asarray(cache.free_tokens(policy)) + extra
    *_, stalled, _ = step(cache, policy, *inputs(text, start, lengths, 20))
    assert (np.asarray(stalled) == bool(extra)).all()


@pytest.mark.parametrize("kind", KINDS)
def test_reruns_are_bit_equal(kind):
  shape = usual(5, 1)
  text = Text.draw(shape, np.random.default_rng(4), 0.5)
  steps = schedule(np.random.default_rng(5), shape)
  first, second = (run(kind, shape, text, steps) for _ in range(2))
  assert all((np.nan_to_num(a) == np.nan_to_num(b)).all() for a, b in zip(rows(first, 0), rows(second, 0), strict=True))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["dms", "vanilla", "streamingllm"])
def test_policies_that_decide(kind, name):
  """What a policy decides of tokens is what the cache forgets; one that keeps everything holds everything."""
  shape = usual(5, 1)
  text, rng = Text.draw(shape, np.random.default_rng(6)), np.random.default_rng(7)
  policy = policies.get(name)(window=5)
  logits = jnp.asarray(rng.standard_normal(text.evict.shape), jnp.float32)
  about = jnp.broadcast_to(jnp.arange(-1, 29), logits.shape[1:])
  text.evict = np.stack([np.asarray(policy.decide(layer, index, about)) for index, layer in enumerate(logits)])
  cache = run(kind, shape, text, schedule(rng, shape), policy=policy)
  if not policy.evicts:
    np.testing.assert_array_equal(cache.live(), np.broadcast_to(cache.seen[:, None], (LAYERS, ROWS, 2)))


def test_unknown_kind_is_named():
  with pytest.raises(ValueError, match="unknown cache 'ring'"):
    caches.create("ring", ModelConfig(), batch=1, capacity=8, window=2, lag=1)


@pytest.mark.parametrize("kind", ["masked", "contiguous", "paged"])
@pytest.mark.parametrize("window, shift", [(0, 0), (3, 0), (4, 1)])
def test_immediate_eviction_in_every_cache(kind, window, shift):
  """Decided W tokens later about the same token: caches equal the formula in chunks, steps and pauses."""
  lag = DMSConfig(window=window, shift=shift, eviction="immediate").lag()
  assert lag == window + shift
  shape = usual(window, lag)
  rng = np.random.default_rng(window)
  run(kind, shape, Text.draw(shape, rng, 0.6), schedule(rng, shape))
