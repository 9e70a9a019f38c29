"""Texts of several tiles for tests of the prefill kernels, compared with the oracle."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np

from pallas_kernels.prefill import NEVER, ref
from tests.kernels.suite import float64, normal


def text(tokens, prefix, heads, group, size, window, rate, dtype, batch=1, shuffle=False, seed=0):
  """Arguments of prefill attention: `tokens` queries after `prefix` cached tokens, keys evicted at random.

  Cached keys outside the window come last, as in an archive: evicted ones are dead and NaN, the others always visible.
  """
  rng = np.random.default_rng(seed)
  total = prefix + tokens
  position = np.broadcast_to(np.arange(total), (batch, heads, total))
  evicted = rng.random(position.shape) < rate
  cached = position < prefix - window
  first = np.where(cached, np.where(evicted, NEVER, -1), position)
  last = np.where(cached, np.where(evicted, -1, NEVER), np.where(evicted, position + window, NEVER))
  order = np.argsort(cached, axis=-1, kind="stable")
  if shuffle:
    order = rng.permuted(order, axis=-1)
  first, last = (np.take_along_axis(x, order, axis=-1) for x in (first, last))
  q = normal(rng, batch, tokens, heads * group, size, dtype=dtype, scale=2.0)
  keys, values = (normal(rng, batch, heads, total, size, dtype=dtype) for _ in range(2))
  nan = jnp.asarray(np.nan, keys.dtype)
  keys, values = (jnp.where((first > last)[..., None], nan, x) for x in (keys, values))
  q_pos = np.broadcast_to(np.arange(prefix, total), (batch, tokens))
  return q, keys, values, *(jnp.asarray(x, jnp.int32) for x in (q_pos, first, last))


def assert_near(out, args, tolerance):
  """`tolerance` in units of the largest value."""
  q, keys, values, *positions = args
  assert out.dtype == q.dtype and out.shape == q.shape
  want = ref.prefill_attention(*float64(q, keys, values), *(np.asarray(x) for x in positions))
  np.testing.assert_allclose(np.asarray(out, np.float64), want, rtol=0, atol=tolerance * np.abs(want).max())
