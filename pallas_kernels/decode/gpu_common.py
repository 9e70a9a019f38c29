"""The Hopper decode kernel's sizes, the division of its work, and the merge of its partial results."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.common import compat, warpgroup
from pallas_kernels.common.compat import plgpu
from pallas_kernels.common.softmax import LOG2E, LOWEST


@dataclasses.dataclass(frozen=True)
class Blocks:
  """Sizes of the decode kernel.

  A worker computes on `block` slots at a time and has `stages` blocks in flight. `split` slots make one partial result;
  the remainder of a pair is cut into pieces of `rest` slots, which start last. `merged` partial results of a pair are
  loaded together, the next ones while these are merged.

  With `workers` 0 each pair has a block of threads of its own, which computes all of it: one launch and no partial
  results. `split`, `rest` and `merged` then mean nothing.
  """

  block: int
  stages: int
  split: int
  workers: int
  rest: int = 128
  merged: int = 8

  def __post_init__(self):
    if self.split % self.block or self.split == self.block or self.block % warpgroup.ROWS:
      raise ValueError(
        f"split {self.split} must be two or more times block {self.block}, and block a multiple of {warpgroup.ROWS}"
      )
    if self.merged < 1:
      raise ValueError(f"merged {self.merged} must be 1 or more")
    if self.rest % self.block or self.rest > self.split:
      raise ValueError(f"rest {self.rest} must be a multiple of block {self.block}, up to split {self.split}")

  @property
  def by_pair(self) -> bool:
    """Whether each pair has a block of threads of its own."""
    return self.workers == 0

  @property
  def whole(self) -> int:
    """Blocks of a whole chunk."""
    return self.split // self.block

  @property
  def piece(self) -> int:
    """Blocks of a piece of the remainder."""
    return self.rest // self.block

  def most_chunks(self, blocks: int) -> int:
    """The most chunks of a pair of up to `blocks` blocks."""
    if self.by_pair:
      return 1
    return max(blocks // self.whole + -(-min(self.whole - 1, blocks) // self.piece), 1)


@dataclasses.dataclass(frozen=True)
class Variant:
  """What a kernel is compiled for, besides the shapes of its arguments.

  `slots` a head in the contiguous cache, `pages` of `page` slots in the table (0: none), `scaled` pages of 8 bits, and
  whether to return the log-sum-exp, `lse`, and with it the slots' `mass`. In the cache, pairs of one number `layer` are
  `apart` pairs from those of the next (0: as many as there are). `softcap` caps natural scores.
  """

  slots: int
  page: int
  pages: int
  scaled: bool
  lse: bool
  mass: bool = False
  apart: int = 0
  softcap: float | None = None

  @property
  def sources(self) -> int:
    return (self.slots > 0) + (self.page > 0)

  def cache_blocks(self, sizes: Blocks) -> int:
    """Blocks of a pair in the contiguous cache, at most."""
    return -(-self.slots // sizes.block)

  def page_blocks(self, sizes: Blocks) -> int:
    """Blocks of a pair in pages, at most."""
    return -(-self.page * self.pages // sizes.block)

  def scores(self, sizes: Blocks) -> int:
    """Places of a query's scores: blocks of the cache, then of pages, at least one, since a pair without live slots
    has one."""
    return (self.cache_blocks(sizes) + max(self.page_blocks(sizes), self.page > 0)) * sizes.block

  def chunks(self, sizes: Blocks) -> int:
    """Partial results of a pair, at most."""
    return sizes.most_chunks(self.cache_blocks(sizes) + self.page_blocks(sizes))

  def draws(self, sizes: Blocks, pairs: int) -> bool:
    """Whether workers take numbers from a counter; no result depends on it.

    With pages only if an eighth of all slots may be more than a chunk a worker: otherwise hardly a number is taken, and
    XLA spends a microsecond clearing the counter before each call. A contiguous cache may be full.
    """
    return not self.page or pairs * (self.slots + self.page * self.pages) // 8 > sizes.workers * sizes.split


@dataclasses.dataclass(frozen=True)
class Tile:
  """A pair's result: `rows` >= G rows of H; each warpgroup merges `together` of them."""

  rows: int
  h: int
  together: int

  @classmethod
  def of(cls, group: int, h: int, apart: bool) -> Tile:
    """As many rows as 128 threads share evenly; `apart`: a warpgroup takes the fewest, one or two numbers a thread."""
    least = max(warpgroup.THREADS // h, 1)
    rows = -(-group // least) * least
    return cls(rows, h, least if apart else rows)

  @property
  def shape(self) -> tuple[int, int]:
    return self.rows, self.h


def chunks_of(lens, sizes: Blocks) -> tuple[jax.Array, jax.Array, jax.Array]:
  """(blocks, whole chunks, pieces of the remainder) of `lens` live slots, one count a source; one empty block without
  any."""
  i32 = jnp.int32
  blocks = sum(lax.div(live + i32(sizes.block - 1), i32(sizes.block)) for live in lens)
  blocks = jnp.maximum(blocks, 1)
  whole = lax.div(blocks, i32(sizes.whole))
  left = blocks - whole * sizes.whole
  return blocks, whole, lax.div(left + i32(sizes.piece - 1), i32(sizes.piece))


def find(starts, first, size: int, number):
  """The last of `size` places, a power of two, whose start is at most `number`; `starts[first:]` ascend from 0 on."""
  place, step = jnp.int32(0), size // 2
  while step:
    place = jnp.where(starts[first + place + step] <= number, place + step, place)
    step //= 2
  return place


def merge(pair, rows, chunks, most: int, together: int, part_ref, stat_ref, out_ref, lse_ref):
  """Merges some rows of a pair's partial results, `chunks()` of at most `most`, in order and `together` at a time.

  The first results are loaded before their number is known, which has to come from memory too.
  """
  shape = rows.size, part_ref.shape[-1]
  vector = next(n for n in (4, 2, 1) if shape[0] * shape[1] // warpgroup.THREADS % n == 0)
  layout = compat.strided_layout(shape, vector)
  spread = lambda x, dtype=jnp.float32: plgpu.layout_cast(jnp.full(shape, x, dtype), layout)

  def load(number, last):
    """Partial results of a batch: [(chunk, sum of values, maximum, sum of weights)]; the `last` again after it."""
    parts = []
    for i in range(together):
      chunk = number * together + i
      at = pair, jnp.minimum(chunk, last)
      top, total = (warpgroup.load_columns(stat_ref.at[*at, x, rows], shape, vector) for x in range(2))
      parts.append((chunk, plgpu.load(part_ref.at[*at, rows], layout=layout, optimized=False), top, total))
    return parts

  ahead = load(jnp.int32(0), jnp.int32(most - 1))
  count = chunks()

  def fold(number, carry):
    acc, top, total, parts = carry
    ahead = load(number + 1, count - 1)
    keep = lambda chunk, x, other: jnp.where(spread(chunk, jnp.int32) < spread(count, jnp.int32), x, spread(other))
    parts = [(keep(c, part, 0.0), keep(c, top, LOWEST), keep(c, total, 0.0)) for c, part, top, total in parts]
    new_top = functools.reduce(jnp.maximum, (part_top for _, part_top, _ in parts), top)
    scale = jnp.exp2(top - new_top)
    acc, total = acc * scale, total * scale
    for part, part_top, part_total in parts:
      weight = jnp.exp2(part_top - new_top)
      acc, total = acc + part * weight, total + part_total * weight
    return acc, new_top, total, ahead

  batches = lax.div(count + jnp.int32(together - 1), jnp.int32(together))
  acc, top, total, _ = lax.fori_loop(0, batches, fold, (spread(0.0), spread(LOWEST), spread(0.0), ahead))
  nothing = total == 0.0
  out = (acc / jnp.where(nothing, 1.0, total)).astype(out_ref.dtype)
  warpgroup.store_rows(out, out_ref.at[pair], rows.start, vector)
  if lse_ref is not None:
    logs = (top + jnp.log(jnp.where(nothing, 1.0, total)) * LOG2E) * (1 / LOG2E)
    lse_ref[pair, rows] = jnp.where(nothing, -jnp.inf, logs)


def write_alone(acc, top, total, out_ref, lse_ref):
  """Writes the result of a pair that one worker computed: acc [H, 8], top and total [8] in registers."""
  nothing = total == 0.0
  one = jnp.where(nothing, 1.0, total)
  warpgroup.store_transposed((acc / lax.broadcast_in_dim(one, acc.shape, [1])).astype(out_ref.dtype), out_ref)
  if lse_ref is not None:
    logs = (top + jnp.log(one) * LOG2E) * (1 / LOG2E)
    warpgroup.store_columns(jnp.where(nothing, -jnp.inf, logs), lse_ref)
