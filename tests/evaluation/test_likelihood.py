"""Likelihood under a policy: decoding equals the masked text where both are defined, and a row decoded alone."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dms_jax import cache as caches
from dms_jax import policies
from dms_jax import testing as tiny
from dms_jax.evaluation import likelihood
from dms_jax.model import cached_forward, check_policy, unembed

LENGTHS = ((20, 5), (31, 17), (20, 1))


@pytest.fixture(scope="module")
def model():
  return tiny.model(gates=tiny.dms(scale=1.0, offset=0.0))


@pytest.fixture
def rows(model, monkeypatch):
  monkeypatch.setattr(likelihood, "BUCKET", 8)
  out = []
  for seed, (length, scored) in enumerate(LENGTHS):
    tokens = np.asarray(tiny.tokens(model.config, 1, length, seed))[0]
    out.append(likelihood.Passage(tokens, np.arange(length - scored - 1, length - 1, dtype=np.int32), tokens[-scored:]))
  return out


def test_decoding_equals_the_masked_text(model, rows):
  """DMS and its threshold; Vanilla and a model whose gates are not asked. float32: sums run in another order."""
  pairs = [(0.3, policies.DMS(threshold=0.3)), (None, policies.Vanilla())]
  scored = likelihood.score([(model, limit) for pair in pairs for limit in pair], rows, batch=2)
  for whole, decoded in (scored[:2], scored[2:]):
    for row, a, b in zip(rows, whole, decoded, strict=True):
      np.testing.assert_allclose(b.logprobs, a.logprobs, atol=2e-5)
      np.testing.assert_array_equal(b.held, len(row.tokens) if a.held is None else a.held)
  assert scored[1][1].held.mean() < 0.9 * 31  # something was evicted


@pytest.mark.parametrize(
  "policy", [policies.H2O(budget=12, window=5), policies.StreamingLLM(budget=12)], ids=["h2o", "streaming"]
)
def test_a_row_is_scored_as_if_decoded_alone(model, rows, policy):
  (scored,) = likelihood.score([(model, policy)], rows, batch=3)
  policy = check_policy(model, policy)
  step = jax.jit(lambda cache, token: cached_forward(model, policy, cache, token, jnp.ones(1, jnp.int32)))
  for row, result in zip(rows, scored, strict=True):
    cache = caches.create(
      "contiguous", model.config, batch=1, capacity=32, policy=policy, lag=model.lag(policy.window),
      dtype=model.dtype,
    )  # fmt: skip
    logits = []
    for token in row.tokens:
      out, cache = step(cache, jnp.full((1, 1), token, jnp.int32))
      logits.append(np.asarray(jax.nn.log_softmax(unembed(model, out.hidden[0, 0]))))
    np.testing.assert_allclose(result.logprobs, np.stack(logits)[row.positions, row.targets], atol=2e-5)
    np.testing.assert_array_equal(result.held, cache.live()[:, 0])
    assert result.held.max() <= 12


def test_a_policy_that_does_not_fit_the_model_is_refused(rows):
  with pytest.raises(ValueError, match="load a retrofit"):
    likelihood.score([(tiny.model(), policies.DMS())], rows)
