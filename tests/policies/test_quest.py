"""Quest where each query head selects its own pages: the union of them, against numpy."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np

from dms_jax.policies import Quest
from dms_jax.policies.base import of_rows, with_numbers


def test_each_head_selects_within_its_row_s_budget():
  """Pages of a head: the `budget` less the window, in pages, with the largest bounds sum_h max(q least, q greatest)."""
  rng = np.random.default_rng(0)
  rows, heads, group, size, pages = 3, 2, 3, 8, 12
  q = rng.standard_normal((rows, heads, group, size)).astype(np.float32)
  ends = np.sort(rng.standard_normal((2, rows, heads, pages, size)).astype(np.float32), axis=0)
  live = rng.random((rows, heads, pages)) < 0.8
  policy = Quest(page=4, budget=20, dense_layers=1, each_head=True).resolved(None)
  policy = with_numbers(policy, {"budget": [12, 20, 40]})
  summaries = jnp.concatenate([*map(jnp.asarray, ends)], axis=-1)
  tokens = jnp.full(rows, 99)
  picked = np.asarray(policy.select(1, jnp.asarray(q), summaries, jnp.asarray(live), tokens))
  bounds = np.maximum(q[:, :, :, None] * ends[0][:, :, None], q[:, :, :, None] * ends[1][:, :, None]).sum(axis=-1)
  for row, count in enumerate((2, 4, 9)):  # (budget - 4 tokens of the window) / 4
    for head in range(heads):
      there = np.flatnonzero(live[row, head])
      wanted = {int(page) for g in range(group) for page in there[np.argsort(-bounds[row, head, g, there])[:count]]}
      assert set(np.flatnonzero(picked[row, head]).tolist()) == wanted
  assert picked[0].sum() > 2 * heads  # more than a head's own
  np.testing.assert_array_equal(policy.select(0, jnp.asarray(q), summaries, jnp.asarray(live), tokens), live)
  some = of_rows(policy, 3, [2, 0, 0]).select(
    1, jnp.asarray(q[[2, 0, 0]]), summaries[jnp.array([2, 0, 0])], live[[2, 0, 0]], tokens
  )
  np.testing.assert_array_equal(some, picked[[2, 0, 0]])
