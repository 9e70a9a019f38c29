"""A cache driven directly, with queries, keys, values and decisions that come from no model.

Values carry their token's position, so that what a slot holds can be read back.
"""

from __future__ import annotations

import dataclasses
import functools
import math

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np

from dms_jax import cache as caches
from dms_jax import policies
from dms_jax import testing as tiny
from dms_jax.config import ModelConfig
from dms_jax.layers import rope_frequencies
from dms_jax.policies.triattention import Calibration
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
  slides: int | None = None  # layer 0 slides over this window

  def config(self):
    sliding = {} if self.slides is None else dict(sliding_window=self.slides + 1, sliding_layers=(True, False))
    return ModelConfig(
      num_layers=LAYERS, num_heads=self.heads * self.group, num_kv_heads=self.heads, head_dim=HEAD, d_model=8, d_ff=8,
      **sliding,
    )  # fmt: skip

  def create(self, kind, capacity=None):
    return caches.create(
      kind, self.config(), batch=ROWS, capacity=capacity or self.length, window=self.window, lag=self.shift,
      **({"page_size": 4} if kind == "paged" else {}),
    )  # fmt: skip


SHAPES = st.builds(
  Shape, window=st.integers(0, 40), shift=st.integers(0, 1), heads=st.integers(1, 3), group=st.integers(1, 3),
  chunk=st.integers(2, 17), length=st.integers(18, 60),
)  # fmt: skip
TWO_KINDS = st.builds(
  lambda shape, more: dataclasses.replace(shape, slides=max(shape.window + more, 1)), SHAPES, st.integers(0, 30)
)


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

  def expected(self, window, shift, slides=None):
    """(attended [L, B, T, N, H] float64 by the formula, visible [L, B, K, T, T]); `slides` as in `Shape`."""
    layers, rows, length, heads, h = self.q.shape
    group = heads // self.k.shape[3]
    out = np.zeros(self.q.shape)
    seen = np.zeros((layers, rows, self.k.shape[3], length, length), bool)
    for l, b, n in np.ndindex(layers, rows, heads):
      kv = n // group
      if l == 0 and slides is not None:
        mask = oracle.visible(np.ones(length, bool), slides)
      else:
        mask = oracle.visible(oracle.about(self.evict[l, b, kv], shift), window)
      seen[l, b, kv] = mask
      scores = self.q[l, b, :, n].astype(float) @ self.k[l, b, :, kv].astype(float).T / math.sqrt(h)
      scores = np.where(mask, scores, -np.inf)
      weights = np.exp(scores - scores.max(-1, keepdims=True))
      out[l, b, :, n] = weights / weights.sum(-1, keepdims=True) @ self.v[l, b, :, kv]
    return out, seen


@functools.partial(jax.jit, compiler_options=tiny.QUICK)
def step(cache, policy, q, k, v, evict, lengths, remaining=None):
  """One step of all layers: (attended [L, B, T, N, H], usage, stalled, cache)."""
  if policy.prunes and not cache.takes_chunk(policy, q.shape[2], remaining):
    cache = cache.prune(policy, lengths > 0)
  plan = cache.plan(policy, lengths, q.shape[2], remaining)

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
def step_by_logits(cache, policy, q, k, v, logits, lengths, remaining):
  """`step` from gate logits [L, B, K, T] instead of decisions."""
  if policy.prunes and not cache.takes_chunk(policy, q.shape[2], remaining):
    cache = cache.prune(policy, lengths > 0)
  plan = cache.plan(policy, lengths, q.shape[2], remaining)
  about = (plan.seen[:, None] + jnp.arange(q.shape[2]) - cache.lag)[:, None]
  about = jnp.broadcast_to(about, (k.shape[1], k.shape[3], k.shape[2]))  # logits may be several a head

  def layer(carry, inputs):
    index, state, q, k, v, logits = inputs
    evict = policy.decide(logits, index, about)
    rated = {"logits": logits} if policy.gate_stats else {}
    out, carry, state, seen = cache.attend(plan, policy, index, carry, state, q, k, v, evict, **rated)
    return carry, (out, state, seen)

  xs = jnp.arange(LAYERS), cache.layer_state(), q, k, v, logits
  carry, (out, states, seen) = jax.lax.scan(layer, cache.layer_carry(), xs)
  return out, seen, plan.stalled, cache.commit(plan, carry, states)


