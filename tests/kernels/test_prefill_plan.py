"""Blocks that the prefill kernels visit: every visible pair once, no block without one."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.prefill import NEVER, gpu, plan

# As programs: op by op each shape would be a hundred of them.
make = jax.jit(plan.make, static_argnames=("block", "grain"))
visitors = jax.jit(plan.visitors, static_argnames="block")
running_count = jax.jit(plan.running_count)


def ints(x):
  return jnp.asarray(x, jnp.int32)


def random_case(rng, order: bool):
  """(positions [B, tiles, M], k_first, k_last) with kept, evicted, always visible, expired and dead keys."""
  b, k, s, size = 2, 2, 300, 16
  start = rng.integers(0, 200, (b, 1))
  positions = start + np.arange(6 * size)
  positions = np.where(np.arange(6 * size) < rng.integers(0, 6 * size + 1, (b, 1)), positions, -2)
  if not order:
    positions = rng.permuted(positions, axis=1)
  position = rng.integers(0, 300, (b, k, s))
  position = np.sort(position) if order else position
  kind = rng.integers(0, 4, position.shape)
  first = np.select([kind == 2, kind == 3], [-1, NEVER], position)
  last = np.select([kind == 1, kind == 3], [position + rng.integers(0, 40), -1], NEVER)
  return positions.reshape(b, 6, size), first, last


def visits(made: plan.Plan, block: int):
  """For each (row, KV head, tile): rows of each visited block, and the number of unmasked blocks."""
  for place in np.ndindex(made.ranges.shape[:3]):
    whole, kept, start, stop = (int(x) for x in made.ranges[place])
    begins = [i * block if i < kept else start + (i - kept) * block for i in range(stop)]
    yield place, [np.arange(x, x + block) for x in begins], whole


@pytest.mark.parametrize("order", [True, False])
@pytest.mark.parametrize("seed", range(4))
def test_every_visible_pair_is_visited_once(seed, order):
  """In any order of keys and queries; every real query of a tile sees all of an unmasked block."""
  block, grain = 32, 8
  positions, first, last = random_case(np.random.default_rng(seed), order)
  made = make(ints(positions), ints(first), ints(last), block=block, grain=grain)
  source, bounds = np.asarray(made.source), np.asarray(made.bounds)
  for (row, head, tile), blocks, whole in visits(made, block):
    queries = positions[row, tile][:, None]
    seen = np.zeros((len(queries), first.shape[2]), int)
    for number, rows in enumerate(blocks):
      assert rows[-1] < source.shape[2] and rows[0] % grain == 0
      low, high = bounds[row, head, :, rows].T
      pairs = (low <= queries) & (queries <= high)
      if number < whole:
        assert pairs[queries[:, 0] >= -1].all()
      keys = source[row, head, rows]
      assert (np.where(keys == first.shape[2], 0, pairs.sum(0)) == pairs.sum(0)).all(), "a row with no key is visible"
      np.add.at(seen.T, keys[keys < first.shape[2]], pairs.T[keys < first.shape[2]])
    expected = (first[row, head] <= queries) & (queries <= last[row, head])
    np.testing.assert_array_equal(seen, expected)


@pytest.mark.parametrize("order", [True, False])
@pytest.mark.parametrize("seed", range(3))
def test_every_visible_pair_has_a_visitor(seed, order):
  """Each gathered row holds its key; a tile sees whole blocks where no mask is needed, and none outside its range."""
  rng, block = np.random.default_rng(seed), 32
  positions, first, last = random_case(rng, order)
  made = make(ints(positions), ints(first), ints(last), block=block, grain=8)
  source, row, bounds = (np.asarray(x) for x in (made.source, made.row, made.bounds))
  held = source < first.shape[2]
  assert held.sum() == (row < source.shape[2]).sum()
  for at in np.argwhere(held):
    assert row[(*at[:2], source[tuple(at)])] == at[2]
  counted = np.where(np.arange(6)[None, :, None] == 2, -2, np.where(rng.random(positions.shape) < 0.8, positions, -2))
  ranges = np.asarray(visitors(ints(counted), ints(bounds), block=block))
  for b, k, number in np.ndindex(ranges.shape[:3]):
    low, high = bounds[b, k, :, number * block : (number + 1) * block]
    start, whole, stop = ranges[b, k, number]
    for tile, queries in enumerate(counted[b]):
      seen = (low <= queries[:, None]) & (queries[:, None] <= high)
      assert (start <= tile < stop) or not seen.any()
      if whole <= tile < stop:
        assert seen[queries >= -1].all()


def text(rng, tokens, window, kept, size):
  """One row and KV head: a text whose keys are kept with probability `kept`, and its tiles of `size` queries."""
  position = np.arange(tokens)[None, None]
  last = np.where(rng.random(position.shape) < kept, NEVER, position + window)
  return position[0].reshape(1, -1, size), position, last


@pytest.mark.parametrize("window, kept", [(0, 0.1), (24, 0.0), (24, 0.2), (24, 1.0), (100, 0.5)])
def test_only_what_is_visible_is_visited(window, kept):
  """A tile visits exactly the blocks of kept keys, and the range of the band, that one of its queries sees."""
  block, grain, size = 32, 8, 16
  positions, first, last = text(np.random.default_rng(0), 512, window, kept, size)
  made = make(ints(positions), ints(first), ints(last), block=block, grain=grain)
  lasting = last >= 511  # kept, or not expired at the end
  for tile, (_, num_kept, _, stop) in enumerate(np.asarray(made.ranges)[0, 0]):
    low, high = positions[0, tile][[0, -1]]
    seen_kept = np.sum(first[lasting] <= high)
    assert num_kept == -(-seen_kept // block)
    band = first[~lasting]
    seen = np.flatnonzero((band <= high) & (band + window >= low)) // grain
    assert stop - num_kept == (-(-(seen[-1] + 1 - seen[0]) * grain // block) if seen.size else 0)


def test_nothing_visible_is_not_visited():
  """Padding, and queries before every key."""
  positions = np.array([[[-2, -2], [0, 1], [5, 6]]])
  first = np.full((1, 1, 40), 3)
  made = make(ints(positions), ints(first), ints(np.full_like(first, NEVER)), block=32, grain=8)
  assert made.ranges[0, 0, :, plan.STOP].tolist() == [0, 0, 2] and made.ranges[0, 0, 2, plan.WHOLE] == 1


def test_cost_follows_what_is_visible():
  """T 32768, W 256 at an achieved CR of 8: a Hopper tile of four heads visits a sixth of what causal attention does."""
  tokens, window, tile, blocks = 32768, 256, gpu.Tile.of(4), gpu.default_blocks(128, 132)
  kept = (tokens / 8 - window - 1) / (tokens - window - 1)
  positions, first, last = text(np.random.default_rng(0), tokens, window, kept, tile.queries)
  made = make(ints(positions), ints(first), ints(last), block=blocks.kv, grain=gpu.GRAIN)
  visited = np.asarray(made.ranges)[..., plan.STOP].sum() * blocks.kv * tile.queries
  visible = np.minimum(last, tokens - 1) - first + 1
  dense = tokens * (tokens + 1) / 2
  print(f"dense / visited {dense / visited:.2f}, dense / visible {dense / visible.sum():.2f}")
  assert visited < 1.1 * visible.sum() and dense / visited > 6.5
  made = make(ints(positions), ints(first), ints(np.full_like(first, NEVER)), block=blocks.kv, grain=gpu.GRAIN)
  assert np.asarray(made.ranges)[..., plan.STOP].sum() * blocks.kv * tile.queries < 1.005 * dense


def test_running_count():
  rng = np.random.default_rng(0)
  for size in (1, 127, 128, 1000):
    flags = rng.random((2, size)) < 0.7
    np.testing.assert_array_equal(running_count(jnp.asarray(flags)), np.cumsum(flags, axis=1))
