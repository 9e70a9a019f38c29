"""Prompts in chunks under policies that compact: every cache against plain numpy, step by step."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import struct

import dms_jax
from dms_jax import cache as caches
from dms_jax import policies
from dms_jax import testing as tiny
from dms_jax.attention import write_pages
from dms_jax.cache import paged, pruning
from dms_jax.cache.compact import moves
from dms_jax.config import ModelConfig
from dms_jax.execution import override
from dms_jax.model import cached_forward
from tests import cache_driver, policy_oracle
from tests.cache_driver import HEAD, KINDS, LAYERS, ROWS, fitted
from tests.programs import step

HEADS, GROUP, PROMPT, LENGTH = 2, 2, 34, 46
MARGIN = 1e-4  # relative; choices closer than this are left to the float64 oracle: another text is sampled


CASES = {
  "h2o": policies.H2O(budget=12, window=5),
  "h2o-cr": policies.H2O(cr=2.5, window=4),
  "h2o-all-window": policies.H2O(budget=6, window=5),
  "tova": policies.TOVA(budget=9),
  "tova-1": policies.TOVA(budget=1),
  "tied": policies.TOVA(budget=9),  # queries of 0 attend to all tokens alike: the later token goes
  "tova-cr": policies.TOVA(cr=3.0),
  "tova-layer": policies.TOVA(budget=9, per_layer=True),
  "keydiff": policies.KeyDiff(budget=10),
  "keydiff-window": policies.KeyDiff(budget=11, window=3),
  "keydiff-cr": policies.KeyDiff(cr=2.5, window=3),
  "snapkv": policies.SnapKV(budget=14, window=4, pool=5),
  "snapkv-one": policies.SnapKV(budget=9, window=0, pool=1),
  "snapkv-all-window": policies.SnapKV(budget=6, window=5, pool=3),
  "snapkv-cr": policies.SnapKV(cr=2.0, window=3, pool=3),
  "rkv": policies.RKV(budget=12, buffer=4, window=3, pool=3, importance=0.3),
  "rkv-cr": policies.RKV(cr=2.5, buffer=3, window=2, pool=5, threshold=0.8),
  "rkv-all-window": policies.RKV(budget=4, buffer=2, window=3),
  "h2o-half": policies.H2O(cr=2.5, window=0, halves=True),
  "expected": fitted(policies.ExpectedAttention(budget=12, buffer=4, sinks=2, future=20, epsilon=0.02)),
  "expected-mean": fitted(policies.ExpectedAttention(cr=2.5, buffer=3, sinks=0, covariance=False, window=2)),
  "tri": fitted(policies.TriAttention(budget=12, buffer=4, furthest=40)),
  "vase": policies.VaSE(budget=12, buffer=4, window=3, seed=3, sinks=1),
  "vase-cr": policies.VaSE(cr=2.0, buffer=3, window=2, large=0.9),
}
# Every cache for each method; the variants of its numbers in one cache, and in all of them at length.
EVERYWHERE = [
  pytest.param(case, kind, marks=[pytest.mark.slow] * (("-" in case or case == "tied") and kind != "contiguous"))
  for case in CASES
  for kind in KINDS
]


def events_of(seed):
  """Steps (width, lengths [B], remaining [B]): each row's prompt in uneven chunks, then decode steps; rows pause."""
  rng, start, steps = np.random.default_rng(seed), np.zeros(ROWS, int), []
  prompts = np.array([PROMPT, PROMPT - 9, 3])
  while (start < prompts).any():
    width = int(rng.choice([1, 13]))  # each is a program
    lengths = np.where(rng.random(ROWS) < 0.2, 0, rng.integers(1, width + 1, ROWS))
    lengths = np.minimum(lengths, prompts - start)
    start = start + lengths
    steps.append((width, lengths, prompts - start))
  for _ in range(LENGTH - PROMPT):
    steps.append((1, (rng.random(ROWS) < 0.8).astype(int), None))
  return prompts, steps


