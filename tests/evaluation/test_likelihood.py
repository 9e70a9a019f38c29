"""Likelihood under a policy: decoding equals the masked text and a row decoded alone."""

from __future__ import annotations

import numpy as np
import pytest

import dms_jax
from dms_jax import policies
from dms_jax import testing as tiny
from dms_jax.evaluation import likelihood

LENGTHS = ((20, 5), (31, 17), (20, 1))


@pytest.fixture(scope="module")
def model():
  return tiny.model(gates=tiny.dms(scale=1.0, offset=0.0))


@pytest.fixture
def rows(model, monkeypatch):
  monkeypatch.setattr(likelihood, "BUCKET", 32)  # all of one shape
  out = []
  for seed, (length, scored) in enumerate(LENGTHS):
    tokens = np.asarray(tiny.tokens(model.config, 1, length, seed))[0]
    out.append(likelihood.Passage(tokens, np.arange(length - scored - 1, length - 1, dtype=np.int32), tokens[-scored:]))
  return out


def test_a_cache_equals_the_masked_text(model, rows):
  """DMS and its threshold; Vanilla and a model whose gates are not asked. float32: sums run in another order."""
  pairs = [(0.3, policies.DMS(threshold=0.3)), (None, policies.Vanilla())]
  scored = likelihood.score([(model, limit) for pair in pairs for limit in pair], rows, batch=2)
  for whole, decoded in (scored[:2], scored[2:]):
    for row, a, b in zip(rows, whole, decoded, strict=True):
      np.testing.assert_allclose(b.logprobs, a.logprobs, atol=2e-5)
      np.testing.assert_array_equal(b.held, len(row.tokens) if a.held is None else a.held)
  assert scored[1][1].held.mean() < 0.9 * 31  # something was evicted


POLICIES = {
  "h2o": policies.H2O(budget=12, window=5), "snapkv": policies.SnapKV(budget=12, window=5),
  "tova": policies.TOVA(budget=12), "streaming": policies.StreamingLLM(budget=12),
  "quest": policies.Quest(budget=12, page=4, window=3),
}  # fmt: skip
SLOW = [pytest.param(name, marks=pytest.mark.slow) for name in ("tova", "streaming", "quest")]


@pytest.mark.parametrize("name", ["h2o", "snapkv", *SLOW])
def test_what_generate_wrote_has_its_log_probabilities(model, monkeypatch, name):
  monkeypatch.setattr(likelihood, "BUCKET", 8)
  prompts = [np.asarray(tiny.tokens(model.config, 1, n, n))[0].tolist() for n in (21, 6, 33)]
  settings = dict(policy=POLICIES[name], max_new_tokens=9, eos=False, cache="contiguous", capacity=48, prefill_chunk=8)
  out = dms_jax.generate(model, prompts, **settings)
  rows = []
  for prompt, new in zip(prompts, out.tokens, strict=True):
    tokens = np.array(prompt + new[:-1], np.int32)  # the last one is never fed
    positions = np.arange(len(prompt) - 1, len(tokens), dtype=np.int32)
    rows.append(likelihood.Passage(tokens, positions, np.array(new, np.int32)))
  (scored,) = likelihood.score([(model, POLICIES[name])], rows, batch=2, chunk=8)
  for b, result in enumerate(scored):
    np.testing.assert_allclose(result.logprobs, out.logprobs[b], atol=2e-5)
    np.testing.assert_array_equal(result.held, out.metrics.live[:, b])
  letters = likelihood.Passage(rows[0].tokens[:21], np.array([20, 20], np.int32), rows[0].targets[[0, 1]])
  (scored,) = likelihood.score([(model, POLICIES[name])], [letters], chunk=8)
  np.testing.assert_allclose(scored[0].logprobs[0], out.logprobs[0][0], atol=2e-5)


def test_a_budget_a_row_scores_as_a_window_would(model, rows):
  """StreamingLLM by position, in chunks and single tokens, as with a ring for each budget; sums in another order."""
  budgets = np.array([9, 6, 9])
  make = lambda budget: policies.StreamingLLM(budget=budget, sinks=2)
  chunks, steps = (likelihood.score([(model, make(budgets))], rows, batch=3, chunk=chunk)[0] for chunk in (7, 1))
  for row, budget, found, one_by_one in zip(rows, budgets, chunks, steps, strict=True):
    ((alone,),) = likelihood.score([(model, make(int(budget)))], [row], chunk=7)
    np.testing.assert_allclose(found.logprobs, alone.logprobs, atol=2e-5)
    np.testing.assert_allclose(found.logprobs, one_by_one.logprobs, atol=2e-5)
    np.testing.assert_array_equal(found.held, alone.held)
    assert (found.held == budget).all()


def test_a_policy_that_does_not_fit_the_model_is_refused(rows):
  with pytest.raises(ValueError, match="load a retrofit"):
    likelihood.score([(tiny.model(), policies.DMS())], rows)
