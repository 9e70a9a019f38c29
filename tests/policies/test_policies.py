"""Policies: the registry, their numbers, and each in every cache against its paper in numpy."""

from __future__ import annotations

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import struct

import dms_jax
from dms_jax import cache as caches
from dms_jax import policies
from dms_jax import testing as tiny
from dms_jax.config import ModelConfig
from dms_jax.model import cached_forward, check_policy
from dms_jax.policies.periodic import Periodic
from tests import cache_driver, policy_oracle
from tests.cache_driver import fitted

NAMES = {
  "dmc", "dms", "expectedattention", "h2o", "keydiff", "kvzap", "quest", "random", "rkv", "snapkv", "streamingllm",
  "tova", "triattention", "trimkv", "vanilla", "vase",
}  # fmt: skip
KINDS = cache_driver.KINDS
LAYERS, ROWS, HEADS, GROUP, HEAD, LENGTH = cache_driver.LAYERS, cache_driver.ROWS, 2, 2, cache_driver.HEAD, 44
MARGIN = 1e-4  # relative; choices closer than this are left to the float64 oracle: another text is drawn


# The interface --------------------------------------------------------------------------------------------------------


def test_registry():
  assert policies.get("DMS") is policies.get("dms") is policies.DMS
  assert policies.REGISTRY.keys() == NAMES
  with pytest.raises(ValueError, match=r"unknown policy 'h3o'; there are \['dmc', 'dms', 'expectedattention', 'h2o'"):
    policies.get("h3o")


def positions(*shape):
  return jnp.broadcast_to(jnp.arange(shape[-1]), shape)


def test_dms_compares_with_its_threshold():
  logits = jnp.array([[[-1.0, 0.0, 0.5, 3.0]]])
  for threshold, expected in ((0.0, [0, 0, 1, 1]), (0.5, [0, 0, 0, 1]), (-2.0, [1, 1, 1, 1])):
    evict = policies.DMS(threshold=threshold).decide(logits, 0, positions(1, 1, 4))
    np.testing.assert_array_equal(evict[0, 0], np.array(expected, bool))


def test_vanilla_keeps_everything_with_and_without_gates():
  for logits in (None, jnp.full((1, 2, 3), 9.0)):
    assert not policies.Vanilla().decide(logits, 0, positions(1, 2, 3)).any()
  assert not policies.Vanilla.evicts and not policies.Vanilla.uses_gates
  assert policies.DMS.evicts and policies.DMS.uses_gates


def test_streaming_evicts_all_but_its_sinks():
  evict = policies.StreamingLLM(window=3, sinks=2).decide(None, 0, positions(1, 1, 4))
  np.testing.assert_array_equal(evict[0, 0], [False, False, True, True])


def leaving(**changes):
  """One layer, row and head; an archive of three slots, the last one dead."""
  given = (
    dict(evicted=False, tokens=20, archived=2, live=[True, True, False], score=0.5, scores=[0.7, 0.3, jnp.nan])
    | changes
  )
  array = {
    name: jnp.asarray(value).reshape((1, 1, 1, -1) if name in ("live", "scores") else (1, 1, 1))
    for name, value in given.items()
  }
  stats, archive_stats = {"score": array.pop("score")}, {"score": array.pop("scores")}
  return policies.Leaving(**{**array, "tokens": array["tokens"][0]}, stats=stats, archive_stats=archive_stats)


def test_retire_appends_what_was_not_evicted():
  for evicted in (True, False):
    retired = policies.DMS(window=1).retire(leaving(evicted=evicted))
    assert bool(retired.keep) == (not evicted) and retired.slot is None


@pytest.mark.parametrize(
  ("budget", "score", "keep", "slot"),
  [(5, 0.1, True, -1), (4, 0.5, True, 1), (4, 0.3, False, 1), (4, 0.2, False, 1), (9, 0.0, True, -1)],
)
def test_a_full_archive_gives_up_its_least(budget, score, keep, slot):
  """W = 1: `budget` - 2 tokens are archived; a tie is lost by the one that leaves."""
  retired = policies.TOVA(window=1, budget=budget).retire(leaving(score=score))
  assert (retired.keep.item(), retired.slot.item()) == (keep, slot)


