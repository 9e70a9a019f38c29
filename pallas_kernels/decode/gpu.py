"""Decode attention on Hopper GPUs with Pallas Mosaic GPU, split by live slots.

The live slots of a (row, KV head) pair form one stream of blocks: the contiguous cache's, then the pages'. A stream is
cut into chunks of `Blocks.split` slots, a constant of the shape, and its remainder into shorter pieces. The chunks of
all pairs form one list, long ones first, so that none starts when the others are nearly done. The list is never stored:
each worker (one warpgroup, two or more a processor) sums the pairs' chunk counts as it starts and finds a chunk by its
number. A worker's first number is its own; it takes further ones from a shared counter, so that neither ragged heads
nor slow processors leave workers idle. With hardly more chunks than workers, it takes every so many instead. A worker
streams its blocks by TMA, several in flight across the ends of chunks, page numbers one block further ahead, and writes
one partial result a chunk: sum of values, maximum and sum of weights. A second kernel merges a pair's partial results
in order; so a result depends on its own slots alone, whichever workers computed the parts.

The tensor cores need at least 64 rows and eight columns: slots, then the values' channels, are the rows, and the
group's queries the columns. The scores of a block are then four numbers a thread, and reading it takes all the time.

Queries, weights and widened blocks are overwritten in place. The barriers of `reduce_columns` and `commit_smem`, and
those that Pallas puts before stores and copies, separate their readers from the next writer.

Pages of 8 bits are converted to q's dtype, exactly, in shared memory, from where the tensor cores read all operands; a
slot's two scales multiply its score and its weight. All scores are in units of log 2.

For the mass of slots the kernel also stores its scores, float32, and XLA turns them into probabilities by the
log-sum-exp of all chunks, which no worker knows. A slot costs 4G bytes to store, 4G to read and 4 for its mass; a
second pass over the keys would read 2H bytes, or H + 8 of a page of 8 bits and its scales. With G up to 8 and H 64 or
128 scores are never more: at G = 4, H = 128 they add 36 bytes to the 512 of a key and a value, another pass 260. The
expression is elementwise, so XLA fuses it into what the policy does next. It reads the scores of all slots, dead ones
too; policies that watch mass bound their slots, and nearly all are live.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from pallas_kernels.common import compat, dispatch, tuned, warpgroup
from pallas_kernels.common.compat import plgpu
from pallas_kernels.common.softmax import LOG2E, LOWEST
from pallas_kernels.decode.gpu_common import Blocks, Tile, Variant, chunks_of, find, merge
from pallas_kernels.decode.mass import slot_mass

QUARTERS = 4  # of a block, the least that is loaded of a cache
MOST_PAIRS = 4096  # of row and KV head in a call of the kernel, whose shared memory holds up to four numbers of each
DECODED = ("float", "int8", "float8")  # formats of pages that the kernel decodes


def default_blocks(
  batch: int, kv_heads: int, slots: int, head_dim: int, processors: int, paged: bool = False, scaled: bool = False
) -> Blocks:
  """Block sizes by shape, as measured on an H100.

  Two workers a processor, three blocks in flight each. Heads of 64, whose blocks are half as large, get four workers
  with two blocks, unless there are so few pairs that workers would be idle, or so many that all have enough to read.
  A chunk of a contiguous cache of `slots` a head is up to twice the share of each of two workers a processor with an
  eighth of the slots live, at least a 128th of `slots` and otherwise at most 1,024: longer chunks mean fewer partial
  results to merge. With pages, `slots` is the contiguous part (the rings), and chunks depend on the number of pairs
  alone: the table of pages may grow, and no result may change with it.
  """
  block = 64
  if compat.interpreting():  # every part of the kernel at work on small inputs
    return Blocks(block, 2, 2 * block, 3)
  pairs, workers, stages = batch * kv_heads, 2 * processors, 3
  few, many = 4 * pairs < processors, pairs >= 3 * workers
  if scaled:
    stages = (2 if slots else 4) * 128 // head_dim
  elif head_dim == 64 and not few and not many:
    workers, stages = 4 * processors, 2
  if paged:
    if many:
      return Blocks(block, stages, 1024, workers, rest=256, merged=4)
    return Blocks(block, stages, 128 if few else 256 if pairs < processors else 512, workers)
  share = pairs * slots // 8 // (2 * processors)
  split = max(2 * block, slots // 128, min(1024, 2 ** share.bit_length()))
  split = -(-split // block) * block
  rest = max(2 * block, split // 4 // block * block)
  return Blocks(block, stages, split, workers, rest=rest, merged=4 if split >= 1024 and pairs >= processors else 8)


def shape_class(pairs: int, head_dim: int, slots: int, page: int, stored: str) -> str:
  """Name of the shapes that share measured sizes, whatever the size of the table of pages."""
  return tuned.shape_class(pairs=pairs, H=head_dim, S=slots, **({"page": page, "of": f" {stored}"} if page else {}))


def processors() -> int:
  """Multiprocessors of the GPU; an H100's without a GPU."""
  if compat.interpreting() or jax.default_backend() != "gpu":
    return 132
  return int(getattr(jax.devices()[0], "core_count", 132))


