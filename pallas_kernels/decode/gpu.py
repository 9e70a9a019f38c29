"""Decode attention on Hopper GPUs with Pallas Mosaic GPU, split by live slots.

The live slots of a (row, KV head) pair are one stream of blocks: those of the contiguous cache, then those of its
pages. It is cut into chunks of `Blocks.split` slots, a constant of the shape. All chunks of all pairs, in order, form
one list, which the workers (one warpgroup each, two per processor) divide evenly by blocks of slots: worker w finds its
share by a scan over the lengths inside the kernel, so ragged heads leave no processor idle and nothing is planned
beforehand. A worker streams its blocks by TMA, several in flight across the ends of chunks, the numbers of pages one
block further ahead, and writes one partial result a chunk: sum of values, maximum and sum of weights. A second kernel,
or the worker that holds a pair's last chunk, merges them in their order; so a pair's result depends on nothing but its
own slots.

Pages of 8 bits are turned into q's dtype, exactly, in shared memory, from where the tensor cores read all operands; a
slot's two scales are factors of its score and of its weight.

The queries of a group are repeated to the 64 rows of a matrix instruction: 64 FLOP per byte, well below what the tensor
cores do at full bandwidth. All scores are in units of log 2.
"""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from pallas_kernels import compat, tuned
from pallas_kernels.compat import plgpu
from pallas_kernels.decode.gpu_work import LOG2E, NEVER, SCAN, Blocks, Tile, blocks_of, merge, share


