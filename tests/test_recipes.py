"""What the flags of a retrofit mean: immediate eviction, the fading neuron, losses, low-rank targets, every field."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest

from dms_jax import cache as caches
from dms_jax import masks
from dms_jax.config import DMSConfig, ModelConfig
from tests import oracle
from tests.test_cache import Shape, Text, run, schedule


@pytest.mark.parametrize("kind", ["masked", "slots"])
@pytest.mark.parametrize("window, shift", [(0, 0), (3, 0), (4, 1)])
def test_immediate_eviction_in_every_cache(kind, window, shift):
  """Decided W tokens later about the same token: caches equal the formula in chunks, steps and pauses."""
  lag = DMSConfig(window=window, shift=shift, eviction="immediate").lag()
  assert lag == window + shift
  shape = Shape(window, lag, heads=2, group=2, chunk=6, length=26)
  rng = np.random.default_rng(window)
  run(kind, shape, Text.draw(shape, rng, 0.6), schedule(rng, shape))


def test_immediate_eviction_is_the_mask_of_the_formula():
  """Key j leaves query i's sight where i - j > W and token j + W + shift said so; without a window both kinds agree."""
  rng = np.random.default_rng(0)
  for window, shift in ((0, 1), (3, 1), (3, 0), (30, 1)):
    decided = rng.random(20) < 0.5
    lag = DMSConfig(window=window, shift=shift, eviction="immediate").lag()
    seen = np.asarray(masks.visible(masks.about_key(jnp.asarray(decided), lag, False), window))
    for i, j in np.ndindex(20, 20):
      at = j + window + shift
      gone = i - j > window and at < 20 and decided[at]
      assert seen[i, j] == (j <= i and not gone)
      assert not (i - j > window) or at <= i  # decided by the time it acts
    np.testing.assert_array_equal(seen, oracle.visible(oracle.about(decided, lag), window))
  assert DMSConfig(window=0, eviction="immediate").lag() == DMSConfig(window=0).lag()
  assert DMSConfig(window=9, eviction="immediate").lag(4) == 5  # of the window in force


def test_a_cache_that_does_not_know_immediate_eviction_says_so(monkeypatch):
  monkeypatch.setitem(caches.KINDS, "other", caches.SlotCache)
  sizes = dict(batch=1, capacity=8, window=3)
  with pytest.raises(NotImplementedError, match=r"dms\.eviction='immediate' with cache='other'"):
    caches.create("other", ModelConfig(), shift=4, **sizes)
  assert caches.create("other", ModelConfig(), shift=1, **sizes).shift == 1
