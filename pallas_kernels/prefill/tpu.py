"""Prefill attention on TPUs with Pallas Mosaic.

The keys that any query sees are gathered first (`plan`), keys and values side by side in rows of 2H, so that far blocks
are dense. The queries of all query heads of a KV head are rows of one matrix; the grid steps over its tiles. The
gathered rows stay in HBM: a step copies the blocks that its tile visits, the next block while it computes on one, and
the next tile's first block while it computes on its last. Blocks that all queries of a tile see come first and need no
mask; in the others, at the diagonal and in the band, each pair is tested.

With H = 64 both products take the whole row of 128: the query is 0 in the value's lanes, and the sum in the key's lanes
is not used. A matrix unit is 128 wide anyway, and nothing moves across lanes.
"""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from pallas_kernels.common import compat_tpu, dispatch
from pallas_kernels.common.compat_tpu import pltpu
from pallas_kernels.common.softmax import LOG2E, LOWEST, in_log2, soft_capped, with_sinks
from pallas_kernels.prefill import plan as planning
from pallas_kernels.prefill.plan import KEPT, START, STOP, WHOLE

LANES = 128


@dataclasses.dataclass(frozen=True)
class Blocks:
  """`q` rows of queries a tile, `kv` keys a block; both multiples of 128."""

  q: int
  kv: int

  def __post_init__(self):
    if self.q % LANES or self.kv % LANES:
      raise ValueError(f"q {self.q} and kv {self.kv} must be multiples of {LANES}")


