"""Caches against the mask they stand for: properties over random shapes, decisions, chunkings and pauses.

Here a cache is driven directly, with queries, keys, values and decisions that come from no model; `test_model.py` does
the same through the layers. Values carry their token's position, so that what a slot holds can be read back.
"""

from __future__ import annotations

import dataclasses
import functools
import math

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dms_jax import cache as caches
from dms_jax import policies
from dms_jax import testing as tiny
from dms_jax.config import DMSConfig, ModelConfig
from tests import oracle

LAYERS, ROWS, HEAD = 2, 3, 4
KINDS = ["masked", "contiguous", "paged"]
ATOL = 2e-6  # float32 sums of at most 60 unit-sized terms


@dataclasses.dataclass(frozen=True)
class Shape:
  window: int
  shift: int
  heads: int  # KV heads
  group: int
  chunk: int
  length: int  # of the longest row

  def config(self):
    return ModelConfig(
      num_layers=LAYERS, num_heads=self.heads * self.group, num_kv_heads=self.heads, head_dim=HEAD, d_model=8, d_ff=8
    )

  def create(self, kind, capacity=None):
    return caches.create(
      kind, self.config(), batch=ROWS, capacity=capacity or self.length, window=self.window, lag=self.shift,
      **({"page": 4} if kind == "paged" else {}),
    )  # fmt: skip


SHAPES = st.builds(
  Shape, window=st.integers(0, 40), shift=st.integers(0, 1), heads=st.integers(1, 3), group=st.integers(1, 3),
  chunk=st.integers(2, 17), length=st.integers(18, 60),
)  # fmt: skip


@dataclasses.dataclass
class Text:
  """Random inputs of every layer and row. q [L, B, T, N, H], k and v [L, B, T, K, H], evict [L, B, K, T]."""

  q: np.ndarray
  k: np.ndarray
  v: np.ndarray
  evict: np.ndarray

  @classmethod
  def draw(cls, shape: Shape, rng: np.random.Generator, rate: float | None = None) -> Text:
    lead = (LAYERS, ROWS, shape.length)
    normal = lambda *s: rng.standard_normal(s).astype(np.float32)
    q, k = normal(*lead, shape.heads * shape.group, HEAD) * 3, normal(*lead, shape.heads, HEAD)
    v = normal(*lead, shape.heads, HEAD)
    v[..., 0] = np.arange(shape.length)[:, None] / 64  # exact in float32: which token this is
    rate = rng.choice([0.0, 0.2, 0.5, 0.9, 1.0]) if rate is None else rate
    return cls(q, k, v, rng.random((LAYERS, ROWS, shape.heads, shape.length)) < rate)

  def expected(self, window, shift):
    """(attended [L, B, T, N, H] float64 by the formula, visible [L, B, K, T, T])."""
    layers, rows, length, heads, h = self.q.shape
    group = heads // self.k.shape[3]
    out = np.zeros(self.q.shape)
    seen = np.zeros((layers, rows, self.k.shape[3], length, length), bool)
    for l, b, n in np.ndindex(layers, rows, heads):
      kv = n // group
      seen[l, b, kv] = mask = oracle.visible(oracle.about(self.evict[l, b, kv], shift), window)
      scores = self.q[l, b, :, n].astype(float) @ self.k[l, b, :, kv].astype(float).T / math.sqrt(h)
      scores = np.where(mask, scores, -np.inf)
      weights = np.exp(scores - scores.max(-1, keepdims=True))
      out[l, b, :, n] = weights / weights.sum(-1, keepdims=True) @ self.v[l, b, :, kv]
    return out, seen


@functools.partial(jax.jit, compiler_options=tiny.QUICK)
def step(cache, policy, q, k, v, evict, lengths):
  """One step of all layers: (attended [L, B, T, N, H], seen, stalled, cache)."""
  plan = cache.plan(policy, lengths, q.shape[2])

  def layer(carry, inputs):
    index, state, *rest = inputs
    out, carry, state, seen = cache.attend(plan, policy, index, carry, state, *rest)
    return carry, (out, state, seen)

  xs = jnp.arange(LAYERS), cache.layer_state(), q, k, v, evict
  carry, (out, states, seen) = jax.lax.scan(layer, cache.layer_carry(), xs)
  return out, seen, plan.stalled, cache.commit(plan, carry, states)


