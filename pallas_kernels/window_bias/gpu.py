"""Retrofit attention on Hopper GPUs with Pallas Mosaic GPU: the forward kernel and the differentiable whole.

FlashAttention-3's shape (arXiv 2407.08608): in each block two warpgroups compute, 64 queries each, and a third one
feeds them keys and values by TMA. Keys fall in three ranges, seen from a tile of queries: far ones, all further back
than the window, whose bias is added and nothing masked; then the band around the window's edge and the diagonal, where
each pair is tested; and, with segments, the first blocks, where keys before the segment's start are masked. Blocks
wholly before the tile's first segment are not visited. All scores are in units of log 2: exp2 is what the hardware has.
"""

from __future__ import annotations

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from pallas_kernels.common import compat, tuned
from pallas_kernels.common.compat import plgpu
from pallas_kernels.window_bias.saved import saved

LOG2E = math.log2(math.e)
# A finite stand-in for -inf as the running maximum of a row that has seen no key: exp2(-inf - M) is 0, not NaN.
NEVER = -1e30
WARPGROUPS = 2  # that compute; one more moves data


@dataclasses.dataclass(frozen=True)
class Blocks:
  """Sizes of the three kernels. Rows are per warpgroup; `stages` blocks of the streamed operands stand in memory."""

  q: int = 64
  kv: int = 128
  stages: int = 2
  dq_q: int = 64
  dq_kv: int = 64
  dq_stages: int = 2
  dkv_kv: int = 64
  dkv_q: int = 64
  dkv_stages: int = 2
  dq_overlap: bool = True  # start both products of a block at once, at the price of registers
  dkv_overlap: bool = True
  compute_registers: int = 240
  memory_registers: int = 24
  split_group: bool = False  # dk and dv of each query head apart, summed by XLA: more parallelism, more memory

  @property
  def multiple(self) -> int:
    """T is padded to a multiple of this."""
    tiles = (self.q, self.dq_q, self.dkv_kv)
    return math.lcm(*(WARPGROUPS * x for x in tiles), self.kv, self.dq_kv, self.dkv_q)


def default_blocks(head_dim: int) -> Blocks:
  """Block sizes by head size: what fits a warpgroup's registers."""
  return Blocks(dq_kv=128) if head_dim == 64 else Blocks(dkv_overlap=False)


@dataclasses.dataclass(frozen=True)
class Variant:
  """What a kernel is compiled for, besides shapes."""

  window: int
  has_bias: bool
  has_segments: bool
  blocks: Blocks


def window_bias_attention(q, k, v, bias, window, segment_ids, blocks: Blocks | None = None):
  """See `api.window_bias_attention`; bfloat16 or float16, head size 64 or 128.

  Raises:
    NotImplementedError: another device, dtype or head size.
  """
  compat.require_hopper()
  t, h = q.shape[1], q.shape[3]
  if not (q.dtype == k.dtype == v.dtype and q.dtype in (jnp.bfloat16, jnp.float16)):
    raise NotImplementedError(f"q, k, v must all be bfloat16 or all float16, not {q.dtype}, {k.dtype}, {v.dtype}")
  if h not in (64, 128):
    raise NotImplementedError(f"head size {h}: only 64 and 128")
  blocks = blocks or tuned.blocks("retrofit", tuned.shape_class(H=h), default_blocks(h))
  pad = -t % blocks.multiple
  if pad:  # zeros behind the last token: no real query sees them, and no gradient reaches them
    q, k, v = (jnp.pad(x, ((0, 0), (0, pad), (0, 0), (0, 0))) for x in (q, k, v))
    bias = None if bias is None else jnp.pad(bias, ((0, 0), (0, 0), (0, pad)))
    segment_ids = None if segment_ids is None else jnp.pad(segment_ids, ((0, 0), (0, pad)), mode="edge")
  bounds = None if segment_ids is None else segment_bounds(segment_ids)
  variant = Variant(int(window), bias is not None, bounds is not None, blocks)
  bias = None if bias is None else bias.astype(jnp.float32)
  return _attention(variant, q, k, v, bias, bounds)[:, :t]


