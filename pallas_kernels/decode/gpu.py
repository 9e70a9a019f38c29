"""Decode attention on Hopper GPUs with Pallas Mosaic GPU, split by live slots.

Each (row, KV head) pair's live prefix is cut into chunks of `Blocks.split` slots, a constant of the shape. All chunks
of all pairs, in order, form one list, which the workers (one warpgroup each, two per processor) divide evenly by blocks
of slots: worker w finds its share by a scan over the lengths inside the kernel, so ragged heads leave no processor idle
and nothing is planned beforehand. A worker streams its blocks by TMA, several in flight across the ends of chunks, and
writes one partial result a chunk: sum of values, maximum and sum of weights. The worker that holds a pair's last chunk
merges them in their order, once all have arrived; so a pair's result depends on nothing but its own slots.

The queries of a group are repeated to the 64 rows of a matrix instruction: 64 FLOP per byte, well below what the tensor
cores do at full bandwidth. All scores are in units of log 2.
"""

from __future__ import annotations

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from pallas_kernels import compat
from pallas_kernels.compat import plgpu

LOG2E = math.log2(math.e)
# A finite stand-in for -inf as the maximum of no scores: exp2(-inf - NEVER) is 0, not NaN.
NEVER = -1e30
# Pairs whose lengths are summed at a time in the scan.
SCAN = 8


@dataclasses.dataclass(frozen=True)
class Blocks:
  """Sizes. `block` slots move at a time, `stages` of them in flight a worker; `split` slots make a partial result."""

  block: int
  stages: int
  split: int
  workers: int
  fused: bool = True  # merge in the same kernel, once a semaphore tells that all partial results are there

  def __post_init__(self):
    if self.split % self.block or self.block % compat.ROWS:
      raise ValueError(f"split {self.split} must be a multiple of block {self.block}, and that of {compat.ROWS}")


