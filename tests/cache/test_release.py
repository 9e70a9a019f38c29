"""Tokens given up in the order of their scores: attention, tokens and pages against plain numpy."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dms_jax import cache as caches
from dms_jax import policies
from dms_jax import testing as tiny
from dms_jax.cache import rows as cache_rows
from dms_jax.cache.release import release, score_floor
from tests import cache_driver, policy_oracle, trained_oracle
from tests.cache_driver import HEAD, LAYERS, ROWS
from tests.helpers import check_pages

HEADS, GROUP, PROMPT, LENGTH, CHUNK, PAGE = 2, 2, 24, 44, 7, 4
SHAPE = cache_driver.Shape(0, 0, HEADS, GROUP, CHUNK, LENGTH)
CASES = {
  "dms": policies.DMS(window=2, threshold=np.array([0.0, 0.8, np.inf], np.float32), scored=True),
  "window-1": policies.DMS(window=1, threshold=np.full(3, 0.5, np.float32), scored=True),
  "all-window": policies.DMS(window=30, threshold=np.zeros(3, np.float32), scored=True),
  "budget": policies.DMS(window=2, budget=12, threshold=np.array([0.5, np.inf, 1.0], np.float32), scored=True),
  "tied": policies.DMS(window=2, threshold=np.full(3, 2.0, np.float32), scored=True),
}


@functools.partial(jax.jit, compiler_options=tiny.QUICK)
def give_up(cache, policy, pressed, share):
  """The rows `pressed` give up a share: (cache, policy, floor, tokens lost)."""
  floor = jnp.where(pressed, score_floor(cache, share), -jnp.inf)
  policy = policy.lowered(-floor)
  return *release(cache, -policy.limit, in_order=not policy.overwrites), policy, floor


def create(policy):
  options = dict(batch=ROWS, capacity=LENGTH, policy=policy, lag=1, page_size=PAGE, longest=LENGTH)
  return caches.create("paged", SHAPE.config(), **options)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("seed", [0, pytest.param(1, marks=pytest.mark.slow), pytest.param(2, marks=pytest.mark.slow)])
def test_what_stays_is_the_formula(case, seed):
  """Chunks and decode steps, rows that pause, and between them rows that give up shares of what they hold."""
  policy, rng = CASES[case], np.random.default_rng(seed)
  text = cache_driver.Text.draw(SHAPE, rng, 0.0)
  logits = rng.standard_normal((LAYERS, ROWS, HEADS, LENGTH)).astype(np.float32)
  logits = np.round(logits) if case == "tied" else logits
  if case == "budget":  # a budget orders them in this precision
    logits = logits.astype(jnp.bfloat16).astype(np.float32)
  about = np.stack([np.pad(logits[..., 1:], ((0, 0),) * 3 + ((0, 1),), constant_values=-np.inf)])[0]
  cache, start = create(policy), np.zeros(ROWS, int)
  limits = np.asarray(policy.threshold, float).copy()
  thresholds, losses = np.repeat(limits[:, None], LENGTH, axis=1), 0
  while (start < LENGTH).any():
    width = CHUNK if (start < PROMPT).any() else 1
    lengths = np.where(rng.random(ROWS) < 0.2, 0, rng.integers(1, width + 1, ROWS))
    lengths = np.minimum(lengths, (PROMPT if width > 1 else LENGTH) - start)
    remaining = np.maximum(PROMPT - start - lengths, 0) if width > 1 else None
    *found, cache = cache_driver.feed_logits(policy, cache, text, logits, start, width, lengths, remaining)
    out, usage, stalled = jax.device_get(found)
    assert not stalled.any()
    end, positions = start + lengths, cache_driver.held(cache)
    by_rows = {
      (l, b): trained_oracle.under_pressure(
        about[l, b], thresholds[b], window=policy.window, capacity=policy.budget
      )
      for l, b in np.ndindex(LAYERS, ROWS)
    }  # fmt: skip
    for (l, b), run in by_rows.items():
      if not lengths[b]:
        continue
      now = slice(start[b], end[b])
      q, k, v = (x[l, b].astype(float) for x in (text.q, text.k, text.v))
      expected = policy_oracle.attend(q.reshape(LENGTH, HEADS, GROUP, HEAD), k, v, run)
      np.testing.assert_allclose(
        out[l, b, : lengths[b]], expected.reshape(text.q.shape[2:])[now], atol=2e-6, rtol=2e-6
      )  # fmt: skip
      for h in range(HEADS):
        held = run.held[h][end[b] - 1]
        assert sorted(positions[l, b, h]) == sorted(held) and int(usage.live[l, b, h]) == len(held)
    start = end
    if rng.random() < 0.35:
      pressed, share = rng.random(ROWS) < 0.6, np.float32(rng.choice([0.2, 0.5]))
      held, free = np.asarray(cache.live()), int(cache.table.pool.count)
      cache, lost, policy, floor = give_up(cache, policy, pressed, share)
      for b in range(ROWS):
        archived = [
          -about[l, b, h, j] for l, h in np.ndindex(LAYERS, HEADS)
          for j in by_rows[l, b].held[h][start[b] - 1]
          if start[b] and j < start[b] - policy.window - 1 and about[l, b, h, j] <= limits[b]
        ]  # fmt: skip
        count = int(np.float32(len(archived)) * share)
        expected = sorted(archived)[count] if count and pressed[b] else -np.inf
        assert floor[b] == expected
        decided = range(max(start[b] - policy.window - 1, 0), max(start[b] - 1, 0))
        ring = [
          j for l, h in np.ndindex(LAYERS, HEADS) for j in decided if -expected < about[l, b, h, j] <= limits[b]
        ]  # fmt: skip
        limits[b] = min(limits[b], -expected)
        thresholds[b, start[b] :] = limits[b]
        gone = sum(score < expected for score in archived)
        assert int(lost[b]) == gone + len(ring)
        assert len(set(archived)) < len(archived) or gone == (count if pressed[b] else 0)
        losses += gone
      assert (np.asarray(cache.live()) <= held).all() and int(cache.table.pool.count) >= free
      check_pages(cache)
      used = -(-np.asarray(cache.archived) // PAGE)
      np.testing.assert_array_equal(used, cache.table.owned)  # pages are freed for real
  assert losses or case == "all-window"


def test_shared_pages_stay_whole():
  """Of two rows that share pages one gives up tokens: the other is unchanged, and so is what they share."""
  policy = policies.DMS(window=2, threshold=np.full(3, np.inf, np.float32), scored=True)
  rng = np.random.default_rng(0)
  text = cache_driver.Text.draw(SHAPE, rng, 0.0)
  logits = rng.standard_normal((LAYERS, ROWS, HEADS, LENGTH)).astype(np.float32)
  cache, start = create(policy), np.zeros(ROWS, int)
  feed = functools.partial(cache_driver.feed_logits, policy)
  for _ in range(2):
    lengths = np.array([9, 0, 0])
    *_, cache = feed(cache, text, logits, start, 9, lengths, np.zeros(ROWS, int))
    start = start + lengths
  cache, enough = cache_rows.fork_row(cache, jnp.int32(0), np.array([False, True, False]))
  assert bool(enough)
  start[1] = start[0]
  for _ in range(6):
    *_, cache = feed(cache, text, logits, start, 1, np.array([1, 1, 0]), None)
    start = start + [1, 1, 0]
  before, other = cache_driver.held(cache), jax.device_get(cache.live())[:, 1]
  owners = check_pages(cache)
  assert owners.max() == 2
  after, lost, *_ = give_up(cache, policy, np.array([True, False, False]), np.float32(0.5))
  check_pages(after)
  held = cache_driver.held(after)
  shared = (18 - 3) // PAGE * PAGE  # tokens of each head in shared pages
  for l, h in np.ndindex(LAYERS, HEADS):
    assert held[l, 1, h] == before[l, 1, h]
    archive = held[l, 0, h][3:]
    assert archive[:shared] == list(range(shared)) and archive == sorted(archive)
  assert int(lost[0]) >= (24 - 3 - shared) * LAYERS * HEADS // 2 and (np.asarray(after.live())[:, 1] == other).all()
