"""Window-bias attention on Hopper GPUs: the forward kernel and the differentiable function.

FlashAttention-3's shape (arXiv 2407.08608): in each block two warpgroups compute on 64 queries each, and a third one
feeds them keys and values by TMA. A tile of queries sees three ranges of keys: far ones, all outside the window, whose
bias is added without a mask; then the band around the window's edge and the diagonal, where each pair is tested; and,
with segments, the first blocks, where keys before the segment's start are masked. Blocks wholly before the tile's first
segment are not visited. All scores are in units of log 2: exp2 is what the hardware has.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from pallas_kernels.common import compat, dispatch, pipeline, tuned
from pallas_kernels.common.compat import plgpu
from pallas_kernels.common.pipeline import WARPGROUPS
from pallas_kernels.common.platform import processors
from pallas_kernels.common.softmax import LOG2E, LOWEST, in_log2
from pallas_kernels.window_bias import gpu_backward
from pallas_kernels.window_bias.common import padded, saved, segment_bounds
from pallas_kernels.window_bias.gpu_common import Blocks, Variant, default_blocks, key_ranges, over_ranges, scores_of


def window_bias_attention(
  q, k, v, bias, window, segment_ids, lse=False, softcap=None, by_age=False, blocks: Blocks | None = None
):
  """See `api.window_bias_attention`; bfloat16 or float16, head size 64 or 128.

  Raises:
    NotImplementedError: another device, dtype or head size.
  """
  compat.require_hopper()
  t, h = q.shape[1], q.shape[3]
  dispatch.supports(("bfloat16", "float16"), q=q, k=k, v=v)
  dispatch.supports_head_size(h)
  blocks = blocks or tuned.blocks(
    "window_bias", tuned.shape_class(H=h), default_blocks(h, k[..., 0].size, processors())
  )
  pad = -t % blocks.multiple
  if pad:  # zeros behind the last token: no real query sees them, and no gradient reaches them
    q, k, v = (padded(x, 1, pad) for x in (q, k, v))
    bias, segment_ids = padded(bias, 2, pad), padded(segment_ids, 1, pad, mode="edge")
  bounds = None if segment_ids is None else segment_bounds(segment_ids)
  variant = Variant(int(window), bias is not None, bounds is not None, blocks, in_log2(softcap), by_age)
  bias = None if bias is None else bias.astype(jnp.float32)
  if not lse:
    return _attention(variant, False, q, k, v, bias, bounds)[:, :t]
  out, logs = _attention(variant, True, q, k, v, bias, bounds)
  return out[:, :t], jnp.swapaxes(logs, 1, 2)[:, :t]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _attention(variant, with_logs: bool, q, k, v, bias, bounds):
  """out, or the pair (out, log-sum-exp float32 [B, N, T])."""
  return _attention_fwd(variant, with_logs, q, k, v, bias, bounds)[0]


def _attention_fwd(variant, with_logs, q, k, v, bias, bounds):
  # The barrier keeps XLA from running the kernel twice in a scan over layers: once for the next operation, and once
  # fused into the update of the array that saves the results of all layers for the backward pass.
  out, lse = saved(lax.optimization_barrier(forward(variant, q, k, v, bias, None if bounds is None else bounds[0])))
  return (out, lse * (1 / LOG2E)) if with_logs else out, (q, k, v, bias, bounds, out, lse)


def _attention_bwd(variant, with_logs, saved, cotangent):
  q, k, v, bias, bounds, out, lse = saved
  dout, dlogs = cotangent if with_logs else (cotangent, None)
  delta = jnp.einsum("btnh,btnh->bnt", out.astype(jnp.float32), dout.astype(jnp.float32))
  delta = delta if dlogs is None else delta - dlogs  # d log-sum-exp / d scores are the weights p
  start, end = (None, None) if bounds is None else bounds
  dq = gpu_backward.query_gradient(variant, q, k, v, bias, start, dout, lse, delta)
  dk, dv, dbias = gpu_backward.key_gradients(variant, q, k, v, bias, end, dout, lse, delta)
  return dq, dk, dv, dbias, None


_attention.defvjp(_attention_fwd, _attention_bwd)


def forward(variant: Variant, q, k, v, bias, start):
  """(out [B, T, N, H], log-sum-exp float32 [B, N, T] in units of log 2); T a multiple of `blocks.multiple`."""
  b, t, n, h = q.shape
  group = n // k.shape[2]
  rows, block, stages = variant.blocks.q, variant.blocks.kv, variant.blocks.stages
  tile = WARPGROUPS * rows
  tiles = t // tile
  scale = h**-0.5 * LOG2E

  def body(q_ref, k_ref, v_ref, bias_ref, start_ref, out_ref, lse_ref, *scratch):
    q_smem, k_smem, v_smem, lse_smem, bias_smem, start_smem, q_ready, k_ready, v_ready, k_free, v_free, turn = scratch
    head, batch = lax.axis_index("head"), lax.axis_index("batch")
    wg = lax.axis_index("wg")
    # The last tiles have the most keys: they start first.
    tile_base = (tiles - 1 - lax.axis_index("tile")) * tile
    q_base = tile_base + jnp.minimum(wg, WARPGROUPS - 1) * rows
    here = pl.ds(q_base, rows)
    first, _, _, end = ranges = key_ranges(variant, start_ref, batch, tile_base, tile, q_base, rows, block)

    def take_turn():
      plgpu.barrier_arrive(turn)
      plgpu.barrier_wait(turn)

    @pl.when(wg < WARPGROUPS)
    def _compute():
      plgpu.set_max_registers(variant.blocks.compute_registers, action="increase")
      pipeline.fetch(wg, q_ready, (q_ref, (batch, here, head), q_smem), (start_ref, (batch, here), start_smem))
      plgpu.barrier_wait(q_ready.at[wg])
      starts = pipeline.row_vector(start_smem, wg)
      acc = pipeline.zeros(rows, h)

      # The warpgroups take turns: one multiplies while the other computes its exponentials.
      pl.when(wg == 1)(take_turn)

      def step(number, carry, masked):
        acc, top, total = carry
        slot = lax.rem(number - first, jnp.int32(stages))
        plgpu.barrier_wait(k_ready.at[slot])
        raw = compat.dot(q_smem.at[wg], k_smem.at[slot].transpose((1, 0)), then=take_turn)
        column = pipeline.column_vector(bias_smem, slot)
        compat.release(k_free.at[slot])
        s, _ = scores_of(variant, raw, scale, q_base, number * block, column, starts, masked)
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

      carry = acc, pipeline.filled_rows(rows, LOWEST), pipeline.filled_rows(rows, 0.0)
      acc, top, total = over_ranges(ranges, step, carry, variant.has_segments, True)
      pl.when(wg == 0)(take_turn)

      q_smem[wg] = (acc / lax.broadcast_in_dim(total, acc.shape, [0])).astype(q.dtype)
      lse_smem[wg] = top + jnp.log(total) * LOG2E
      pipeline.store(wg, (out_ref, (batch, here, head), q_smem), (lse_ref, (batch, head, here), lse_smem))

    @pl.when(wg == WARPGROUPS)
    def _load():
      plgpu.set_max_registers(variant.blocks.memory_registers, action="decrease")
      kv_head = lax.div(head, jnp.int32(group))

      def copies(number):
        keys = pl.ds((first + number) * block, block)
        bias = bias_ref, (batch, kv_head, keys), bias_smem
        return [(k_ref, (batch, keys, kv_head), k_smem), bias], [(v_ref, (batch, keys, kv_head), v_smem)]

      pipeline.stream(end - first, stages, copies, (k_free, k_ready), (v_free, v_ready))

  operand = lambda *shape: pipeline.matrix(shape, q.dtype)
  scratch = [operand(WARPGROUPS, rows, h), operand(stages, block, h), operand(stages, block, h)]
  scratch += [pipeline.vector(WARPGROUPS, rows), pipeline.vector(stages, block) if variant.has_bias else None]
  scratch += [pipeline.vector(WARPGROUPS, rows, dtype=jnp.int32) if variant.has_segments else None]
  scratch += [pipeline.barriers(WARPGROUPS, 1 + variant.has_segments), pipeline.barriers(stages, 1 + variant.has_bias)]
  scratch += [pipeline.barriers(stages, 1), pipeline.barriers(stages), pipeline.barriers(stages), pipeline.barriers(1)]
  return pipeline.launch(
    body,
    [q, k, v, bias * LOG2E if variant.has_bias else None, start],
    [jax.ShapeDtypeStruct(q.shape, q.dtype), jax.ShapeDtypeStruct((b, n, t), jnp.float32)],
    scratch,
    {"head": n, "tile": tiles, "batch": b},
    f"window_bias_forward_{rows}x{block}x{stages}",
  )
