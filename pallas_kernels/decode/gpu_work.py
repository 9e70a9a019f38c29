"""The Hopper decode kernel's sizes, the division of its work, and the merge of its parts."""

from __future__ import annotations

import dataclasses
import functools
import math

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from pallas_kernels import compat
from pallas_kernels.compat import plgpu

LOG2E = math.log2(math.e)
# A finite stand-in for -inf as the maximum of no scores: exp2(-inf - NEVER) is 0, not NaN.
NEVER = -1e30
# Pairs whose lengths are summed at a time in the scan, all of them read together; then so many fewer.
SCAN, FEWER = 32, 8


@dataclasses.dataclass(frozen=True)
class Blocks:
  """Sizes. `block` slots are computed with at a time, `stages` blocks of them in flight a worker; `split` slots make a
  partial result; `fused`: the merge is part of the same kernel, once a semaphore tells that all results are there."""

  block: int
  stages: int
  split: int
  workers: int
  fused: bool = False

  def __post_init__(self):
    if self.split % self.block or self.block % compat.ROWS:
      raise ValueError(f"split {self.split} must be a multiple of block {self.block}, and that of {compat.ROWS}")


@dataclasses.dataclass(frozen=True)
class Tile:
  """A pair's result in the registers of a warpgroup: `rows` >= G rows of H, `vector` elements together."""

  rows: int
  h: int

  @classmethod
  def of(cls, group: int, h: int) -> Tile:
    return cls(group + group % 2 if h == 64 else group, h)  # 128 threads must share it evenly

  @property
  def shape(self) -> tuple[int, int]:
    return self.rows, self.h

  @property
  def vector(self) -> int:
    each = self.rows * self.h // 128
    return next(v for v in (4, 2, 1) if each % v == 0)

  @property
  def batch(self) -> int:
    """Partial results loaded together."""
    return max(4, min(16, 64 * 128 // (self.rows * self.h)))


def blocks_of(lens, pair, block: int):
  """Blocks of a pair's live slots, `lens` of each source; one, with nothing in it, where there are none."""
  count = sum(lax.div(live[pair] + jnp.int32(block - 1), jnp.int32(block)) for live in lens)
  return jnp.maximum(count, 1)


def share(lens, pairs: int, sizes: Blocks, worker):
  """Where a worker begins and ends: ((pair, chunk, blocks before the pair), end), the end in blocks of the whole list.

  A chunk belongs to the worker in whose part of the list it begins.
  """
  i32 = jnp.int32
  groups = -(-pairs // SCAN)

  def blocks(pair):
    count = blocks_of(lens, pair, sizes.block)
    return jnp.where(pair < pairs, count, 0) if pairs % SCAN else count

  def several(first, count):
    return sum(blocks(first + i) for i in range(count))

  total = lax.fori_loop(0, groups, lambda i, total: total + several(i * SCAN, SCAN), i32(0))
  each, rest = lax.div(total, i32(sizes.workers)), lax.rem(total, i32(sizes.workers))
  begin = worker * each + jnp.minimum(worker, rest)
  end = begin + each + (worker < rest).astype(i32)

  def further(state):
    number, before, count = state
    return (before + count <= begin) & (number < groups - 1)

  def skip(state):
    number, before, count = state
    return number + 1, before + count, several((number + 1) * SCAN, SCAN)

  number, before, _ = lax.while_loop(further, skip, (i32(0), i32(0), several(i32(0), SCAN)))
  pair = number * SCAN
  for size, times in ((FEWER, SCAN // FEWER - 1), (1, FEWER)):
    first, passing = pair, jnp.bool_(True)
    for i in range(times):
      count = several(first + i * size, size)
      passing = passing & (before + count <= begin)
      pair = pair + jnp.where(passing, size, 0)
      before = before + jnp.where(passing, count, 0)
  per_chunk = sizes.split // sizes.block
  chunk = lax.div(begin - before + i32(per_chunk - 1), i32(per_chunk))
  pair = jnp.minimum(pair, pairs - 1)
  count = blocks_of(lens, pair, sizes.block)
  beyond = chunk * per_chunk >= count
  start = jnp.where(beyond, pair + 1, pair), jnp.where(beyond, 0, chunk), jnp.where(beyond, before + count, before)
  return start, end


def merge(pair, chunks, tile: Tile, part_ref, stat_ref, out_ref, lse_ref):
  """Merges a pair's partial results in their order, and writes its output."""
  layout = compat.strided_layout(tile.shape, tile.vector)
  full = lambda x: plgpu.layout_cast(jnp.full(tile.shape, x, jnp.float32), layout)

  def several(number, carry):
    acc, top, total = carry
    parts = []
    for i in range(tile.batch):
      chunk = number * tile.batch + i
      dead = jnp.where(chunk < chunks, 0.0, NEVER)
      chunk = jnp.minimum(chunk, chunks - 1)
      stats = (compat.load_columns(stat_ref.at[pair, chunk, x, pl.ds(0, tile.rows)], tile.shape, tile.vector)
               for x in range(2))  # fmt: skip
      part_top, part_total = stats
      part = plgpu.load(part_ref.at[pair, chunk], layout=layout, optimized=False)
      parts.append((part, part_top + dead, part_total))
    new_top = functools.reduce(jnp.maximum, (part_top for _, part_top, _ in parts), top)
    scale = jnp.exp2(top - new_top)
    acc, total = acc * scale, total * scale
    for part, part_top, part_total in parts:
      weight = jnp.exp2(part_top - new_top)
      acc, total = acc + part * weight, total + part_total * weight
    return acc, new_top, total

  batches = lax.div(chunks + jnp.int32(tile.batch - 1), jnp.int32(tile.batch))
  acc, top, total = lax.fori_loop(0, batches, several, (full(0.0), full(NEVER), full(0.0)))
  nothing = total == 0.0
  out_ref[pair] = (acc / jnp.where(nothing, 1.0, total)).astype(out_ref.dtype)
  if lse_ref is not None:
    logs = (top + jnp.log(jnp.where(nothing, 1.0, total)) * LOG2E) * (1 / LOG2E)
    lse_ref[pair] = jnp.where(nothing, -jnp.inf, logs)