def default_blocks(batch: int, kv_heads: int, slots: int, head_dim: int, processors: int) -> Blocks:
  """Block sizes by shape: blocks of 32 KiB, two workers a processor, and two or more chunks a worker at an eighth of
  the slots live. Larger chunks mean fewer partial results, up to 512 slots, where these are 1 % of the traffic."""
  block = 128 if head_dim == 64 else 64
  workers = 2 * processors
  share = max(batch * kv_heads * slots // 8 // workers, 1)
  split = max(block, slots // 256, min(512, 2 ** (share.bit_length() - 1)))
  return Blocks(block, 3, -(-split // block) * block, workers, not compat.interpreting())


def processors() -> int:
  """Multiprocessors of the GPU; of an H100 where there is none."""
  if compat.interpreting() or jax.default_backend() != "gpu":
    return 132
  return int(getattr(jax.devices()[0], "core_count", 132))


def decode_attention(q, kv, layer, lengths, *, pages=None, lse: bool = False, mass: bool = False, blocks=None):
  """See `api.decode_attention`; bfloat16 or float16, head size 64 or 128, groups up to 8, slots a multiple of 8.

  Raises:
    NotImplementedError: another device, dtype or shape; pages; mass.
  """
  compat.require_hopper()
  if pages is not None or mass:
    raise NotImplementedError("reads a contiguous cache only, and returns no mass of slots")
  b, n, h = q.shape
  layers, _, k, slots, _ = kv.shape
  group, pairs = n // k, b * k
  if q.dtype != kv.dtype or q.dtype not in (jnp.bfloat16, jnp.float16):
    raise NotImplementedError(f"q and kv must both be bfloat16 or both float16, not {q.dtype} and {kv.dtype}")
  if h not in (64, 128) or group > compat.GROUP:
    raise NotImplementedError(f"head size {h} and {group} query heads a KV head: only 64 and 128, up to 8")
  if slots % 8:
    raise NotImplementedError(f"{slots} slots a head: must be a multiple of 8")
  if layers * pairs * slots >= 2**31 or pairs > 4096:
    raise NotImplementedError(f"a cache of {kv.shape}: fewer than 2^31 slots and at most 4096 pairs of row and KV head")
  blocks = blocks or default_blocks(b, k, slots, h, processors())
  lengths = jnp.pad(lengths.astype(jnp.int32).reshape(pairs), (0, -pairs % SCAN))
  rows = kv.reshape(layers * pairs * slots, 2 * h)
  number = jnp.asarray(layer, jnp.int32).reshape(1)
  out, logs = _attend(blocks, lse, q.reshape(pairs, group, h), rows, number, lengths, slots)
  out = out[:, :group].reshape(b, n, h)
  return (out, logs[:, :group, 0].reshape(b, n)) if lse else out


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
  """Blocks of a pair's live slots; one, with nothing in it, where there are none."""
  return jnp.maximum(lax.div(lens[pair] + jnp.int32(block - 1), jnp.int32(block)), 1)


def share(lens, pairs: int, sizes: Blocks, worker):
  """Where a worker begins and ends: ((pair, chunk, blocks before the pair), end), the end in blocks of the whole list.

  A chunk belongs to the worker in whose part of the list it begins.
  """
  i32 = jnp.int32
  groups = -(-pairs // SCAN)

  def blocks(pair):
    count = blocks_of(lens, pair, sizes.block)
    return jnp.where(pair < pairs, count, 0) if pairs % SCAN else count

  def several(number):
    return sum(blocks(number * SCAN + i) for i in range(SCAN))

  total = lax.fori_loop(0, groups, lambda i, total: total + several(i), i32(0))
  each, rest = lax.div(total, i32(sizes.workers)), lax.rem(total, i32(sizes.workers))
  begin = worker * each + jnp.minimum(worker, rest)
  end = begin + each + (worker < rest).astype(i32)

  def further(state):
    number, before, count = state
    return (before + count <= begin) & (number < groups - 1)

  def skip(state):
    number, before, count = state
    return number + 1, before + count, several(number + 1)

  number, before, _ = lax.while_loop(further, skip, (i32(0), i32(0), several(i32(0))))
  pair, passing = number * SCAN, jnp.bool_(True)
  for i in range(SCAN):
    count = blocks(number * SCAN + i)
    passing = passing & (before + count <= begin)
    pair = pair + passing.astype(i32)
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


def _attend(sizes: Blocks, lse: bool, q, kv, layer, lengths, slots: int):
  """(out [P, R, H], log-sum-exp float32 [P, R, H] or None); q [P, G, H], kv [L * P * S, 2H], lengths padded."""
  pairs, group, h = q.shape
  tile = Tile.of(group, h)
  block, stages, split = sizes.block, sizes.stages, sizes.split
  per_chunk = split // block
  scale = h**-0.5 * LOG2E
  i32 = jnp.int32

  def body(*refs):
    refs = list(refs)
    q_ref, kv_ref, layer_ref, lengths_ref, part_ref, stat_ref = refs[:6]
    del refs[:6]
    out_ref = refs.pop(0) if sizes.fused else None
    lse_ref = refs.pop(0) if sizes.fused and lse else None
    lens, kv_smem, ready, lens_ready = refs
    arrived = pl.get_global(plgpu.SemaphoreType.REGULAR((pairs,))) if sizes.fused else None

    for first in range(0, lengths.shape[0], 256):
      here = pl.ds(first, min(256, lengths.shape[0] - first))
      plgpu.copy_gmem_to_smem(lengths_ref.at[here], lens.at[here], lens_ready)
    first_slot = layer_ref[0] * (pairs * slots)
    plgpu.barrier_wait(lens_ready)
    start, end = share(lens, pairs, sizes, lax.axis_index("worker"))

    def blocks(pair):
      return blocks_of(lens, jnp.minimum(pair, pairs - 1), block)

    def inside(item):
      _, chunk, before = item
      return before + chunk * per_chunk < end

    def following(item, count):
      """The item after `item`, whose pair has `count` blocks."""
      pair, chunk, before = item
      last = (chunk + 1) * per_chunk >= count
      return jnp.where(last, pair + 1, pair), jnp.where(last, 0, chunk + 1), jnp.where(last, before + count, before)

    def fetch(ahead, number):
      """Starts the load of the next block, the worker's `number`-th; returns what comes after it."""
      item, i = ahead
      pair, chunk, _ = item
      slot = lax.rem(number, i32(stages))

      @pl.when(inside(item))
      def _():
        row = first_slot + pair * slots + chunk * split + i * block
        plgpu.copy_gmem_to_smem(kv_ref.at[pl.ds(row, block)], kv_smem.at[slot], ready.at[slot])

      count = blocks(pair)
      ends = i + 1 >= jnp.minimum(count - chunk * per_chunk, per_chunk)
      after = following(item, count)
      return tuple(jnp.where(ends, x, y) for x, y in zip(after, item, strict=True)), jnp.where(ends, 0, i + 1)

    ahead = start, i32(0)
    for number in range(stages):
      ahead = fetch(ahead, i32(number))

    def one_chunk(state):
      item, ahead, number = state
      pair, chunk, _ = item
      count = blocks(pair)
      live = lens[jnp.minimum(pair, pairs - 1)] - chunk * split  # slots of this chunk and later ones
      size = jnp.minimum(count - chunk * per_chunk, per_chunk)
      whole = jnp.minimum(lax.div(live, i32(block)), size)
      queries = compat.load_repeated(q_ref.at[pair])
      row = lambda x: plgpu.layout_cast(jnp.full((compat.ROWS,), x, jnp.float32), compat.row_layout())
      acc = plgpu.layout_cast(jnp.zeros((compat.ROWS, h), jnp.float32), plgpu.Layout.WGMMA)

      def step(i, carry, masked):
        acc, top, total, ahead = carry
        slot = lax.rem(number + i, i32(stages))
        keys, values = kv_smem.at[slot, :, pl.ds(0, h)], kv_smem.at[slot, :, pl.ds(h, h)]
        plgpu.barrier_wait(ready.at[slot])
        s = compat.dot(queries, keys.transpose((1, 0))) * scale
        if masked:
          index = lambda shape, axis: plgpu.broadcasted_iota(i32, shape, axis, layout=plgpu.Layout.WGMMA)
          s = jnp.where(index(s.shape, 1) < live - i * block, s, -jnp.inf)
          # What lies past the end may be NaN, and 0 * NaN is NaN.
          tail = plgpu.load(values, layout=plgpu.Layout.WGMMA)
          values[...] = jnp.where(index(tail.shape, 0) < live - i * block, tail, jnp.zeros((), tail.dtype))
          plgpu.commit_smem()
        new_top = jnp.maximum(top, s.max(axis=1))
        shrink = jnp.exp2(top - new_top)
        p = jnp.exp2(s - lax.broadcast_in_dim(new_top, s.shape, [0]))
        total = total * shrink + p.sum(axis=1)
        acc = acc * lax.broadcast_in_dim(shrink, acc.shape, [0])
        acc = compat.accumulate(acc, p.astype(q.dtype), values)
        compat.settle()
        return acc, new_top, total, fetch(ahead, number + i + stages)

      carry = acc, row(NEVER), row(0.0), ahead
      carry = lax.fori_loop(0, whole, functools.partial(step, masked=False), carry)
      acc, top, total, ahead = lax.fori_loop(whole, size, functools.partial(step, masked=True), carry)
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

  most = -(-slots // split)
  parts = [jax.ShapeDtypeStruct((pairs, most, *tile.shape), jnp.float32)]
  parts.append(jax.ShapeDtypeStruct((pairs, most, 2, compat.GROUP), jnp.float32))
  outs = [jax.ShapeDtypeStruct((pairs, *tile.shape), q.dtype)]
  outs += [jax.ShapeDtypeStruct((pairs, *tile.shape), jnp.float32)] if lse else []
  params = plgpu.CompilerParams(approx_math=True)
  copies = -(-lengths.shape[0] // 256)
  part, stat, *done = compat.kernel(
    body,
    out_type=parts + (outs if sizes.fused else []),
    scratch_types=[
      plgpu.SMEM(lengths.shape, jnp.int32),
      plgpu.SMEM((stages, block, 2 * h), q.dtype, transforms=compat.operand_transforms()),
      plgpu.Barrier(num_barriers=stages, num_arrivals=1),
      plgpu.Barrier(num_arrivals=copies),
    ],
    grid=(sizes.workers,),
    grid_names=("worker",),
    kernel_name=f"decode_{block}x{stages}_{split}",
    compiler_params=params,
  )(q, kv, layer, lengths)

  if not sizes.fused:

    def merge_body(lengths_ref, part_ref, stat_ref, *out_refs):
      out_ref, lse_ref = out_refs if lse else (*out_refs, None)
      pair = lax.axis_index("pair")
      count = blocks_of(lengths_ref, pair, block)
      merge(pair, lax.div(count + i32(per_chunk - 1), i32(per_chunk)), tile, part_ref, stat_ref, out_ref, lse_ref)

    done = compat.kernel(
      merge_body, out_type=outs, grid=(pairs,), grid_names=("pair",), kernel_name="decode_merge", compiler_params=params
    )(lengths, part, stat)
  return done[0], done[1] if lse else None