def feed_logits(policy, cache, text, logits, start, width, lengths, remaining):
  """One step from gate logits [L, B, K, T]; the padding is NaN, and so is what dead slots hold."""
  q, k, v, _, real = inputs(text, start, lengths, width)
  take = np.minimum(start[:, None] + np.arange(width), logits.shape[-1] - 1)
  own = np.stack([logits[:, b][:, :, take[b]] for b in range(ROWS)], axis=1)
  own = np.where((np.arange(width) < lengths[:, None])[:, None], own, np.nan)
  remaining = None if remaining is None else jnp.asarray(remaining, jnp.int32)
  return step_by_logits(poison(cache), policy, q, k, v, jnp.asarray(own), real, remaining)


def poison(cache):
  """NaN in every slot that holds nothing, and of pages in those that nobody owns; by numpy, without a program."""
  seen, kv = np.asarray(cache.seen), np.asarray(cache.kv)
  live = seen[:, None] if isinstance(cache, caches.MaskedCache) else np.asarray(cache.live())
  dead = np.arange(kv.shape[3]) >= np.broadcast_to(live, kv.shape[:3])[..., None]
  cache = cache.replace(kv=jnp.asarray(np.where(dead[..., None], kv.dtype.type(np.nan), kv)))
  if not isinstance(cache, caches.PagedCache):
    return cache
  table, owned, pages = (np.asarray(x) for x in (cache.table.pages, cache.table.owned, cache.store.pages))
  index = np.arange(cache.slots - cache.ring)
  page = np.repeat(table, cache.page_size, axis=-1)
  archived = index < np.asarray(cache.archived)[..., None]
  alive = np.zeros((cache.pages, cache.page_size), bool)
  alive[page[archived], np.broadcast_to(index % cache.page_size, page.shape)[archived]] = True
  beyond = np.arange(table.shape[3]) >= owned[..., None]  # no page, or another's: 2^30
  return cache.replace(
    store=cache.store.replace(pages=jnp.asarray(np.where(alive[..., None], pages, pages.dtype.type(np.nan)))),
    table=cache.table.replace(pages=jnp.asarray(np.where(beyond, np.int32(2**30), table))),
  )


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
  expected, seen = text.expected(shape.window, shape.shift, shape.slides)
  history = {
    (l, b, k): oracle.slot_reuse(text.evict[l, b, k], shape.window, shape.shift)
    for l, b, k in np.ndindex(LAYERS, ROWS, shape.heads)
  }
  policy, cache = policy or policies.DMS(window=shape.window), shape.create(kind)
  start = np.zeros(ROWS, int)
  for width, lengths in steps:
    *found, cache = step(poison(cache), policy, *inputs(text, start, lengths, width))
    out, count, stalled = jax.device_get(found)
    assert not stalled.any()
    live = np.asarray(cache.live())
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
        assert sorted(slots) == list(np.flatnonzero(seen[l, b, k, end - 1]))
        ring = min(end, shape.window + 1)
        assert all(slots[t % (shape.window + 1)] == t for t in range(end - ring, end))
        if l == 0 and shape.slides is not None:  # the archive is a ring, too
          span = shape.slides - shape.window
          assert all(t % span == slot for slot, t in enumerate(slots[ring:]))
          continue
        assert sorted(slots) == sorted(history[l, b, k][end - 1])
        assert slots[ring:] == sorted(slots[ring:])  # the archive is in the order of positions
    start = start + lengths
  np.testing.assert_array_equal(cache.seen, start)
  return cache


def fitted(policy):
  """A policy with tables for 4 query and 2 KV heads: RoPE's frequencies, and queries as if they were calibrated."""
  config = ModelConfig(num_layers=LAYERS, num_heads=4, num_kv_heads=2, head_dim=HEAD, rope_theta=100.0)
  if isinstance(policy, policies.TriAttention):
    rng = np.random.default_rng(5)
    centres = rng.standard_normal((config.num_layers, config.num_heads, config.head_dim))
    length = np.hypot(*np.split(centres, 2, axis=-1))
    arrays = centres, length * (1 + rng.random(length.shape)), rope_frequencies(config)[None]
    policy = policy.replace(tables=Calibration(*(jnp.asarray(x, jnp.float32) for x in arrays)))
  return policy.fitted(config)