def decode_attention(
  q, kv, layer, lengths, *, pages=None, lse: bool = False, mass: bool = False, softcap=None, sinks=None, blocks=None
):
  """See `api.decode_attention`; bfloat16 or float16, head size 64 or 128, groups up to 8.

  The slots of `kv` must be a multiple of 8, since a copy by TMA begins at a tile of 8 rows. Pages must divide a block
  or be a whole number of blocks, and have 8 slots or more, 16 with scales; in q's dtype, or int8 or float8_e4m3fn.
  More than `MOST_PAIRS` pairs of row and KV head take several calls of the kernel, each with some of the rows.

  Raises:
    NotImplementedError: another device, dtype or shape; scores that are capped; attention sinks.
  """
  compat.require_hopper()
  dispatch.supports_plain_scores(softcap, sinks)
  b, n, h = q.shape
  layers, _, k = (kv if kv is not None else pages.table).shape[:3]
  group = n // k
  if q.dtype not in (jnp.bfloat16, jnp.float16) or (kv is not None and kv.dtype != q.dtype):
    stored = "" if kv is None else f" and {kv.dtype}"
    raise NotImplementedError(f"q and kv must both be bfloat16 or both float16, not {q.dtype}{stored}")
  if h not in (64, 128) or group > warpgroup.GROUP:
    raise NotImplementedError(f"head size {h} and {group} query heads a KV head: only 64 and 128, up to 8")
  slots = 0 if kv is None else kv.shape[3]
  if slots % 8:
    raise NotImplementedError(f"{slots} slots a head: must be a multiple of 8")
  if layers * b * k * slots >= 2**31 or k > MOST_PAIRS:
    raise NotImplementedError(
      f"{layers} layers of {b} rows and {k} KV heads, {slots} slots each: up to {MOST_PAIRS} heads and 2^31 slots"
    )
  scaled = pages is not None and pages.format.scaled
  page, stored = (0, "") if pages is None else (pages.pool.shape[1], pages.pool.dtype.name)
  calls = -(-b // (MOST_PAIRS // k))
  rows = -(-b // calls)
  if blocks is None:
    default = default_blocks(rows, k, slots, h, processors(), page > 0, scaled)
    blocks = tuned.blocks("decode", shape_class(rows * k, h, slots, page, stored), default)
  first = [q.reshape(b * k, group, h), jnp.asarray(layer, jnp.int32).reshape(1)]
  arrays, counts = [], []
  if kv is not None:
    arrays.append(kv.reshape(layers * b * k * slots, 2 * h))
    counts.append(lengths)
  most = 0
  if pages is not None:
    most = pages.table.shape[3]
    check_pages(pages, q.dtype, blocks.block)
    # The kernel reads no page number from an empty table, but takes no empty array.
    table = jnp.zeros((1,), jnp.int32) if most == 0 else pages.table.astype(jnp.int32).reshape(-1)
    arrays += [pages.pool.reshape(-1, 2 * h), table]
    arrays += [pages.scales.reshape(-1)] if scaled else []
    counts.append(pages.lengths)
  counts = [x.astype(jnp.int32).reshape(b * k) for x in counts]
  attend = functools.partial(_attend, blocks, Variant(slots, page, most, scaled, lse or mass, mass, k * (calls > 1)))
  if calls == 1:
    out, logs, masses = attend(*first, *arrays, *counts)
  else:
    # Rows instead of layers: number layer * B + row is where the first row of a call begins in the cache.
    attend = attend if compat.interpreting() else jax.jit(attend)  # lowered once
    parts = [
      attend(first[0][at : at + rows * k], first[1] * b + at // k, *arrays, *(x[at : at + rows * k] for x in counts))
      for at in range(0, b * k, rows * k)
    ]
    out, logs, masses = jax.tree.map(lambda *x: jnp.concatenate(x), *parts)
  results = [out.reshape(b, n, h)]
  results += [logs.reshape(b, n)] if lse else []
  results += [jax.tree.map(lambda x: x.reshape(b, k, -1), masses)] if mass else []
  return tuple(results) if len(results) > 1 else results[0]


def check_pages(pages, dtype, block: int) -> None:
  """Raises NotImplementedError for pages that the kernel does not read."""
  (number, page, _), stored = pages.pool.shape, pages.pool.dtype
  if pages.format.name not in DECODED or (not pages.format.scaled and stored != dtype):
    raise NotImplementedError(f"pages.pool is {stored} and q {dtype}: must be the same, or 8 bits with scales")
  least = 16 if pages.format.scaled else 8  # a copy to shared memory begins at a multiple of 128 bytes
  if page % least or (block % page and page % block):
    raise NotImplementedError(
      f"pages of {page} slots: must be a multiple of {least}, and divide {block} or be a multiple of it"
    )
  if number == 0 or number * page >= 2**31 or pages.table.size >= 2**31:
    raise NotImplementedError(f"a pool of {number} pages, a table of {pages.table.size}: 1 or more, below 2^31 slots")


def _attend(sizes: Blocks, variant: Variant, q, layer, *arrays):
  """(out [P, G, H], log-sum-exp [P, G] or None, masses ([P, S], [P, M * page]) or None), the last two float32, for P
  pairs of row and KV head.

  q [P, G, H], layer [1]; then kv [L * P * S, 2H] if there are slots; the pool [pages * page, 2H], the table
  [L * P * M] and, if scaled, scales [pages * page * 2] if there are pages; lengths of each.
  """
  pairs, group, h = q.shape
  tile = Tile.of(group, h, apart=pairs < processors())
  block, stages = sizes.block, sizes.stages
  slots, page = variant.slots, variant.page
  unit = min(page, block) if page else block  # slots that one copy of pages moves
  pieces = block // unit
  scale = h**-0.5 * LOG2E
  i32 = jnp.int32
  lengths = arrays[-variant.sources :]
  listed = max(warpgroup.THREADS, 1 << (pairs - 1).bit_length())  # pairs, and as many more as make it a power of two
  board_size = stages + 2  # numbers of chunks from the one computed with to the one drawn
  counting = variant.draws(sizes, pairs) and not compat.interpreting()
  apart = variant.apart or pairs

  def body(*refs):
    refs = list(refs)
    q_ref, layer_ref = refs.pop(0), refs.pop(0)
    kv_ref = refs.pop(0) if slots else None
    pool_ref, table_ref = (refs.pop(0), refs.pop(0)) if page else (None, None)
    scales_ref = refs.pop(0) if variant.scaled else None
    lengths_refs = [refs.pop(0) for _ in lengths]
    part_ref, stat_ref = refs.pop(0), refs.pop(0)
    scores_ref = refs.pop(0) if variant.mass else None
    lens = [refs.pop(0) for _ in lengths]
    starts, sums, board, reduced, q_smem, p_smem, kv_smem, ready, *refs = refs
    bytes_smem, scales_smem, bytes_ready = refs if variant.scaled else (None, None, None)
    # The first element counts the chunks taken. XLA would copy a single zero, a constant to it, before each call; this
    # many elements it fills once for many calls, so the kernel leaves the counter at 0.
    counters = pl.get_global(plgpu.SemaphoreType.REGULAR((warpgroup.THREADS,))) if counting else None
    worker, workers = lax.axis_index("worker"), i32(sizes.workers)

    live = [warpgroup.load_padded(ref, listed, -1) for ref in lengths_refs]
    _, *counts = chunks_of([jnp.maximum(x, 0) for x in live], sizes)
    before, every = zip(
      *(warpgroup.running_sum(jnp.where(live[0] < 0, 0, count), sums.at[i]) for i, count in enumerate(counts)),
      strict=True,
    )
    for target, x in zip(lens, live, strict=True):
      target[...] = x
    for i in range(2):
      starts[pl.ds(i * listed, listed)] = before[i]
    plgpu.commit_smem()
    total = sum(every)
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

    def item(number):
      """(pair, chunk, its first block, its blocks) of a chunk of the list: whole ones of all pairs, then the pieces."""
      is_piece = number >= every[0]
      number = jnp.where(is_piece, number - every[0], number)
      first = jnp.where(is_piece, i32(listed), 0)
      pair = jnp.minimum(find(starts, first, listed, number), pairs - 1)
      number = number - starts[first + pair]
      count, whole, _ = chunks_of([x[pair] for x in lens], sizes)
      left = whole * sizes.whole + number * sizes.piece  # where a piece begins
      return (
        pair,
        jnp.where(is_piece, whole + number, number),
        jnp.where(is_piece, left, number * sizes.whole),
        jnp.where(is_piece, jnp.minimum(count - left, sizes.piece), sizes.whole),
      )

    def in_cache(pair):
      """Blocks of a pair in the contiguous cache."""
      return lax.div(lens[0][pair] + i32(block - 1), i32(block)) if slots else i32(0)

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
          live = lens[0][pair] - at * block
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
          live = lens[-1][pair] - start
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
      for half in range(2):
        columns = pl.ds(half * h, h)
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
      for source, length in enumerate(lens):
        last = source + 1 == len(lens)
        stop = size if last else jnp.clip(first - begin, 0, size)
        origin = lambda source=source: begin if source == 0 and slots else begin - first
        live = length[pair] - origin() * block
        place = (origin() + i32(source * variant.cache_blocks(sizes))) * block if variant.mass else None
        one = functools.partial(step, live=live, place=place, scaled=variant.scaled and last)
        carry = lax.fori_loop(done, stop, one, carry)
        done = stop
      acc, top, weights, ahead = carry
      weights = warpgroup.reduce_columns(weights, "sum", reduced.at[lax.rem(number + turn + size, i32(2))])
      warpgroup.store_transposed(acc, part_ref.at[pair, chunk, pl.ds(0, group)])
      warpgroup.store_columns(top, stat_ref.at[pair, chunk, 0, pl.ds(0, group)])
      warpgroup.store_columns(weights, stat_ref.at[pair, chunk, 1, pl.ds(0, group)])
      return turn + 1, number_of(turn + 1), ahead, number + size

    lax.while_loop(lambda state: state[1] < total, one_chunk, (i32(0), worker, ahead, i32(0)))

  parts = [jax.ShapeDtypeStruct((pairs, variant.chunks(sizes), *tile.shape), jnp.float32)]
  parts.append(jax.ShapeDtypeStruct((pairs, variant.chunks(sizes), 2, warpgroup.GROUP), jnp.float32))
  if variant.mass:
    parts.append(jax.ShapeDtypeStruct((pairs, group, variant.scores(sizes)), jnp.float32))
  outs = [jax.ShapeDtypeStruct(q.shape, q.dtype)]
  outs += [jax.ShapeDtypeStruct((pairs, *tile.shape), jnp.float32)] if variant.lse else []
  params = plgpu.CompilerParams(approx_math=True)
  scratch = [plgpu.SMEM((listed,), jnp.int32) for _ in lengths]
  scratch += [plgpu.SMEM(shape, jnp.int32) for shape in ((2 * listed,), (2, warpgroup.THREADS // 32), (board_size,))]
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
  kinds = (f"pages{page}_" if page else "") + ("mass_" if variant.mass else "")
  part, stat, *scores = compat.kernel(
    body,
    out_type=parts,
    scratch_types=scratch,
    grid=(sizes.workers,),
    grid_names=("worker",),
    kernel_name=f"decode_{kinds}{block}x{stages}_{sizes.split}",
    compiler_params=params,
  )(q, layer, *arrays)

  def merge_body(*refs):
    lengths_refs, (part_ref, stat_ref, out_ref, *logs) = refs[: len(lengths)], refs[len(lengths) :]
    pair = lax.axis_index("pair")
    chunks = lambda: sum(chunks_of([live[pair] for live in lengths_refs], sizes)[1:])
    rows = pl.ds(lax.axis_index("rows") * tile.together, tile.together)
    merge(
      pair, rows, chunks, variant.chunks(sizes), sizes.merged, part_ref, stat_ref, out_ref, logs[0] if logs else None
    )

  done = compat.kernel(
    merge_body,
    out_type=outs,
    grid=(pairs, tile.rows // tile.together),
    grid_names=("pair", "rows"),
    kernel_name=f"decode_merge_{sizes.merged}",
    compiler_params=params,
  )(*lengths, part, stat)
  logs = done[1][:, :group, 0] if variant.lse else None
  if not variant.mass:
    return done[0], logs, None
  of_cache = (0, slots, lengths[0]) if slots else None
  of_pages = (variant.cache_blocks(sizes) * block, page * variant.pages, lengths[-1]) if page else None
  return done[0], logs, slot_mass(scores[0], logs, (of_cache, of_pages))
