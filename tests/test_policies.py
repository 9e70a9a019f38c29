"""Policies: the registry, what each decides and retires, and that their numbers are traced."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dms_jax import policies


def test_registry():
  assert policies.get("DMS") is policies.get("dms") is policies.DMS
  assert policies.REGISTRY == {"dms": policies.DMS, "vanilla": policies.Vanilla}
  with pytest.raises(ValueError, match=r"unknown policy 'h3o'; there are \['dms', 'vanilla'\]"):
    policies.get("h3o")


def test_dms_compares_with_its_threshold():
  logits = jnp.array([[[-1.0, 0.0, 0.5, 3.0]]])
  for threshold, expected in ((0.0, [0, 0, 1, 1]), (0.5, [0, 0, 0, 1]), (-2.0, [1, 1, 1, 1])):
    evict = policies.DMS(threshold=threshold).decide(logits, logits.shape)
    np.testing.assert_array_equal(evict[0, 0], np.array(expected, bool))


def test_vanilla_keeps_everything_with_and_without_gates():
  for logits in (None, jnp.full((1, 2, 3), 9.0)):
    assert not policies.Vanilla().decide(logits, (1, 2, 3)).any()
  assert not policies.Vanilla.evicts and not policies.Vanilla.uses_gates
  assert policies.DMS.evicts and policies.DMS.uses_gates


def test_retire_appends_what_was_not_evicted():
  evicted, position = jnp.array([[[True, False]]]), jnp.arange(2)
  np.testing.assert_array_equal(policies.DMS(window=1).retire(evicted, position), [[[False, True]]])
  broadcast = policies.DMS(window=1).retire(jnp.array([True, False]), jnp.zeros((3, 1), int))
  assert broadcast.shape == (3, 2)


def test_numbers_are_leaves_and_the_window_is_a_shape():
  policy = policies.DMS(window=8, threshold=0.5)
  assert jax.tree.leaves(policy) == [0.5]
  assert jax.tree.structure(policy) == jax.tree.structure(policies.DMS(window=8, threshold=3.0))
  assert jax.tree.structure(policy) != jax.tree.structure(policies.DMS(window=9, threshold=0.5))
  with pytest.raises(AttributeError):
    policy.threshold = 1.0
