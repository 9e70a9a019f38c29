"""Every policy beside a layer that slides: that layer keeps its window, the other is as if alone."""

from __future__ import annotations

import itertools

import jax
import numpy as np
import pytest

from dms_jax import cache as caches
from dms_jax import policies
from dms_jax.cache.sliding import most_slots
from tests import cache_driver
from tests.cache_driver import ATOL, KINDS, ROWS, Shape, Text, fitted
from tests.helpers import check_pages

LENGTH, SLIDES = 40, 9
POLICIES = {
  "dms": policies.DMS(window=3),
  "dms-scored": policies.DMS(window=3, scored=True),
  "dms-budget": policies.DMS(window=3, budget=8, threshold=0.5),
  "dms-layer": policies.DMS(window=3, budget=8, limit_over="layer", kv_heads=2),
  "streaming": policies.StreamingLLM(window=3, sinks=2),
  "vanilla": policies.Vanilla(window=3),
  "h2o": policies.H2O(budget=9, window=4),
  "tova": policies.TOVA(budget=8),
  "quest": policies.Quest(budget=8, page=4, window=3, dense_layers=0),
  "snapkv": policies.SnapKV(budget=10, window=4, pool=3),
  "keydiff": policies.KeyDiff(budget=8, window=3),
  "random": policies.Random(budget=8, window=3, seed=5),
  "rkv": policies.RKV(budget=9, buffer=4, window=3),
  "expected": fitted(policies.ExpectedAttention(budget=9, buffer=4, sinks=1)),
  "tri": fitted(policies.TriAttention(budget=9, buffer=4)),
  "vase": policies.VaSE(budget=9, buffer=4, window=3, sinks=1),
}
ONE_KIND = Shape(0, 1, heads=2, group=2, chunk=8, length=LENGTH)
PROMPTS = np.array([21, 13, 8])
CHUNKS = [np.minimum(np.maximum(PROMPTS - start, 0), 8) for start in (0, 8, 16)]


def create(kind, shape, policy):
  config = shape.config()
  capacity = LENGTH if kind == "masked" else most_slots(policy, config, LENGTH)
  options = {"page_size": 4, "longest": LENGTH} if kind == "paged" else {}
  return caches.create(kind, config, batch=ROWS, capacity=capacity, policy=policy, lag=1, **options)


# The paths of a chunk and a step in one cache each; all of them in all caches at length.
USUAL = [
  *((name, "paged") for name in ("dms", "dms-layer", "h2o", "quest", "rkv")),
  *((name, "contiguous") for name in ("dms", "dms-budget", "snapkv")),
  *((name, "masked") for name in ("dms", "dms-budget", "quest")),
]


@pytest.mark.parametrize(
  ("name", "kind"),
  [pytest.param(*case, marks=[pytest.mark.slow] * (case not in USUAL)) for case in itertools.product(POLICIES, KINDS)],
)
def test_policies_beside_a_sliding_layer(name, kind):
  policy, rng = POLICIES[name], np.random.default_rng(0)
  text = Text.draw(ONE_KIND, rng, 0.5)
  logits = rng.standard_normal(text.evict.shape).astype(np.float32)
  shape = Shape(0, 1, heads=2, group=2, chunk=8, length=LENGTH, slides=SLIDES)
  expected, seen = text.expected(0, 1, SLIDES)
  alone, beside = create(kind, ONE_KIND, policy), create(kind, shape, policy)
  steps = [(8, lengths, PROMPTS - np.minimum(PROMPTS, 8 * n)) for n, lengths in enumerate(CHUNKS, 1)]
  steps += [(1, (rng.random(ROWS) < 0.8).astype(int), None) for _ in range(LENGTH - PROMPTS.max())]
  start = np.zeros(ROWS, int)
  for width, lengths, remaining in steps:
    *one, alone = cache_driver.feed_logits(policy, alone, text, logits, start, width, lengths, remaining)
    *two, beside = cache_driver.feed_logits(policy, beside, text, logits, start, width, lengths, remaining)
    (out, usage, stalled), (other, own, _) = jax.device_get((two, one))
    assert not stalled.any()
    end = start + lengths
    for b in np.flatnonzero(lengths):
      np.testing.assert_allclose(out[1, b, : lengths[b]], other[1, b, : lengths[b]], atol=ATOL, rtol=ATOL)
      now = slice(start[b], end[b])
      np.testing.assert_allclose(out[0, b, : lengths[b]], expected[0, b, now], atol=ATOL, rtol=ATOL)
      np.testing.assert_array_equal(usage.reads[0, b], seen[0, b, :, now].sum((-1, -2)))
    np.testing.assert_array_equal(usage.live[1], own.live[1])
    np.testing.assert_array_equal(usage.reads[1], own.reads[1])
    live = np.asarray(beside.live())
    np.testing.assert_array_equal(live[1], np.asarray(alone.live())[1])
    np.testing.assert_array_equal(live[0], np.minimum(end, SLIDES + 1)[:, None].repeat(2, 1))
    if kind != "masked":
      held, before = cache_driver.held(beside), cache_driver.held(alone)
      for index in np.ndindex(live.shape):
        last = end[index[1]] - 1
        wanted = sorted(before[index]) if index[0] else [*range(max(last - SLIDES, 0), last + 1)]
        assert sorted(held[index]) == wanted
    start = end
  if kind == "paged":
    check_pages(beside)
