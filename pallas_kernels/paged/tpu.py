"""Slots written into pages of 8 bits on TPUs, in place.

XLA scatters 8-bit numbers into an array of another memory layout, and so copies the whole pool twice. Here the grid has
one step for each tile of 32 slots, the smallest piece that memory keeps together, that gets new slots: the step reads
the tile, puts them in, and writes it back.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from pallas_kernels.common import compat_tpu
from pallas_kernels.common.compat_tpu import pltpu
from pallas_kernels.common.dispatch import Expected
from pallas_kernels.paged.pages import pages_at

TILE = compat_tpu.tile(jnp.int8)  # slots that memory keeps together
ENTRIES = 2**15  # tiles of a call; four numbers each take half a MiB of scalar memory


def write_pages(pool, table, slots, rows):
  """See `api.write_pages`; pages of int8 or float8_e4m3fn, a multiple of 32 slots; a donated `pool` stays in place.

  Raises:
    NotImplementedError: another device; pages of more bits, which XLA scatters in place, or of no whole tiles.
  """
  compat_tpu.require_tpu()
  page = pool.shape[1]
  if page % TILE or pool.dtype.itemsize != 1:
    refusal = Expected if pool.dtype.itemsize != 1 else NotImplementedError
    raise refusal(f"pages of {page} slots in {pool.dtype}: must be 8 bits, a multiple of {TILE}")
  flat = lambda x, n: x.reshape(-1, *x.shape[x.ndim - n :])
  table, slots, rows = flat(table, 1), flat(slots, 1), flat(rows, 2)
  archives, most, _ = rows.shape
  end = table.shape[1] * page
  inside = (slots >= 0) & (slots < end)
  first, count = jnp.min(jnp.where(inside, slots, end), axis=1), jnp.sum(inside, axis=1, dtype=jnp.int32)
  if most > 1:  # rows that are written come first
    order = jnp.argsort(~inside, axis=1, stable=True)
    rows = jnp.take_along_axis(rows, order[..., None], axis=1)
  tiles = 1 if most == 1 else (most + TILE - 2) // TILE + 1
  together = max(ENTRIES // tiles, 1)
  for begin in range(0, archives, together):
    pool = _write(pool, tiles, *(x[begin : begin + together] for x in (table, first, rows, count)))
  return pool


def _write(pool, tiles: int, table, first, rows, count):
  """`pool` with the first `count` [N] of `rows` [N, X, width] in slots `first` [N], first + 1, ... of N archives.

  The new slots of an archive lie in at most `tiles` tiles; N * tiles is at most ENTRIES.
  """
  (number, page, width), (archives, most, _) = pool.shape, rows.shape
  # The archive's tile `at` is tile t of its new slots, and its slots `low` to `high` are new.
  at = (first // TILE)[:, None] + jnp.arange(tiles)
  low, high = (jnp.clip(x[:, None] - at * TILE, 0, TILE) for x in (first, first + count))
  each = page // TILE
  place = pages_at(table, at // each) * each + at % each
  wanted = ((low < high) & (place >= 0) & (place < number * each)).reshape(-1)
  if most == 1:
    new = jnp.broadcast_to(rows, (archives, TILE, width))
  else:
    source = at[..., None] * TILE + jnp.arange(TILE) - first[:, None, None]
    source = jnp.clip(source, 0, most - 1).reshape(archives, tiles * TILE)
    new = jnp.take_along_axis(rows, source[..., None], axis=1).reshape(archives * tiles, TILE, width)
  # Tiles to write come first. With nothing to write, the one step writes a tile back unchanged.
  order = jnp.argsort(~wanted).astype(jnp.int32)
  scalars = order, jnp.where(wanted, place.reshape(-1), 0), *(jnp.where(wanted, x.reshape(-1), 0) for x in (low, high))

  def body(order_ref, place_ref, low_ref, high_ref, new_ref, old_ref, out_ref):
    entry = order_ref[pl.program_id(0)]
    slot = lax.broadcasted_iota(jnp.int32, (TILE, width), 0)
    inside = (slot >= low_ref[entry]) & (slot < high_ref[entry])
    bits = lambda ref: pltpu.bitcast(ref[0], jnp.int8).astype(jnp.int32)
    out_ref[0] = pltpu.bitcast(jnp.where(inside, bits(new_ref), bits(old_ref)).astype(jnp.int8), pool.dtype)

  spec = lambda index: pl.BlockSpec((1, TILE, width), index)
  of_pool = lambda i, order, place, low, high: (place[order[i]], 0, 0)
  out = pl.pallas_call(
    body,
    out_shape=jax.ShapeDtypeStruct((number * each, TILE, width), pool.dtype),
    grid_spec=pltpu.PrefetchScalarGridSpec(
      num_scalar_prefetch=4,
      grid=(jnp.maximum(jnp.sum(wanted, dtype=jnp.int32), 1),),
      in_specs=[spec(lambda i, order, *_: (order[i], 0, 0)), spec(of_pool)],
      out_specs=spec(of_pool),
    ),
    input_output_aliases={5: 0},
    name="write_pages",
  )(*(x.astype(jnp.int32) for x in scalars), new, pool.reshape(number * each, TILE, width))
  return out.reshape(pool.shape)
