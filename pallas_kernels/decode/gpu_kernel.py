"""The Hopper kernel of decode attention: workers stream live slots, a second kernel merges.

A worker streams its blocks by TMA, several in flight across the ends of chunks, page numbers one block further ahead.

The tensor cores need at least 64 rows and eight columns: slots, then the values' channels, are the rows, and the
group's queries the columns. The scores of a block are then four numbers a thread, and reading it takes all the time.

Queries, weights and widened blocks are overwritten in place. The barriers of `reduce_columns` and `commit_smem`, and
those that Pallas puts before stores and copies, separate their readers from the next writer.

Pages of 8 bits are converted to q's dtype, exactly, in shared memory, from where the tensor cores read all operands; a
slot's two scales multiply its score and its weight. All scores are in units of log 2.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from pallas_kernels.common import compat, warpgroup
from pallas_kernels.common.compat import plgpu
from pallas_kernels.common.softmax import LOG2E, LOWEST, in_log2, soft_capped_by_exp2, with_sinks
from pallas_kernels.decode.gpu_common import Blocks, Tile, Variant, chunks_of, merge, write_alone
from pallas_kernels.decode.gpu_division import Listed, Own
from pallas_kernels.decode.mass import slot_mass

QUARTERS = 4  # of a block, the least that is loaded of a cache


def attend(sizes: Blocks, variant: Variant, tile: Tile, q, layer, *arrays, sinks=None):
  """(out [P, G, H], log-sum-exp [P, G] or None, masses ([P, S], [P, M * page]) or None), the last two float32, for P
  pairs of row and KV head.

  q [P, G, H], layer [1]; then kv [L * P * S, 2H] if there are slots; the pool [pages * page, 2H], the table
  [L * P * M] and, if scaled, scales [pages * page * 2] if there are pages; lengths of each. sinks [P, G] or None.
  """
  pairs, group, h = q.shape
  block, stages = sizes.block, sizes.stages
  slots, page = variant.slots, variant.page
  unit = min(page, block) if page else block  # slots that one copy of pages moves
  pieces = block // unit
  scale = h**-0.5 * LOG2E
  i32 = jnp.int32
  lengths = arrays[-variant.sources :]
  alone = sizes.by_pair  # no partial results, no second kernel
  division = Own if alone else Listed
  shared = division.scratch(pairs, variant.sources)
  board_size = stages + 2  # numbers of chunks from the one computed with to the one drawn
  counting = not alone and variant.draws(sizes, pairs) and not compat.interpreting()
  apart = variant.apart or pairs

  def body(*refs):
    refs = list(refs)
    q_ref, layer_ref = refs.pop(0), refs.pop(0)
    kv_ref = refs.pop(0) if slots else None
    pool_ref, table_ref = (refs.pop(0), refs.pop(0)) if page else (None, None)
    scales_ref = refs.pop(0) if variant.scaled else None
    lengths_refs = [refs.pop(0) for _ in lengths]
    out_ref, log_ref = refs.pop(0), refs.pop(0) if variant.lse or not alone else None  # or partial results
    scores_ref = refs.pop(0) if variant.mass else None
    shared_refs, refs = refs[: len(shared)], refs[len(shared) :]
    board, reduced, q_smem, p_smem, kv_smem, ready, *refs = refs
    bytes_smem, scales_smem, bytes_ready = (refs.pop(0) for _ in range(3)) if variant.scaled else (None, None, None)
    # The first element counts the chunks taken. XLA would copy a single zero, a constant to it, before each call; this
    # many elements it fills once for many calls, so the kernel leaves the counter at 0.
    counters = pl.get_global(plgpu.SemaphoreType.REGULAR((warpgroup.THREADS,))) if counting else None
    worker, workers = (i32(0), i32(1)) if alone else (lax.axis_index("worker"), i32(sizes.workers))
    work = division(sizes, lengths_refs, shared_refs)
    live_of, item, total = work.live, work.item, work.total
    first_slot, first_page = layer_ref[0] * (apart * slots), layer_ref[0] * (apart * variant.pages)

    # The number of a worker's first chunk, or of its first two if there are few, is known beforehand. It takes the next
    # ones from the counter one chunk ahead, so that the answer has arrived when it is needed. Without a counter (the
    # interpreter has none) chunks are dealt out in turn.
    rounds = jnp.where(2 * total < 5 * workers, i32(2), i32(1))
    dealt = rounds * workers

    def draw(turn, here):
      """Asks for the number of the chunk after a worker's `turn`-th, if the counter gives it."""
      if not counting:
        return i32(0)
      wanted = here & (turn + 1 >= rounds) & (total > dealt)
      return lax.cond(
        wanted, lambda: warpgroup.draw(counters.at[pl.ds(0, 1)], total - dealt + workers - 1), lambda: i32(0)
      )

    def drawn(turn, answer):
      """Number of a worker's `turn`-th chunk, once it is needed."""
      if not counting:
        return worker + turn * workers
      place = board.at[pl.ds(lax.rem(turn, i32(board_size)), 1)]
      return lax.cond(turn < rounds, lambda: worker + turn * workers, lambda: dealt + warpgroup.announce(answer, place))

    def number_of(turn):
      """Number of a worker's `turn`-th chunk, after `drawn` announced it."""
      if not counting:
        return worker + turn * workers
      return jnp.where(turn < rounds, worker + turn * workers, dealt + board[lax.rem(turn, i32(board_size))])

    def in_cache(pair):
      """Blocks of a pair in the contiguous cache."""
      return lax.div(live_of(0, pair) + i32(block - 1), i32(block)) if slots else i32(0)

    def numbers_of(pair, at):
      """Page numbers of block `at` of a pair's stream; arbitrary if nothing in it is live."""
      if not variant.pages:
        return (i32(0),) * pieces if page else ()
      at = (at - in_cache(pair)) * block
      place = lambda j: jnp.clip(lax.div(at + i32(j * unit), i32(page)), 0, variant.pages - 1)
      return tuple(table_ref[first_page + pair * variant.pages + place(j)] for j in range(pieces))

    def copy_live(live, j, copies, barrier):
      """Starts `copies` for the j-th piece of a block, or does what they would have done to the barrier."""

      @pl.when(live > j * unit)
      def _():
        for source, target in copies:
          plgpu.copy_gmem_to_smem(source, target, barrier)

      @pl.when(live <= j * unit)
      def _():
        for _ in copies:
          plgpu.barrier_arrive(barrier)

    def copy_block(row, live, slot):
      """Starts the load of a block of the cache, of no more than a quarter above its live slots."""
      parts = [block * n // QUARTERS for n in range(1, QUARTERS + 1)]
      for low, size in zip([0, *parts], parts, strict=False):
        fits = (live > low if low else True) & (live <= size if size < block else True)
        copy = functools.partial(plgpu.copy_gmem_to_smem, kv_ref.at[pl.ds(row, size)], kv_smem.at[slot, pl.ds(0, size)])
        pl.when(fits)(functools.partial(copy, ready.at[slot]))

    def fetch(ahead, number):
      """Starts the load of the next block, the worker's `number`-th; returns the state after it.

      `ahead`: how many chunks the worker had before this one; blocks left in it, this one included, 0 at the end; its
      pair; the block's number in the pair's stream; the numbers of its pages; what `draw` returned for the next chunk.
      """
      turn, left, pair, at, numbers, answer = ahead
      slot = lax.rem(number, i32(stages))
      here = left > 0
      first = in_cache(pair) if page else None

      if slots:

        @pl.when(here & (at < first) if page else here)
        def _():
          row = first_slot + pair * slots + at * block
          live = live_of(0, pair) - at * block
          if not page:
            copy_block(row, live, slot)
            return
          for j in range(pieces):
            piece = kv_smem.at[slot, pl.ds(j * unit, unit)]
            copy_live(live, j, [(kv_ref.at[pl.ds(row + j * unit, unit)], piece)], ready.at[slot])

      if page:

        @pl.when(here & (at >= first))
        def copy_pages():
          start = (at - first) * block
          live = live_of(variant.sources - 1, pair) - start
          target, barrier = (bytes_smem, bytes_ready.at[slot]) if variant.scaled else (kv_smem, ready.at[slot])
          for j in range(pieces):
            row = numbers[j] * page + (lax.rem(start, i32(page)) if page > block else 0)
            copies = [(pool_ref.at[pl.ds(row, unit)], target.at[slot, pl.ds(j * unit, unit)])]
            if variant.scaled:
              piece = scales_smem.at[slot, pl.ds(2 * j * unit, 2 * unit)]
              copies.append((scales_ref.at[pl.ds(2 * row, 2 * unit)], piece))
            copy_live(live, j, copies, barrier)

      def next_chunk():
        number = drawn(turn + 1, answer)
        pair, _, at, size = item(number)
        here = number < total
        return turn + 1, jnp.where(here, size, 0), pair, at, numbers_of(pair, at), draw(turn + 1, here)

      def next_block():
        return turn, left - 1, pair, at + 1, numbers_of(pair, at + 1), answer

      return lax.cond(left > 1, next_block, lambda: lax.cond(here, next_chunk, lambda: ahead))

    pair, _, at, size = item(worker)
    here = worker < total
    ahead = i32(0), jnp.where(here, size, 0), pair, at, numbers_of(pair, at), draw(i32(0), here)
    ahead = lax.fori_loop(0, stages, lambda number, ahead: fetch(ahead, number), ahead)

    def index(shape):
      """Each element's slot in its block."""
      return plgpu.broadcasted_iota(i32, shape, 0, layout=plgpu.Layout.WGMMA)

    def widened(slot, live):
      """A block of 8 bits in q's dtype, written over a block of the cache; zeros from slot `live` on."""
      own = kv_smem.at[slot] if slots else kv_smem
      width = min(h, 128)  # of what registers hold at a time
      for first in range(0, 2 * h, width):
        columns = pl.ds(first, width)
        x = plgpu.load(bytes_smem.at[slot, :, columns], layout=plgpu.Layout.WGMMA_UPCAST_2X, optimized=False)
        if x.dtype != jnp.int8:
          x = x.astype(jnp.float16)  # the one conversion that the hardware has
        x = x.astype(q.dtype) if x.dtype == jnp.int8 and q.dtype == jnp.bfloat16 else x.astype(jnp.float32)
        x = plgpu.layout_cast(x.astype(q.dtype), plgpu.Layout.WGMMA)
        x = jnp.where(index(x.shape) < live, x, jnp.zeros((), x.dtype))
        own[:, columns] = x
      plgpu.commit_smem()
      return own.at[:, pl.ds(0, h)], own.at[:, pl.ds(h, h)]

    def one_chunk(state):
      turn, chunk_number, ahead, number = state
      pair, chunk, begin, size = item(chunk_number)
      warpgroup.load_queries(q_ref.at[pair], q_smem)
      plgpu.commit_smem()
      first = in_cache(pair)
      column = lambda x: plgpu.layout_cast(jnp.full((warpgroup.GROUP,), x, jnp.float32), compat.column_layout())
      zeros = lambda n: plgpu.layout_cast(jnp.zeros((n, warpgroup.GROUP), jnp.float32), plgpu.Layout.WGMMA)

      def step(i, carry, live, place, scaled):
        """Block i of the chunk, `live` slots from the chunk's first on, whose score lies at `place`."""
        acc, top, weights, ahead = carry
        slot = lax.rem(number + i, i32(stages))
        live = live - i * block
        if scaled:
          plgpu.barrier_wait(bytes_ready.at[slot])
          keys, values = widened(slot, live)
          of_keys, of_values = warpgroup.load_pairs(scales_smem.at[slot])
        else:
          plgpu.barrier_wait(ready.at[slot])
          keys, values = kv_smem.at[slot, :, pl.ds(0, h)], kv_smem.at[slot, :, pl.ds(h, h)]

          @pl.when(live < block)
          def _():  # Slots past the end may hold NaN, and 0 * NaN is NaN.
            warpgroup.clear_rows(values, jnp.maximum(live, 0))
            plgpu.commit_smem()

        s = compat.dot(keys, q_smem.transpose((1, 0))) * scale
        if scaled:
          s = s * lax.broadcast_in_dim(of_keys, s.shape, [0])
        s = soft_capped_by_exp2(s, in_log2(variant.softcap))
        s = jnp.where(index(s.shape) < live, s, -jnp.inf)
        if variant.mass:
          warpgroup.store_transposed(s, scores_ref.at[pair, pl.ds(0, group), pl.ds(place + i * block, block)])
        new_top = jnp.maximum(top, warpgroup.reduce_columns(s, "max", reduced.at[lax.rem(number + turn + i, i32(2))]))
        shrink = jnp.exp2(top - new_top)
        p = jnp.exp2(s - lax.broadcast_in_dim(new_top, s.shape, [1]))
        weights = weights * lax.broadcast_in_dim(shrink, p.shape, [1]) + p
        if scaled:
          p = jnp.where(index(p.shape) < live, p * lax.broadcast_in_dim(of_values, p.shape, [0]), 0.0)
        warpgroup.store_weights(p.astype(q.dtype), p_smem)
        plgpu.commit_smem()
        acc = acc * lax.broadcast_in_dim(shrink, acc.shape, [1])
        acc = compat.accumulate(acc, values.transpose((1, 0)), p_smem.transpose((1, 0)))
        compat.settle()
        return acc, new_top, weights, fetch(ahead, number + i + stages)

      carry, done = (zeros(h), column(LOWEST), zeros(block), ahead), i32(0)
      for source in range(variant.sources):
        last = source + 1 == variant.sources
        stop = size if last else jnp.clip(first - begin, 0, size)
        origin = lambda source=source: begin if source == 0 and slots else begin - first
        live = live_of(source, pair) - origin() * block
        place = (origin() + i32(source * variant.cache_blocks(sizes))) * block if variant.mass else None
        one = functools.partial(step, live=live, place=place, scaled=variant.scaled and last)
        carry = lax.fori_loop(done, stop, one, carry)
        done = stop
      acc, top, weights, ahead = carry
      weights = warpgroup.reduce_columns(weights, "sum", reduced.at[lax.rem(number + turn + size, i32(2))])
      if alone:
        write_alone(acc, top, weights, out_ref.at[pair], log_ref.at[pair] if variant.lse else None)
      else:
        warpgroup.store_transposed(acc, out_ref.at[pair, chunk, pl.ds(0, group)])
        warpgroup.store_columns(top, log_ref.at[pair, chunk, 0, pl.ds(0, group)])
        warpgroup.store_columns(weights, log_ref.at[pair, chunk, 1, pl.ds(0, group)])
      return turn + 1, number_of(turn + 1), ahead, number + size

    lax.while_loop(lambda state: state[1] < total, one_chunk, (i32(0), worker, ahead, i32(0)))

  struct = jax.ShapeDtypeStruct
  outs = [struct(q.shape, q.dtype)]
  if variant.lse:
    outs.append(struct((pairs, *((warpgroup.GROUP,) if alone else tile.shape)), jnp.float32))
  parts = [struct((pairs, variant.chunks(sizes), *shape), jnp.float32) for shape in (tile.shape, (2, warpgroup.GROUP))]
  written = outs if alone else parts
  if variant.mass:
    written = [*written, struct((pairs, group, variant.scores(sizes)), jnp.float32)]
  params = plgpu.CompilerParams(approx_math=True)
  scratch = [*shared, plgpu.SMEM((board_size,), jnp.int32)]
  scratch.append(plgpu.SMEM((2, warpgroup.THREADS // 32, warpgroup.GROUP), jnp.float32))
  laid = lambda dtype: compat.operand_transforms(dtype, h)
  matrix = lambda dtype, *lead: plgpu.SMEM((*lead, block, 2 * h), dtype, transforms=laid(dtype))
  scratch += [
    plgpu.SMEM((warpgroup.GROUP, n), q.dtype, transforms=compat.operand_transforms(q.dtype, 64)) for n in (h, block)
  ]
  # One buffer holds the widened block if all blocks are of 8 bits.
  scratch += [
    matrix(q.dtype, *((stages,) if slots or not variant.scaled else ())),
    plgpu.Barrier(num_barriers=stages, num_arrivals=pieces),
  ]
  if variant.scaled:
    scratch += [matrix(arrays[1 if slots else 0].dtype, stages), plgpu.SMEM((stages, 2 * block), jnp.float32)]
    scratch.append(plgpu.Barrier(num_barriers=stages, num_arrivals=2 * pieces))
  grid = dict(grid=(pairs,), grid_names=("pair",)) if alone else dict(grid=(sizes.workers,), grid_names=("worker",))
  kinds = (f"pages{page}_" if page else "") + ("mass_" if variant.mass else "")
  done = compat.kernel(
    body,
    out_type=written,
    scratch_types=scratch,
    kernel_name=f"decode_{kinds}{block}x{stages}_{'pair' if alone else sizes.split}",
    compiler_params=params,
    **grid,
  )(q, layer, *arrays)
  scores = done.pop() if variant.mass else None
  if not alone:
    done = merged(sizes, variant, tile, lengths, outs, *done)
  if not variant.lse:
    return done[0], None, None
  out, logs = with_sinks(done[0], done[1][:, :group] if alone else done[1][:, :group, 0], sinks)
  if not variant.mass:
    return out, logs, None
  of_cache = (0, slots, lengths[0]) if slots else None
  of_pages = (variant.cache_blocks(sizes) * block, page * variant.pages, lengths[-1]) if page else None
  return out, logs, slot_mass(scores, logs, (of_cache, of_pages))


def merged(sizes: Blocks, variant: Variant, tile: Tile, lengths, outs, part, stat):
  """The second kernel: `outs` from partial results [P, chunks, rows, H] and their maxima and sums [P, chunks, 2, 8]."""

  def body(*refs):
    lengths_refs, (part_ref, stat_ref, out_ref, *logs) = refs[: len(lengths)], refs[len(lengths) :]
    pair = lax.axis_index("pair")

    def chunks():
      return sum(chunks_of([live[pair] for live in lengths_refs], sizes)[1:])

    rows = pl.ds(lax.axis_index("rows") * tile.together, tile.together)
    most = variant.chunks(sizes)
    merge(pair, rows, chunks, most, sizes.merged, part_ref, stat_ref, out_ref, logs[0] if logs else None)

  return compat.kernel(
    body,
    out_type=outs,
    grid=(part.shape[0], tile.rows // tile.together),
    grid_names=("pair", "rows"),
    kernel_name=f"decode_merge_{sizes.merged}",
    compiler_params=plgpu.CompilerParams(approx_math=True),
  )(*lengths, part, stat)
