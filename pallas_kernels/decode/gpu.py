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

Where there are many pairs, or bounded ones, each has a block of threads of its own, which writes the result: no list,
no partial results, no second kernel. The processors hold more such blocks at once than workers.

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

from pallas_kernels.common import compat, dispatch, tuned, warpgroup
from pallas_kernels.common.platform import processors
from pallas_kernels.decode import gpu_kernel
from pallas_kernels.decode.gpu_common import Blocks, Tile, Variant
from pallas_kernels.decode.gpu_division import padded

MOST_PAIRS = 4096  # of row and KV head in a call of the kernel, whose shared memory holds up to four numbers of each
SHARED = 227 * 2**10  # bytes of shared memory of a block of threads, at most
MANY_PAIRS = 2048  # from which on pages are read by a block of threads a pair
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

  A pair has a block of threads of its own, with two blocks of slots in flight, where processors have several pairs and
  none is long: in a contiguous cache of up to 1,024 slots from a pair and a half a processor on, of up to 2,048 slots
  from six on; in pages from `MANY_PAIRS` on.

  Heads of 256: one worker a processor, with as many blocks in flight as its shared memory holds; no other choice was
  timed.
  """
  block = 64
  if compat.interpreting():  # every part of the kernel at work on small inputs
    return Blocks(block, 2, 2 * block, 3)
  pairs, workers, stages = batch * kv_heads, 2 * processors, 3
  few, many = 4 * pairs < processors, pairs >= 3 * workers
  if head_dim == 256:
    return wide_blocks(pairs, slots, processors, paged, scaled)
  if pairs >= MANY_PAIRS if paged else (slots <= 1024 and 2 * pairs >= 3 * processors) or (slots <= 2048 and many):
    return Blocks(block, 2, 2 * block, 0)
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


def wide_blocks(pairs: int, slots: int, processors: int, paged: bool, scaled: bool) -> Blocks:
  """`default_blocks` of head size 256, whose blocks of 64 slots take 64 KiB, 32 of 8 bits and 64 for one made wider."""
  block, kib = 64, 2**10
  listed = 4 * (2 + (slots > 0) + paged) * padded(min(pairs, MOST_PAIRS))  # bytes of the list of chunks
  rest = 8 * kib + (64 * kib if scaled and not slots else 0)
  stage = (33 * kib if scaled else 0) + (64 * kib if slots or not scaled else 0)
  stages = min((SHARED - listed - rest) // stage, 3)
  if paged:
    split = 128 if 4 * pairs < processors else 256 if pairs < processors else 512
  else:
    share = pairs * slots // 8 // processors
    split = -(-max(2 * block, slots // 128, min(1024, 2 ** share.bit_length())) // block) * block
  return Blocks(block, stages, split, processors, rest=max(2 * block, split // 4), merged=4)


def shape_class(pairs: int, head_dim: int, slots: int, page: int, stored: str) -> str:
  """Name of the shapes that share measured sizes, whatever the size of the table of pages."""
  return tuned.shape_class(pairs=pairs, H=head_dim, S=slots, **({"page": page, "of": f" {stored}"} if page else {}))


def decode_attention(
  q, kv, layer, lengths, *, pages=None, lse: bool = False, mass: bool = False, softcap=None, sinks=None, blocks=None
):
  """See `api.decode_attention`; bfloat16 or float16, head size 64, 128 or 256, groups up to 8.

  The slots of `kv` must be a multiple of 8, since a copy by TMA begins at a tile of 8 rows. Pages must divide a block
  or be a whole number of blocks, and have 8 slots or more, 16 with scales; in q's dtype, or int8 or float8_e4m3fn.
  More than `MOST_PAIRS` pairs of row and KV head that share workers take several calls of the kernel, each with some of
  the rows.

  Raises:
    NotImplementedError: another device, dtype or shape.
  """
  compat.require_hopper()
  b, n, h = q.shape
  layers, _, k = (kv if kv is not None else pages.table).shape[:3]
  group = n // k
  if q.dtype not in (jnp.bfloat16, jnp.float16) or (kv is not None and kv.dtype != q.dtype):
    stored = "" if kv is None else f" and {kv.dtype}"
    raise NotImplementedError(f"q and kv must both be bfloat16 or both float16, not {q.dtype}{stored}")
  dispatch.supports_head_size(h, (64, 128, 256))
  if group > warpgroup.GROUP:
    raise NotImplementedError(f"{group} query heads a KV head: only up to {warpgroup.GROUP}")
  slots = 0 if kv is None else kv.shape[3]
  if slots % 8:
    raise NotImplementedError(f"{slots} slots a head: must be a multiple of 8")
  if layers * b * k * slots >= 2**31 or k > MOST_PAIRS:
    raise NotImplementedError(
      f"{layers} layers of {b} rows and {k} KV heads, {slots} slots each: up to {MOST_PAIRS} heads and 2^31 slots"
    )
  scaled = pages is not None and pages.format.scaled
  page, stored = (0, "") if pages is None else (pages.pool.shape[1], pages.pool.dtype.name)

  def sizes(rows: int) -> Blocks:
    default = default_blocks(rows, k, slots, h, processors(), page > 0, scaled)
    return tuned.blocks("decode", shape_class(rows * k, h, slots, page, stored), default)

  calls = 1 if (blocks or sizes(b)).by_pair else -(-b // (MOST_PAIRS // k))
  rows = -(-b // calls)
  blocks = blocks or sizes(rows)
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
  logs_wanted = lse or mass or sinks is not None
  variant = Variant(slots, page, most, scaled, logs_wanted, mass, k * (calls > 1), softcap)
  tile = Tile.of(n // k, h, apart=rows * k < processors())
  attend = functools.partial(gpu_kernel.attend, blocks, variant, tile)
  of_pairs = lambda rows: None if sinks is None else jnp.tile(sinks.reshape(k, group), (rows, 1))
  if calls == 1:
    out, logs, masses = attend(*first, *arrays, *counts, sinks=of_pairs(b))
  else:
    # Rows instead of layers: number layer * B + row is where the first row of a call begins in the cache.
    attend = attend if compat.interpreting() else jax.jit(attend)  # lowered once
    parts = []
    for at in range(0, b * k, rows * k):
      queries, *lens = (x[at : at + rows * k] for x in (first[0], *counts))
      of_rows = of_pairs(len(queries) // k)
      parts.append(attend(queries, first[1] * b + at // k, *arrays, *lens, sinks=of_rows))
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
