"""How the Hopper decode kernel divides live slots among blocks of threads: two ways.

A pair is a row and one of its KV heads. A division names the chunks of all pairs by numbers from 0 to `total`.
`item(number)` gives a chunk's pair, its number in the pair, its first block and how many blocks it has;
`live(source, pair)` a pair's live slots in the cache or in pages. Its constructor runs at the start of the kernel:
lengths come from global memory, `scratch` is shared memory.
"""

from __future__ import annotations

from collections.abc import Sequence

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from pallas_kernels.common import warpgroup
from pallas_kernels.common.compat import plgpu
from pallas_kernels.decode.gpu_common import Blocks, chunks_of, find


def padded(pairs: int) -> int:
  """Places for the numbers of all pairs: a power of two, of which all threads have equally many."""
  return max(warpgroup.THREADS, 1 << (pairs - 1).bit_length())


class Listed:
  """Chunks of `Blocks.split` slots of all pairs, then the shorter pieces of what is left of each.

  Chunks are found by their number in the sums of the pairs' counts, which 128 threads compute together.
  """

  def __init__(self, sizes: Blocks, lengths: Sequence, scratch: Sequence):
    *self.lens, self.starts, sums = scratch
    self.sizes, self.pairs, self.listed = sizes, lengths[0].shape[0], len(self.lens[0])
    live = [warpgroup.load_padded(ref, self.listed, -1) for ref in lengths]
    _, *counts = chunks_of([jnp.maximum(x, 0) for x in live], sizes)
    before, self.every = zip(
      *(warpgroup.running_sum(jnp.where(live[0] < 0, 0, count), sums.at[i]) for i, count in enumerate(counts)),
      strict=True,
    )
    for target, x in zip(self.lens, live, strict=True):
      target[...] = x
    for i in range(2):
      self.starts[pl.ds(i * self.listed, self.listed)] = before[i]
    plgpu.commit_smem()
    self.total = sum(self.every)

  @staticmethod
  def scratch(pairs: int, sources: int) -> list:
    listed = padded(pairs)
    shapes = [(listed,)] * sources + [(2 * listed,), (2, warpgroup.THREADS // 32)]
    return [plgpu.SMEM(shape, jnp.int32) for shape in shapes]

  def live(self, source: int, pair):
    return self.lens[source][pair]

  def item(self, number):
    i32, sizes = jnp.int32, self.sizes
    is_piece = number >= self.every[0]
    number = jnp.where(is_piece, number - self.every[0], number)
    first = jnp.where(is_piece, i32(self.listed), 0)
    pair = jnp.minimum(find(self.starts, first, self.listed, number), self.pairs - 1)
    number = number - self.starts[first + pair]
    count, whole, _ = chunks_of([x[pair] for x in self.lens], sizes)
    left = whole * sizes.whole + number * sizes.piece  # where a piece begins
    return (
      pair,
      jnp.where(is_piece, whole + number, number),
      jnp.where(is_piece, left, number * sizes.whole),
      jnp.where(is_piece, jnp.minimum(count - left, sizes.piece), sizes.whole),
    )


class Own:
  """All blocks of a pair, in a block of threads of its own: one chunk."""

  total = 1

  def __init__(self, sizes: Blocks, lengths: Sequence, scratch: Sequence):
    del scratch
    self.sizes, self.pair = sizes, lax.axis_index("pair")
    self.lens = [ref[self.pair] for ref in lengths]

  @staticmethod
  def scratch(pairs: int, sources: int) -> list:
    return []

  def live(self, source: int, pair):
    del pair  # the only one
    return self.lens[source]

  def item(self, number):
    del number
    count, _, _ = chunks_of(self.lens, self.sizes)
    return self.pair, jnp.int32(0), jnp.int32(0), count
