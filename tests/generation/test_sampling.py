"""Sampling: the distributions, log-probabilities, and what a sample may depend on."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from dms_jax import execution
from dms_jax.generation.sampling import Sampling, filtered, largest_threshold, row_keys, sample

drawn, of_filtered = jax.jit(sample), jax.jit(filtered)  # op by op each shape would be some fifty programs


def softmax(x):
  e = np.exp(x - x.max(axis=-1, keepdims=True))
  return e / e.sum(axis=-1, keepdims=True)


def expected(logits, temperature, top_k=None, top_p=None):
  """The distribution by its definition, sorting: temperature, then the k largest, then the smallest set of mass p."""
  x = np.asarray(logits, np.float64) / temperature
  order = np.argsort(-x)
  kept = order if top_k is None else order[:top_k]
  p = softmax(x[kept])
  if top_p is not None:
    n = int(np.searchsorted(np.cumsum(p), top_p - 1e-9)) + 1
    kept, p = kept[:n], p[:n] / p[:n].sum()
  out = np.zeros_like(x)
  out[kept] = p
  return out


@pytest.mark.parametrize("k", [1, 2, 17, 64])
def test_largest_threshold_is_the_kth_value(k):
  x = jax.random.normal(jax.random.key(0), (5, 64))
  x = x.at[:, :3].set(jnp.array([0.0, -0.0, -1e30]))
  marked = np.asarray(largest_threshold(x, jnp.ones_like(x), jnp.float32(k)))
  for row, keep in zip(np.asarray(x), marked, strict=True):
    np.testing.assert_array_equal(row[keep], row[row >= np.sort(row)[-k]])


def test_unreachable_mass_keeps_everything():
  x = jax.random.normal(jax.random.key(0), (2, 9))
  assert np.asarray(largest_threshold(x, jnp.ones_like(x), jnp.float32(99))).all()


@pytest.mark.parametrize(
  "settings", [dict(), dict(top_k=3), dict(top_p=0.7), dict(top_k=5, top_p=0.8), dict(top_p=1.0), dict(top_k=99)]
)
@pytest.mark.parametrize("temperature", [0.6, 1.3])
def test_distribution(settings, temperature):
  logits = 2 * jax.random.normal(jax.random.key(4), (8,))
  sampling = Sampling.create(temperature, **settings)
  want = expected(logits, temperature, **settings)
  got = jax.nn.softmax(of_filtered(logits[None], sampling)[0])
  np.testing.assert_allclose(got, want, atol=2e-6)  # float32 softmax

  draws = 20_000
  keys = row_keys(jax.random.key(1), draws)
  tokens, _ = drawn(jnp.broadcast_to(logits, (draws, 8)), keys, jnp.zeros(draws, jnp.int32), sampling)
  counts = np.bincount(np.asarray(tokens), minlength=8)
  assert (counts[want == 0] == 0).all()
  kept = want > 0
  if kept.sum() > 1:  # the draw is fixed by its key: this cannot fail one time in a thousand
    assert stats.chisquare(counts[kept], draws * want[kept]).pvalue > 1e-3


def test_logprobs_are_of_the_raw_logits():
  logits = 5 * jax.random.normal(jax.random.key(0), (6, 50))
  for sampling in (Sampling.create(), Sampling.create(0.5, top_k=4)):
    tokens, logprobs = drawn(logits, row_keys(jax.random.key(1), 6), jnp.zeros(6, jnp.int32), sampling)
    want = np.log(softmax(np.asarray(logits, np.float64)))[np.arange(6), np.asarray(tokens)]
    np.testing.assert_allclose(logprobs, want, atol=1e-5)
    assert logprobs.dtype == jnp.float32 and tokens.dtype == jnp.int32


def test_greedy_needs_no_key_and_takes_the_first_of_equals():
  tokens, _ = drawn(jnp.array([[0.0, 2.0, 2.0, 1.0]]), None, jnp.zeros(1, jnp.int32), Sampling.create(0.0, 3, 0.5))
  assert tokens.tolist() == [1]


def test_a_draw_depends_on_its_own_key_and_count_alone():
  sampling = Sampling.create(1.0, top_k=40, top_p=0.95)
  logits = jax.random.normal(jax.random.key(0), (5, 60))
  keys = row_keys(jax.random.key(3), 5)
  count = jnp.array([0, 1, 2, 3, 4], jnp.int32)
  tokens, logprobs = drawn(logits, keys, count, sampling)
  order = jnp.array([3, 1, 4, 0, 2])
  others = drawn(logits[order].at[0].set(9.0), keys[order], count[order], sampling)
  np.testing.assert_array_equal(others[0][1:], tokens[order][1:])
  np.testing.assert_array_equal(others[1][1:], logprobs[order][1:])
  flat = jnp.zeros((64, 60))  # the same key draws anew at every count, and another key differs
  again, _ = drawn(flat, jnp.broadcast_to(keys[:1], (64,)), jnp.arange(64, dtype=jnp.int32), Sampling.create(1.0))
  assert len(set(again.tolist())) > 20


def test_numbers_are_traced():
  traces = []

  @jax.jit
  def draw(logits, keys, sampling):
    traces.append(1)
    return sample(logits, keys, jnp.zeros(2, jnp.int32), sampling)

  keys, logits = row_keys(jax.random.key(0), 2), jnp.zeros((2, 9))
  for settings in ((0.5, 3, 0.9), (0.7, 4, 0.5), (2.0, 1, 1.0)):
    draw(logits, keys, Sampling.create(*settings))
  assert len(traces) == 1


def test_filters_that_exclude_nothing_are_skipped_in_one_program():
  """`Execution.skipped_filters`: the same tokens, and no new program where a filter comes or goes."""
  traces = []

  @jax.jit
  def draw(sampling):
    traces.append(1)
    return sample(logits, keys, jnp.zeros(64, jnp.int32), sampling)[0]

  keys, logits = row_keys(jax.random.key(0), 64), jax.random.normal(jax.random.key(1), (64, 9))
  choices = ((0.5, 3, 0.9), (1.0,), (1.0, 2), (1.0, None, 0.6), (1.0, 100, 0.6), (1.0, 9, 1.0))
  found = []
  for skips in (False, True):
    traces.clear()
    with execution.override(skipped_filters=skips):
      found.append([draw(Sampling.create(*settings)) for settings in choices])
    assert len(traces) == (1 if skips else 4)
  np.testing.assert_array_equal(*found)


@pytest.mark.parametrize(
  "settings",
  [
    dict(temperature=1e-50), dict(temperature=1e-40), dict(temperature=1e-38), dict(temperature=1.0, top_p=1e-50),
    dict(temperature=1.0, top_p=1e-40), dict(temperature=1e-38, top_k=5, top_p=0.9), dict(temperature=1.0, top_k=1),
    dict(temperature=1e300, top_k=1),
  ],
)  # fmt: skip
def test_extreme_numbers_leave_the_likeliest_token(settings):
  logits = 30 * jax.random.normal(jax.random.key(2), (16, 50))
  for sampling in (own := Sampling.create(**settings), own.replace(temperature=jnp.full(16, own.temperature))):
    tokens, logprobs = drawn(logits, row_keys(jax.random.key(0), 16), jnp.zeros(16, jnp.int32), sampling)
    np.testing.assert_array_equal(tokens, np.argmax(logits, axis=-1))
    assert np.isfinite(logprobs).all()


@pytest.mark.parametrize("settings", [dict(temperature=1e300), dict(temperature=1e38, top_p=1.0, top_k=10**400)])
def test_an_endless_temperature_draws_evenly(settings):
  got = jax.nn.softmax(of_filtered(jnp.array([[-50.0, 0.0, 30.0, 80.0]]), Sampling.create(**settings))[0])
  np.testing.assert_allclose(got, 0.25, rtol=1e-6)  # float32


@pytest.mark.parametrize("key", [5, "5", [1, 2], np.float32(2.0)])
def test_what_is_no_key_is_refused(key):
  with pytest.raises(ValueError, match="key"):
    row_keys(key, 2)


def test_keys():
  key = jax.random.key(7)
  assert row_keys(key, 3).shape == (3,)
  np.testing.assert_array_equal(jax.random.key_data(row_keys(key, 3)), jax.random.key_data(row_keys(key, 5)[:3]))
  own = jax.random.split(key, 4)
  np.testing.assert_array_equal(jax.random.key_data(row_keys(own, 4)), jax.random.key_data(own))
  np.testing.assert_array_equal(  # old-style keys are taken too
    jax.random.key_data(row_keys(jax.random.PRNGKey(7), 3)), jax.random.key_data(row_keys(key, 3))
  )
  with pytest.raises(ValueError, match="each of the 5 rows"):
    row_keys(own, 5)


@pytest.mark.parametrize(
  ("settings", "culprit"),
  [
    (dict(temperature=-1.0), "temperature"),
    (dict(temperature=float("nan")), "temperature"),
    (dict(temperature=1.0, top_k=0), "top_k"),
    (dict(temperature=1.0, top_p=0.0), "top_p"),
    (dict(temperature=0.0, top_p=1.5), "top_p"),
    (dict(temperature="0.5"), "temperature"),
    (dict(temperature=None), "temperature"),
    (dict(temperature=[1.0]), "temperature"),
    (dict(temperature=10**400), "temperature"),
    (dict(temperature=1.0, top_k=float("inf")), "top_k"),
    (dict(temperature=1.0, top_k=float("nan")), "top_k"),
    (dict(temperature=1.0, top_k=2.5), "top_k"),
    (dict(temperature=1.0, top_k=True), "top_k"),
    (dict(temperature=1.0, top_k="5"), "top_k"),
    (dict(temperature=1.0, top_p="0.9"), "top_p"),
  ],
)
def test_settings_out_of_range_are_refused(settings, culprit):
  with pytest.raises(ValueError, match=culprit):
    Sampling.create(**settings)
