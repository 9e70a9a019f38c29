"""Policies that read trained gates: every cache against plain numpy, chunks and single tokens."""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import dms_jax
from dms_jax import cache as caches
from dms_jax import policies
from dms_jax import testing as tiny
from dms_jax.config import ModelConfig
from dms_jax.model import check_policy
from tests import cache_driver, oracle, policy_oracle, trained_oracle
from tests.cache_driver import HEAD, KINDS, LAYERS, ROWS

HEADS, GROUP, PROMPT, LENGTH, CHUNK = 2, 2, 30, 40, 7
MARGIN = 1e-4  # relative; choices closer than this are left to the float64 oracle: another text is sampled

CASES = {
  "dms": policies.DMS(window=3, budget=10),
  "dms-budget-alone": policies.DMS(window=2, budget=9, threshold=math.inf),
  "dms-cr": policies.DMS(window=1, cr=2.5, threshold=0.5, hard=True),
  "dms-all-window": policies.DMS(window=5, budget=6),
  "dms-rows": policies.DMS(window=2, budget=np.array([7, 12, 9]), threshold=np.array([0.0, math.inf, 1.0])),
  "shared": policies.DMS(window=3, budget=10, limit_over="layer", kv_heads=HEADS),
  "shared-rows": policies.DMS(
    window=2, budget=np.array([7, 12, 9]), threshold=np.array([0.0, math.inf, 1.0]), limit_over="layer", kv_heads=HEADS
  ),
  "shared-cr": policies.DMS(window=1, cr=2.5, threshold=0.5, hard=True, limit_over="layer", kv_heads=HEADS),
  "shared-all-window": policies.DMS(window=5, budget=6, limit_over="layer", kv_heads=HEADS),
  "shared-tied": policies.DMS(window=2, budget=9, limit_over="layer", kv_heads=HEADS),
  "trimkv": policies.TRIMKV(budget=9),
  "trimkv-window": policies.TRIMKV(window=3, budget=11),
  "trimkv-cr": policies.TRIMKV(cr=2.5),
  "kvzap": policies.KVzap(window=3, threshold=-0.5),
  "tied": policies.DMS(window=2, budget=9),  # gate logits of -2, -1, 0 and so on: of equal ones the later token goes
}
MERGES = {"dmc": policies.DMC(window=0), "dmc-window": policies.DMC(window=3)}
# Every cache for each method; the variants of its numbers in one cache, and in all of them at length.
EVERYWHERE = [
  pytest.param(case, kind, marks=[pytest.mark.slow] * ("-" in case and kind != "contiguous"))
  for case in CASES
  for kind in KINDS
]


def lag_of(policy):
  return 1 if policy.objective == "dms" else 0


def row_of(number, b):
  return number[b] if np.ndim(number) else number


def by_formula(policy, b, logits):
  """The oracle's run of row b from gate logits [K, T], by the token that computes them."""
  about = np.full(logits.shape, -np.inf)
  about[:, : logits.shape[1] - lag_of(policy)] = logits[:, lag_of(policy) :]
  match policy:
    case policies.KVzap():
      return trained_oracle.gated(about < row_of(policy.threshold, b), None, window=policy.window)
    case policies.DMS(limit_over="layer"):
      budget = lambda seen: row_of(policy.budget, b) if policy.budget is not None else math.ceil(seen / policy.cr)
      return trained_oracle.sharing(about, row_of(policy.threshold, b), window=policy.window, budget=budget)
    case policies.DMS():
      rank = trained_oracle.ranked(about)
      evicted, score = about > row_of(policy.threshold, b), lambda head, j, t: -rank[head, j]
    case policies.TRIMKV():
      beta = 1 / (1 + np.exp(-about))
      evicted, score = np.zeros(about.shape, bool), lambda head, j, t: beta[head, j] ** (t - j)
  budget, cr = (row_of(number, b) for number in (policy.budget, policy.cr))
  capacity = lambda seen: budget if budget is not None else max(math.ceil(seen / cr), policy.window + 1)
  return trained_oracle.gated(evicted, score, window=policy.window, capacity=capacity)


def events_of(seed):
  """Steps (width, lengths [B], remaining [B]): each row's prompt in uneven chunks, then decode steps; rows pause."""
  rng, start, steps = np.random.default_rng(seed), np.zeros(ROWS, int), []
  prompts = np.array([PROMPT, PROMPT - 9, 3])
  while (start < prompts).any():
    lengths = np.where(rng.random(ROWS) < 0.2, 0, rng.integers(1, CHUNK + 1, ROWS))
    lengths = np.minimum(lengths, prompts - start)
    start = start + lengths
    steps.append((CHUNK, lengths, prompts - start))
  for _ in range(LENGTH - PROMPT):
    steps.append((1, (rng.random(ROWS) < 0.8).astype(int), None))
  return steps