def by_paper(policy, layer, q, k, v, events, prompt):
  if isinstance(policy, policies.SnapKV):
    budget = policy.budget if policy.budget is not None else -(-prompt // policy.cr)
    return policy_oracle.snapkv(q, k, prompt=prompt, window=policy.window, budget=int(budget), pool=policy.pool)
  return policy_oracle.by_policy(policy, layer, q, k, v, events)


@functools.cache
def sampled(case):
  """(text, prompts, steps, oracle's runs by (layer, row), attended [L, B, T, N, H]), without near ties."""
  policy, shape = CASES[case], cache_driver.Shape(0, 0, HEADS, GROUP, 2, LENGTH)
  for seed in range(30):
    text, (prompts, steps) = cache_driver.Text.draw(shape, np.random.default_rng(seed), 0.0), events_of(seed)
    if case == "tied":
      text.q[:] = 0
    runs, out = {}, np.zeros(text.q.shape)
    for l, b in np.ndindex(LAYERS, ROWS):
      events = [(int(n[b]), None if left is None else int(left[b])) for _, n, left in steps if n[b]]
      total = sum(n for n, _ in events)
      q, k, v = (x[l, b, :total].astype(float) for x in (text.q, text.k, text.v))
      q = q.reshape(total, HEADS, GROUP, HEAD)
      runs[l, b] = by_paper(policy, l, q, k, v, events, int(prompts[b]))
      out[l, b, :total] = policy_oracle.attend(q, k, v, runs[l, b]).reshape(total, HEADS * GROUP, HEAD)
    if case == "tied" or min(run.margin for run in runs.values()) > MARGIN:
      return text, prompts, steps, runs, out
  raise AssertionError(f"{case}: near ties in every text")


def create(kind, policy):
  config = ModelConfig(num_layers=LAYERS, num_heads=HEADS * GROUP, num_kv_heads=HEADS, head_dim=HEAD, d_model=8, d_ff=8)
  capacity = LENGTH if kind == "masked" else int(policy.capacity(LENGTH))
  options = {"page_size": 4, "longest": LENGTH} if kind == "paged" else {}
  return caches.create(kind, config, batch=ROWS, capacity=capacity, policy=policy, lag=1, **options)


def feed(policy, cache, text, start, width, lengths, remaining):
  """One step; the padding is NaN, and so is what dead slots hold."""
  *rest, _, lengths = cache_driver.inputs(text, start, lengths, width)
  evict = jnp.zeros((LAYERS, ROWS, HEADS, width), bool)
  remaining = None if remaining is None else jnp.asarray(remaining, jnp.int32)
  return cache_driver.step(cache_driver.poison(cache), policy, *rest, evict, lengths, remaining)


@pytest.mark.parametrize(("case", "kind"), EVERYWHERE)
def test_chunks_are_the_paper(case, kind):
  """Attention, tokens held, slots and reads after every chunk and decode step; the cache has no slot to spare."""
  policy, (text, prompts, steps, runs, expected) = CASES[case], sampled(case)
  cache, start = create(kind, policy), np.zeros(ROWS, int)
  for width, lengths, remaining in steps:
    *found, cache = feed(policy, cache, text, start, width, lengths, remaining)
    out, usage, stalled = jax.device_get(found)
    assert not stalled.any()
    live, end = np.asarray(cache.live()), start + lengths
    positions = cache_driver.held(cache) if kind != "masked" else None
    for l, b, h in np.ndindex(LAYERS, ROWS, HEADS):
      if not lengths[b]:
        continue
      run, now, group = runs[l, b], slice(start[b], end[b]), slice(h * GROUP, (h + 1) * GROUP)
      np.testing.assert_allclose(out[l, b, : lengths[b], group], expected[l, b, now, group], atol=2e-6, rtol=2e-6)
      assert int(usage.reads[l, b, h]) == sum(len(tokens) for tokens in run.read[h][now])
      held = run.held[h][end[b] - 1]
      if isinstance(policy, policies.SnapKV) and end[b] == prompts[b] < len(run.held[h]):
        held = run.held[h][end[b]] - {end[b]}  # after the compaction
      if not (isinstance(policy, policies.SnapKV) and end[b] == prompts[b] == len(run.held[h])):
        assert int(usage.live[l, b, h]) == live[l, b, h] == len(held)
        assert positions is None or sorted(positions[l, b, h]) == sorted(held)
    start = end


@pytest.mark.parametrize("kind", ["contiguous", pytest.param("masked", marks=pytest.mark.slow)])
def test_a_short_later_prompt_is_a_window_of_its_own(kind):
  """A prompt of fewer than W + 1 tokens cuts by its own queries alone; those of earlier turns have had their say."""
  policy, first, second, end = policies.SnapKV(budget=9, window=4, pool=1), 14, 18, 20
  shape = cache_driver.Shape(0, 0, HEADS, GROUP, 2, end)
  text, cache, start = cache_driver.Text.draw(shape, np.random.default_rng(1), 0.0), create(kind, policy), 0
  for width, lengths, remaining in [(first, first, 0), *[(1, 1, None)] * (second - first), (1, 1, 1), (1, 1, 0)]:
    if start == second:
      before = cache
    left = None if remaining is None else np.full(ROWS, remaining)
    *_, cache = feed(policy, cache, text, np.full(ROWS, start), width, np.full(ROWS, lengths), left)
    start += lengths
  held = lambda c: positions_of(c) if kind == "masked" else cache_driver.held(c)
  was, now = held(before), held(cache)
  for l, b, h in np.ndindex(LAYERS, ROWS, HEADS):
    tokens = sorted(was[l, b, h])
    votes = np.zeros(end)
    for t in range(second, end):
      tokens.append(t)
      q = text.q[l, b, t, h * GROUP : (h + 1) * GROUP].astype(float)
      votes[tokens] += policy_oracle.softmax(q @ text.k[l, b, tokens, h].T / HEAD**0.5).mean(axis=0)
    outside = [j for j in tokens if j < end - 5]
    kept = sorted(outside, key=lambda j: (-votes[j], j))[:4]
    assert len(outside) > 4
    assert sorted(now[l, b, h]) == sorted([*kept, *range(end - 5, end)])


def positions_of(cache):
  """`cache_driver.held` of a masked cache."""
  position, newest = np.arange(cache.slots), np.asarray(cache.seen)[:, None, None] - 1
  visible = (~np.asarray(cache.evicted) | (newest - position <= cache.window)) & (position <= newest)
  return {index: np.flatnonzero(visible[index]).tolist() for index in np.ndindex(visible.shape[:3])}


def test_later_turns_pool_neighbours_of_the_text():
  """Three turns under SnapKV: archives stay in the order of the text, so the same neighbours are pooled everywhere."""
  policy = policies.SnapKV(budget=14, window=2, pool=5)
  shape = cache_driver.Shape(0, 0, HEADS, GROUP, 2, LENGTH)
  text, held = cache_driver.Text.draw(shape, np.random.default_rng(3), 0.0), {}
  prompt = [(13, 13, 0), *[(1, 1, None)] * 2]
  for kind in ("masked", "paged"):
    cache, start = create(kind, policy), 0
    for width, lengths, remaining in 3 * prompt:
      left = None if remaining is None else np.full(ROWS, remaining)
      *_, cache = feed(policy, cache, text, np.full(ROWS, start), width, np.full(ROWS, lengths), left)
      start += lengths
    held[kind] = positions_of(cache) if kind == "masked" else cache_driver.held(cache)
  for index, positions in held["masked"].items():
    assert sorted(held["paged"][index]) == positions
    assert held["paged"][index][3:] == sorted(held["paged"][index][3:])


@pytest.mark.parametrize("case", ["h2o", "snapkv"])
def test_writes_into_pages_are_in_the_order_promised(case, monkeypatch):
  """An implementation that relies on slots without gaps, as on TPUs, writes the same."""

  def relying(pool, table, slots, rows, *, in_order=True):
    if in_order:
      inside = (slots >= 0) & (slots < table.shape[-1] * pool.shape[1])
      first = jnp.min(jnp.where(inside, slots, 2**30), axis=-1, keepdims=True)
      slots = jnp.where(inside, first + jnp.cumsum(inside, axis=-1) - 1, -1)
    return write_pages(pool, table, slots, rows, in_order=False)

  monkeypatch.setattr(paged, "write_pages", relying)
  monkeypatch.setattr(cache_driver, "step", jax.jit(cache_driver.step.__wrapped__, compiler_options=tiny.QUICK))
  test_chunks_are_the_paper(case, "paged")


@pytest.mark.parametrize(
  ("case", "kind"),
  [
    pytest.param(case, kind, marks=[pytest.mark.slow] * (case in ("tri", "vase") and kind != "contiguous"))
    for case in ("h2o", "keydiff", "snapkv", "rkv", "expected", "tri", "vase")
    for kind in KINDS
  ],
)
def test_a_row_does_not_depend_on_its_neighbours(case, kind):
  """Bit for bit, whatever other rows hold and whether they take part.

  Under a policy that prunes, other rows are due in steps in which this one is not.
  """
  policy, (text, _, steps, *_) = CASES[case], sampled(case)
  alone, together, start = create(kind, policy), create(kind, policy), np.zeros(ROWS, int)
  unlike = 0
  for width, lengths, remaining in steps:
    if policy.prunes and remaining is None:
      due = np.asarray(policy.due(together.seen, together.live())) & (lengths > 0)
      unlike += due.any() and not due[1]
    only = np.where(np.arange(ROWS) == 1, lengths, 0)
    first, *_, alone = feed(policy, alone, text, start, width, only, remaining)
    second, *_, together = feed(policy, together, text, start, width, lengths, remaining)
    np.testing.assert_array_equal(first[:, 1, : lengths[1]], second[:, 1, : lengths[1]])
    np.testing.assert_array_equal(alone.live()[:, 1], together.live()[:, 1])
    start = start + lengths
  assert unlike or not policy.prunes


def test_random_holds_the_same_however_it_is_read():
  """Its scores never change, so the order of cuts does not matter."""
  policy = policies.Random(budget=11, window=3, seed=5)
  shape = cache_driver.Shape(0, 0, HEADS, GROUP, 2, LENGTH)
  text, (_, steps) = cache_driver.Text.draw(shape, np.random.default_rng(0), 0.0), events_of(0)
  cache, start = create("contiguous", policy), np.zeros(ROWS, int)
  for width, lengths, remaining in steps:
    *_, cache = feed(policy, cache, text, start, width, lengths, remaining)
    start = start + lengths
  held = cache_driver.held(cache)
  for l, b, h in np.ndindex(LAYERS, ROWS, HEADS):
    run = policy_oracle.random(
      np.zeros((start[b], HEADS, GROUP, HEAD)),
      np.zeros((start[b], HEADS, HEAD)),
      seed=5,
      layer=l,
      sinks=0,
      budget=11,
      window=3,
    )
    assert sorted(held[l, b, h]) == sorted(run.held[h][-1])


MOVES = jax.jit(moves, static_argnums=(1, 2))


@pytest.mark.parametrize("in_order", [False, True])
@pytest.mark.parametrize("seed", range(20))
def test_moves(seed, in_order):
  """Tokens that stay fill the first slots, each goes to one; archived ones keep theirs if it is among them, or all
  their order."""
  rng = np.random.default_rng(seed)
  slots, entering = int(rng.choice([0, 3, 8])), int(rng.choice([1, 8]))  # each pair is a program
  archived = int(rng.integers(0, slots + 1))
  exists = np.concatenate([np.arange(slots) < archived, np.ones(entering, bool)])
  stays = exists & (rng.random(slots + entering) < rng.random())
  if stays.sum() > slots:
    stays[np.flatnonzero(stays)[slots:]] = False
  out = MOVES(stays[None, None], slots, in_order)
  target, count = np.asarray(out.target)[0, 0], int(out.archived[0, 0])
  assert count == stays.sum()
  place = np.where(
    target < slots, target, np.where(np.arange(slots + entering) < slots, np.arange(slots + entering), slots)
  )
  ends = place[stays]
  assert sorted(ends) == list(range(count))
  assert (target[~stays] == slots).all()
  if in_order:
    assert list(ends) == list(range(count))
    assert not np.any(np.diff(target[target < slots]) != 1)
    return
  kept = stays[:slots] & (np.arange(slots) < count)
  assert (target[:slots][kept] == slots).all()


@struct.dataclass
class _ByNorm(policies.Policy):
  """Evicts tokens whose key is short: a policy whose decisions see keys."""

  uses_keys = True

  def decide(self, logits, layer, position, keys=None):
    return jnp.linalg.norm(keys.astype(jnp.float32), axis=-1) < 1.8


@pytest.mark.parametrize("kind", KINDS)
def test_decisions_that_see_keys(kind):
  """The key of the token that computes a decision: in chunks and single steps, the same tokens are held."""
  model = tiny.model()
  policy = _ByNorm(window=3)
  tokens, held = np.asarray(tiny.tokens(model.config, 2, 24)), []
  for width in (24, 8, 1):
    cache = caches.create(kind, model.config, batch=2, capacity=24, policy=policy, lag=0)
    for start in range(0, 24, width):
      _, cache = step(model, policy, cache, tokens[:, start : start + width], np.full(2, width, np.int32))
    held.append(np.asarray(cache.live()))
  assert (held[0] < 24).sum() >= 3
  for other in held[1:]:
    np.testing.assert_array_equal(held[0], other)


@pytest.mark.parametrize(
  ("numbers", "make"),
  [
    ((-1.0, 0.0, 3.0), lambda x: policies.DMS(window=3, threshold=x)),
    ((2.0, 3.0, 5.0), lambda x: policies.KeyDiff(cr=x, window=1)),
    ((6, 9, 13), lambda x: policies.RKV(budget=x, buffer=x - 3, importance=x / 20, threshold=x / 20, window=1)),
    *(
      pytest.param(numbers, make, marks=pytest.mark.slow)
      for numbers, make in (
        ((6, 9, 20), lambda x: policies.TOVA(budget=x, window=0)),
        ((2.0, 3.0, 5.0), lambda x: policies.H2O(cr=x, window=0, halves=True)),
      )
    ),
  ],
)
def test_numbers_may_be_one_a_row(numbers, make):
  """Thresholds and budgets [B]: each row is bit-equal to a batch in which all rows have its number."""
  model = tiny.model(gates=tiny.dms(window=3))
  tokens = np.asarray(tiny.tokens(model.config, 3, 30))

  def read(policy):
    cache = caches.create("contiguous", model.config, batch=3, capacity=40, policy=policy, lag=1)
    out, cache = step(model, policy, cache, tokens[:, :20], np.full(3, 20, np.int32))
    hidden = [out.hidden]
    for t in range(20, 30):
      out, cache = step(model, policy, cache, tokens[:, t : t + 1], np.ones(3, np.int32))
      hidden.append(out.hidden)
    return np.concatenate(hidden, axis=1), np.asarray(cache.live())

  hidden, live = read(make(jnp.asarray(numbers)))
  for row, number in enumerate(numbers):
    alone, held = read(make(jnp.full(3, number)))
    np.testing.assert_array_equal(hidden[row], alone[row])
    np.testing.assert_array_equal(live[:, row], held[:, row])
  assert len({x.tobytes() for x in np.moveaxis(live, 1, 0)}) == 3


@pytest.mark.parametrize("kind", ["contiguous", "paged"])
def test_rows_are_cut_a_few_at_a_time(kind, monkeypatch):
  """In copies of five layers of rows, with as many archive slots as they need and their own numbers, as all at once."""
  model, active = tiny.model(), np.array([True, True, True, True, True, False])
  policy = policies.RKV(budget=jnp.array([6, 9, 15, 30, 7, 6]), buffer=4, window=2)
  cache = caches.create(kind, model.config, batch=6, capacity=100, policy=policy, lag=1)
  tokens, lengths = np.asarray(tiny.tokens(model.config, 6, 20)), np.full(6, 20, np.int32)
  _, cache = jax.jit(cached_forward)(model, policy, cache, tokens, lengths, remaining=np.ones(6, np.int32))

  def cut(together, narrow):
    monkeypatch.setattr(pruning, "LEAST", together)
    monkeypatch.setattr(pruning, "LEAST_WIDTH", narrow)
    widths = pruning.widths(cache)
    return jax.jit(lambda cache: cache.prune(policy, active))(cache), widths

  with override(small_cuts=False):
    whole, all_slots = cut(1000, 1000)
  with override(small_cuts=True):
    parts, widths = cut(5, 2)
  assert len(all_slots) == 1 and 20 - 3 <= widths[-2] < widths[-1] == all_slots[0]
  held = np.broadcast_to(np.array([6, 9, 15, 20, 7, 20])[:, None], whole.live().shape)
  np.testing.assert_array_equal(whole.live(), held)
  jax.tree.map(np.testing.assert_array_equal, parts, whole)


GENERATED = {
  "snapkv": policies.SnapKV(budget=12, window=3, pool=3),
  "keydiff": policies.KeyDiff(budget=10),
  "h2o": policies.H2O(budget=10),
  "rkv": policies.RKV(budget=10, buffer=4, window=3),
  "expected": policies.ExpectedAttention(budget=8, buffer=4, sinks=1),
  "vase": policies.VaSE(budget=10, buffer=4, window=3, sinks=1),
}


@pytest.mark.parametrize(
  "case", [c if c in ("snapkv", "rkv") else pytest.param(c, marks=pytest.mark.slow) for c in GENERATED]
)
def test_generation(case):
  """All caches agree through `generate`, rows apart from one another, whatever the chunks where the paper has none."""
  policy, model = GENERATED[case], tiny.model()
  prompts = [tiny.tokens(model.config, 1, n, seed=n).tolist()[0] for n in (23, 9, 2)]
  settings = dict(policy=policy, max_new_tokens=12, eos=False, decode_block=6, capacity=40)  # one: one program
  run = functools.partial(dms_jax.generate, model, prompts, **settings)
  results = [run(prefill_chunk=8, cache=kind) for kind in ("contiguous", "masked", "paged")]
  for other in results[1:]:
    assert results[0].tokens == other.tokens
    np.testing.assert_array_equal(results[0].metrics.live, other.metrics.live)
  for row, prompt in enumerate(prompts):
    alone = dms_jax.generate(model, [prompt], prefill_chunk=8, cache="contiguous", **settings)
    assert alone.tokens[0] == results[0].tokens[row]
  if case not in ("keydiff", "h2o"):  # its prompt is read densely, so the chunking changes nothing
    single = run(prefill_chunk=1, cache="contiguous")
    assert single.tokens == results[0].tokens
  if case == "snapkv":
    assert results[0].metrics.live.max() == 12 + 11


def test_exact_prefill_reads_one_by_one():
  """The prompt is decoded token by token: the same as a chunk of one through decode steps."""
  model, policy = tiny.model(), policies.TOVA(budget=7, exact_prefill=True)
  prompts = [tiny.tokens(model.config, 1, n, seed=n).tolist()[0] for n in (23, 9)]
  run = functools.partial(dms_jax.generate, model, prompts, policy=policy, max_new_tokens=6, eos=False, decode_block=6)
  one, eight = run(prefill_chunk=1), run(prefill_chunk=8)
  assert one.tokens == eight.tokens
  np.testing.assert_array_equal(one.metrics.prompt_reads, eight.metrics.prompt_reads)


@pytest.mark.slow
def test_numbers_of_rows_in_generate():
  """One number a row: as if each row ran under its own."""
  model, budgets = tiny.model(), (5, 9)
  prompts = [tiny.tokens(model.config, 1, n, seed=n).tolist()[0] for n in (23, 9)]
  for make in (lambda x: policies.SnapKV(budget=x, window=2), lambda x: policies.TOVA(budget=x)):
    run = lambda budget, make=make: dms_jax.generate(
      model, prompts, policy=make(budget), max_new_tokens=3, eos=False, prefill_chunk=8
    )
    rows = run(np.asarray(budgets))
    for row, budget in enumerate(budgets):
      alone = run(budget)
      assert rows.tokens[row] == alone.tokens[row]
      np.testing.assert_array_equal(rows.metrics.live[:, row], alone.metrics.live[:, row])
    assert rows.metrics.live[:, 0].max() < rows.metrics.live[:, 1].min()


@pytest.mark.parametrize("policy", [policies.SnapKV(budget=np.array([5, 9]), window=2), policies.TOVA(cr=np.ones(2))])
def test_numbers_of_rows_need_rows(policy):
  """Refused before any work where rows come and go, or where there are others than numbers."""
  model, name = tiny.model(), "cr" if policy.budget is None else "budget"
  with pytest.raises(ValueError, match=rf"{name} has shape \(2,\), and must be one number, or one for each of 3 rows"):
    dms_jax.generate(model, [[1], [2], [3]], policy=policy)
  with pytest.raises(ValueError, match=rf"{name} has shape \(2,\), and must be one number: rows come and go"):
    dms_jax.Generator(model, policy=policy, width=2)


def test_a_window_is_that_of_all_requests():
  """A budget that has become a window is refused in a line that names the form in which each request has its own."""
  make = lambda **fields: dms_jax.Generator(tiny.model(), policy=policies.StreamingLLM(budget=9, **fields), width=2)
  message = (
    r"budget=12: not a number .* there are: sinks; StreamingLLM\(budget=N, by_position=True\) has a budget for each"
  )
  with pytest.raises(ValueError, match=message):
    make().submit([1, 2], budget=12)
  generator = make(by_position=True)
  generator.submit([1, 2], budget=12)
  with pytest.raises(ValueError, match=r"cr=2.0: not a number of this StreamingLLM .* there are: budget, sinks$"):
    generator.submit([1, 2], cr=2.0)


def test_going_on_reads_nothing():
  """A row without a prompt of a later turn keeps its pending token while others read theirs."""
  model, prompts = tiny.model(), [[1, 2, 3, 4, 5, 6], [7]]
  policy = policies.SnapKV(budget=4, window=1)
  past = dms_jax.generate(model, prompts, policy=policy, max_new_tokens=1, prefill_chunk=8, cache="contiguous")
  read = dms_jax.generate(model, [[], [8, 9]], continue_from=past, max_new_tokens=0, prefill_chunk=8)
  assert read.conversation.pending.tolist() == [past.tokens[0][0], -1]
  assert read.metrics.seen.tolist() == [6, 4]


@pytest.mark.slow
@pytest.mark.parametrize("case", GENERATED)
def test_going_on_is_no_prompt(case):
  """Rows without a prompt of a later turn decode: nothing is cut, whatever other rows read; so in a `Generator`."""
  policy, model, options = GENERATED[case], tiny.model(), dict(eos=False, prefill_chunk=8, decode_block=6)
  prompts = [tiny.tokens(model.config, 1, n, seed=n).tolist()[0] for n in (23, 9)]
  run = functools.partial(dms_jax.generate, model, policy=policy, max_new_tokens=6, **options)
  past = run(prompts)
  whole, mixed = run(None, continue_from=past), run([[], prompts[1]], continue_from=past)
  np.testing.assert_array_equal(whole.metrics.live[:, 0], mixed.metrics.live[:, 0])
  assert whole.tokens[0] == mixed.tokens[0]
  np.testing.assert_array_equal(whole.logprobs[0], mixed.logprobs[0])
  generator = dms_jax.Generator(model, policy=past.conversation.policy, width=2, page_size=4, pages=200, **options)
  ticket = generator.submit(max_new_tokens=6, continue_from=past.conversation.row(0), chains=2, keep=True)
  list(generator.run())
  result = generator.results[ticket]
  assert result.tokens == [whole.tokens[0]] * 2
  assert result.held == [whole.metrics.live[:, 0].mean()] * 2


@struct.dataclass
class _Merging(policies.Policy):
  """Appends up to `most` tokens outside the window, then merges each into the archived token seen first."""

  most: int = 5

  stats = ("first", "count")

  def admit(self, layer, position):
    return {"first": position.astype(jnp.float32), "count": jnp.ones(position.shape)}

  def retire(self, leaving):
    full = leaving.archived >= self.most
    first = jnp.where(leaving.live, leaving.archive_stats["first"] / leaving.archive_stats["count"], jnp.inf)
    at = jnp.argmin(jnp.pad(first, ((0, 0),) * 3 + ((0, 1),), constant_values=jnp.inf), axis=-1)
    count = jnp.take_along_axis(leaving.archive_stats["count"], jnp.minimum(at, first.shape[-1] - 1)[..., None], -1)
    slot = jnp.where(full, at.astype(jnp.int32), -1)
    return policies.Retired(~leaving.evicted, slot, 1 / (count[..., 0] + 1))


@pytest.mark.parametrize("kind", KINDS)
def test_merging(kind):
  """A leaving token is averaged into an archived one: attention, tokens held and statistics against plain numpy."""
  policy, length = _Merging(window=3), 24
  shape = cache_driver.Shape(0, 0, HEADS, GROUP, 2, length)
  text = cache_driver.Text.draw(shape, np.random.default_rng(3), 0.0)
  cache = create(kind, policy)
  for t in range(length):
    out, usage, stalled, cache = feed(policy, cache, text, np.full(ROWS, t), 1, np.ones(ROWS, int), None)
    assert not stalled.any() and (np.asarray(usage.live) == min(t + 1, 4 + 5)).all()
    for l, b, h in np.ndindex(LAYERS, ROWS, HEADS):
      k, v = (x[l, b, : t + 1, h].astype(float) for x in (text.k, text.v))
      groups = []  # the positions averaged in each archived token
      for left in range(t - 3):
        if len(groups) < 5:
          groups.append([left])
        else:
          min(groups, key=lambda group: sum(group) / len(group)).append(left)
      averaged = lambda x, groups=groups: [x[group].mean(axis=0) for group in groups]
      keys, values = (np.array([*averaged(x), *x[max(t - 3, 0) :]]) for x in (k, v))
      q = text.q[l, b, t, h * GROUP : (h + 1) * GROUP].astype(float)
      expected = policy_oracle.softmax(q @ keys.T / np.sqrt(HEAD)) @ values
      np.testing.assert_allclose(out[l, b, 0, h * GROUP : (h + 1) * GROUP], expected, atol=5e-6, rtol=5e-6)
