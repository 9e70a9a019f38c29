"""Policies in every cache, one decode step after another, against their papers in numpy."""

from __future__ import annotations

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import struct

from dms_jax import cache as caches
from dms_jax import policies
from dms_jax.config import ModelConfig
from tests import cache_driver, policy_oracle
from tests.cache_driver import fitted

KINDS = cache_driver.KINDS
LAYERS, ROWS, HEADS, GROUP, HEAD, LENGTH = cache_driver.LAYERS, cache_driver.ROWS, 2, 2, cache_driver.HEAD, 44
MARGIN = 1e-4  # relative; choices closer than this are left to the float64 oracle: another text is drawn


def held_by(policy):
  """size(t): what the papers call the size of the cache, after token t has attended."""
  if policy.budget is not None:
    return lambda t: policy.budget - 1
  return lambda t: max(math.ceil((t + 2) / policy.cr), policy.window + 1) - 1


def by_papers(policy, layer, q, k, v):
  """The oracle's run of one layer and row."""
  match policy:
    case policies.Vanilla():
      return policy_oracle.streaming(q, k, sinks=LENGTH, window=0)
    case policies.StreamingLLM():
      return policy_oracle.streaming(q, k, sinks=policy.sinks, window=policy.window)
    case policies.TOVA():
      return policy_oracle.tova(q, k, size=held_by(policy), per_layer=policy.per_layer)
    case policies.H2O():
      size = held_by(policy)
      recent = lambda t: size(t) // 2 if policy.halves else policy.window
      return policy_oracle.h2o(q, k, size=size, recent=recent)
    case policies.Random():
      options = dict(seed=policy.seed, sinks=policy.sinks, budget=policy.budget, window=policy.window)
      return policy_oracle.random(q, k, layer=layer, **options)
    case policies.Quest():
      budget = lambda t: policy.budget if policy.budget is not None else math.ceil((t + 1) / policy.cr)
      pages = lambda t: max((budget(t) - policy.window - 1) // policy.page, 1)
      options = dict(page=policy.page, pages=pages, window=policy.window, each_head=policy.each_head)
      return policy_oracle.quest(q, k, dense=layer < policy.dense_layers, **options)
  return policy_oracle.by_policy(policy, layer, q, k, v, [(1, None)] * len(q))


CASES = {
  "vanilla": policies.Vanilla(window=3),
  "streaming": policies.StreamingLLM(window=6, sinks=3),
  "streaming-0": policies.StreamingLLM(window=0, sinks=1),
  "tova": policies.TOVA(budget=9),
  "tova-layer": policies.TOVA(budget=9, per_layer=True),
  "tova-cr": policies.TOVA(cr=3.0),
  "tova-1": policies.TOVA(budget=1),
  "tied": policies.TOVA(budget=9),  # queries of 0 attend to all tokens alike: the later token goes
  "h2o": policies.H2O(budget=12, window=5),
  "h2o-cr": policies.H2O(cr=2.5, window=4),
  "h2o-0": policies.H2O(budget=6, window=5),
  "keydiff": policies.KeyDiff(budget=10),
  "random": policies.Random(budget=11, window=3, seed=5),
  "random-sinks": policies.Random(budget=9, window=0, seed=2**31 - 1, sinks=2),
  "quest": policies.Quest(window=3, page=4, budget=16, dense_layers=1),
  "quest-cr": policies.Quest(window=7, page=4, cr=2.0, dense_layers=0),
  "quest-heads": policies.Quest(window=3, page=4, budget=12, dense_layers=1, each_head=True),
  "h2o-half": policies.H2O(cr=2.5, window=0, halves=True),
  "h2o-half-1": policies.H2O(budget=2, window=0, halves=True),
  "rkv": policies.RKV(budget=10, buffer=4, window=3, exact_prefill=True),
  "rkv-cr": policies.RKV(cr=3.0, buffer=5, window=2, exact_prefill=True),
  "expected": fitted(policies.ExpectedAttention(budget=9, buffer=5, sinks=2, future=20, exact_prefill=True)),
  "tri": fitted(policies.TriAttention(budget=9, buffer=5, furthest=64, exact_prefill=True)),
  "vase": policies.VaSE(budget=11, buffer=5, window=3, large=0.3, sinks=2, seed=7, exact_prefill=True),
}


@functools.cache
def drawn(case):
  """(text, oracle's runs by (layer, row), attended [L, B, T, N, H]) of a text in which no choice is a near tie."""
  policy, shape = CASES[case], cache_driver.Shape(0, 0, HEADS, GROUP, 2, LENGTH)
  for seed in range(20):
    text = cache_driver.Text.draw(shape, np.random.default_rng(seed), 0.0)
    if case == "tied":
      text.q[:] = 0
    runs, out = {}, np.zeros(text.q.shape)
    for l, b in np.ndindex(LAYERS, ROWS):
      q, k, v = (x[l, b].astype(float) for x in (text.q, text.k, text.v))
      q = q.reshape(LENGTH, HEADS, GROUP, HEAD)
      runs[l, b] = by_papers(policy, l, q, k, v)
      out[l, b] = policy_oracle.attend(q, k, v, runs[l, b]).reshape(out[l, b].shape)
    if case == "tied" or min(run.margin for run in runs.values()) > MARGIN:
      return text, runs, out
  raise AssertionError(f"{case}: near ties in every text")


def create(kind, policy, capacity=None):
  config = ModelConfig(num_layers=LAYERS, num_heads=HEADS * GROUP, num_kv_heads=HEADS, head_dim=HEAD, d_model=8, d_ff=8)
  if capacity is None:
    capacity = LENGTH if kind == "masked" else int(policy.capacity(LENGTH))
  return caches.create(kind, config, batch=ROWS, capacity=capacity, policy=policy, lag=1)


def decisions(policy, start, width):
  """What the policy decides at a step, bool [L, B, K, T], by the tokens that compute it."""
  about = np.broadcast_to((start[:, None] + np.arange(width) - 1)[:, None], (ROWS, HEADS, width))
  return np.stack([np.asarray(policy.decide(None, layer, jnp.asarray(about))) for layer in range(LAYERS)])


def feed(policy, cache, text, start, lengths, width):
  """One step; the padding is NaN, and so is what dead slots hold."""
  *rest, _, lengths = cache_driver.inputs(text, start, lengths, width)
  evict = jnp.asarray(decisions(policy, start, width))
  return cache_driver.step(cache_driver.poison(cache), policy, *rest, evict, lengths)


# Every cache for each method; the variants of its numbers in one cache, and in all of them at length.
EVERYWHERE = [
  pytest.param(case, kind, marks=[pytest.mark.slow] * (("-" in case or case == "tied") and kind != "contiguous"))
  for case in CASES
  for kind in KINDS
]


@pytest.mark.parametrize(("case", "kind"), EVERYWHERE)
def test_policy_is_its_paper(case, kind):
  """Attention, tokens held, slots and reads after every step; rows pause at random and end at different lengths.

  The cache has no slot more than the policy says it needs.
  """
  policy, (text, runs, expected), rng = CASES[case], drawn(case), np.random.default_rng(1)
  cache, start, ends = create(kind, policy), np.zeros(ROWS, int), np.array([LENGTH, LENGTH // 2, LENGTH - 5])
  while (start < ends).any():
    lengths = ((rng.random(ROWS) < 0.8) & (start < ends)).astype(int)
    *found, cache = feed(policy, cache, text, start, lengths, 1)
    out, seen, stalled = jax.device_get(found)
    assert not stalled.any()
    slots_of = cache_driver.held(cache) if kind == "contiguous" else None
    live = np.asarray(cache.live())
    for l, b, h in np.ndindex(LAYERS, ROWS, HEADS):
      if not lengths[b]:
        assert not seen.reads[l, b, h]
        continue
      t, run = start[b], runs[l, b]
      group = slice(h * GROUP, (h + 1) * GROUP)
      np.testing.assert_allclose(out[l, b, 0, group], expected[l, b, t, group], atol=2e-6, rtol=2e-6)
      assert int(seen.live[l, b, h]) == live[l, b, h] == len(run.held[h][t])
      assert int(seen.reads[l, b, h]) == len(run.read[h][t])
      if slots_of is not None:
        assert sorted(slots_of[l, b, h]) == sorted(run.held[h][t])
    start = start + lengths


@struct.dataclass
class _Watching(policies.Policy):
  """Observes everything there is, and notes what does not fit: values of `cache_driver` carry their positions."""

  stats = ("position", "wrong", "queries")
  observes = prompt_observes = ("keys", "values", "positions", "queries")
  compacts = True

  def observe(self, stats, seen):
    fits = jnp.round(seen.values[..., 0] * 64).astype(jnp.int32) == seen.positions
    queries = jnp.sum(seen.queries[:, :, :, 0], axis=(2, 3))[..., None]
    return {
      "position": stats["position"], "wrong": stats["wrong"] + (seen.live & ~fits).astype(jnp.float32),
      "queries": jnp.where(seen.live & ~jnp.isnan(seen.keys[..., 0]), queries, stats["queries"]),
    }  # fmt: skip

  def compact(self, candidates):
    return candidates.live


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_observed(kind):
  """Values and positions of the same tokens, and the step's queries by KV head, in chunks and decode steps."""
  policy, shape = _Watching(window=3), cache_driver.Shape(0, 0, HEADS, GROUP, 2, LENGTH)
  text = cache_driver.Text.draw(shape, np.random.default_rng(0), 0.0)
  cache, start = create(kind, policy), np.zeros(ROWS, int)
  for width, lengths in ((7, [7, 5, 0]), (7, [3, 7, 2]), (1, [1, 0, 1]), (1, [1, 1, 1])):
    *_, cache = feed(policy, cache, text, start, np.array(lengths), width)
    begin, start = start, start + lengths
    for l, b, h in np.ndindex(LAYERS, ROWS, HEADS):
      of_head = {name: np.asarray(x)[l, b, h] for name, x in cache.stats.items()}
      ring = len(of_head["wrong"]) if kind == "masked" else min(start[b], 4)
      assert not of_head["wrong"].any()
      assert {start[b] - 1} <= set(of_head["position"][:ring].astype(int)) or not start[b]
      if lengths[b]:
        expected = text.q[l, b, begin[b], h * GROUP : (h + 1) * GROUP].sum()
        newest = start[b] - 1 if kind == "masked" else (start[b] - 1) % 4
        np.testing.assert_allclose(of_head["queries"][newest], expected, rtol=1e-5, atol=1e-5)


def test_positions_are_a_statistic():
  with pytest.raises(TypeError, match='so its stats must name "position"'):
    policies.register(type("Bad", (policies.Policy,), {"observes": ("positions",)}))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("case", ["streaming", "streaming-0", "quest"])
def test_chunks_are_exact(case, kind):
  """Chunks of a prompt hold what single tokens hold, in the smallest cache; Quest reads them densely."""
  policy, (text, runs, expected), rng = CASES[case], drawn(case), np.random.default_rng(2)
  cache, start = create(kind, policy), np.zeros(ROWS, int)
  while (start < LENGTH).any():
    width = int(rng.choice([1, 7]))
    lengths = np.minimum(rng.integers(0, width + 1, ROWS), LENGTH - start)
    *found, cache = feed(policy, cache, text, start, lengths, width)
    out, seen, stalled = jax.device_get(found)
    assert not stalled.any()
    for l, b in np.ndindex(LAYERS, ROWS):
      now, end = slice(start[b], start[b] + lengths[b]), start[b] + lengths[b]
      if end:
        assert seen.live[l, b].tolist() == [len(held[end - 1]) for held in runs[l, b].held]
      if case == "quest" and width > 1:
        read = runs[l, b].held
      else:
        read = runs[l, b].read
        np.testing.assert_allclose(out[l, b, : lengths[b]], expected[l, b, now], atol=2e-6, rtol=2e-6)
      assert seen.reads[l, b].tolist() == [sum(len(r) for r in reads[now]) for reads in read]
    start = start + lengths


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("case", ["streaming", "tova", "h2o", "random", "quest"])
def test_rows_do_not_depend_on_their_neighbours(case, kind):
  """Bit for bit, whatever the other rows hold, and whether they take part."""
  policy, (text, *_) = CASES[case], drawn(case)
  other = dataclasses.replace(text, q=text.q[:, ::-1] * 2, k=text.k[:, ::-1], v=text.v[:, ::-1])
  for name in ("q", "k", "v"):
    getattr(other, name)[:, 1] = getattr(text, name)[:, 1]
  one, two, start = create(kind, policy), create(kind, policy), np.zeros(ROWS, int)
  ahead = np.array([9, 0, 3])
  for t in range(12):
    *_, two = feed(policy, two, other, np.where(ahead > t, t, 0) * (ahead > 0), (t < ahead).astype(int), 1)
  for t in range(LENGTH):
    first, _, _, one = feed(policy, one, text, start + t, np.ones(ROWS, int), 1)
    lengths = np.array([t % 3 == 0 and t < 30, 1, 0]).astype(int)
    begin = np.asarray(two.seen)
    second, _, _, two = feed(policy, two, other, begin, lengths, 1)
    np.testing.assert_array_equal(first[:, 1], second[:, 1])


@pytest.mark.parametrize("case", ["streaming", "tova", "h2o", "random", "quest"])
def test_numbers_are_traced(case):
  """A sweep over budgets, sinks and seeds compiles one decode step."""
  policy, traces = CASES[case], []

  @jax.jit
  def step(cache, policy):
    traces.append(None)
    plan = cache.plan(policy, jnp.ones(ROWS, jnp.int32), 1)
    q, kv = jnp.ones((ROWS, 1, HEADS * GROUP, HEAD)), jnp.ones((ROWS, 1, HEADS, HEAD))
    evict = policy.decide(None, 0, jnp.zeros((ROWS, HEADS, 1), jnp.int32))
    state = jax.tree.map(lambda x: x[0], cache.layer_state())
    return cache.attend(plan, policy, 0, cache.layer_carry(), state, q, kv, kv, evict)[0]

  for factor in range(1, 4):
    step(create("contiguous", policy, 40), jax.tree.map(lambda x, factor=factor: x * factor, policy))
  assert len(traces) == 1


@pytest.mark.parametrize("case", ["tova", "quest"])
def test_a_row_without_room_sits_out(case):
  """Slots are too few for the policy's numbers: the row is left alone bit by bit, and goes on when there are more."""
  policy, (text, _, expected) = CASES[case], drawn(case)
  cache, start, one = create("contiguous", policy, 8), np.zeros(ROWS, int), np.ones(ROWS, int)
  for _ in range(8):
    *_, stalled, cache = feed(policy, cache, text, start, one, 1)
    start = start + one
    assert not stalled.any()
  _, _, stalled, after = feed(policy, cache, text, start, one, 1)
  assert stalled.all() and (cache.free_tokens(policy) == 0).all()
  for a, b in zip(jax.tree.leaves(cache), jax.tree.leaves(after), strict=True):
    np.testing.assert_array_equal(a, b)
  cache = after.grow(int(policy.capacity(LENGTH)))
  while start[0] < LENGTH:
    out, _, stalled, cache = feed(policy, cache, text, start, one, 1)
    assert not stalled.any()
    np.testing.assert_allclose(out[:, :, 0], expected[:, :, start[0]], atol=2e-6, rtol=2e-6)
    start = start + one


@pytest.mark.parametrize("kind", KINDS)
def test_a_cache_is_for_its_policy(kind):
  ones = jnp.ones(ROWS, jnp.int32)
  with pytest.raises(ValueError, match=r"TOVA needs the statistics \['position', 'score'\], but the cache stores \[\]"):
    create(kind, policies.Vanilla()).plan(CASES["tova"], ones, 1)
  with pytest.raises(
    ValueError, match=r"Vanilla needs the statistics \[\], but the cache stores \['position', 'score'\]"
  ):
    create(kind, CASES["tova"]).plan(policies.Vanilla(), ones, 1)
  with pytest.raises(ValueError, match="window=3, but the cache has window=0"):
    create(kind, policies.Vanilla()).plan(CASES["quest"], ones, 1)
  with pytest.raises(ValueError, match="one token at a time, and here are 4"):
    exact = CASES["tova"].replace(exact_prefill=True)
    create(kind, exact).plan(exact, ones, 4)
  if kind == "contiguous":
    with pytest.raises(ValueError, match="Quest selects pages of 4 slots, the cache has 0"):
      create(kind, policies.Vanilla(window=3)).plan(CASES["quest"], ones, 1)