def segment_bounds(segment_ids: jax.Array) -> tuple[jax.Array, jax.Array]:
  """First position of each token's segment and the one past its last, int32 [B, T] each."""
  t = segment_ids.shape[1]
  positions = jnp.arange(t, dtype=jnp.int32)[None]
  change = segment_ids[:, 1:] != segment_ids[:, :-1]
  first = jnp.pad(change, ((0, 0), (1, 0)), constant_values=True)
  last = jnp.pad(change, ((0, 0), (0, 1)), constant_values=True)
  start = lax.cummax(jnp.where(first, positions, 0), axis=1)
  end = lax.cummin(jnp.where(last, positions + 1, t), axis=1, reverse=True)
  return start, end


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attention(variant, q, k, v, bias, bounds):
  return _attention_fwd(variant, q, k, v, bias, bounds)[0]


def _attention_fwd(variant, q, k, v, bias, bounds):
  # The barrier keeps XLA from running the kernel twice in a scan over layers: once for the next operation, and once
  # fused into the update of the array that saves the results of all layers for the backward pass.
  out, lse = saved(lax.optimization_barrier(forward(variant, q, k, v, bias, None if bounds is None else bounds[0])))
  return out, (q, k, v, bias, bounds, out, lse)


def _attention_bwd(variant, saved, dout):
  from pallas_kernels.window_bias import gpu_backward

  q, k, v, bias, bounds, out, lse = saved
  delta = jnp.einsum("btnh,btnh->bnt", out.astype(jnp.float32), dout.astype(jnp.float32))
  start, end = (None, None) if bounds is None else bounds
  dq = gpu_backward.query_gradient(variant, q, k, v, bias, start, dout, lse, delta)
  dk, dv, dbias = gpu_backward.key_gradients(variant, q, k, v, bias, end, dout, lse, delta)
  return dq, dk, dv, dbias, None


_attention.defvjp(_attention_fwd, _attention_bwd)


def scores_of(variant: Variant, raw, scale, q_base, kv_base, bias, start):
  """Scores [queries, keys] in units of log 2 with the bias and every mask; `raw` is the bare product q k^T."""
  i = plgpu.broadcasted_iota(jnp.int32, raw.shape, 0, layout=plgpu.Layout.WGMMA) + q_base
  j = plgpu.broadcasted_iota(jnp.int32, raw.shape, 1, layout=plgpu.Layout.WGMMA) + kv_base
  s = raw * scale
  if bias is not None:
    s = jnp.where(i - j > variant.window, s + lax.broadcast_in_dim(bias, raw.shape, [1]), s)
  visible = j <= i
  if start is not None:
    visible = visible & (j >= lax.broadcast_in_dim(start, raw.shape, [0]))
  return jnp.where(visible, s, -jnp.inf)


def far_scores(raw, scale, bias):
  """Scores of a block all of whose keys are visible and, if there is a bias, further back than the window."""
  s = raw * scale
  return s if bias is None else s + lax.broadcast_in_dim(bias, raw.shape, [1])


def key_ranges(variant: Variant, start_ref, batch, tile_base, tile, q_base, rows, block):
  """Blocks of keys that a tile of queries visits: (first, far_begin, far_end, end), in blocks.

  [first, far_begin) and [far_end, end) need masks, [far_begin, far_end) need none. `first` and `end` are the same for
  all warpgroups of the tile; the others belong to the `rows` queries from `q_base` on.
  """
  i32 = jnp.int32
  end = lax.div(tile_base + i32(tile + block - 1), i32(block))
  reach = jnp.maximum(q_base - variant.window, 0) if variant.has_bias else q_base + 1
  far_end = lax.div(reach, i32(block))
  first = far_begin = i32(0)
  if variant.has_segments:
    first = lax.div(start_ref[batch, tile_base], i32(block))
    far_begin = lax.div(start_ref[batch, q_base + (rows - 1)] + i32(block - 1), i32(block))
    far_begin = jnp.minimum(far_begin, end)
    far_end = jnp.maximum(far_end, far_begin)
  return first, far_begin, far_end, end


