"""Prefill attention on Hopper GPUs with Pallas Mosaic GPU: the forward kernel.

The keys that any query sees are gathered first (`plan`), so that far blocks are dense. The kernel follows
FlashAttention-3 (arXiv 2407.08608): in each block two warpgroups compute on 64 rows each, and a third one feeds them
keys and values by TMA. A tile's 128 rows are several query heads of one KV head, with `Tile.queries` neighbouring
queries of each: the fewer queries a tile spans, the less it visits of the band that only some of its rows see. Blocks
that all queries of a tile see come first and need no mask; in the others, at the diagonal and in the band, each pair is
tested. Tiles differ in work, by position and by how much their heads hold, so workers take them from a counter.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from pallas_kernels.common import compat, dispatch, pipeline, tuned, warpgroup
from pallas_kernels.common.compat import plgpu
from pallas_kernels.common.pipeline import WARPGROUPS
from pallas_kernels.common.platform import processors
from pallas_kernels.common.softmax import LOG2E, LOWEST, soft_capped_by_exp2, with_sinks
from pallas_kernels.common.warpgroup import ROWS
from pallas_kernels.prefill import gpu_mass
from pallas_kernels.prefill import plan as planning
from pallas_kernels.prefill.gpu_common import GRAIN, Blocks, Tile, default_blocks
from pallas_kernels.prefill.plan import KEPT, START, STOP, WHOLE


def prefill_attention(
  q,
  keys,
  values,
  q_pos,
  k_first,
  k_last,
  *,
  lse=False,
  query_weights=None,
  softcap=None,
  sinks=None,
  blocks: Blocks | None = None,
):
  """See `api.prefill_attention`; bfloat16 or float16, head size 64, 128 or 256.

  Raises:
    NotImplementedError: another device, dtype or head size.
  """
  compat.require_hopper()
  _, t, n, h = q.shape
  dispatch.supports(("bfloat16", "float16"), q=q, keys=keys, values=values)
  dispatch.supports_head_size(h, (64, 128, 256))
  blocks = blocks or tuned.blocks("prefill", tuned.shape_class(H=h), default_blocks(h, processors()))
  tile, weighted = Tile.of(n // keys.shape[1]), query_weights is not None
  args, row = _prepare(tile, blocks, weighted, q, keys, values, q_pos, k_first, k_last)
  out, logs = _attend(tile, blocks, lse or weighted or sinks is not None, softcap, *args)
  results, masses = [out[:, :t]], []
  if lse or sinks is not None:
    of_keys = tile.join(logs.reshape(*logs.shape[:3], -1))[:, :t] * (1 / LOG2E)
    results = list(with_sinks(results[0], of_keys, sinks))
  if weighted:
    q, keys, _, rows, bounds, _ = args
    if sinks is not None:  # in the sums of queries that see a key
      sums = jnp.where(of_keys == -jnp.inf, -jnp.inf, results[1] * LOG2E)
      sums = jnp.pad(sums, ((0, 0), (0, rows.shape[1] * tile.queries - t), (0, 0)))
      logs = tile.split(sums[..., None]).reshape(logs.shape)
    masses.append(gpu_mass.key_mass(tile, softcap, q, keys, rows, bounds, row, logs, query_weights))
  results = [*(results if lse else results[:1]), *masses]
  return tuple(results) if len(results) > 1 else results[0]


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _prepare(tile: Tile, blocks: Blocks, weighted: bool, q, keys, values, q_pos, k_first, k_last):
  """(the arguments of `_attend`, the gathered row of each key, if `weighted`)."""
  b, t = q_pos.shape
  pad = -t % tile.queries
  positions = jnp.pad(q_pos.astype(jnp.int32), ((0, 0), (0, pad)), constant_values=-2)
  positions = positions.reshape(b, (t + pad) // tile.queries, tile.queries)
  plan = planning.make(positions, k_first, k_last, block=blocks.kv, grain=GRAIN)
  rows = tile.arrange(positions, -2).reshape(*positions.shape[:2], WARPGROUPS, ROWS)
  keys, values = (planning.gather(x, plan.source) for x in (keys, values))
  # TMA reads zeros past the end and writes nothing there, but tiles memory by 8 rows; the interpreter needs all rows.
  # So does a text of up to one tile: a copy as long as the whole axis begins at 0, wherever it should.
  pad = pad if compat.interpreting() or t <= tile.queries else -t % 8
  q = jnp.pad(q, ((0, 0), (0, pad), (0, 0), (0, 0)))
  return (q, keys, values, rows, plan.bounds, plan.ranges), plan.row if weighted else None


def _attend(tile: Tile, blocks: Blocks, lse: bool, softcap: float | None, q, keys, values, rows, bounds, ranges):
  """(out [B, T, N, H], log-sum-exp float32 [B, parts, tiles, 2, 64] in units of log 2, if asked for).

  q [B, T, N, H], T a multiple of 8; keys and values [B, K, R, H], rows [B, tiles, 2, 64]: positions; bounds, ranges:
  see `Plan`.
  """
  b, _, n, h = q.shape
  tiles, group = rows.shape[1], n // keys.shape[1]
  parts, shares = group // tile.heads, n // tile.heads  # of a group of query heads and of all, with tiles of their own
  block, stages = blocks.kv, blocks.stages
  scale = h**-0.5 * LOG2E  # scores in units of log 2: exp2 is what the hardware has
  cap = None if softcap is None else softcap * h**0.5  # of products that are not yet scaled
  i32 = jnp.int32
  pieces = tile.pieces()
  items = tiles * shares * b
  workers = min(blocks.workers or items, items)
  several = workers < items  # tiles for a worker
  buffers = 2 if several else 1  # of a tile's queries
  counting = several and not compat.interpreting()

  def body(q_ref, k_ref, v_ref, rows_ref, bounds_ref, ranges_ref, out_ref, logs_ref, *scratch):
    logs_smem, q_smem, k_smem, v_smem, rows_smem, bounds_smem, board, *scratch = scratch
    q_ready, k_ready, v_ready, q_free, k_free, v_free, turn = scratch
    worker, wg = lax.axis_index("worker"), lax.axis_index("wg")
    # As many elements as XLA fills once for many calls; the first one counts (`decode.gpu_kernel`).
    counters = pl.get_global(plgpu.SemaphoreType.REGULAR((warpgroup.THREADS,))) if counting else None

    # A worker's first tile is known beforehand. Its loader takes the number of the next one from the counter and writes
    # it to the board before that tile's queries are ready. The interpreter has no counter: tiles are dealt in turn.

    def draw():
      """Asks for the number of a worker's next tile. Each worker asks once in vain."""
      return warpgroup.draw(counters.at[pl.ds(0, 1)], i32(items - 1)) if counting else i32(0)

    def announce(number, answer):
      """Tells all threads a worker's `number`-th tile, `items` or more for none; `answer`: what `draw` returned."""
      answer = answer if counting else worker + (number - 1) * workers
      return workers + warpgroup.announce(answer, board.at[pl.ds(lax.rem(number, i32(buffers)), 1)])

    def place(item):
      """(part, row, tile of queries). Tiles that read the same keys follow one another: the L2 cache holds them. The
      last ones have the most keys and come first."""
      item = jnp.minimum(item, items - 1)
      unit = lax.div(item, i32(tiles))
      return lax.rem(unit, i32(shares)), lax.div(unit, i32(shares)), (tiles - 1) - lax.rem(item, i32(tiles))

    def ranges(item, *which):
      part, batch, tile = place(item)
      return tuple(ranges_ref[batch, lax.div(part, i32(parts)), tile, i] for i in which)

    def each(do, state):
      """Runs state = do(state) for a worker's tiles; (number of the tile among the worker's, its item, ...)."""
      return lax.while_loop(lambda state: state[1] < items, do, state) if several else do(state)

    def here(ref, item, piece):
      """A piece's part of q or of the output."""
      part, batch, tile_number = place(item)
      first = tile_number * tile.queries + piece.first
      return ref.at[batch, pl.ds(first, piece.count), part * tile.heads + piece.head]

    def take_turn():
      plgpu.barrier_arrive(turn)
      plgpu.barrier_wait(turn)

    @pl.when(wg < WARPGROUPS)
    def _compute():
      plgpu.set_max_registers(blocks.compute_registers, action="increase")

      def one_tile(state):
        # `before`: the blocks of earlier tiles; then this one's, without a mask and in all.
        number, item, before, whole, stop = state
        buffer = lax.rem(number, i32(buffers))
        positions = pipeline.row_vector(rows_smem, buffer, wg)
        queries = q_smem.at[buffer, wg]

        # The warpgroups take turns: one multiplies while the other computes its exponentials.
        pl.when(wg == 1)(take_turn)

        def step(i, carry, masked):
          acc, top, total = carry
          slot = lax.rem(before + i, i32(stages))
          plgpu.barrier_wait(k_ready.at[slot])
          s = compat.dot(queries, k_smem.at[slot].transpose((1, 0)), then=take_turn)
          s = soft_capped_by_exp2(s, cap)
          if masked:
            bounds = (pipeline.column_vector(bounds_smem, slot, x) for x in range(2))
            first, last = (lax.broadcast_in_dim(x, s.shape, [1]) for x in bounds)
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

        carry = pipeline.zeros(ROWS, h), pipeline.filled_rows(ROWS, LOWEST), pipeline.filled_rows(ROWS, 0.0)
        carry = lax.fori_loop(0, whole, functools.partial(step, masked=False), carry)
        acc, top, total = lax.fori_loop(whole, stop, functools.partial(step, masked=True), carry)
        pl.when(wg == 0)(take_turn)

        # Padding (which the unmasked blocks include) and rows that saw nothing give zeros.
        real = (positions >= -1) & (total > 0.0)
        weight = lax.broadcast_in_dim(jnp.where(real, 1 / jnp.where(real, total, 1.0), 0.0), acc.shape, [0])
        q_smem[buffer, wg] = jnp.where(weight > 0.0, acc * weight, 0.0).astype(q.dtype)
        if lse:
          logs_smem[wg] = jnp.where(real, top + jnp.log(jnp.where(real, total, 1.0)) * LOG2E, -jnp.inf)
        plgpu.commit_smem()
        if lse:
          part, batch, tile_number = place(item)
          plgpu.copy_smem_to_gmem(logs_smem.at[wg], logs_ref.at[batch, part, tile_number, wg])
        for piece in pieces:
          source = q_smem.at[buffer, piece.warpgroup, pl.ds(piece.row, piece.count)]
          store = functools.partial(plgpu.copy_smem_to_gmem, source, here(out_ref, item, piece))
          pl.when(wg == piece.warpgroup)(store)
        before = before + stop
        if several:
          following = lax.rem(number + 1, i32(buffers))
          plgpu.barrier_wait(q_ready.at[following])
          item = workers + board[following]
          whole, stop = ranges(item, WHOLE, STOP)
        plgpu.wait_smem_to_gmem(0)
        if several:
          plgpu.barrier_arrive(q_free.at[buffer])
        return number + 1, item, before, whole, stop

      plgpu.barrier_wait(q_ready.at[0])
      each(one_tile, (i32(0), worker, i32(0), *ranges(worker, WHOLE, STOP)))

    @pl.when(wg == WARPGROUPS)
    def _load():
      plgpu.set_max_registers(blocks.memory_registers, action="decrease")

      def one_tile(state):
        number, item, before = state
        part, batch, tile_number = place(item)
        kv_head = lax.div(part, i32(parts))
        kept, band_start, stop = ranges(item, KEPT, START, STOP)
        buffer = lax.rem(number, i32(buffers))
        answer = draw() if several else None
        plgpu.copy_gmem_to_smem(rows_ref.at[batch, tile_number], rows_smem.at[buffer], q_ready.at[buffer])
        for piece in pieces:
          target = q_smem.at[buffer, piece.warpgroup, pl.ds(piece.row, piece.count)]
          plgpu.copy_gmem_to_smem(here(q_ref, item, piece), target, q_ready.at[buffer])

        def copies(i):
          first = jnp.where(i < kept, i * block, band_start + (i - kept) * block)
          span = pl.ds(pl.multiple_of(first, GRAIN), block)
          bounds = bounds_ref, (batch, kv_head, slice(None), span), bounds_smem
          return [(k_ref, (batch, kv_head, span), k_smem), bounds], [(v_ref, (batch, kv_head, span), v_smem)]

        pipeline.stream(stop, stages, copies, (k_free, k_ready), (v_free, v_ready), before=before)
        number = number + 1
        if several:
          # The tile before this one has left what the next one gets.
          pl.when(number >= buffers)(lambda: plgpu.barrier_wait(q_free.at[lax.rem(number, i32(buffers))]))
          item = announce(number, answer)
        return number, item, before + stop

      number, _, before = each(one_tile, (i32(0), worker, i32(0)))
      if several:
        for _ in range(1 + len(pieces)):  # instead of the queries of a next tile
          plgpu.barrier_arrive(q_ready.at[lax.rem(number, i32(buffers))])
        plgpu.barrier_wait(q_free.at[lax.rem(number - 1, i32(buffers))])
      compat.drain(before, k_free, v_free)

  operand = lambda *shape: pipeline.matrix(shape, q.dtype)
  scratch = [pipeline.vector(WARPGROUPS, ROWS) if lse else None, operand(buffers, WARPGROUPS, ROWS, h)]
  scratch += [operand(stages, block, h), operand(stages, block, h)]
  scratch += [pipeline.vector(buffers, WARPGROUPS, ROWS, dtype=i32), pipeline.vector(stages, 2, block, dtype=i32)]
  scratch += [pipeline.vector(buffers, dtype=i32) if several else None]
  scratch += [pipeline.barriers(buffers, 1 + len(pieces)), pipeline.barriers(stages, 2), pipeline.barriers(stages, 1)]
  scratch += [pipeline.barriers(buffers) if several else None]
  scratch += [pipeline.barriers(stages), pipeline.barriers(stages), pipeline.barriers(1)]
  logs = jax.ShapeDtypeStruct((b, n // tile.heads, *rows.shape[1:]), jnp.float32) if lse else None
  return pipeline.launch(
    body,
    [q, keys, values, rows, bounds, ranges],
    [jax.ShapeDtypeStruct(q.shape, q.dtype), logs],
    scratch,
    {"worker": workers},
    f"prefill_{tile.heads}x{tile.queries}_{block}x{stages}",
  )