def default_blocks(
  batch: int, kv_heads: int, slots: int, head_dim: int, processors: int, paged: bool = False, scaled: bool = False
) -> Blocks:
  """Block sizes by shape: blocks of 32 KiB in q's dtype, two workers a processor.

  A contiguous cache of `slots` a head gets two or more chunks a worker at an eighth of the slots live. Larger chunks
  mean fewer partial results, up to 512 slots, where these are 1 % of the traffic. With pages `slots` is what the
  contiguous cache beside them holds; their table may grow, and no result may change with it: chunks go by the number of
  pairs alone, and are shorter, since what is evicted makes shares small (predicted from how evenly work divides, not
  measured). Merging in a second kernel was measured faster than in the workers (62.0 us against 65.9, H100,
  B32 K8 G4 H128 S8192 at CR 8).
  """
  if compat.interpreting():  # every part of the kernel at work on small inputs
    return Blocks(64, 2, 128, 3)
  block = 128 if head_dim == 64 else 64
  pairs, workers = batch * kv_heads, 2 * processors
  if paged:
    stages = (2 if slots else 4) if scaled else 3
    return Blocks(block, stages, 256 if 2 * pairs >= workers else 128, workers)
  share = max(pairs * slots // 8 // workers, 1)
  split = max(block, slots // 256, min(512, 2 ** (share.bit_length() - 1)))
  return Blocks(block, 3, -(-split // block) * block, workers)


def shape_class(pairs: int, head_dim: int, slots: int, page: int, stored: str) -> str:
  """Shapes that share measured sizes; how large a table of pages has grown plays no part."""
  return tuned.shape_class(pairs=pairs, H=head_dim, S=slots, **({"page": page, "of": f" {stored}"} if page else {}))


def processors() -> int:
  """Multiprocessors of the GPU; of an H100 where there is none."""
  if compat.interpreting() or jax.default_backend() != "gpu":
    return 132
  return int(getattr(jax.devices()[0], "core_count", 132))


@dataclasses.dataclass(frozen=True)
class Case:
  """What a kernel is compiled for, besides the shapes of its arguments: `slots` a head in the contiguous cache and
  `pages` of `page` slots in the table, 0 where there is none; `scaled`, pages of 8 bits; `lse` is asked for."""

  slots: int
  page: int
  pages: int
  scaled: bool
  lse: bool

  @property
  def sources(self) -> int:
    return (self.slots > 0) + (self.page > 0)

  def chunks(self, sizes: Blocks) -> int:
    """Partial results of a pair, at most."""
    blocks = -(-self.slots // sizes.block) + -(-self.page * self.pages // sizes.block)
    return max(-(-blocks // (sizes.split // sizes.block)), 1)


def decode_attention(q, kv, layer, lengths, *, pages=None, lse: bool = False, mass: bool = False, blocks=None):
  """See `api.decode_attention`; bfloat16 or float16, head size 64 or 128, groups up to 8.

  The slots of `kv` must be a multiple of 8, since a copy by TMA begins at a tile of 8 rows. Pages must divide a block
  or be a whole number of blocks, and have 8 slots or more, 16 with scales; in q's dtype, or int8 or float8_e4m3fn.

  Raises:
    NotImplementedError: another device, dtype or shape; mass.
  """
  compat.require_hopper()
  if mass:
    raise NotImplementedError("returns no mass of slots")
  b, n, h = q.shape
  layers, _, k = (kv if kv is not None else pages.table).shape[:3]
  group, pairs = n // k, b * k
  if q.dtype not in (jnp.bfloat16, jnp.float16) or (kv is not None and kv.dtype != q.dtype):
    stored = "" if kv is None else f" and {kv.dtype}"
    raise NotImplementedError(f"q and kv must both be bfloat16 or both float16, not {q.dtype}{stored}")
  if h not in (64, 128) or group > compat.GROUP:
    raise NotImplementedError(f"head size {h} and {group} query heads a KV head: only 64 and 128, up to 8")
  slots = 0 if kv is None else kv.shape[3]
  if slots % 8:
    raise NotImplementedError(f"{slots} slots a head: must be a multiple of 8")
  if layers * pairs * slots >= 2**31 or pairs > 4096:
    raise NotImplementedError(
      f"{layers} layers of {pairs} pairs of row and KV head, {slots} slots each: up to 4096 pairs and 2^31 slots"
    )
  scaled = pages is not None and pages.scales is not None
  page, stored = (0, "") if pages is None else (pages.pool.shape[1], pages.pool.dtype.name)
  if blocks is None:
    default = default_blocks(b, k, slots, h, processors(), page > 0, scaled)
    blocks = tuned.blocks("decode", shape_class(pairs, h, slots, page, stored), default)
  arrays = [q.reshape(pairs, group, h), jnp.asarray(layer, jnp.int32).reshape(1)]
  counts = []
  if kv is not None:
    arrays.append(kv.reshape(layers * pairs * slots, 2 * h))
    counts.append(lengths)
  most = 0
  if pages is not None:
    most = pages.table.shape[3]
    check_pages(pages, q.dtype, blocks.block)
    # A table without places: there is nothing in it, and the kernel reads none.
    table = jnp.zeros((1,), jnp.int32) if most == 0 else pages.table.astype(jnp.int32).reshape(-1)
    arrays += [pages.pool.reshape(-1, 2 * h), table]
    arrays += [pages.scales.reshape(-1)] if scaled else []
    counts.append(pages.lengths)
  counts = [jnp.pad(x.astype(jnp.int32).reshape(pairs), (0, -pairs % SCAN)) for x in counts]
  case = Case(slots, page, most, scaled, lse)
  out, logs = _attend(blocks, case, *arrays, *counts)
  out = out[:, :group].reshape(b, n, h)
  return (out, logs[:, :group, 0].reshape(b, n)) if lse else out


def check_pages(pages, dtype, block: int) -> None:
  """Raises NotImplementedError for pages that the kernel does not read."""
  (number, page, _), stored = pages.pool.shape, pages.pool.dtype
  if pages.scales is None and stored != dtype:
    raise NotImplementedError(f"pages.pool is {stored} and q {dtype}: must be the same, or 8 bits with scales")
  least = 8 if pages.scales is None else 16  # a copy to shared memory begins at a multiple of 128 bytes
  if page % least or (block % page and page % block):
    raise NotImplementedError(
      f"pages of {page} slots: must be a multiple of {least}, and divide {block} or be a multiple of it"
    )
  if number == 0 or number * page >= 2**31 or pages.table.size >= 2**31:
    raise NotImplementedError(f"a pool of {number} pages, a table of {pages.table.size}: 1 or more, below 2^31 slots")


def _attend(sizes: Blocks, case: Case, q, layer, *arrays):
  """(out [P, R, H], log-sum-exp float32 [P, R, H] or None), for P pairs of row and KV head.

  q [P, G, H], layer [1]; then kv [L * P * S, 2H] if there are slots; the pool [pages * page, 2H], the table
  [L * P * M] and, if scaled, scales [pages * page * 2] if there are pages; lengths of each, padded.
  """
  pairs, group, h = q.shape
  tile = Tile.of(group, h)
  block, stages, split = sizes.block, sizes.stages, sizes.split
  per_chunk = split // block
  slots, page = case.slots, case.page
  unit = min(page, block) if page else block  # slots that one copy moves
  pieces = block // unit
  scale = h**-0.5 * LOG2E
  i32 = jnp.int32
  lengths = arrays[-case.sources :]

  def body(*refs):
    refs = list(refs)
    q_ref, layer_ref = refs.pop(0), refs.pop(0)
    kv_ref = refs.pop(0) if slots else None
    pool_ref, table_ref = (refs.pop(0), refs.pop(0)) if page else (None, None)
    scales_ref = refs.pop(0) if case.scaled else None
    lengths_refs = [refs.pop(0) for _ in lengths]
    part_ref, stat_ref = refs.pop(0), refs.pop(0)
    out_ref = refs.pop(0) if sizes.fused else None
    lse_ref = refs.pop(0) if sizes.fused and case.lse else None
    lens = [refs.pop(0) for _ in lengths]
    kv_smem, ready, lens_ready, *refs = refs
    bytes_smem, scales_smem, bytes_ready = refs if case.scaled else (None, None, None)
    arrived = pl.get_global(plgpu.SemaphoreType.REGULAR((pairs,))) if sizes.fused else None

    for source, target in zip(lengths_refs, lens, strict=True):
      for first in range(0, source.shape[0], 256):
        here = pl.ds(first, min(256, source.shape[0] - first))
        plgpu.copy_gmem_to_smem(source.at[here], target.at[here], lens_ready)
    first_slot, first_page = layer_ref[0] * (pairs * slots), layer_ref[0] * (pairs * case.pages)
    plgpu.barrier_wait(lens_ready)
    start, end = share(lens, pairs, sizes, lax.axis_index("worker"))

    def blocks(pair):
      return blocks_of(lens, jnp.minimum(pair, pairs - 1), block)

    def in_cache(pair):
      """Blocks of a pair in the contiguous cache."""
      return lax.div(lens[0][jnp.minimum(pair, pairs - 1)] + i32(block - 1), i32(block)) if slots else i32(0)

    def inside(item):
      _, chunk, before = item
      return before + chunk * per_chunk < end

    def following(item, count):
      """The item after `item`, whose pair has `count` blocks."""
      pair, chunk, before = item
      last = (chunk + 1) * per_chunk >= count
      return jnp.where(last, pair + 1, pair), jnp.where(last, 0, chunk + 1), jnp.where(last, before + count, before)

    def numbers_of(item, i):
      """Numbers of the pages in block i of a chunk; anything where nothing is live."""
      if not case.pages:
        return (i32(0),) * pieces if page else ()
      pair, chunk, _ = item
      at = (chunk * per_chunk + i - in_cache(pair)) * block
      pair = jnp.minimum(pair, pairs - 1)
      place = lambda j: jnp.clip(lax.div(at + i32(j * unit), i32(page)), 0, case.pages - 1)
      return tuple(table_ref[first_page + pair * case.pages + place(j)] for j in range(pieces))

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

    def fetch(ahead, number):
      """Starts the load of the next block, the worker's `number`-th; returns what comes after it."""
      item, i, numbers = ahead
      pair, chunk, _ = item
      slot = lax.rem(number, i32(stages))
      at = chunk * per_chunk + i  # the block's number in its stream
      first = in_cache(pair)
      here = inside(item)

      if slots:

        @pl.when(here & (at < first) if page else here)
        def _():
          row = first_slot + pair * slots + at * block
          if not page:
            plgpu.copy_gmem_to_smem(kv_ref.at[pl.ds(row, block)], kv_smem.at[slot], ready.at[slot])
            return
          live = lens[0][pair] - at * block
          for j in range(pieces):
            piece = kv_smem.at[slot, pl.ds(j * unit, unit)]
            copy_live(live, j, [(kv_ref.at[pl.ds(row + j * unit, unit)], piece)], ready.at[slot])

      if page:

        @pl.when(here & (at >= first))
        def _():
          start = (at - first) * block
          live = lens[-1][pair] - start
          target, barrier = (bytes_smem, bytes_ready.at[slot]) if case.scaled else (kv_smem, ready.at[slot])
          for j in range(pieces):
            row = numbers[j] * page + (lax.rem(start, i32(page)) if page > block else 0)
            copies = [(pool_ref.at[pl.ds(row, unit)], target.at[slot, pl.ds(j * unit, unit)])]
            if case.scaled:
              piece = scales_smem.at[slot, pl.ds(2 * j * unit, 2 * unit)]
              copies.append((scales_ref.at[pl.ds(2 * row, 2 * unit)], piece))
            copy_live(live, j, copies, barrier)

      count = blocks(pair)
      ends = i + 1 >= jnp.minimum(count - chunk * per_chunk, per_chunk)
      after = following(item, count)
      item = tuple(jnp.where(ends, x, y) for x, y in zip(after, item, strict=True))
      i = jnp.where(ends, 0, i + 1)
      return item, i, numbers_of(item, i)

    ahead = start, i32(0), numbers_of(start, i32(0))
    for number in range(stages):
      ahead = fetch(ahead, i32(number))

    def widened(slot, live):
      """Brings a block of 8 bits into q's dtype, in place of a block of the cache; zeros from `live` on, if given."""
      own = kv_smem.at[slot] if slots else kv_smem
      for half in range(2):
        columns = pl.ds(half * h, h)
        x = plgpu.load(bytes_smem.at[slot, :, columns], layout=plgpu.Layout.WGMMA_UPCAST_2X, optimized=False)
        if x.dtype != jnp.int8:
          x = x.astype(jnp.float16)  # the one conversion that the hardware has
        x = x.astype(q.dtype) if x.dtype == jnp.int8 and q.dtype == jnp.bfloat16 else x.astype(jnp.float32)
        x = plgpu.layout_cast(x.astype(q.dtype), plgpu.Layout.WGMMA)
        if live is not None:
          index = plgpu.broadcasted_iota(i32, x.shape, 0, layout=plgpu.Layout.WGMMA)
          x = jnp.where(index < live, x, jnp.zeros((), x.dtype))
        own[:, columns] = x
      plgpu.commit_smem()
      return own.at[:, pl.ds(0, h)], own.at[:, pl.ds(h, h)]

    def one_chunk(state):
      item, ahead, number = state
      pair, chunk, _ = item
      pair_lens = [live[jnp.minimum(pair, pairs - 1)] for live in lens]
      count, first, begin = blocks(pair), in_cache(pair), chunk * per_chunk
      size = jnp.minimum(count - begin, per_chunk)
      queries = compat.load_repeated(q_ref.at[pair])
      row = lambda x: plgpu.layout_cast(jnp.full((compat.ROWS,), x, jnp.float32), compat.row_layout())
      acc = plgpu.layout_cast(jnp.zeros((compat.ROWS, h), jnp.float32), plgpu.Layout.WGMMA)

      def step(i, carry, live, scaled):
        """Block i of the chunk; `live` slots from the chunk's first on, None: all of the block is."""
        acc, top, total, ahead = carry
        slot = lax.rem(number + i, i32(stages))
        index = lambda shape, axis: plgpu.broadcasted_iota(i32, shape, axis, layout=plgpu.Layout.WGMMA)
        rest = None if live is None else live - i * block
        if scaled:
          plgpu.barrier_wait(bytes_ready.at[slot])
          keys, values = widened(slot, rest)
          of_keys, of_values = compat.load_pairs(scales_smem.at[slot])
        else:
          plgpu.barrier_wait(ready.at[slot])
          keys, values = kv_smem.at[slot, :, pl.ds(0, h)], kv_smem.at[slot, :, pl.ds(h, h)]
        s = compat.dot(queries, keys.transpose((1, 0))) * scale
        if scaled:
          s = s * lax.broadcast_in_dim(of_keys, s.shape, [1])
        if live is not None:
          s = jnp.where(index(s.shape, 1) < rest, s, -jnp.inf)
          # What lies past the end may be NaN, and 0 * NaN is NaN.
          if not scaled:
            tail = plgpu.load(values, layout=plgpu.Layout.WGMMA)
            values[...] = jnp.where(index(tail.shape, 0) < rest, tail, jnp.zeros((), tail.dtype))
            plgpu.commit_smem()
        new_top = jnp.maximum(top, s.max(axis=1))
        shrink = jnp.exp2(top - new_top)
        p = jnp.exp2(s - lax.broadcast_in_dim(new_top, s.shape, [0]))
        total = total * shrink + p.sum(axis=1)
        if scaled:
          p = p * lax.broadcast_in_dim(of_values, p.shape, [1])
          p = p if live is None else jnp.where(index(p.shape, 1) < rest, p, 0.0)
        acc = acc * lax.broadcast_in_dim(shrink, acc.shape, [0])
        acc = compat.accumulate(acc, p.astype(q.dtype), values)
        compat.settle()
        return acc, new_top, total, fetch(ahead, number + i + stages)

      carry, done = (acc, row(NEVER), row(0.0), ahead), i32(0)
      for source, length in enumerate(pair_lens):
        last = source + 1 == len(pair_lens)
        stop = size if last else jnp.clip(first - begin, 0, size)
        live = length - (begin if source == 0 and slots else begin - first) * block
        whole = jnp.clip(lax.div(live, i32(block)), done, stop)
        scaled = case.scaled and last
        carry = lax.fori_loop(done, whole, functools.partial(step, live=None, scaled=scaled), carry)
        carry = lax.fori_loop(whole, stop, functools.partial(step, live=live, scaled=scaled), carry)
        done = stop
      acc, top, total, ahead = carry
      compat.store_first(acc, part_ref.at[pair, chunk, pl.ds(0, group)])
      compat.store_first(top, stat_ref.at[pair, chunk, 0, pl.ds(0, group)])
      compat.store_first(total, stat_ref.at[pair, chunk, 1, pl.ds(0, group)])
      if sizes.fused:
        plgpu.semaphore_signal(arrived.at[pair], memory_scope="gpu")
      return following(item, count), ahead, number + size

    lax.while_loop(lambda state: inside(state[0]), one_chunk, (start, ahead, i32(0)))

    if sizes.fused:
      # Workers start in the order of their numbers, and the one with a pair's last chunk waits for lower ones alone,
      # which run already: the wait ends even where the grid does not fit the GPU.
      def finish(item):
        pair, chunk, _ = item
        count = blocks(pair)
        chunks = lax.div(count + i32(per_chunk - 1), i32(per_chunk))

        @pl.when(chunk == chunks - 1)
        def _():
          plgpu.semaphore_wait(arrived.at[pair], chunks, memory_scope="gpu")
          merge(pair, chunks, tile, part_ref, stat_ref, out_ref, lse_ref)

        return following(item, count)

      lax.while_loop(inside, finish, start)

  parts = [jax.ShapeDtypeStruct((pairs, case.chunks(sizes), *tile.shape), jnp.float32)]
  parts.append(jax.ShapeDtypeStruct((pairs, case.chunks(sizes), 2, compat.GROUP), jnp.float32))
  outs = [jax.ShapeDtypeStruct((pairs, *tile.shape), q.dtype)]
  outs += [jax.ShapeDtypeStruct((pairs, *tile.shape), jnp.float32)] if case.lse else []
  params = plgpu.CompilerParams(approx_math=True)
  copies = len(lengths) * -(-lengths[0].shape[0] // 256)
  scratch = [plgpu.SMEM(x.shape, jnp.int32) for x in lengths]
  laid = lambda dtype: compat.operand_transforms(dtype, h)
  matrix = lambda dtype, *lead: plgpu.SMEM((*lead, block, 2 * h), dtype, transforms=laid(dtype))
  # Where blocks of 8 bits alone are loaded, one place is enough to widen them to.
  scratch += [
    matrix(q.dtype, *((stages,) if slots or not case.scaled else ())),
    plgpu.Barrier(num_barriers=stages, num_arrivals=pieces),
  ]
  scratch.append(plgpu.Barrier(num_arrivals=copies))
  if case.scaled:
    scratch += [matrix(arrays[1 if slots else 0].dtype, stages), plgpu.SMEM((stages, 2 * block), jnp.float32)]
    scratch.append(plgpu.Barrier(num_barriers=stages, num_arrivals=2 * pieces))
  kinds = f"pages{page}_" if page else ""
  part, stat, *done = compat.kernel(
    body,
    out_type=parts + (outs if sizes.fused else []),
    scratch_types=scratch,
    grid=(sizes.workers,),
    grid_names=("worker",),
    kernel_name=f"decode_{kinds}{block}x{stages}_{split}",
    compiler_params=params,
  )(q, layer, *arrays)

  if not sizes.fused:

    def merge_body(*refs):
      lengths_refs, (part_ref, stat_ref, out_ref, *logs) = refs[: len(lengths)], refs[len(lengths) :]
      pair = lax.axis_index("pair")
      chunks = lax.div(blocks_of(lengths_refs, pair, block) + i32(per_chunk - 1), i32(per_chunk))
      merge(pair, chunks, tile, part_ref, stat_ref, out_ref, logs[0] if logs else None)

    done = compat.kernel(
      merge_body, out_type=outs, grid=(pairs,), grid_names=("pair",), kernel_name="decode_merge", compiler_params=params
    )(*lengths, part, stat)
  return done[0], done[1] if case.lse else None