def forward(variant: Variant, q, k, v, bias, start):
  """(out [B, T, N, H], log-sum-exp float32 [B, N, T] in units of log 2); T a multiple of `blocks.multiple`."""
  b, t, n, h = q.shape
  group = n // k.shape[2]
  rows, block, stages = variant.blocks.q, variant.blocks.kv, variant.blocks.stages
  tile = WARPGROUPS * rows
  tiles = t // tile
  scale = h**-0.5 * LOG2E
  inputs = [q, k, v]
  if variant.has_bias:
    inputs.append(bias * LOG2E)
  if variant.has_segments:
    inputs.append(start)

  def body(*refs):
    refs = list(refs)
    q_ref, k_ref, v_ref = refs[:3]
    del refs[:3]
    bias_ref = refs.pop(0) if variant.has_bias else None
    start_ref = refs.pop(0) if variant.has_segments else None
    out_ref, lse_ref, q_smem, k_smem, v_smem, lse_smem = refs[:6]
    del refs[:6]
    bias_smem = refs.pop(0) if variant.has_bias else None
    start_smem = refs.pop(0) if variant.has_segments else None
    q_ready, k_ready, v_ready, k_free, v_free, turn = refs

    head, batch = lax.axis_index("head"), lax.axis_index("batch")
    wg = lax.axis_index("wg")
    # The last tiles have the most keys: they start first.
    tile_base = (tiles - 1 - lax.axis_index("tile")) * tile
    q_base = tile_base + jnp.minimum(wg, WARPGROUPS - 1) * rows
    first, far_begin, far_end, end = key_ranges(variant, start_ref, batch, tile_base, tile, q_base, rows, block)

    def take_turn():
      plgpu.barrier_arrive(turn)
      plgpu.barrier_wait(turn)

    @pl.when(wg < WARPGROUPS)
    def _compute():
      plgpu.set_max_registers(variant.blocks.compute_registers, action="increase")
      plgpu.copy_gmem_to_smem(q_ref.at[batch, pl.ds(q_base, rows), head], q_smem.at[wg], q_ready.at[wg])
      if variant.has_segments:
        plgpu.copy_gmem_to_smem(start_ref.at[batch, pl.ds(q_base, rows)], start_smem.at[wg], q_ready.at[wg])
      plgpu.barrier_wait(q_ready.at[wg])
      starts = plgpu.load(start_smem.at[wg], layout=compat.row_layout()) if variant.has_segments else None
      row = lambda x: plgpu.layout_cast(jnp.full((rows,), x, jnp.float32), compat.row_layout())
      acc = plgpu.layout_cast(jnp.zeros((rows, h), jnp.float32), plgpu.Layout.WGMMA)

      # The warpgroups take turns: one multiplies while the other computes its exponentials.
      pl.when(wg == 1)(take_turn)

      def step(number, carry, masked):
        acc, top, total = carry
        slot = lax.rem(number - first, jnp.int32(stages))
        plgpu.barrier_wait(k_ready.at[slot])
        raw = compat.dot(q_smem.at[wg], k_smem.at[slot].transpose((1, 0)), then=take_turn)
        column = plgpu.load(bias_smem.at[slot], layout=compat.column_layout()) if variant.has_bias else None
        compat.release(k_free.at[slot])
        if masked:
          s = scores_of(variant, raw, scale, q_base, number * block, column, starts)
        else:
          s = far_scores(raw, scale, column)
        new_top = jnp.maximum(top, s.max(axis=1))
        shrink = jnp.exp2(top - new_top)
        p = jnp.exp2(s - lax.broadcast_in_dim(new_top, s.shape, [0]))
        total = total * shrink + p.sum(axis=1)
        p16 = p.astype(q.dtype)
        total, new_top, shrink, p16 = lax.optimization_barrier((total, new_top, shrink, p16))
        plgpu.barrier_arrive(turn)
        plgpu.barrier_wait(v_ready.at[slot])
        plgpu.barrier_wait(turn)
        product = compat.dot(p16, v_smem.at[slot])
        compat.release(v_free.at[slot])
        return acc * lax.broadcast_in_dim(shrink, acc.shape, [0]) + product, new_top, total

      carry = acc, row(NEVER), row(0.0)
      if variant.has_segments:
        carry = lax.fori_loop(first, far_begin, functools.partial(step, masked=True), carry)
      carry = lax.fori_loop(far_begin, far_end, functools.partial(step, masked=False), carry)
      acc, top, total = lax.fori_loop(far_end, end, functools.partial(step, masked=True), carry)
      pl.when(wg == 0)(take_turn)

      q_smem[wg] = (acc / lax.broadcast_in_dim(total, acc.shape, [0])).astype(q.dtype)
      lse_smem[wg] = top + jnp.log(total) * LOG2E
      plgpu.commit_smem()
      plgpu.copy_smem_to_gmem(q_smem.at[wg], out_ref.at[batch, pl.ds(q_base, rows), head])
      plgpu.copy_smem_to_gmem(lse_smem.at[wg], lse_ref.at[batch, head, pl.ds(q_base, rows)])
      plgpu.wait_smem_to_gmem(0)

    @pl.when(wg == WARPGROUPS)
    def _load():
      plgpu.set_max_registers(variant.blocks.memory_registers, action="decrease")
      kv_head = lax.div(head, jnp.int32(group))

      @pl.loop(0, end - first)
      def _(number):
        slot = lax.rem(number, jnp.int32(stages))
        keys = pl.ds((first + number) * block, block)
        full = number >= stages
        pl.when(full)(lambda: plgpu.barrier_wait(k_free.at[slot]))
        plgpu.copy_gmem_to_smem(k_ref.at[batch, keys, kv_head], k_smem.at[slot], k_ready.at[slot])
        if variant.has_bias:
          plgpu.copy_gmem_to_smem(bias_ref.at[batch, kv_head, keys], bias_smem.at[slot], k_ready.at[slot])
        pl.when(full)(lambda: plgpu.barrier_wait(v_free.at[slot]))
        plgpu.copy_gmem_to_smem(v_ref.at[batch, keys, kv_head], v_smem.at[slot], v_ready.at[slot])

      compat.drain(end - first, k_free, v_free)

  matrix = functools.partial(plgpu.SMEM, dtype=q.dtype, transforms=compat.operand_transforms())
  scratch = [matrix((WARPGROUPS, rows, h)), matrix((stages, block, h)), matrix((stages, block, h))]
  scratch.append(plgpu.SMEM((WARPGROUPS, rows), jnp.float32))
  if variant.has_bias:
    scratch.append(plgpu.SMEM((stages, block), jnp.float32))
  if variant.has_segments:
    scratch.append(plgpu.SMEM((WARPGROUPS, rows), jnp.int32))
  barrier = lambda count, arrivals: plgpu.Barrier(num_barriers=count, num_arrivals=arrivals)
  scratch += [barrier(WARPGROUPS, 1 + variant.has_segments), barrier(stages, 1 + variant.has_bias), barrier(stages, 1)]
  scratch += [barrier(stages, WARPGROUPS), barrier(stages, WARPGROUPS), barrier(1, WARPGROUPS)]
  return compat.kernel(
    body,
    out_type=[jax.ShapeDtypeStruct(q.shape, q.dtype), jax.ShapeDtypeStruct((b, n, t), jnp.float32)],
    scratch_types=scratch,
    grid=(n, tiles, b),
    grid_names=("head", "tile", "batch"),
    num_threads=WARPGROUPS + 1,
    thread_name="wg",
    kernel_name=f"retrofit_forward_{rows}x{block}x{stages}",
    compiler_params=plgpu.CompilerParams(approx_math=True),
  )(*inputs)
