"""Decode attention on TPUs with Pallas Mosaic, split by live slots.

The live slots of a (row, KV head) pair form one stream of blocks: the contiguous cache's, then the pages'. A stream is
cut into chunks of `Blocks.split` blocks, a constant. The graph lists the chunks that hold anything, of all pairs in
order, and the cores divide the list by blocks. The cache stays in HBM: a core copies the blocks of its part of the list
to its own memory, several ahead and across the ends of chunks, and of the last block only the live tiles (or pages). So
evicted tokens are not loaded, and ragged heads leave no core waiting. XLA merges chunks in order; if one core does
everything, a chunk is a whole pair and nothing is merged.

Keys and values are used side by side, in rows of 2H = 128 or 256 lanes. With H = 64 both products take the whole row of
128: the query is 0 in the value's lanes, and the sum in the key's lanes is not used. A matrix unit is 128 wide anyway,
and nothing moves across lanes. All scores are in units of log 2.

Pages of 8 bits are converted to q's dtype, exactly, before their block is used; a slot's two scales multiply its score
and its weight. Scales come as one row a page and are needed as one row a block: a product with ones moves each to its
slot's lane, exactly.

For the mass of slots the kernel also stores the scores of each block, float32, eight queries whatever the group: 64
bytes a slot, written and read, where a second pass over the keys would read 2H bytes or more. XLA turns them into
probabilities by the log-sum-exp of all chunks.
"""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from pallas_kernels.common import compat_tpu
from pallas_kernels.common.compat_tpu import pltpu
from pallas_kernels.common.softmax import LOG2E, LOWEST, in_log2, soft_capped, with_sinks
from pallas_kernels.decode.mass import slot_mass

LANES = 128
DECODED = ("float", "int8", "float8")  # formats of pages that the kernel decodes
# Rows of a float32 tile, to which the queries of a group are padded.
GROUP = 8
# The most slots of a page with scales: two matrices, scales of a page by slots, must fit the memory.
LARGEST = 256
# Bytes for lengths, the list of chunks and page numbers, out of 1 MiB of scalar memory.
SCALARS = 768 * 2**10


@dataclasses.dataclass(frozen=True)
class Blocks:
  """Sizes: a core computes on `block` slots at a time, a power of 2, with `stages` blocks in memory or on their way;
  `split` blocks make a chunk (0: a whole pair does); `workers` divide the chunks."""

  block: int
  stages: int
  split: int
  workers: int

  def __post_init__(self):
    if self.block & (self.block - 1) or self.stages < 2:
      raise ValueError(f"block {self.block} must be a power of 2, and there must be two stages or more")


def cores() -> int:
  """Cores that share the default device's kernels: two on v4 and v5p; 1 without a TPU."""
  device = jax.devices()[0]
  return int(getattr(device, "num_cores", 1)) if device.platform == "tpu" else 1


