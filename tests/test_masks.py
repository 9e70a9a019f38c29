"""Masks as pictures: each expected matrix is written out."""

from __future__ import annotations

import hypothesis
import hypothesis.strategies as st
import jax.numpy as jnp
import numpy as np
import pytest

from dms_jax import masks
from tests import oracle


def picture(text: str) -> np.ndarray:
  """ "x . / x x" -> [[True, False], [True, True]]: rows are queries, columns keys."""
  return np.array([[c == "x" for c in row.split()] for row in text.strip().splitlines()])


def evicted(*keys: int, length: int) -> jnp.ndarray:
  return jnp.isin(jnp.arange(length), jnp.array(keys, int))


@pytest.mark.parametrize(
  "window, keys, expected",
  [
    (1, (1,), """
      x . . . .
      x x . . .
      x x x . .
      x . x x .
      x . x x x"""),
    (0, (0, 3), """
      x . . . .
      . x . . .
      . x x . .
      . x x x .
      . x x . x"""),
    (2, (0, 1, 2, 3, 4), """
      x . . . .
      x x . . .
      x x x . .
      . x x x .
      . . x x x"""),
    (9, (0, 1, 2, 3, 4), """
      x . . . .
      x x . . .
      x x x . .
      x x x x .
      x x x x x"""),
    (1, (), """
      x . . . .
      x x . . .
      x x x . .
      x x x x .
      x x x x x"""),
  ],
  ids=["one", "no window", "all", "all in the window", "none"],
)  # fmt: skip
def test_visible(window, keys, expected):
  np.testing.assert_array_equal(masks.visible(evicted(*keys, length=5), window), picture(expected))


def test_the_shift_moves_a_decision_to_the_token_before():
  """Decided at token 2 about token 1 (shift 1), or about itself (shift 0); the newest token is not decided."""
  computed = jnp.array([True, False, True, False, True])
  np.testing.assert_array_equal(masks.about_key(computed, 1, False), [False, True, False, True, False])
  np.testing.assert_array_equal(masks.about_key(computed, 0, False), computed)
  seen = masks.visible(masks.about_key(computed, 1, False), 0)
  expected = """
    x . . . .
    x x . . .
    x . x . .
    x . x x .
    x . x . x"""
  np.testing.assert_array_equal(seen, picture(expected))


def test_biases():
  z = jnp.array([[[0.0, 50.0, -50.0, 1.0]]])
  soft = np.asarray(masks.soft_bias(z, 1))
  np.testing.assert_allclose(soft[0, 0], [-50.0, 0.0, -np.log1p(np.e), 0.0], rtol=1e-6, atol=1e-6)
  np.testing.assert_allclose(
    masks.soft_bias(z, 0)[0, 0], [-np.log(2), -50.0, 0.0, -np.log1p(np.e)], rtol=1e-6, atol=1e-6
  )
  np.testing.assert_array_equal(masks.hard_bias(jnp.array([[[True, False]]])), [[[-np.inf, 0.0]]])


@hypothesis.given(st.integers(0, 12), st.integers(0, 1), st.lists(st.booleans(), min_size=9, max_size=9))
@hypothesis.settings(max_examples=60)
def test_agrees_with_the_oracle(window, shift, decisions):
  """The mask, what is held after the last token, and the released slot reuse: one thing."""
  computed = np.array(decisions)
  about = masks.about_key(jnp.asarray(computed), shift, False)
  np.testing.assert_array_equal(about, oracle.about(computed, shift))
  seen = np.asarray(masks.visible(about, window))
  np.testing.assert_array_equal(seen, oracle.visible(oracle.about(computed, shift), window))
  held = oracle.slot_reuse(computed, window, shift)
  assert int(masks.held_tokens(about, window)) == seen[-1].sum() == len(held[-1])
  assert float(masks.keys_read(about, window)) == seen.sum()
  for i, positions in enumerate(held):
    assert set(positions) == set(np.flatnonzero(seen[i]))
