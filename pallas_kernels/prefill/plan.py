"""The keys that each tile of queries visits: computed in the graph before the prefill kernels.

Per row and KV head, the keys that any query sees are gathered, in their given order:

    [ kept: visible from some query on to the last one | zeros up to a block | band: those that expire before | zeros ]

Kept keys that every query sees (a cached prefix, wherever it was) come first. A tile of queries visits one range of
each part: the kept keys up to its last query, and the band around its own position. The ranges follow from the smallest
and largest bounds of `grain` keys at a time, so they are right for keys in any order; with keys in the order of their
positions, as caches have them, they are as short as what is visible.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Shaped

NEVER = np.int32(2**30)  # as the first position: a key that no query sees; as the last one: a key never evicted
WIDTH = 128  # flags counted by one product
WHOLE, KEPT, START, STOP = range(4)  # of a plan's ranges


class Plan(NamedTuple):
  """For R rows of gathered keys and `tiles` tiles of queries.

  `source` [B, K, R]: the key that a row holds, S if none. `bounds` [B, K, 2, R]: first and last position that sees it.
  `row` [B, K, S]: the row that holds a key, R or more if none. `ranges` [B, K, tiles, 4]: WHOLE, blocks of kept keys
  that need no mask; KEPT, all blocks of kept keys; START, first row of the band; STOP, all blocks. Block i >= KEPT
  begins at row START + (i - KEPT) * block, an earlier one at i * block.
  """

  source: jax.Array
  bounds: jax.Array
  ranges: jax.Array
  row: jax.Array


def triangle(size: int, above: int = 0) -> Float[Array, "size size"]:
  """Ones from the diagonal `above` the main one upwards; a constant if small, which costs no kernel of its own."""
  np_or_jnp = np if size <= WIDTH else jnp
  return jnp.asarray(np_or_jnp.triu(np_or_jnp.ones((size, size), np.float32), above))


def running_count(flags: Bool[Array, "*batch S"]) -> Int[Array, "*batch S"]:
  """Flags up to each one, inclusive; S <= 2^24.

  Two products with triangles of ones, which every device does faster than a scan. They are exact in whatever precision
  it multiplies: the factors are 0, 1 and counts up to 128, the sums float32.
  """
  *batch, s = flags.shape
  blocks = -(-s // WIDTH)
  x = jnp.pad(flags, [(0, 0)] * len(batch) + [(0, blocks * WIDTH - s)]).reshape(*batch, blocks, WIDTH)
  inside = jnp.einsum("...bw,wv->...bv", x.astype(jnp.float32), triangle(WIDTH))
  before = jnp.einsum("...b,bc->...c", inside[..., -1], triangle(blocks, 1))
  counts = inside + before[..., None]
  return counts.astype(jnp.int32).reshape(*batch, blocks * WIDTH)[..., :s]


def make(
  positions: Int[Array, "B tiles M"],
  k_first: Int[Array, "B K S"],
  k_last: Int[Array, "B K S"],
  *,
  block: int,
  grain: int,
) -> Plan:
  """Plans visits of `block` keys at a time, beginning at multiples of `grain`, which divides `block`.

  Args:
    positions: of the queries of each tile; below -1 for padding, which sees nothing.
    k_first, k_last: as in `api.prefill_attention`.
  """
  b, k, s = k_first.shape
  rows = -(-s // block) * block + 2 * block  # the gap between the parts, and a last block that begins before the end
  real = positions >= -1
  low = jnp.min(jnp.where(real, positions, NEVER), axis=-1)  # [B, tiles]
  high = jnp.max(jnp.where(real, positions, -2), axis=-1)
  lowest, highest = (x[:, None, None] for x in (low.min(axis=-1), high.max(axis=-1)))

  live = (k_first <= k_last) & (k_first <= highest) & (k_last >= lowest)
  lasting = live & (k_last >= highest)
  early = lasting & (k_first <= lowest)
  counts = running_count(jnp.stack([early, lasting & ~early, live & ~lasting], axis=2))  # [B, K, 3, S]
  num_early, num_late = counts[:, :, 0, -1:], counts[:, :, 1, -1:]
  num_kept = num_early + num_late
  band = (num_kept + (block - 1)) // block * block  # its first row
  row = jnp.where(early, 0, jnp.where(lasting, num_early, band))
  row = row + jnp.where(early, counts[:, :, 0], jnp.where(lasting, counts[:, :, 1], counts[:, :, 2])) - 1
  # Rows past the end are dropped; each key its own, so that the promise of unique ones holds.
  index = jnp.arange(s, dtype=jnp.int32)
  row = jnp.where(live, row, rows + index)
  pair = jnp.arange(b)[:, None, None], jnp.arange(k)[:, None]
  source = jnp.full((b, k, rows), s, jnp.int32).at[*pair, row].set(index, mode="drop", unique_indices=True)
  first, last = take(k_first, source, NEVER), take(k_last, source, -1)

  grains = rows // grain
  split = lambda x: x.reshape(b, k, 1, grains, grain)
  first_low, first_high, last_high = split(first).min(-1), split(first).max(-1), split(last).max(-1)
  number = jnp.arange(grains, dtype=jnp.int32)
  low, high = low[:, None, :, None], high[:, None, :, None]
  kept = number * grain < num_kept[:, :, None]  # [B, K, 1, grains]
  begun = first_low <= high  # [B, K, tiles, grains]
  kept_stop = jnp.max(jnp.where(kept & begun, number + 1, 0), axis=-1) * grain
  whole = jnp.min(jnp.where(kept & (first_high <= low), grains, number), axis=-1) * grain
  in_band = ~kept & begun & (last_high >= low)
  start = jnp.min(jnp.where(in_band, number, grains), axis=-1) * grain
  stop = jnp.max(jnp.where(in_band, number + 1, 0), axis=-1) * grain
  kept_blocks = (kept_stop + (block - 1)) // block
  whole_blocks = jnp.minimum(whole // block, kept_blocks)
  band_blocks = (jnp.maximum(stop - start, 0) + (block - 1)) // block
  ranges = jnp.stack([whole_blocks, kept_blocks, jnp.where(band_blocks > 0, start, 0), kept_blocks + band_blocks], -1)
  return Plan(source, jnp.stack([first, last], axis=2), ranges.astype(jnp.int32), row)


def visitors(
  positions: Int[Array, "B tiles M"], bounds: Int[Array, "B K 2 R"], *, block: int
) -> Int[Array, "B K blocks 3"]:
  """The tiles of queries that see each block of gathered keys: (start, whole, stop), the mirror of a plan's ranges.

  Tiles `start` to `whole` need a mask, tiles `whole` to `stop` none: each query in them sees the whole block.

  Args:
    positions: of the queries that count; below -1 for the others, whose pairs an unmasked tile may contain.
  """
  b, k, _, r = bounds.shape
  tiles = positions.shape[1]
  real = positions >= -1
  low = jnp.min(jnp.where(real, positions, NEVER), axis=-1)[:, None, None]  # [B, 1, 1, tiles]
  high = jnp.max(jnp.where(real, positions, -2), axis=-1)[:, None, None]
  split = lambda x: x.reshape(b, k, r // block, 1, block)
  first, last = split(bounds[:, :, 0]), split(bounds[:, :, 1])
  seen = (first.min(-1) <= high) & (last.max(-1) >= low)  # [B, K, blocks, tiles]
  whole = (first.max(-1) <= low) & (last.min(-1) >= high)
  number = jnp.arange(tiles, dtype=jnp.int32)
  stop = jnp.max(jnp.where(seen, number + 1, 0), axis=-1)
  start = jnp.minimum(jnp.min(jnp.where(seen, number, tiles), axis=-1), stop)
  partly = ~whole & (number >= start[..., None]) & (number < stop[..., None])
  return jnp.stack([start, jnp.maximum(start, jnp.max(jnp.where(partly, number + 1, 0), axis=-1)), stop], axis=-1)


def take(x: Shaped[Array, "B K X *n"], source: Int[Array, "B K R"], fill) -> Shaped[Array, "B K R *n"]:
  """x[b, k, source[b, k, r]], `fill` past the end."""
  return jax.vmap(jax.vmap(lambda x, i: x.at[i].get(mode="fill", fill_value=fill)))(x, source)


def gather(x: Float[Array, "B K S H"], source: Int[Array, "B K R"]) -> Float[Array, "B K R H"]:
  """Rows of keys or values in the order of the plan, zeros where it holds none: dead keys may be NaN."""
  return take(x, source, 0)
