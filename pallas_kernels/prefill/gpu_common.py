"""What the Hopper prefill kernels share: their sizes, and which rows a tile of queries holds."""

from __future__ import annotations

import dataclasses
import itertools

import jax.numpy as jnp
from jaxtyping import Array, Float, Shaped

from pallas_kernels.common import compat
from pallas_kernels.common.pipeline import WARPGROUPS
from pallas_kernels.common.warpgroup import ROWS

GRAIN = 32  # a band begins at a multiple of this many rows


@dataclasses.dataclass(frozen=True)
class Blocks:
  """`kv` keys a block, `stages` blocks of keys and of values in shared memory.

  `workers` blocks of threads take all tiles one by one from a counter, and load the next one's queries and keys
  meanwhile; 0: each tile has its own.
  """

  kv: int = 128
  stages: int = 2
  compute_registers: int = 240
  memory_registers: int = 24
  workers: int = 0

  def __post_init__(self):
    if self.kv % ROWS:  # a swizzled row of the second product's operand
      raise ValueError(f"kv {self.kv} must be a multiple of {ROWS}")


def default_blocks(head_dim: int, processors: int) -> Blocks:
  """Block sizes by head size: 64 KiB of keys and as much of values. A worker a processor; all tiles at once in the
  interpreter, which runs workers one after the other.

  At head size 256 the sums of 64 rows fill half of a thread's registers, so blocks have 64 keys, and a tile's queries
  take 64 KiB of shared memory, so there is no room for those of a next one: each tile has its own block of threads.
  """
  if head_dim == 256:
    return Blocks(kv=64)
  return Blocks(stages=4 if head_dim == 64 else 2, workers=0 if compat.interpreting() else processors)


@dataclasses.dataclass(frozen=True)
class Piece:
  """`count` rows of a tile from `row` of a warpgroup on: one head's queries, from the tile's `first` on."""

  warpgroup: int
  row: int
  head: int
  first: int
  count: int


@dataclasses.dataclass(frozen=True)
class Tile:
  """Which rows a tile holds: `queries` of each of `heads` query heads, head after head, then unused rows."""

  heads: int
  queries: int

  @classmethod
  def of(cls, group: int) -> Tile:
    """As many heads of the group together as leave at most an eighth of the rows unused."""
    rows = WARPGROUPS * ROWS
    for heads in range(min(group, 8), 0, -1):
      queries = rows // heads // 8 * 8  # shared memory is tiled by 8 rows
      if group % heads == 0 and heads * queries >= rows * 7 // 8:
        return cls(heads, queries)
    raise AssertionError("one head fills a tile")

  def pieces(self) -> list[Piece]:
    """The tile cut where a head or a warpgroup ends."""
    cuts = sorted({*range(0, self.heads * self.queries + 1, self.queries), ROWS})
    return [Piece(a // ROWS, a % ROWS, a // self.queries, a % self.queries, b - a) for a, b in itertools.pairwise(cuts)]

  def arrange(self, x: Shaped[Array, "B tiles queries"], fill) -> Shaped[Array, "B tiles 128"]:
    """A number of each query, for every row of its tile; `fill` for unused rows."""
    rows = jnp.tile(x, (1, 1, self.heads))
    return jnp.pad(rows, ((0, 0), (0, 0), (0, WARPGROUPS * ROWS - rows.shape[2])), constant_values=fill)

  def split(self, q: Float[Array, "B T N H"]) -> Float[Array, "B parts tiles 128 H"]:
    """Queries in the rows of their tiles, zeros in unused ones; T is a multiple of `queries`."""
    b, t, n, h = q.shape
    rows = q.reshape(b, t // self.queries, self.queries, n // self.heads, self.heads, h)
    rows = jnp.transpose(rows, (0, 3, 1, 4, 2, 5)).reshape(b, n // self.heads, t // self.queries, -1, h)
    return jnp.pad(rows, ((0, 0),) * 3 + ((0, WARPGROUPS * ROWS - rows.shape[3]), (0, 0)))

  def join(self, x: Shaped[Array, "B parts tiles 128"]) -> Shaped[Array, "B T N"]:
    """The inverse of `split` for one number a row."""
    b, parts, tiles, _ = x.shape
    x = x[..., : self.heads * self.queries].reshape(b, parts, tiles, self.heads, self.queries)
    return jnp.transpose(x, (0, 2, 4, 1, 3)).reshape(b, tiles * self.queries, parts * self.heads)
