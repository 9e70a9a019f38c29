"""Prefill attention on Hopper GPUs with Pallas Mosaic GPU.

The keys that any query sees are gathered first (`plan`), so that far blocks are dense. Then FlashAttention-3's shape
(arXiv 2407.08608): in each block two warpgroups compute, 64 rows each, and a third one feeds them keys and values by
TMA. The 128 rows of a tile are several query heads of one KV head, `Tile.queries` neighbouring queries of each: the
fewer queries a tile spans, the less of the band it visits that only some of its rows see. Blocks that all queries of a
tile see come first and are not masked; in the others, at the diagonal and in the band, each pair is tested.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from pallas_kernels.common import compat, tuned
from pallas_kernels.common.compat import plgpu
from pallas_kernels.common.warpgroup import ROWS
from pallas_kernels.prefill import plan as planning
from pallas_kernels.prefill.plan import KEPT, START, STOP, WHOLE

LOG2E = math.log2(math.e)
# A finite stand-in for -inf as the running maximum of a row that has seen no key: exp2(-inf - M) is 0, not NaN.
NEVER = -1e30
WARPGROUPS = 2  # that compute; one more moves data
GRAIN = 32  # a band begins at a multiple of so many rows


@dataclasses.dataclass(frozen=True)
class Blocks:
  """`kv` keys a block, `stages` blocks of keys and of values in shared memory."""

  kv: int = 128
  stages: int = 2
  compute_registers: int = 240
  memory_registers: int = 24

  def __post_init__(self):
    if self.kv % ROWS:  # a swizzled row of the second product's operand
      raise ValueError(f"kv {self.kv} must be a multiple of {ROWS}")


def default_blocks(head_dim: int) -> Blocks:
  """Block sizes by head size: 64 KiB of keys and as much of values."""
  return Blocks(stages=4 if head_dim == 64 else 2)


@dataclasses.dataclass(frozen=True)
class Piece:
  """`count` rows of a tile, from `row` of a warpgroup: queries of one head, from the tile's `first` on."""

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


