"""Backward kernels of window-bias attention on Hopper GPUs: dq by queries, the others by keys.

Each output is summed by one block in a fixed order, so two runs agree bit for bit and nothing is added in memory. With
`split_group` XLA adds dk, dv and dbias of a group's heads, after dk and dv were rounded to q's dtype. With
p = exp2(s - lse), dp = dout v^T, delta = rowsum(out * dout): ds = p (dp - delta), dq = scale ds k, dk = scale ds^T q,
dv = p^T dout, dbias_j = sum of ds over the queries further than the window from key j and over the group's heads, each
ds times i - j where a bias grows with age. If scores are capped, ds is multiplied by the cap's slope for dq and dk.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from pallas_kernels.common import compat, pipeline
from pallas_kernels.common.compat import plgpu
from pallas_kernels.common.pipeline import WARPGROUPS
from pallas_kernels.common.softmax import LOG2E, before_cap, soft_capped_by_exp2
from pallas_kernels.window_bias.gpu_common import Variant, age, key_ranges, over_ranges, scores_of


def query_gradient(variant: Variant, q, k, v, bias, start, dout, lse, delta):
  """dq [B, T, N, H]: each tile of queries passes once over the keys it sees."""
  b, t, n, h = q.shape
  group = n // k.shape[2]
  rows, block, stages = variant.blocks.dq_q, variant.blocks.dq_kv, variant.blocks.dq_stages
  tile = WARPGROUPS * rows
  tiles = t // tile
  scale = h**-0.5

  def body(q_ref, k_ref, v_ref, dout_ref, lse_ref, delta_ref, bias_ref, start_ref, dq_ref, *scratch):
    q_smem, dout_smem, lse_smem, delta_smem, k_smem, v_smem, bias_smem, start_smem, *scratch = scratch
    q_ready, k_ready, v_ready, k_free, v_free = scratch
    head, batch = lax.axis_index("head"), lax.axis_index("batch")
    wg = lax.axis_index("wg")
    tile_base = (tiles - 1 - lax.axis_index("tile")) * tile
    q_base = tile_base + jnp.minimum(wg, WARPGROUPS - 1) * rows
    here = pl.ds(q_base, rows)
    first, _, _, end = ranges = key_ranges(variant, start_ref, batch, tile_base, tile, q_base, rows, block)

    @pl.when(wg < WARPGROUPS)
    def _compute():
      plgpu.set_max_registers(variant.blocks.compute_registers, action="increase")
      rows_at, numbers_at = (batch, here, head), (batch, head, here)
      pipeline.fetch(wg, q_ready, (q_ref, rows_at, q_smem), (dout_ref, rows_at, dout_smem))
      pipeline.fetch(wg, q_ready, (lse_ref, numbers_at, lse_smem), (delta_ref, numbers_at, delta_smem))
      pipeline.fetch(wg, q_ready, (start_ref, (batch, here), start_smem))
      plgpu.barrier_wait(q_ready.at[wg])
      lse, delta, starts = (pipeline.row_vector(x, wg) for x in (lse_smem, delta_smem, start_smem))

      def step(number, dq, masked):
        slot = lax.rem(number - first, jnp.int32(stages))

        def weights(raw):
          column = pipeline.column_vector(bias_smem, slot)
          s, capped = scores_of(variant, raw, scale * LOG2E, q_base, number * block, column, starts, masked)
          return before_cap(jnp.exp2(s - lax.broadcast_in_dim(lse, s.shape, [0])), capped, variant.softcap)

        products = compat.dot_pair if variant.blocks.dq_overlap else compat.dot_twice
        plgpu.barrier_wait(k_ready.at[slot])
        plgpu.barrier_wait(v_ready.at[slot])
        keys, values = (x.at[slot].transpose((1, 0)) for x in (k_smem, v_smem))
        p, dp = products(q_smem.at[wg], keys, dout_smem.at[wg], values, weights)
        compat.release(v_free.at[slot])
        ds = p * (dp - lax.broadcast_in_dim(delta, p.shape, [0]))
        dq = compat.accumulate(dq, ds.astype(q.dtype), k_smem.at[slot])
        compat.release(k_free.at[slot])
        return dq

      dq = over_ranges(ranges, step, pipeline.zeros(rows, h), variant.has_segments, True)
      q_smem[wg] = (dq * scale).astype(q.dtype)
      pipeline.store(wg, (dq_ref, (batch, here, head), q_smem))

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
  scratch = [operand(WARPGROUPS, rows, h)] * 2 + [pipeline.vector(WARPGROUPS, rows)] * 2
  scratch += [operand(stages, block, h)] * 2 + [pipeline.vector(stages, block) if variant.has_bias else None]
  scratch += [pipeline.vector(WARPGROUPS, rows, dtype=jnp.int32) if variant.has_segments else None]
  scratch += [pipeline.barriers(WARPGROUPS, 4 + variant.has_segments), pipeline.barriers(stages, 1 + variant.has_bias)]
  scratch += [pipeline.barriers(stages, 1), pipeline.barriers(stages), pipeline.barriers(stages)]
  (dq,) = pipeline.launch(
    body,
    [q, k, v, dout, lse, delta, bias * LOG2E if variant.has_bias else None, start],
    [jax.ShapeDtypeStruct(q.shape, q.dtype)],
    scratch,
    {"head": n, "tile": tiles, "batch": b},
    f"window_bias_dq_{rows}x{block}x{stages}",
  )
  return dq


def query_ranges(variant: Variant, end_ref, batch, t, tile_base, tile, kv_base, rows, block):
  """Blocks of queries that see a tile of keys: (first, far_begin, far_end, end); the mirror of `key_ranges`."""
  i32 = jnp.int32
  first = lax.div(tile_base, i32(block))
  reach = kv_base + (rows + variant.window) if variant.has_bias else kv_base + (rows - 1)
  far_begin = lax.div(reach + i32(block - 1), i32(block))
  end = far_end = i32(t // block)
  if variant.has_segments:
    end = lax.div(end_ref[batch, tile_base + (tile - 1)] + i32(block - 1), i32(block))
    far_end = lax.div(end_ref[batch, kv_base], i32(block))
  far_begin = jnp.minimum(far_begin, end)
  return first, far_begin, jnp.clip(far_end, far_begin, end), end


def key_gradients(variant: Variant, q, k, v, bias, segment_end, dout, lse, delta):
  """(dk, dv [B, T, K, H], dbias float32 [B, K, T] or None): each tile of keys passes once over the queries that see it.

  All is transposed, keys in rows, so that a key's bias is one number in registers and dbias a sum along rows.
  """
  b, t, n, h = q.shape
  kv_heads = k.shape[2]
  group = n // kv_heads
  heads = 1 if variant.blocks.split_group else group  # query heads of one block, one after the other
  parts = n // heads
  rows, block, stages = variant.blocks.dkv_kv, variant.blocks.dkv_q, variant.blocks.dkv_stages
  tile = WARPGROUPS * rows
  scale = h**-0.5

  def body(q_ref, k_ref, v_ref, dout_ref, lse_ref, delta_ref, bias_ref, end_ref, dk_ref, dv_ref, dbias_ref, *scratch):
    k_smem, v_smem, q_smem, dout_smem, lse_smem, delta_smem, bias_smem, end_smem, *scratch = scratch
    kv_ready, q_ready, dout_ready, free = scratch
    part, batch = lax.axis_index("part"), lax.axis_index("batch")
    wg = lax.axis_index("wg")
    kv_head = lax.div(part * heads, jnp.int32(group))
    tile_base = lax.axis_index("tile") * tile  # the first tiles are seen by the most queries
    kv_base = tile_base + jnp.minimum(wg, WARPGROUPS - 1) * rows
    first, _, _, end = ranges = query_ranges(variant, end_ref, batch, t, tile_base, tile, kv_base, rows, block)
    steps = end - first  # of one head

    @pl.when(wg < WARPGROUPS)
    def _compute():
      plgpu.set_max_registers(variant.blocks.compute_registers, action="increase")
      here = pl.ds(kv_base, rows)
      pipeline.fetch(wg, kv_ready, (k_ref, (batch, here, kv_head), k_smem), (v_ref, (batch, here, kv_head), v_smem))
      pipeline.fetch(wg, kv_ready, (bias_ref, (batch, kv_head, here), bias_smem), (end_ref, (batch, here), end_smem))
      plgpu.barrier_wait(kv_ready.at[wg])
      bias_row, ends = (pipeline.row_vector(x, wg) for x in (bias_smem, end_smem))

      def step(number, carry, done, masked):
        """`done`: blocks of queries that earlier heads have passed."""
        dk, dv, dbias = carry
        slot = lax.rem(done + number - first, jnp.int32(stages))
        plgpu.barrier_wait(q_ready.at[slot])
        plgpu.barrier_wait(dout_ready.at[slot])

        def positions():  # of queries and keys; recomputed at each use: registers are scarcer than adds
          j = plgpu.broadcasted_iota(jnp.int32, (rows, block), 0, layout=plgpu.Layout.WGMMA) + kv_base
          i = plgpu.broadcasted_iota(jnp.int32, (rows, block), 1, layout=plgpu.Layout.WGMMA) + number * block
          return i, j

        def weights(raw):
          s = capped = soft_capped_by_exp2(raw * (scale * LOG2E), variant.softcap)
          i, j = positions() if masked or variant.by_age else (None, None)
          if variant.has_bias:
            added = lax.broadcast_in_dim(bias_row, s.shape, [0])
            biased = s + (added * age(i, j) if variant.by_age else added)
            s = jnp.where(i - j > variant.window, biased, s) if masked else biased
          if masked:
            visible = i >= j
            if variant.has_segments:
              visible = visible & (i < lax.broadcast_in_dim(ends, s.shape, [0]))
            s = jnp.where(visible, s, -jnp.inf)
          column = pipeline.column_vector(lse_smem, slot)
          return jnp.exp2(s - lax.broadcast_in_dim(column, s.shape, [1])), None if variant.softcap is None else capped

        def score_gradient(p, capped, dp, dbias):
          column = pipeline.column_vector(delta_smem, slot)
          ds = p * (dp - lax.broadcast_in_dim(column, p.shape, [1]))
          if variant.has_bias:
            i, j = positions() if masked or variant.by_age else (None, None)
            of_bias = ds * age(i, j) if variant.by_age else ds
            dbias = dbias + (jnp.where(i - j > variant.window, of_bias, 0.0) if masked else of_bias).sum(axis=1)
          return before_cap(ds, capped, variant.softcap).astype(q.dtype), dbias

        queries, douts = q_smem.at[slot], dout_smem.at[slot]
        queries_t, douts_t = (x.transpose((1, 0)) for x in (queries, douts))
        if variant.blocks.dkv_overlap:
          (p, capped), dp = compat.dot_pair(k_smem.at[wg], queries_t, v_smem.at[wg], douts_t, weights)
          ds = lambda dbias: score_gradient(p, capped, dp, dbias)
          dv, dk, dbias = compat.accumulate_pair(dv, p.astype(q.dtype), douts, dk, queries, dbias, ds)
        else:
          p, capped = weights(compat.dot(k_smem.at[wg], queries_t))
          dv = compat.accumulate(dv, p.astype(q.dtype), douts)
          dp = compat.dot(v_smem.at[wg], douts_t)
          ds, dbias = score_gradient(p, capped, dp, dbias)
          dk = compat.accumulate(dk, ds, queries)
        compat.release(free.at[slot])
        return dk, dv, dbias

      def one_head(g, carry):
        return over_ranges(ranges, functools.partial(step, done=g * steps), carry, True, variant.has_segments)

      carry = pipeline.zeros(rows, h), pipeline.zeros(rows, h), pipeline.filled_rows(rows, 0.0)
      dk, dv, dbias = one_head(0, carry) if heads == 1 else lax.fori_loop(0, heads, one_head, carry)
      k_smem[wg] = (dk * scale).astype(k.dtype)
      v_smem[wg] = dv.astype(v.dtype)
      if variant.has_bias:
        bias_smem[wg] = dbias
      gradients = (dk_ref, (batch, here, part), k_smem), (dv_ref, (batch, here, part), v_smem)
      pipeline.store(wg, *gradients, (dbias_ref, (batch, part, here), bias_smem))

    @pl.when(wg == WARPGROUPS)
    def _load():
      plgpu.set_max_registers(variant.blocks.memory_registers, action="decrease")

      def copies(number):
        head = part * heads + lax.div(number, steps)
        queries = pl.ds((first + lax.rem(number, steps)) * block, block)
        rows_at, numbers_at = (batch, queries, head), (batch, head, queries)
        of_q = [(q_ref, rows_at, q_smem), (lse_ref, numbers_at, lse_smem)]
        return of_q, [(dout_ref, rows_at, dout_smem), (delta_ref, numbers_at, delta_smem)]

      pipeline.stream(steps * heads, stages, copies, (free, q_ready), (None, dout_ready))

  operand = lambda *shape: pipeline.matrix(shape, q.dtype)
  scratch = [operand(WARPGROUPS, rows, h)] * 2 + [operand(stages, block, h)] * 2 + [pipeline.vector(stages, block)] * 2
  scratch += [pipeline.vector(WARPGROUPS, rows) if variant.has_bias else None]
  scratch += [pipeline.vector(WARPGROUPS, rows, dtype=jnp.int32) if variant.has_segments else None]
  scratch += [pipeline.barriers(WARPGROUPS, 2 + variant.has_bias + variant.has_segments)]
  scratch += [pipeline.barriers(stages, 2), pipeline.barriers(stages, 2), pipeline.barriers(stages)]
  gradients = [jax.ShapeDtypeStruct((b, t, parts, h), x.dtype) for x in (k, v)]
  dk, dv, dbias = pipeline.launch(
    body,
    [q, k, v, dout, lse, delta, bias * LOG2E if variant.has_bias else None, segment_end],
    [*gradients, jax.ShapeDtypeStruct((b, parts, t), jnp.float32) if variant.has_bias else None],
    scratch,
    {"part": parts, "tile": t // tile, "batch": b},
    f"window_bias_dkv_{rows}x{block}x{stages}",
  )
  if parts != kv_heads:
    together = lambda x: x.reshape(b, t, kv_heads, group, h).astype(jnp.float32).sum(axis=3).astype(x.dtype)
    dk, dv = together(dk), together(dv)
    dbias = None if dbias is None else dbias.reshape(b, kv_heads, group, t).sum(axis=2)
  return dk, dv, dbias