@functools.cache
def sampled(case):
  """(text, gate logits [L, B, K, T], steps, oracle's runs, attended [L, B, T, N, H]), without near ties."""
  policy, shape = CASES[case], cache_driver.Shape(0, 0, HEADS, GROUP, 2, LENGTH)
  for seed in range(30):
    rng = np.random.default_rng(seed)
    text, steps = cache_driver.Text.draw(shape, rng, 0.0), events_of(seed)
    logits = rng.standard_normal((LAYERS, ROWS, HEADS, LENGTH)).astype(np.float32)
    logits = logits + 2 if case.startswith("trimkv") else np.round(logits - 1) if "tied" in case else logits
    runs, out = {}, np.zeros(text.q.shape)
    for l, b in np.ndindex(LAYERS, ROWS):
      total = sum(int(n[b]) for _, n, _ in steps)
      q, k, v = (x[l, b, :total].astype(float) for x in (text.q, text.k, text.v))
      q = q.reshape(total, HEADS, GROUP, HEAD)
      runs[l, b] = by_formula(policy, b, logits[l, b, :, :total].astype(float))
      out[l, b, :total] = policy_oracle.attend(q, k, v, runs[l, b]).reshape(total, HEADS * GROUP, HEAD)
    if "tied" in case or min(run.margin for run in runs.values()) > MARGIN:
      return text, logits, steps, runs, out
  raise AssertionError(f"{case}: near ties in every text")


def create(kind, policy):
  config = ModelConfig(num_layers=LAYERS, num_heads=HEADS * GROUP, num_kv_heads=HEADS, head_dim=HEAD, d_model=8, d_ff=8)
  capacity = LENGTH if kind == "masked" else int(np.max(policy.capacity(jnp.full(ROWS, LENGTH))))
  options = {"page_size": 4, "longest": LENGTH} if kind == "paged" else {}
  return caches.create(kind, config, batch=ROWS, capacity=capacity, policy=policy, lag=lag_of(policy), **options)


@pytest.mark.parametrize(("case", "kind"), EVERYWHERE)
def test_policy_is_its_formula(case, kind):
  """Attention, tokens held, slots and reads after every chunk and decode step: as one token at a time.

  The cache has no slot more than the budget.
  """
  policy, (text, logits, steps, runs, expected) = CASES[case], sampled(case)
  cache, start = create(kind, policy), np.zeros(ROWS, int)
  for width, lengths, remaining in steps:
    *found, cache = cache_driver.feed_logits(policy, cache, text, logits, start, width, lengths, remaining)
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
      assert int(usage.live[l, b, h]) == live[l, b, h] == len(held)
      assert positions is None or sorted(positions[l, b, h]) == sorted(held)
    start = end


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("case", ["dms", "trimkv", "kvzap", "dmc"])
def test_a_row_does_not_depend_on_its_neighbours(case, kind):
  """Bit for bit, whatever other rows hold and whether they take part."""
  policy = (CASES | MERGES)[case]
  if case in MERGES:  # which reads one token at a time
    rng = np.random.default_rng(0)
    text = cache_driver.Text.draw(cache_driver.Shape(0, 0, HEADS, GROUP, 2, LENGTH), rng, 0.0)
    logits = rng.standard_normal((LAYERS, ROWS, 2 * HEADS, LENGTH)).astype(np.float32)
    steps = [(1, (rng.random(ROWS) < 0.8).astype(int), None) for _ in range(LENGTH)]
  else:
    text, logits, steps, *_ = sampled(case)
  alone, together, start = create(kind, policy), create(kind, policy), np.zeros(ROWS, int)
  for width, lengths, remaining in steps:
    only = np.where(np.arange(ROWS) == 1, lengths, 0)
    first, *_, alone = cache_driver.feed_logits(policy, alone, text, logits, start, width, only, remaining)
    second, *_, together = cache_driver.feed_logits(policy, together, text, logits, start, width, lengths, remaining)
    np.testing.assert_array_equal(first[:, 1, : lengths[1]], second[:, 1, : lengths[1]])
    np.testing.assert_array_equal(alone.live()[:, 1], together.live()[:, 1])
    start = start + lengths


def test_the_budget_is_never_exceeded():
  """And it binds: the cases would hold more without it."""
  for case in ("dms", "dms-rows", "trimkv", "trimkv-cr"):
    policy, (_, logits, _, runs, _), binds = CASES[case], sampled(case), case != "dms"
    for (l, b), run in runs.items():
      for head, held in enumerate(run.held):
        sizes = np.array([len(tokens) for tokens in held])
        most = [np.asarray(policy.capacity(jnp.full(ROWS, t + 1)))[b] for t in range(len(held))]
        assert (sizes <= most).all()
        binds |= (~oracle.about(logits[l, b, head, : len(held)] > 0, 1)).sum() > sizes.max()
    assert binds