def prefill_attention(
  q, keys, values, q_pos, k_first, k_last, *, lse=False, query_weights=None, blocks: Blocks | None = None
):
  """See `api.prefill_attention`; bfloat16 or float16, head size 64 or 128.

  Raises:
    NotImplementedError: another device, dtype or head size; log-sum-exp and mass.
  """
  compat.require_hopper()
  if lse or query_weights is not None:
    raise NotImplementedError("returns no log-sum-exp and no mass of keys")
  _, t, n, h = q.shape
  if not (q.dtype == keys.dtype == values.dtype and q.dtype in (jnp.bfloat16, jnp.float16)):
    raise NotImplementedError(
      f"q, keys, values must all be bfloat16 or all float16, not {q.dtype}, {keys.dtype}, {values.dtype}"
    )
  if h not in (64, 128):
    raise NotImplementedError(f"head size {h}: only 64 and 128")
  blocks = blocks or tuned.blocks("prefill", tuned.shape_class(H=h), default_blocks(h))
  tile = Tile.of(n // keys.shape[1])
  return _attend(tile, blocks, *_prepare(tile, blocks, q, keys, values, q_pos, k_first, k_last))[:, :t]


@functools.partial(jax.jit, static_argnums=(0, 1))
def _prepare(tile: Tile, blocks: Blocks, q, keys, values, q_pos, k_first, k_last):
  """The arguments of `_attend`."""
  b, t = q_pos.shape
  pad = -t % tile.queries
  positions = jnp.pad(q_pos.astype(jnp.int32), ((0, 0), (0, pad)), constant_values=-2)
  positions = positions.reshape(b, (t + pad) // tile.queries, tile.queries)
  plan = planning.make(positions, k_first, k_last, block=blocks.kv, grain=GRAIN)
  rows = jnp.tile(positions, (1, 1, tile.heads))
  unused = WARPGROUPS * ROWS - rows.shape[2]
  rows = jnp.pad(rows, ((0, 0), (0, 0), (0, unused)), constant_values=-2).reshape(*rows.shape[:2], WARPGROUPS, ROWS)
  keys, values = (planning.gather(x, plan.source) for x in (keys, values))
  return jnp.pad(q, ((0, 0), (0, pad), (0, 0), (0, 0))), keys, values, rows, plan.bounds, plan.ranges


def _attend(tile: Tile, blocks: Blocks, q, keys, values, rows, bounds, ranges):
  """q [B, T, N, H], keys and values [B, K, R, H], rows [B, tiles, 2, 64]: positions; bounds, ranges: see `Plan`."""
  b, _, n, h = q.shape
  tiles, group = rows.shape[1], n // keys.shape[1]
  parts = group // tile.heads  # of a group of query heads, each with tiles of its own
  block, stages = blocks.kv, blocks.stages
  scale = h**-0.5 * LOG2E  # scores in units of log 2: exp2 is what the hardware has
  i32 = jnp.int32
  pieces = tile.pieces()

  def body(q_ref, k_ref, v_ref, rows_ref, bounds_ref, ranges_ref, out_ref, *scratch):
    q_smem, k_smem, v_smem, rows_smem, bounds_smem, q_ready, k_ready, v_ready, k_free, v_free, turn = scratch
    part, batch, wg = lax.axis_index("part"), lax.axis_index("batch"), lax.axis_index("wg")
    kv_head = lax.div(part, i32(parts))
    # The last tiles have the most keys: they start first.
    number = (tiles - 1) - lax.axis_index("tile")
    whole, kept, band_start, stop = (ranges_ref[batch, kv_head, number, i] for i in (WHOLE, KEPT, START, STOP))

    def here(ref, piece):
      """The part of q or of the output that a piece holds."""
      first = number * tile.queries + piece.first
      return ref.at[batch, pl.ds(first, piece.count), part * tile.heads + piece.head]

    def take_turn():
      plgpu.barrier_arrive(turn)
      plgpu.barrier_wait(turn)

    @pl.when(wg < WARPGROUPS)
    def _compute():
      plgpu.set_max_registers(blocks.compute_registers, action="increase")
      plgpu.barrier_wait(q_ready)
      positions = plgpu.load(rows_smem.at[wg], layout=compat.row_layout())
      row = lambda x: plgpu.layout_cast(jnp.full((ROWS,), x, jnp.float32), compat.row_layout())
      acc = plgpu.layout_cast(jnp.zeros((ROWS, h), jnp.float32), plgpu.Layout.WGMMA)

      # The warpgroups take turns: one multiplies while the other computes its exponentials.
      pl.when(wg == 1)(take_turn)

      def step(i, carry, masked):
        acc, top, total = carry
        slot = lax.rem(i, i32(stages))
        plgpu.barrier_wait(k_ready.at[slot])
        s = compat.dot(q_smem.at[wg], k_smem.at[slot].transpose((1, 0)), then=take_turn)
        if masked:
          bound = lambda x: plgpu.load(bounds_smem.at[slot, x], layout=compat.column_layout())
          first, last = (lax.broadcast_in_dim(bound(x), s.shape, [1]) for x in range(2))
          query = lax.broadcast_in_dim(positions, s.shape, [0])
          s = jnp.where((first <= query) & (query <= last), s, -jnp.inf)
        compat.release(k_free.at[slot])
        # The maximum is kept scaled, so that scaling and subtracting are one instruction.
        new_top = jnp.maximum(top, s.max(axis=1) * scale)
        shrink = jnp.exp2(top - new_top)
        p = jnp.exp2(s * scale - lax.broadcast_in_dim(new_top, s.shape, [0]))
        acc = acc * lax.broadcast_in_dim(shrink, acc.shape, [0])
        total = total * shrink + p.sum(axis=1)
        p16 = p.astype(q.dtype)
        acc, total, new_top, p16 = lax.optimization_barrier((acc, total, new_top, p16))
        plgpu.barrier_arrive(turn)
        plgpu.barrier_wait(v_ready.at[slot])
        plgpu.barrier_wait(turn)
        acc = compat.accumulate(acc, p16, v_smem.at[slot])
        compat.release(v_free.at[slot])
        return acc, new_top, total

      carry = lax.fori_loop(0, whole, functools.partial(step, masked=False), (acc, row(NEVER), row(0.0)))
      acc, _, total = lax.fori_loop(whole, stop, functools.partial(step, masked=True), carry)
      pl.when(wg == 0)(take_turn)

      # Padding, which took part in the blocks without a mask, and rows that saw nothing give zeros.
      real = (positions >= -1) & (total > 0.0)
      weight = lax.broadcast_in_dim(jnp.where(real, 1 / jnp.where(real, total, 1.0), 0.0), acc.shape, [0])
      q_smem[wg] = jnp.where(weight > 0.0, acc * weight, 0.0).astype(q.dtype)
      plgpu.commit_smem()
      for piece in pieces:
        source = q_smem.at[piece.warpgroup, pl.ds(piece.row, piece.count)]
        store = functools.partial(plgpu.copy_smem_to_gmem, source, here(out_ref, piece))
        pl.when(wg == piece.warpgroup)(store)
      plgpu.wait_smem_to_gmem(0)

    @pl.when(wg == WARPGROUPS)
    def _load():
      plgpu.set_max_registers(blocks.memory_registers, action="decrease")
      plgpu.copy_gmem_to_smem(rows_ref.at[batch, number], rows_smem, q_ready)
      for piece in pieces:
        target = q_smem.at[piece.warpgroup, pl.ds(piece.row, piece.count)]
        plgpu.copy_gmem_to_smem(here(q_ref, piece), target, q_ready)

      @pl.loop(0, stop)
      def _(i):
        slot = lax.rem(i, i32(stages))
        first = jnp.where(i < kept, i * block, band_start + (i - kept) * block)
        span = pl.ds(pl.multiple_of(first, GRAIN), block)
        full = i >= stages
        pl.when(full)(lambda: plgpu.barrier_wait(k_free.at[slot]))
        plgpu.copy_gmem_to_smem(k_ref.at[batch, kv_head, span], k_smem.at[slot], k_ready.at[slot])
        plgpu.copy_gmem_to_smem(bounds_ref.at[batch, kv_head, :, span], bounds_smem.at[slot], k_ready.at[slot])
        pl.when(full)(lambda: plgpu.barrier_wait(v_free.at[slot]))
        plgpu.copy_gmem_to_smem(v_ref.at[batch, kv_head, span], v_smem.at[slot], v_ready.at[slot])

      compat.drain(stop, k_free, v_free)

  matrix = functools.partial(plgpu.SMEM, dtype=q.dtype, transforms=compat.operand_transforms())
  barrier = lambda count, arrivals: plgpu.Barrier(num_barriers=count, num_arrivals=arrivals)
  scratch = [matrix((WARPGROUPS, ROWS, h)), matrix((stages, block, h)), matrix((stages, block, h))]
  scratch += [plgpu.SMEM((WARPGROUPS, ROWS), i32), plgpu.SMEM((stages, 2, block), i32)]
  scratch += [plgpu.Barrier(num_arrivals=1 + len(pieces)), barrier(stages, 2), barrier(stages, 1)]
  scratch += [barrier(stages, WARPGROUPS), barrier(stages, WARPGROUPS), barrier(1, WARPGROUPS)]
  return compat.kernel(
    body,
    out_type=jax.ShapeDtypeStruct(q.shape, q.dtype),
    scratch_types=scratch,
    grid=(n // tile.heads, tiles, b),
    grid_names=("part", "tile", "batch"),
    num_threads=WARPGROUPS + 1,
    thread_name="wg",
    kernel_name=f"prefill_{tile.heads}x{tile.queries}_{block}x{stages}",
    compiler_params=plgpu.CompilerParams(approx_math=True),
  )(q, keys, values, rows, bounds, ranges)