def default_blocks(head_dim: int, dtype, workers: int) -> Blocks:
  """Blocks of 256 KiB, eight of them: 2 MiB on their way cover a microsecond's latency at 2 TB/s. Their size never
  depends on the capacity of the cache, so neither does a result."""
  if compat_tpu.interpreting():  # every part of the kernel at work on small inputs
    return Blocks(64, 3, 2, 2)
  block = 2**18 // (2 * head_dim * jnp.dtype(dtype).itemsize)
  return Blocks(block, 8, 0 if workers == 1 else 2048 // block, workers)


def decode_attention(
  q, kv, layer, lengths, *, pages=None, lse: bool = False, mass: bool = False, softcap=None, sinks=None, blocks=None
):
  """See `api.decode_attention`; bfloat16 or float32, head size 64 or 128, groups up to 8.

  The slots of `kv` should be a multiple of the rows of a tile (bfloat16 16, float32 8), and must be if they are more
  than a block; with another number XLA may lay the array out with other axes innermost, and copy it. Pages hold
  q's dtype, int8 or float8_e4m3fn, and a power of 2 of slots: a tile or more (of 8 bits 32 to 256).

  Args:
    blocks: `Blocks`, by default `default_blocks`.

  Raises:
    NotImplementedError: another device, dtype or shape.
  """
  compat_tpu.require_tpu()
  b, n, h = q.shape
  k = (kv if kv is not None else pages.table).shape[2]
  group, pairs, rows = n // k, b * k, compat_tpu.tile(q.dtype)
  blocks = blocks or default_blocks(h, q.dtype, cores())
  if q.dtype not in (jnp.bfloat16, jnp.float32):
    raise NotImplementedError(f"q is {q.dtype}: only bfloat16 and float32")
  if h not in (64, 128) or group > GROUP:
    raise NotImplementedError(f"head size {h} and {group} query heads a KV head: only 64 and 128, up to {GROUP}")
  if kv is not None:
    if kv.dtype != q.dtype:
      raise NotImplementedError(f"kv is {kv.dtype} and q {q.dtype}: must be the same")
    if kv.shape[3] % rows and kv.shape[3] > blocks.block:
      raise NotImplementedError(
        f"{kv.shape[3]} slots a head in {q.dtype}: above {blocks.block} they must be a multiple of {rows}, a tile"
      )
  if pages is not None:
    page = pages.pool.shape[1]
    if pages.format.name not in DECODED or (not pages.format.scaled and pages.pool.dtype != q.dtype):
      raise NotImplementedError(
        f"pages.pool is {pages.pool.dtype} and q {q.dtype}: must be the same, or 8 bits with scales"
      )
    rows = compat_tpu.tile(pages.pool.dtype)
    if page % rows or page & (page - 1):
      raise NotImplementedError(f"pages of {page} slots in {pages.pool.dtype}: must be a power of 2, at least {rows}")
    if pages.format.scaled and (page > LARGEST or blocks.block < rows):
      raise NotImplementedError(
        f"pages of {page} slots with scales, blocks of {blocks.block}: up to {LARGEST}, from {rows} on"
      )

  counts = [jnp.zeros((pairs,), jnp.int32)] * 2
  sizes = [0, 0]
  if kv is not None:
    counts[0], sizes[0] = jnp.clip(lengths.astype(jnp.int32).reshape(pairs), 0, kv.shape[3]), kv.shape[3]
  table = jnp.zeros((1,), jnp.int32)
  if pages is not None:
    sizes[1] = pages.table.shape[3] * page
    counts[1] = jnp.clip(pages.lengths.astype(jnp.int32).reshape(pairs), 0, sizes[1])
    table = lax.dynamic_index_in_dim(pages.table, layer, 0, keepdims=False).astype(jnp.int32).reshape(-1)
  items, bounds, held = work_list(counts, sizes, blocks)
  scalars = 4 * (table.size + items.size + 2 * pairs)
  if scalars > SCALARS:
    raise NotImplementedError(
      f"{table.size} page numbers and {items.size} chunks of {pairs} pairs of row and KV head: "
      f"{scalars:,} bytes of scalar memory, there are {SCALARS:,}"
    )

  queries = q.reshape(pairs, group, h).astype(jnp.float32)
  queries = jnp.pad(queries, ((0, 0), (0, GROUP - group), (0, LANES - h)))
  number = jnp.asarray(layer, jnp.int32).reshape(1)
  scalars = number, items, bounds, *counts, table
  archive = (None, None) if pages is None else (pages.pool, pages.scales)
  parts, *scores = _attend(blocks, q.dtype, h, held.shape[1], mass, softcap, scalars, queries, kv, *archive)
  if not mass and sinks is None:
    return merge(parts, held, q, group, lse)
  out, logs = with_sinks(*merge(parts, held, q, group, True), sinks)
  if not mass:
    return (out, logs) if lse else out
  of_cache = None if kv is None else (0, sizes[0], counts[0])
  of_pages = None if pages is None else (-(-sizes[0] // blocks.block) * blocks.block, sizes[1], counts[1])
  masses = slot_mass(scores[0], logs.reshape(pairs, group), (of_cache, of_pages))
  masses = tuple(None if x is None else x.reshape(b, k, -1) for x in masses)
  return (out, logs, masses) if lse else (out, masses)


def work_list(counts, sizes, blocks: Blocks):
  """The chunks with anything live, and which worker does each.

  Args: counts, live slots of each pair in the contiguous cache and in pages, int32 [pairs] each; sizes, slots at most.

  Returns:
    (items, bounds, held): chunk `c` of pair `p` as `p * chunks + c` int32 [pairs * chunks], those with anything live
    first, in order; worker w does items bounds[w] .. bounds[w + 1] - 1; held [pairs, chunks], whether anything is live.
  """
  upper = lambda x: (x + blocks.block - 1) // blocks.block
  most = max(sum(upper(size) for size in sizes), 1)
  split = blocks.split or most
  chunks = -(-most // split)
  total = upper(counts[0]) + upper(counts[1])
  each = jnp.clip(total[:, None] - jnp.arange(chunks, dtype=jnp.int32) * split, 0, split)
  held = each > 0
  flat = held.reshape(-1)
  index = jnp.arange(1, flat.size + 1, dtype=jnp.int32)
  items = jnp.searchsorted(jnp.cumsum(flat.astype(jnp.int32)), index, method="compare_all").astype(jnp.int32)
  before = jnp.cumsum(each.reshape(-1)) - each.reshape(-1)
  share = (jnp.sum(each) + blocks.workers - 1) // blocks.workers
  begins = share * jnp.arange(blocks.workers + 1, dtype=jnp.int32)[:, None]
  bounds = jnp.sum(flat & (before < begins), axis=1, dtype=jnp.int32)
  return items, bounds, held


def merge(parts, held, q, group: int, lse: bool):
  """Merges chunks in order, one after the other, so that dead ones at the end change no bit."""
  b, n, h = q.shape
  values = parts[:, :, :group, LANES - h : LANES] if h == 64 else parts[:, :, :group]
  logs = parts[:, :, :group, :1] if h == 64 else parts[:, :, GROUP : GROUP + group, :1]
  live = held[:, :, None, None]
  logs, values = jnp.where(live, logs, -jnp.inf), jnp.where(live, values, 0.0)
  top = logs.max(axis=1)
  top = jnp.where(top == -jnp.inf, 0.0, top)
  acc, total = jnp.zeros_like(values[:, 0]), jnp.zeros_like(top)
  for chunk in range(held.shape[1]):
    weight = jnp.exp2(logs[:, chunk] - top)
    acc, total = acc + weight * values[:, chunk], total + weight
  out = (acc / jnp.where(total == 0, 1.0, total)).reshape(b, n, h).astype(q.dtype)
  return (out, ((top + jnp.log2(total)) / LOG2E).reshape(b, n)) if lse else out


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3, 4, 5))
def _attend(sizes: Blocks, dtype, h: int, chunks: int, mass: bool, softcap, scalars, queries, kv, pool, scales):
  """[Output and log2 of the sum of exponentials of each chunk, float32 [pairs, chunks, rows, 128]], and with `mass` the
  scores, float32 [pairs, 8, X], in units of log 2: blocks of the cache, then of pages.

  With H = 128 they are rows 0-7 and 8-15, the logarithm in every lane; with H = 64 the logarithm is in lanes 0-63 and
  the output in the others. Chunks with nothing live are not written.
  """
  pairs, _, lanes = queries.shape
  block, stages, width = sizes.block, sizes.stages, 2 * h
  slots = 0 if kv is None else kv.shape[3]
  most = 0 if pool is None else scalars[-1].shape[0] // pairs
  page = block if pool is None else pool.shape[1]
  unit, smallest = min(page, block), compat_tpu.tile(dtype)
  pieces, scaled = block // unit, scales is not None
  heads = 1 if kv is None else kv.shape[2]
  in_cache, in_pages = -(-slots // block), -(-most * page // block)
  split = sizes.split or max(in_cache + in_pages, 1)
  tile_rows = GROUP * (h // 64)
  ragged = slots % smallest != 0  # copies may not end inside a tile, but they may take all there is
  precision = lax.Precision.HIGHEST if dtype == jnp.float32 else None
  i32 = jnp.int32

  def body(layer_ref, items_ref, bounds_ref, first_ref, held_ref, table_ref, q_ref, *refs):
    refs = list(refs)
    kv_ref = None if kv is None else refs.pop(0)
    pool_ref = None if pool is None else refs.pop(0)
    scales_ref = refs.pop(0) if scaled else None
    parts_ref = refs.pop(0)
    scores_ref = refs.pop(0) if mass else None
    rows, q_rows, tiles, ready, asked, done, *refs = refs
    score_tiles, stored = (refs.pop(0), refs.pop(0)) if mass else (None, None)
    cells, factors, to_lanes = (refs.pop(0) for _ in range(3)) if scaled else (None, None, None)
    ring = refs
    begin, end = bounds_ref[pl.program_id(0)], bounds_ref[pl.program_id(0) + 1]

    upper = lambda x: lax.div(x + i32(block - 1), i32(block))

    def pair_of(item):
      """(pair, chunk, blocks of the pair in the contiguous cache, and in all)."""
      code = items_ref[jnp.minimum(item, items_ref.shape[0] - 1)]
      pair, chunk = lax.div(code, i32(chunks)), lax.rem(code, i32(chunks))
      pair = jnp.minimum(pair, pairs - 1)  # entries past the list's end are arbitrary
      first = upper(first_ref[pair])
      return pair, chunk, first, first + upper(held_ref[pair])

    def blocks_of(item):
      """Blocks of a chunk."""
      _, chunk, _, count = pair_of(item)
      return jnp.minimum(count - chunk * split, split)

    def live_in(item, i):
      """(whether block i of a chunk is in pages, its number there or in the cache, its live slots)."""
      pair, chunk, first, _ = pair_of(item)
      number = chunk * split + i
      paged = number >= first
      number = jnp.where(paged, number - first, number)
      length = jnp.where(paged, held_ref[pair], first_ref[pair])
      return paged, number, jnp.minimum(length - number * block, block)

    def move(item, i, slot, act):
      """Starts or awaits the copies of block i of a chunk to `rows[slot]`."""
      pair, _, _, _ = pair_of(item)
      paged, number, live = live_in(item, i)

      def copy(source, at, size):
        act(pltpu.make_async_copy(source, rows.at[slot, pl.ds(pl.multiple_of(at, size), size)], ready.at[slot]))

      if kv is not None:

        @pl.when(~paged)
        def _():
          row, head = lax.div(pair, i32(heads)), lax.rem(pair, i32(heads))
          source = kv_ref.at[layer_ref[0], row, head]
          if ragged:
            act(pltpu.make_async_copy(source, ring[0].at[slot], ready.at[slot]))
            return
          # Only live tiles: a copy for each power of 2 in their number, the large ones first.
          wanted = lax.div(live + i32(smallest - 1), i32(smallest)) * smallest
          size = block
          while size >= smallest:
            if size <= slots:

              @pl.when((wanted & size) != 0)
              def _(size=size):
                at = wanted & i32(-2 * size)
                start = pl.multiple_of(number * block + at, size)
                copy(source.at[pl.ds(start, size)], at, size)

            size //= 2

      if pool is not None:

        @pl.when(paged)
        def copy_pages():
          def one(j, _):
            position = number * block + j * unit
            place = table_ref[pair * most + lax.div(position, i32(page))]
            source = pool_ref.at[place]
            if unit < page:
              source = source.at[pl.ds(pl.multiple_of(lax.rem(position, i32(page)), unit), unit)]
            target = (cells if scaled else rows).at[slot, pl.ds(pl.multiple_of(j * unit, unit), unit)]
            act(pltpu.make_async_copy(source, target, ready.at[slot]))
            if scaled:
              act(pltpu.make_async_copy(scales_ref.at[place], factors.at[slot, j], ready.at[slot]))
            return 0

          lax.fori_loop(0, lax.div(live + i32(unit - 1), i32(unit)), one, 0)

    def queries_to(item, slot):
      return pltpu.make_async_copy(q_ref.at[pair_of(item)[0]], q_rows.at[slot], asked.at[slot])

    def fetch(ahead, number):
      """Starts the copies of the next block, the worker's `number`-th; returns the state after it."""
      item, i = ahead
      slot = lax.rem(number, i32(stages))

      @pl.when(item < end)
      def _():
        pl.when(i == 0)(lambda: queries_to(item, slot).start())
        move(item, i, slot, lambda copy: copy.start())

      last = i + 1 >= blocks_of(item)
      return jnp.where(last, item + 1, item), jnp.where(last, 0, i + 1)

    ahead = lax.fori_loop(0, stages - 1, lambda number, ahead: fetch(ahead, number), (begin, i32(0)))
    if scaled:
      for of_value in range(2):  # 1 where a page's number is that of a slot at this place of a page
        number, slot = (lax.broadcasted_iota(i32, to_lanes.shape[1:], axis) for axis in range(2))
        to_lanes[of_value] = (number == 2 * lax.rem(slot, i32(page)) + of_value).astype(jnp.float32)

    def factors_of(slot, live, begin):
      """The factors of scores and weights of a block in pages, [1, block] each; arbitrary for dead slots.

      Args: begin, where in its page the block begins, if it is smaller than one.
      """
      numbers = factors[slot].reshape(pieces, 2 * page)
      shape = numbers.shape
      index = lax.broadcasted_iota(i32, shape, 0) * page + lax.div(lax.broadcasted_iota(i32, shape, 1), i32(2))
      numbers = jnp.where(index < live + begin, numbers, 0.0)  # dead scales may be NaN, and 0 * NaN is NaN
      found = []
      for of_value in range(2):
        lanes = to_lanes[of_value, :, pl.ds(pl.multiple_of(begin, unit), block)] if unit < page else to_lanes[of_value]
        spread = jnp.dot(numbers, lanes, precision=lax.Precision.HIGHEST, preferred_element_type=jnp.float32)
        own = lax.broadcasted_iota(i32, spread.shape, 0) == lax.div(
          lax.broadcasted_iota(i32, spread.shape, 1), i32(unit)
        )
        found.append(jnp.sum(jnp.where(own, spread, 0.0), axis=0, keepdims=True))
      return found

    def store_scores(turn, pair, block_number):
      at = pl.ds(pl.multiple_of(block_number * block, block), block)
      return pltpu.make_async_copy(score_tiles.at[turn], scores_ref.at[pair, :, at], stored.at[turn])

    def one_chunk(state):
      item, ahead, number = state
      pair, chunk, _, _ = pair_of(item)
      count = blocks_of(item)
      place = lax.rem(number, i32(stages))
      queries_to(item, place).wait()
      query = q_rows[place].astype(dtype)

      def step(i, carry):
        acc, top, total, ahead = carry
        slot = lax.rem(number + i, i32(stages))
        ahead = fetch(ahead, number + i + stages - 1)  # into the slot of the block before this one
        move(item, i, slot, lambda copy: copy.wait())
        paged, block_number, live = live_in(item, i)
        if scaled:

          @pl.when(paged)
          def widen():
            x = cells[slot]
            x = x.astype(jnp.int32) if x.dtype == jnp.int8 else x
            rows[slot] = x.astype(jnp.float32).astype(dtype)

        if ragged:

          @pl.when(~paged)
          def copy_ring():
            rows[slot, :slots] = ring[0][slot]

        @pl.when(live < block)
        def _():  # slots past the end may hold NaN, and 0 * NaN is NaN
          tail = rows[slot].astype(jnp.float32)
          index = lax.broadcasted_iota(i32, tail.shape, 0)
          rows[slot] = jnp.where(index < live, tail, 0.0).astype(dtype)

        keys, values = rows[slot, :, :LANES], rows[slot, :, width - LANES :]
        dot = functools.partial(lax.dot_general, precision=precision, preferred_element_type=jnp.float32)
        s = dot(query, keys, (((1,), (1,)), ((), ()))) * (h**-0.5 * LOG2E)
        if scaled:
          of_keys, of_values = factors_of(slot, live, lax.rem(block_number * block, i32(page)))
          s = jnp.where(paged, s * of_keys, s)
        s = soft_capped(s, in_log2(softcap))
        s = jnp.where(lax.broadcasted_iota(i32, s.shape, 1) < live, s, -jnp.inf)
        if mass:
          turn = lax.rem(number + i, i32(2))
          store = store_scores(turn, pair, jnp.where(paged, in_cache + block_number, block_number))
          pl.when(number + i >= 2)(store.wait)  # until the block before the last has left this buffer
          score_tiles[turn] = s
          store.start()
        new_top = jnp.maximum(top, s.max(axis=1, keepdims=True))
        p = jnp.exp2(s - new_top)
        shrink = jnp.exp2(top - new_top)
        total = total * shrink + p.sum(axis=1, keepdims=True)
        if scaled:
          p = jnp.where(paged, p * of_values, p)
        acc = acc * shrink + dot(p.astype(dtype), values, (((1,), (0,)), ((), ())))
        return acc, new_top, total, ahead

      column = lambda x: jnp.full((GROUP, 1), x, jnp.float32)
      init = jnp.zeros((GROUP, LANES), jnp.float32), column(LOWEST), column(0.0), ahead
      acc, top, total, ahead = lax.fori_loop(0, count, step, init)

      turn = lax.rem(item - begin, i32(2))
      write = pltpu.make_async_copy(tiles.at[turn], parts_ref.at[pair, chunk], done.at[turn])
      pl.when(item - begin >= 2)(write.wait)  # until the chunk before the last has left this buffer
      out, logs = acc / total, jnp.broadcast_to(top + jnp.log2(total), acc.shape)
      if h == 64:
        tiles[turn] = jnp.where(lax.broadcasted_iota(i32, acc.shape, 1) < h, logs, out)
      else:
        tiles[turn, :GROUP], tiles[turn, GROUP:] = out, logs
      write.start()
      return item + 1, ahead, number + count

    _, _, computed = lax.while_loop(lambda state: state[0] < end, one_chunk, (begin, ahead, i32(0)))
    for turn in range(2):
      last = pltpu.make_async_copy(tiles.at[turn], parts_ref.at[0, 0], done.at[turn])
      pl.when(end - begin > turn)(last.wait)
      if mass:
        pl.when(computed > turn)(store_scores(turn, 0, 0).wait)

  arrays = [x for x in (kv, pool, scales) if x is not None]
  of_scaled = []
  if scaled:
    of_scaled.append(pltpu.VMEM((stages, block, width), pool.dtype))
    of_scaled.append(pltpu.VMEM((stages, pieces, 1, 2 * page), jnp.float32))
    of_scaled.append(pltpu.VMEM((2, 2 * page, max(page, block)), jnp.float32))
  outs, of_mass = [jax.ShapeDtypeStruct((pairs, chunks, tile_rows, LANES), jnp.float32)], []
  if mass:
    outs.append(jax.ShapeDtypeStruct((pairs, GROUP, max(in_cache + in_pages, 1) * block), jnp.float32))
    of_mass = [pltpu.VMEM((2, GROUP, block), jnp.float32), pltpu.SemaphoreType.DMA((2,))]
  return pl.pallas_call(
    body,
    out_shape=outs,
    grid_spec=pltpu.PrefetchScalarGridSpec(
      num_scalar_prefetch=len(scalars),
      grid=(sizes.workers,),
      in_specs=[pl.BlockSpec(memory_space=pl.ANY)] * (1 + len(arrays)),
      out_specs=[pl.BlockSpec(memory_space=pl.ANY)] * len(outs),
      scratch_shapes=[
        pltpu.VMEM((stages, block, width), dtype),
        pltpu.VMEM((stages, GROUP, lanes), jnp.float32),
        pltpu.VMEM((2, tile_rows, LANES), jnp.float32),
        pltpu.SemaphoreType.DMA((stages,)),
        pltpu.SemaphoreType.DMA((stages,)),
        pltpu.SemaphoreType.DMA((2,)),
        *of_mass,
        *of_scaled,
        *([pltpu.VMEM((stages, slots, width), dtype)] if ragged else []),
      ],
    ),
    compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel",)),
    name=f"decode_{block}x{stages}_{sizes.split}",
  )(*scalars, queries, *arrays)