def test_an_archive_without_slots_forgets():
  empty = leaving(archived=0, live=jnp.zeros(0, bool), scores=jnp.zeros(0))
  for score in (0.5, jnp.inf):
    retired = policies.H2O(window=1, budget=2).retire(empty.replace(stats={"score": jnp.full((1, 1, 1), score)}))
    assert not retired.keep.any()


def test_numbers_are_leaves_and_the_window_is_a_shape():
  policy = policies.DMS(window=8, threshold=0.5)
  assert jax.tree.leaves(policy) == [0.5]
  assert jax.tree.structure(policy) == jax.tree.structure(policies.DMS(window=8, threshold=3.0))
  assert jax.tree.structure(policy) != jax.tree.structure(policies.DMS(window=9, threshold=0.5))
  assert jax.tree.leaves(policies.H2O(window=8, budget=64)) == [64]
  assert jax.tree.leaves(policies.Quest(cr=4.0)) == [4.0, 2]
  with pytest.raises(AttributeError):
    policy.threshold = 1.0


@pytest.mark.parametrize(
  ("policy", "window"),
  [
    (policies.H2O(budget=64), 31), (policies.H2O(budget=64, window=7), 7), (policies.H2O(cr=4.0, window=7), 7),
    (policies.H2O(cr=4.0), 0), (policies.H2O(budget=np.int32(9)), 4), (policies.VaSE(cr=4.0), 63),
    (policies.TOVA(budget=64), 0), (policies.Random(cr=2.0), 0), (policies.StreamingLLM(budget=64), 59),
    (policies.StreamingLLM(window=9, sinks=0), 9), (policies.Quest(budget=64), 15), (policies.Quest(cr=8.0, page=4), 3),
    (policies.Vanilla(), 0), (policies.DMS(), 5),
  ],
)  # fmt: skip
def test_open_windows_are_filled_in(policy, window):
  resolved = check_policy(tiny.model(gates=tiny.dms()), policy)
  assert resolved.window == window
  again = (
    check_policy(tiny.model(gates=tiny.dms()), resolved) if not isinstance(policy, policies.StreamingLLM) else resolved
  )
  assert again == resolved


@pytest.mark.parametrize(
  ("policy", "message"),
  [
    (policies.H2O(), "H2O: give either budget="), (policies.TOVA(budget=8, cr=2.0), "TOVA: give either budget="),
    (policies.H2O(cr=0.5), "cr=0.5 must be 1"), (policies.H2O(budget=4, window=9), "budget=4 tokens must be 10"),
    (policies.KeyDiff(cr=float("nan")), "cr=nan must be a finite"), (policies.TOVA(budget=9.7), "must be whole"),
    (policies.SnapKV(budget="9"), "=9 tokens must be a finite"), (policies.TOVA(budget=2**40), "whole, and"),
    (policies.TOVA(budget=9, window=2.5), "window=2.5 must"), (policies.SnapKV(budget=99, pool=3.0), "pool=3.0 must"),
    (policies.H2O(budget=np.array([8, 0])), "must be 1 or more"),
    (policies.RKV(budget=9, buffer=0), "buffer=0 must be a whole"),
    (policies.RKV(budget=9, pool=4), "pool=4 must be an odd"),
    (policies.RKV(budget=9, importance=1.5), "importance=1.5 must be from"),
    (policies.VaSE(budget=80, large=2.0), "large=2.0 must be"), (policies.VaSE(budget=8), "budget=8 tokens must be 64"),
    (policies.TriAttention(budget=8), "give calibration=FILE"),
    (policies.TriAttention(calibration="none.npz"), "no such file"),
    (policies.ExpectedAttention(budget=8, future=0), "future=0 must be a whole number"),
    (policies.ExpectedAttention(budget=8, future=2**31 - 1), "future=2147483647 must be a whole number, from 1 to 107"),
    (policies.RKV(budget=9, buffer=2**30), "buffer=1073741824 must be a whole number, from 1 to 1073741823"),
    (policies.Random(budget=9, seed=2**31), "Random: seed=2147483648 must be at most 2147483647"),
    (policies.TOVA(budget=0), "budget=0 tokens must be 1"), (policies.Random(cr=0.5), "cr=0.5 must be 1"),
    (policies.StreamingLLM(), "give either window="), (policies.StreamingLLM(budget=4), "more than its sinks=4"),
    (policies.StreamingLLM(window=1, sinks=-1), "sinks=-1"), (policies.Quest(budget=20), "budget=20 tokens must be 32"),
    (policies.Quest(cr=2.0, window=3), "whole pages of 16"), (policies.Quest(cr=2.0, page=0), "page=0"),
    (policies.TOVA(budget=4, window=-1), "window=-1"), (policies.DMS(), "needs eviction gates"),
  ],
)  # fmt: skip
def test_numbers_that_make_no_sense(policy, message):
  with pytest.raises(ValueError, match=message):
    check_policy(tiny.model(), policy)