def inputs(text: Text, start, lengths, width):
  """The next `lengths[b]` tokens of each row as padded arrays; the padding is NaN and evicts, and must not matter."""
  take = np.minimum(start[:, None] + np.arange(width), text.q.shape[2] - 1)
  real = np.arange(width) < lengths[:, None]
  rows = np.arange(len(start))[:, None]
  q, k, v = (np.where(real[..., None, None], x[:, rows, take], np.nan) for x in (text.q, text.k, text.v))
  evict = np.moveaxis(np.moveaxis(text.evict, 2, -1)[:, rows, take], -1, 2)
  return tuple(jnp.asarray(x) for x in (q, k, v, np.where(real[:, None], evict, True), lengths.astype(np.int32)))


@functools.partial(jax.jit, compiler_options=tiny.QUICK)
def poison(cache):
  """NaN in every slot that holds nothing, and of pages in those that nobody owns."""
  live = cache.seen[:, None] if isinstance(cache, caches.MaskedCache) else cache.live()
  dead = jnp.arange(cache.kv.shape[3]) >= jnp.broadcast_to(live, cache.kv.shape[:3])[..., None]
  cache = cache.replace(kv=jnp.where(dead[..., None], jnp.nan, cache.kv))
  if not isinstance(cache, caches.PagedCache):
    return cache
  index = jnp.arange(cache.slots - cache.ring)
  page = jnp.repeat(cache.table.pages, cache.page_size, axis=-1)
  page = jnp.where(index < cache.archived[..., None], page, cache.pages)
  alive = jnp.zeros((cache.pages, cache.page_size), bool).at[page, index % cache.page_size].set(True, mode="drop")
  pages = jnp.where(alive[..., None], cache.store.pages, jnp.nan)
  beyond = jnp.arange(cache.table.pages.shape[3]) >= cache.table.owned[..., None]  # no page, or another's: 2^30
  table = cache.table.replace(pages=jnp.where(beyond, 2**30, cache.table.pages))
  return cache.replace(store=cache.store.replace(pages=pages), table=table)


def slots_of(cache):
  """All slots of a cache as one array [L, B, K, S, 2H]."""
  if not isinstance(cache, caches.PagedCache):
    return np.asarray(cache.kv)
  archive = np.asarray(cache.store.pages)[np.minimum(cache.table.pages, cache.pages - 1)]
  return np.concatenate([cache.kv[:, :, :, : cache.ring], archive.reshape(*cache.archived.shape, -1, 2 * HEAD)], axis=3)


def held(cache):
  """{(layer, row, head): positions that a cache holds, slot by slot}, read from the values."""
  live, values = np.asarray(cache.live()), slots_of(cache)[..., HEAD]
  return {index: [round(x * 64) for x in values[index][: live[index]].tolist()] for index in np.ndindex(live.shape)}


def schedule(rng, shape):
  """Steps (width, lengths [B]) that feed every row to its end: chunks and single tokens mixed, some rows pausing."""
  start, steps = np.zeros(ROWS, int), []
  ends = rng.integers(1, shape.length + 1, ROWS)
  ends[rng.integers(ROWS)] = shape.length
  while (start < ends).any():
    width = int(rng.choice([1, shape.chunk]))
    for _ in range(1 if width > 1 else 4):
      lengths = np.where(rng.random(ROWS) < 0.3, 0, rng.integers(1, width + 1, ROWS))
      lengths = np.minimum(lengths, ends - start)
      steps.append((width, lengths))
      start = start + lengths
  return steps