def test_the_heads_of_a_layer_share_the_budget():
  """Their mean never exceeds it; some head holds more while another holds less."""
  for case in ("shared", "shared-rows", "shared-cr"):
    policy, (*_, runs, _), uneven = CASES[case], sampled(case), False
    for (_, b), run in runs.items():
      sizes = np.array([[len(tokens) for tokens in held] for held in run.held])
      budget = [
        row_of(policy.budget, b) if policy.budget is not None else max(math.ceil((t + 1) / policy.cr), 2)
        for t in range(sizes.shape[1])
      ]  # fmt: skip
      assert (sizes.mean(axis=0) <= budget).all()
      uneven |= (sizes.max(axis=0) > budget).any()
    assert uneven


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("case", ["dmc", pytest.param("dmc-window", marks=pytest.mark.slow)])
def test_merged_tokens_are_the_formula(case, kind):
  """DMC: attention and tokens held after every step; float32 sums of weighted means. Rows pause and end apart."""
  policy, shape = MERGES[case], cache_driver.Shape(0, 0, HEADS, GROUP, 2, LENGTH)
  rng = np.random.default_rng(0)
  text = cache_driver.Text.draw(shape, rng, 0.0)
  logits = rng.standard_normal((LAYERS, ROWS, 2 * HEADS, LENGTH)).astype(np.float32)
  cache, start, ends = create(kind, policy), np.zeros(ROWS, int), np.array([LENGTH, LENGTH // 2, LENGTH - 5])
  expected, held = np.zeros(text.q.shape), np.zeros((LAYERS, ROWS, HEADS, LENGTH), int)
  for l, b in np.ndindex(LAYERS, ROWS):
    q, k, v = (x[l, b].astype(float) for x in (text.q, text.k, text.v))
    merges, omega = logits[l, b, :HEADS] > 0, 1 / (1 + np.exp(logits[l, b, HEADS:].astype(float)))
    out, held[l, b] = trained_oracle.dmc(
      q.reshape(LENGTH, HEADS, GROUP, HEAD), k, v, merges, omega, window=policy.window
    )
    expected[l, b] = out.reshape(expected[l, b].shape)
  assert held[..., -1].max() < LENGTH - 8
  while (start < ends).any():
    lengths = ((rng.random(ROWS) < 0.8) & (start < ends)).astype(int)
    out, usage, stalled, cache = cache_driver.feed_logits(policy, cache, text, logits, start, 1, lengths, None)
    assert not stalled.any()
    for b in np.flatnonzero(lengths):
      np.testing.assert_allclose(out[:, b, 0], expected[:, b, start[b]], atol=5e-6, rtol=5e-6)
      np.testing.assert_array_equal(usage.live[:, b], held[:, b, :, start[b]])
      np.testing.assert_array_equal(usage.reads[:, b], held[:, b, :, start[b]])
    start = start + lengths


GENERATED = {
  "dms": (tiny.dms(window=3, scale=1.0, offset=0.0), policies.DMS(budget=9)),
  "dms-alone": (tiny.dms(window=3, scale=1.0, offset=0.0), policies.DMS(budget=8, threshold=math.inf)),
  "shared": (tiny.dms(window=3, scale=1.0, offset=0.0), policies.DMS(budget=9, limit_over="layer")),
  "trimkv": (tiny.dms(objective="trimkv", offset=-2.0, hidden=8), policies.TRIMKV(budget=8)),
  "kvzap": (tiny.dms(objective="kvzap", hidden=8), policies.KVzap(window=3, threshold=0.0)),
  "dmc": (tiny.dms(objective="dmc", window=0, scale=1.0, offset=0.0), policies.DMC()),
}  # fmt: skip


@pytest.mark.parametrize(
  "case", ["dms", "shared", "trimkv", *(pytest.param(c, marks=pytest.mark.slow) for c in ("dms-alone", "kvzap", "dmc"))]
)
def test_any_chunking_reads_a_prompt_the_same(case):
  """Logits of deeper layers depend on what earlier ones held: whole models, by chunks and one token at a time."""
  gates, policy = GENERATED[case]
  model = tiny.model(gates=gates)
  prompts = [tiny.tokens(model.config, 1, n, seed=n).tolist()[0] for n in (29, 11)]
  run = functools.partial(dms_jax.generate, model, prompts, max_new_tokens=8, eos=False, decode_block=4)
  whole = run(policy=policy, prefill_chunk=16, cache="contiguous")
  held = np.asarray(whole.metrics.live)
  most = held.mean(axis=-1) if policy.removes else held
  assert held.min() < 37 and (not policy.bounded or most.max() <= policy.budget)
  others = [run(policy=policy, prefill_chunk=5, cache="paged")]
  if policy.bounded:
    others.append(run(policy=policy.replace(exact_prefill=True), prefill_chunk=16, cache="contiguous"))
  for other in others:
    assert whole.tokens == other.tokens
    np.testing.assert_array_equal(held, other.metrics.live)
    np.testing.assert_array_equal(whole.metrics.prompt_reads, other.metrics.prompt_reads)


@pytest.mark.slow
@pytest.mark.parametrize("case", GENERATED)
def test_requests_are_answered_as_alone(case):
  """A `Generator` with chains that share a prompt: as `generate` answers each prompt."""
  gates, policy = GENERATED[case]
  model, options = tiny.model(gates=gates), dict(eos=False, prefill_chunk=8, decode_block=4)
  prompts = [tiny.tokens(model.config, 1, n, seed=n).tolist()[0] for n in (29, 11)]
  generator = dms_jax.Generator(model, policy=policy, width=3, page_size=4, pages=200, **options)
  tickets = [generator.submit(p, max_new_tokens=8, chains=n) for p, n in zip(prompts, (2, 1), strict=True)]
  list(generator.run())
  alone = dms_jax.generate(model, prompts, policy=policy, max_new_tokens=8, **options)
  for ticket, tokens, chains in zip(tickets, alone.tokens, (2, 1), strict=True):
    assert generator.results[ticket].tokens == [tokens] * chains


def test_dms_without_a_budget_is_what_it_was():
  policy = policies.DMS(window=4)
  assert jax.tree.leaves(policy) == [0.0] and not policy.gate_stats and not policy.removes
  assert not (policy.bounded or policy.overwrites or policy.compacts or policy.replays or policy.stats)
  assert policy.data_dependent and int(policy.capacity(50)) == int(policy.reach(50)) == 50
  with_budget = policies.DMS(window=4, budget=9)
  assert with_budget.bounded and not with_budget.data_dependent and int(with_budget.capacity(50)) == 9
  assert policies.Vanilla().continues(policy) and policy.continues(policies.KVzap()) and policy.continues(policy)
  assert not with_budget.continues(policies.Vanilla()) and not policies.Vanilla().continues(with_budget)
  assert not with_budget.continues(policy) and not policy.continues(with_budget) and with_budget.continues(with_budget)
  assert not policy.continues(None)


@pytest.mark.parametrize(
  ("gates", "policy", "message"),
  [
    ({}, policies.TRIMKV(budget=9), "TRIMKV reads gates trained with retrofit.objective=trimkv; this model's were"),
    ({}, policies.KVzap(), "KVzap reads gates trained with retrofit.objective=kvzap; this model's were trained"),
    ({"objective": "trimkv"}, policies.DMS(), "DMS reads gates trained with retrofit.objective=dms; this model's were"),
    ({"objective": "trimkv"}, None, r"TRIMKV: give either budget= \(tokens\) or cr="),
    ({"objective": "kvzap"}, policies.DMC(), "DMC reads gates trained with retrofit.objective=dmc; this model's were"),
    ({"objective": "trimkv"}, policies.TRIMKV(budget=9, cr=2.0), "TRIMKV: give either budget="),
    ({}, policies.DMS(budget=4), r"DMS: budget=4 tokens must be 6 or more at window=5"),
    ({}, policies.DMS(window=0, budget=4), r"DMS: window=0 must be 1 or more with these gates"),
    ({"eviction": "immediate"}, policies.DMS(budget=9), r"DMS: window=5 must be 6 or more with these gates"),
    ({}, policies.DMS(threshold=math.nan), "DMS: threshold=nan must be a number"),
    ({}, policies.DMS(threshold=np.array([0.0, math.nan])), r"DMS: threshold=\[ 0. nan\] must be a number"),
    ({"objective": "kvzap"}, policies.KVzap(threshold=math.nan), "KVzap: threshold=nan must be a number"),
    (None, policies.KVzap(), "KVzap needs eviction gates and this model has none"),
  ],
)  # fmt: skip
def test_refusals(gates, policy, message):
  model = tiny.model(gates=None if gates is None else tiny.dms(**gates))
  with pytest.raises(ValueError, match=message):
    check_policy(model, policy)


def test_the_gates_name_their_policy():
  assert check_policy(tiny.model(gates=tiny.dms(objective="kvzap")), None) == policies.KVzap(window=5)
  assert check_policy(tiny.model(gates=tiny.dms(objective="dmc")), None) == policies.DMC(window=5)
  assert check_policy(tiny.model(gates=tiny.dms()), None) == policies.DMS(window=5)