@pytest.mark.parametrize(
  "policy",
  [
    policies.H2O(budget=20, window=7),
    policies.TOVA(cr=3.3),
    policies.Random(cr=1.0, window=4),
    policies.RKV(budget=20, buffer=7, exact_prefill=True),
    policies.RKV(cr=3.3, buffer=5, exact_prefill=True),
    policies.StreamingLLM(window=6, sinks=3),
    policies.Vanilla(),
  ],
)
def test_reach_is_the_inverse_of_capacity(policy):
  """What `reach` promises fits: for ever where the need does not grow; of a ratio at most two tokens are missed."""
  tokens = jnp.arange(1, 400)
  need = np.asarray(policy.capacity(tokens))
  assert (need <= tokens).all() and (np.diff(need) >= 0).all()
  for slots in range(policy.window + 1, 60):
    reach = int(policy.reach(slots))
    fits = int(np.asarray(tokens)[need <= slots].max())
    assert reach >= slots and (fits == 399 if reach >= 399 else fits - 2 <= reach <= fits)


# Against numpy --------------------------------------------------------------------------------------------------------


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
    case policies.KeyDiff():
      options = dict(window=policy.window, capacity=lambda n: int(policy.capacity(n)))
      return policy_oracle.budgeted(q, k, [(1, False)] * len(q), rescore=policy_oracle.key_similarity(k), **options)
    case policies.Quest():
      budget = lambda t: policy.budget if policy.budget is not None else math.ceil((t + 1) / policy.cr)
      pages = lambda t: max((budget(t) - policy.window - 1) // policy.page, 1)
      options = dict(page=policy.page, pages=pages, window=policy.window)
      return policy_oracle.quest(q, k, dense=layer < policy.dense_layers, **options)
    case Periodic():
      return policy_oracle.by_policy(policy, layer, q, k, v, [(1, None)] * len(q))
  raise NotImplementedError(policy)


CASES = {
  "vanilla": policies.Vanilla(window=3),
  "streaming": policies.StreamingLLM(window=6, sinks=3),
  "streaming-0": policies.StreamingLLM(window=0, sinks=1),
  "tova": policies.TOVA(budget=9),
  "tova-layer": policies.TOVA(budget=9, per_layer=True),
  "tova-cr": policies.TOVA(cr=3.0),
  "tova-1": policies.TOVA(budget=1),
  "h2o": policies.H2O(budget=12, window=5),
  "h2o-cr": policies.H2O(cr=2.5, window=4),
  "h2o-0": policies.H2O(budget=6, window=5),
  "keydiff": policies.KeyDiff(budget=10),
  "random": policies.Random(budget=11, window=3, seed=5),
  "random-sinks": policies.Random(budget=9, window=0, seed=2**31 - 1, sinks=2),
  "quest": policies.Quest(window=3, page=4, budget=16, dense_layers=1),
  "quest-cr": policies.Quest(window=7, page=4, cr=2.0, dense_layers=0),
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
    runs, out = {}, np.zeros(text.q.shape)
    for l, b in np.ndindex(LAYERS, ROWS):
      q, k, v = (x[l, b].astype(float) for x in (text.q, text.k, text.v))
      q = q.reshape(LENGTH, HEADS, GROUP, HEAD)
      runs[l, b] = by_papers(policy, l, q, k, v)
      out[l, b] = policy_oracle.attend(q, k, v, runs[l, b]).reshape(out[l, b].shape)
    if min(run.margin for run in runs.values()) > MARGIN:
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


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("case", CASES)
def test_policy_is_its_paper(case, kind):
  """Attention, tokens held, slots and reads after every step; rows pause at random and end at different lengths.

  The cache has no slot more than the policy says it needs.
  """
  policy, (text, runs, expected), rng = CASES[case], drawn(case), np.random.default_rng(1)
  cache, start, ends = create(kind, policy), np.zeros(ROWS, int), np.array([LENGTH, LENGTH // 2, LENGTH - 5])
  while (start < ends).any():
    lengths = ((rng.random(ROWS) < 0.8) & (start < ends)).astype(int)
    out, seen, stalled, cache = feed(policy, cache, text, start, lengths, 1)
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
    out, seen, stalled, cache = feed(policy, cache, text, start, lengths, width)
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
  with pytest.raises(ValueError, match=r"TOVA needs the statistics \['score'\], but the cache stores \[\]"):
    create(kind, policies.Vanilla()).plan(CASES["tova"], ones, 1)
  with pytest.raises(ValueError, match=r"Vanilla needs the statistics \[\], but the cache stores \['score'\]"):
    create(kind, CASES["tova"]).plan(policies.Vanilla(), ones, 1)
  with pytest.raises(ValueError, match="window=3, but the cache has window=0"):
    create(kind, policies.Vanilla()).plan(CASES["quest"], ones, 1)
  with pytest.raises(ValueError, match="one token at a time, and here are 4"):
    exact = CASES["tova"].replace(exact_prefill=True)
    create(kind, exact).plan(exact, ones, 4)
  if kind == "contiguous":
    with pytest.raises(ValueError, match="Quest selects pages of 4 slots, the cache has 0"):
      create(kind, policies.Vanilla(window=3)).plan(CASES["quest"], ones, 1)


# Through the model ----------------------------------------------------------------------------------------------------

GENERATED = {
  "streaming": policies.StreamingLLM(window=5, sinks=2),
  "tova": policies.TOVA(budget=10, exact_prefill=True),
  "h2o": policies.H2O(budget=10, exact_prefill=True),
  "h2o-cr": policies.H2O(cr=2.0, window=5, exact_prefill=True),
  "random": policies.Random(budget=10, window=3, exact_prefill=True),
  "quest": policies.Quest(budget=12, page=4, dense_layers=1),
}


@pytest.mark.parametrize("case", [c if c == "tova" else pytest.param(c, marks=pytest.mark.slow) for c in GENERATED])
def test_generation(case):
  """Both caches agree; a head never holds more than the budget; a chunked prompt is as one read token by token."""
  policy = GENERATED[case]
  model = tiny.model(gates=tiny.dms() if case in ("streaming", "tova") else None)  # which are not asked
  prompts = [tiny.tokens(model.config, 1, n, seed=n)[0].tolist() for n in (23, 9, 1)]
  run = functools.partial(
    dms_jax.generate, model, prompts, policy=policy, max_new_tokens=12, eos=False, decode_block=6, history=True
  )
  slots, masked = run(prefill_chunk=8), run(prefill_chunk=8, cache="masked")
  assert slots.tokens == masked.tokens
  np.testing.assert_allclose(slots.logprobs, masked.logprobs, atol=2e-5)
  for name in ("live", "decode_reads", "prompt_reads", "history"):
    np.testing.assert_array_equal(getattr(slots.metrics, name), getattr(masked.metrics, name))
  if case != "quest":  # whose single tokens select, and whose prompts are read densely
    single = run(prefill_chunk=1)
    assert slots.tokens == single.tokens
    np.testing.assert_array_equal(slots.metrics.live, single.metrics.live)
    np.testing.assert_array_equal(slots.metrics.prompt_reads, single.metrics.prompt_reads)
  resolved = slots.conversation.policy
  bound = np.asarray(resolved.capacity(jnp.asarray(slots.metrics.seen, jnp.int32)))
  assert (slots.metrics.live.max(axis=(0, 2)) <= bound).all() and (slots.metrics.peak <= bound).all()
  if resolved.bounded:
    np.testing.assert_array_equal(slots.metrics.live, np.broadcast_to(bound[:, None], slots.metrics.live.shape))
    capacity = int(resolved.capacity(23 + 12))
    assert run(prefill_chunk=8, capacity=capacity).tokens == slots.tokens
    with pytest.raises(ValueError, match=f"capacity={capacity - 1} is too small"):
      run(capacity=capacity - 1)
  more = dms_jax.generate(model, continue_from=slots, max_new_tokens=5, eos=False)  # under the same policy
  whole = run(max_new_tokens=17, prefill_chunk=8)
  assert [a + b for a, b in zip(slots.tokens, more.tokens, strict=True)] == whole.tokens


def test_a_conversation_keeps_to_its_policy():
  model = tiny.model()
  held = dms_jax.generate(model, [[1, 2, 3]], policy=policies.TOVA(budget=4), max_new_tokens=3)
  with pytest.raises(ValueError, match="held under TOVA cannot go on under Vanilla"):
    dms_jax.generate(model, [[4]], policy=policies.Vanilla(), continue_from=held)
  wider = dms_jax.generate(model, [[4] * 9], policy=policies.TOVA(budget=8), continue_from=held, max_new_tokens=3)
  assert (wider.metrics.live == 8).all()


def test_a_chunk_without_room_is_left_out_whole():
  model, policy = tiny.model(), policies.TOVA(budget=30)
  cache = caches.create("contiguous", model.config, batch=2, capacity=10, policy=policy, lag=1)
  take = jax.jit(cached_forward)
  tokens = tiny.tokens(model.config, 2, 8)
  out, cache = take(model, policy, cache, tokens, jnp.array([8, 2]))
  out, cache = take(model, policy, cache, tokens, jnp.array([3, 8]))
  assert out.stalled.tolist() == [True, False] and out.lengths.tolist() == [0, 8] and cache.seen.tolist() == [8, 10]


@pytest.mark.parametrize("name", ["h2o", "quest", "rkv"])
def test_a_decode_step_copies_no_cache(name):
  """Scores and summaries ride along: temporaries stay below 2 % of a cache of 8 rows of 8,192 slots.

  Pruning takes the space of six of the 16 layers, one layer at a time, whether layers are stacked or a list.
  """
  layers = 16 if name == "rkv" else 8
  cfg = tiny.config(num_layers=layers, d_model=64, d_ff=64, num_heads=8, num_kv_heads=4, head_dim=64)
  model = tiny.model(cfg).unstacked() if name == "rkv" else tiny.model(cfg)
  policy = {
    "h2o": policies.H2O(budget=8192, window=255), "quest": policies.Quest(budget=1024),
    "rkv": policies.RKV(budget=4096),
  }[name]  # fmt: skip
  policy = check_policy(model, policy)
  make = functools.partial(caches.create, "contiguous", cfg, batch=8, capacity=8192, policy=policy, lag=1)
  cache = jax.eval_shape(make)
  tokens, lengths = jax.ShapeDtypeStruct((8, 1), jnp.int32), jax.ShapeDtypeStruct((8,), jnp.int32)
  compiled = jax.jit(cached_forward, donate_argnums=2).lower(model, policy, cache, tokens, lengths).compile()
  memory, size = compiled.memory_analysis(), cache.kv.size * cache.kv.dtype.itemsize
  share = 6 / 16 if name == "rkv" else 0.02
  assert memory.temp_size_in_bytes < share * size, f"{memory.temp_size_in_bytes:,} bytes beside a cache of {size:,}"
  assert memory.alias_size_in_bytes >= size