def run(kind, shape, text, steps, policy=None):
  """Checks every step of a run against the formula; returns the cache."""
  expected, seen = text.expected(shape.window, shape.shift)
  history = {
    (l, b, k): oracle.slot_reuse(text.evict[l, b, k], shape.window, shape.shift)
    for l, b, k in np.ndindex(LAYERS, ROWS, shape.heads)
  }
  policy, cache = policy or policies.DMS(window=shape.window), shape.create(kind)
  start = np.zeros(ROWS, int)
  for width, lengths in steps:
    out, count, stalled, cache = step(poison(cache), policy, *inputs(text, start, lengths, width))
    assert not stalled.any()
    out, count, live = np.asarray(out), jax.tree.map(np.asarray, count), np.asarray(cache.live())
    for b in range(ROWS):
      now, end = slice(start[b], start[b] + lengths[b]), start[b] + lengths[b]
      np.testing.assert_allclose(out[:, b, : lengths[b]], expected[:, b, now], atol=ATOL, rtol=ATOL)
      np.testing.assert_array_equal(count.reads[:, b], seen[:, b, :, now].sum((-1, -2)))
      if end:
        np.testing.assert_array_equal(count.live[:, b], seen[:, b, :, end - 1].sum(-1))
        np.testing.assert_array_equal(live[:, b], seen[:, b, :, end - 1].sum(-1))
    positions = held(cache) if kind != "masked" else {}
    for (l, b, k), slots in positions.items():
      if end := start[b] + lengths[b]:
        assert sorted(slots) == sorted(history[l, b, k][end - 1])
        assert sorted(slots) == list(np.flatnonzero(seen[l, b, k, end - 1]))
        ring = min(end, shape.window + 1)
        assert all(slots[t % (shape.window + 1)] == t for t in range(end - ring, end))
        assert slots[ring:] == sorted(slots[ring:])  # the archive is in the order of positions
    start = start + lengths
  np.testing.assert_array_equal(cache.seen, start)
  return cache


@pytest.mark.parametrize("kind", KINDS)
@hypothesis.settings(max_examples=6)
@hypothesis.given(shape=SHAPES, seeds=st.lists(st.integers(0, 2**31), min_size=4, max_size=4))
def test_cache_is_mask(kind, shape, seeds):
  """Outputs, counts and what is held equal the masked formula and the released slot reuse, after every step.

  Dead slots hold NaN before each step and padding is NaN throughout; decisions range from none to all.
  """
  for seed in seeds:
    rng = np.random.default_rng(seed)
    run(kind, shape, Text.draw(shape, rng), schedule(rng, shape))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("window", [0, 1, 40])
@pytest.mark.parametrize("shift", [0, 1])
@pytest.mark.parametrize("rate", [0.0, 1.0])
def test_extreme_windows(kind, window, shift, rate):
  """The smallest windows, and one longer than half the text; nothing evicted and everything."""
  shape = Shape(window, shift, heads=2, group=2, chunk=9, length=42)
  rng = np.random.default_rng(window)
  cache = run(kind, shape, Text.draw(shape, rng, rate), schedule(rng, shape))
  if kind == "contiguous" and rate == 1.0 and shift == 0:
    assert (cache.live() == np.minimum(cache.seen, window + 1)[None, :, None]).all()


@pytest.mark.parametrize("window", [0, 1, 5])
@pytest.mark.parametrize("shift", [0, 1])
def test_one_token_at_a_time_is_a_chunk(window, shift):
  """The same slots hold the same tokens, bit by bit, whether fed one by one or in chunks of any size."""
  shape = Shape(window, shift, heads=2, group=1, chunk=7, length=30)
  text = Text.draw(shape, np.random.default_rng(1), 0.5)
  every = np.full(ROWS, 1)
  one = run("contiguous", shape, text, [(1, every)] * 30)
  seven = run("contiguous", shape, text, [(7, 7 * every)] * 4 + [(7, 2 * every)])
  mixed = run("contiguous", shape, text, [(1, every)] * 3 + [(7, 6 * every)] * 4 + [(1, every)] * 3)
  for other in (seven, mixed):
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
  shape = Shape(5, 1, heads=2, group=3, chunk=11, length=40)
  text = Text.draw(shape, np.random.default_rng(4), 0.5)
  steps = schedule(np.random.default_rng(5), shape)
  first, second = (run(kind, shape, text, steps) for _ in range(2))
  assert all((np.nan_to_num(a) == np.nan_to_num(b)).all() for a, b in zip(rows(first, 0), rows(second, 0), strict=True))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["dms", "vanilla", "streamingllm"])
def test_policies_that_decide(kind, name):
  """What a policy decides of tokens is what the cache forgets; one that keeps everything holds everything."""
  shape = Shape(5, 1, heads=2, group=2, chunk=8, length=30)
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
  shape = Shape(window, lag, heads=2, group=2, chunk=6, length=26)
  rng = np.random.default_rng(window)
  run(kind, shape, Text.draw(shape, rng, 0.6), schedule(rng, shape))