def default_blocks(rows: int) -> Blocks:
  """512 of each, or all queries if they are fewer: large enough to hide the row sums and the loop, small against a
  core's 16 MiB. The number of slots does not matter, so that no result depends on the capacity of a cache."""
  return Blocks(min(512, -(-rows // LANES) * LANES), 512)


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
  """See `api.prefill_attention`; bfloat16 or float32, head size 64 or 128.

  Raises:
    NotImplementedError: another device, dtype or head size; mass.
  """
  compat_tpu.require_tpu()
  if query_weights is not None:
    raise NotImplementedError("returns no mass of keys")
  _, t, n, h = q.shape
  k = keys.shape[1]
  dispatch.supports(("bfloat16", "float32"), q=q, keys=keys, values=values)
  dispatch.supports_head_size(h)
  blocks = blocks or default_blocks(t * (n // k))
  rows, kv, positions, bounds, ranges = _prepare(blocks, q, keys, values, q_pos, k_first, k_last)
  wanted = lse or sinks is not None
  out, *logs = _finish(q.shape, k, *_attend(blocks, h, wanted, softcap, rows, kv, positions, bounds, ranges))
  if not wanted:
    return out
  results = with_sinks(out, *logs, sinks)
  return results if lse else results[0]


@functools.partial(jax.jit, static_argnums=0)
def _prepare(blocks: Blocks, q, keys, values, q_pos, k_first, k_last):
  """The arguments of `_attend`; a KV head's rows are its heads' queries at one position, then those at the next."""
  b, t, n, h = q.shape
  k = keys.shape[1]
  group = n // k
  pad = -(t * group) % blocks.q
  rows = jnp.moveaxis(q.reshape(b, t, k, group, h), 1, 2).reshape(b, k, t * group, h)
  rows = jnp.pad(rows, ((0, 0), (0, 0), (0, pad), (0, LANES - h)))
  positions = jnp.pad(jnp.repeat(q_pos.astype(jnp.int32), group, axis=1), ((0, 0), (0, pad)), constant_values=-2)
  positions = positions.reshape(b, -1, blocks.q)
  plan = planning.make(positions, k_first, k_last, block=blocks.kv, grain=LANES)
  kv = planning.gather(jnp.concatenate([keys, values], axis=-1), plan.source)
  return rows, kv, positions[:, :, None], plan.bounds, jnp.swapaxes(plan.ranges, 2, 3)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _finish(shape: tuple[int, ...], k: int, out, logs=None):
  """The kernel's rows as [B, T, N, H], and its log-sum-exp, if there is one, as [B, T, N]."""
  b, t, n, h = shape
  out = out[:, :, : t * (n // k), LANES - h :].reshape(b, k, t, n // k, h)
  results = [jnp.moveaxis(out, 2, 1).reshape(shape)]
  if logs is not None:
    logs = logs.reshape(b, k, -1)[:, :, : t * (n // k)].reshape(b, k, t, n // k)
    results.append(jnp.moveaxis(logs, 2, 1).reshape(b, t, n))
  return results


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3))
def _attend(blocks: Blocks, h: int, lse: bool, softcap: float | None, q, kv, positions, bounds, ranges):
  """q [B, K, tiles * M, 128], kv [B, K, R, 2H], positions [B, tiles, 1, M]; bounds and ranges: see `Plan`, the ranges
  with the tiles last. Returns the output, in the last H lanes of [B, K, tiles * M, 128], and with `lse` the
  log-sum-exp, float32 [B, K, tiles, 1, M]."""
  b, k, _, _ = q.shape
  tiles, _, size = positions.shape[1:]
  block, width, dtype = blocks.kv, kv.shape[3], q.dtype
  scale = h**-0.5 * LOG2E  # scores in units of log 2
  precision = lax.Precision.HIGHEST if dtype == jnp.float32 else None
  dot = functools.partial(lax.dot_general, precision=precision, preferred_element_type=jnp.float32)
  i32 = jnp.int32

  def body(ranges_ref, positions_ref, q_ref, kv_ref, bounds_ref, out_ref, *scratch):
    logs_ref, *scratch = scratch if lse else (None, *scratch)
    kv_buffer, bounds_buffer, ready, column, acc, top, total, ahead = scratch
    batch, head, tile = (pl.program_id(i) for i in range(3))
    following = jnp.minimum(tile + 1, tiles - 1)
    whole, stop = ranges_ref[WHOLE, tile], ranges_ref[STOP, tile]
    more = (tile + 1 < tiles) & (ranges_ref[STOP, following] > 0)

    def copies(tile, i, slot):
      """Copies of a tile's i-th block and of its keys' bounds."""
      kept, start = ranges_ref[KEPT, tile], ranges_ref[START, tile]
      first = jnp.where(i < kept, i * block, start + (i - kept) * block)
      here = pl.ds(pl.multiple_of(first, LANES), block)
      return (
        pltpu.make_async_copy(kv_ref.at[batch, head, here], kv_buffer.at[slot], ready.at[slot, 0]),
        pltpu.make_async_copy(bounds_ref.at[batch, head, :, here], bounds_buffer.at[slot], ready.at[slot, 1]),
      )

    def load(tile, i, slot):
      for copy in copies(tile, i, slot):
        copy.start()

    @pl.when(tile == 0)
    def _():
      ahead[0], ahead[1] = i32(0), i32(0)

    offset = ahead[0]  # the slot of this tile's first block
    pl.when((stop > 0) & (ahead[1] == 0))(lambda: load(tile, i32(0), offset))

    column[...] = jnp.broadcast_to(positions_ref[...], (LANES, size)).T[:, :1]
    acc[...] = jnp.zeros_like(acc)
    top[...] = jnp.full_like(top, LOWEST)
    total[...] = jnp.zeros_like(total)

    def step(i, _, masked):
      slot = lax.rem(offset + i, i32(2))
      last = i + 1 == stop
      pl.when(~last | more)(
        lambda: load(jnp.where(last, following, tile), jnp.where(last, 0, i + 1), lax.rem(slot + 1, i32(2)))
      )
      for copy in copies(tile, i, slot):
        copy.wait()
      keys, values = kv_buffer[slot, :, :LANES], kv_buffer[slot, :, width - LANES :]
      s = soft_capped(dot(q_ref[...], keys, (((1,), (1,)), ((), ()))) * scale, in_log2(softcap))
      if masked:
        first, end = bounds_buffer[slot, :1], bounds_buffer[slot, 1:]
        s = jnp.where((first <= column[...]) & (column[...] <= end), s, -jnp.inf)
      new_top = jnp.maximum(top[...], s.max(axis=1, keepdims=True))
      p = jnp.exp2(s - new_top)
      shrink = jnp.exp2(top[...] - new_top)
      total[...] = total[...] * shrink + p.sum(axis=1, keepdims=True)
      acc[...] = acc[...] * shrink + dot(p.astype(dtype), values, (((1,), (0,)), ((), ())))
      top[...] = new_top
      return 0

    lax.fori_loop(0, whole, functools.partial(step, masked=False), 0)
    lax.fori_loop(whole, stop, functools.partial(step, masked=True), 0)
    ahead[0] = lax.rem(offset + stop, i32(2))
    ahead[1] = ((stop > 0) & more).astype(i32)

    # Padding (which the unmasked blocks include) and rows that saw nothing give zeros.
    real = (column[...] >= -1) & (total[...] > 0.0)
    out_ref[...] = jnp.where(real, acc[...] / jnp.where(real, total[...], 1.0), 0.0).astype(dtype)
    if lse:
      logs = jnp.where(real, (top[...] + jnp.log2(jnp.where(real, total[...], 1.0))) / LOG2E, -jnp.inf)
      logs_ref[...] = jnp.broadcast_to(logs, (size, LANES)).T[:1]  # from sublanes to lanes

  tile_of = lambda rows, width: pl.BlockSpec((None, None, rows, width), lambda b, k, i: (b, k, i, 0))
  out_shapes, out_specs = [jax.ShapeDtypeStruct(q.shape, dtype)], [tile_of(size, LANES)]
  if lse:
    out_shapes.append(jax.ShapeDtypeStruct((b, k, tiles, 1, size), jnp.float32))
    out_specs.append(pl.BlockSpec((None, None, None, 1, size), lambda b, k, i: (b, k, i, 0, 0)))
  return pl.pallas_call(
    body,
    out_shape=out_shapes,
    grid=(b, k, tiles),
    in_specs=[
      pl.BlockSpec((None, None, 4, tiles), lambda b, k, i: (b, k, 0, 0), memory_space=pltpu.SMEM),
      pl.BlockSpec((None, None, 1, size), lambda b, k, i: (b, i, 0, 0)),
      tile_of(size, LANES),
      pl.BlockSpec(memory_space=pl.ANY),
      pl.BlockSpec(memory_space=pl.ANY),
    ],
    out_specs=out_specs,
    scratch_shapes=[
      pltpu.VMEM((2, block, width), dtype),
      pltpu.VMEM((2, 2, block), i32),
      pltpu.SemaphoreType.DMA((2, 2)),
      pltpu.VMEM((size, 1), i32),
      pltpu.VMEM((size, LANES), jnp.float32),
      pltpu.VMEM((size, 1), jnp.float32),
      pltpu.VMEM((size, 1), jnp.float32),
      pltpu.SMEM((2,), i32),
    ],
    compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel", "arbitrary")),
    name=f"prefill_{size}x{block}",
  )(ranges, positions, q, kv, bounds)
