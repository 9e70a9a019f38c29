"""Backward kernels of window-bias attention on Hopper GPUs: dq by queries, the others by keys.

Each output is summed by one block in a fixed order, so two runs agree bit for bit and nothing is added in memory. With
p = exp2(s - lse), dp = dout v^T, delta = rowsum(out * dout): ds = p (dp - delta), dq = scale ds k, dk = scale ds^T q,
dv = p^T dout, dbias_j = sum of ds over the queries further than the window from key j and over the group's heads.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from pallas_kernels.common import compat
from pallas_kernels.common.compat import plgpu
from pallas_kernels.common.softmax import LOG2E
from pallas_kernels.window_bias.gpu_common import WARPGROUPS, Variant, far_scores, key_ranges, scores_of


def query_gradient(variant: Variant, q, k, v, bias, start, dout, lse, delta):
  """dq [B, T, N, H]: each tile of queries passes once over the keys it sees."""
  b, t, n, h = q.shape
  group = n // k.shape[2]
  rows, block, stages = variant.blocks.dq_q, variant.blocks.dq_kv, variant.blocks.dq_stages
  tile = WARPGROUPS * rows
  tiles = t // tile
  scale = h**-0.5
  inputs = [q, k, v, dout, lse, delta]
  if variant.has_bias:
    inputs.append(bias * LOG2E)
  if variant.has_segments:
    inputs.append(start)

  def body(*refs):
    refs = list(refs)
    q_ref, k_ref, v_ref, dout_ref, lse_ref, delta_ref = refs[:6]
    del refs[:6]
    bias_ref = refs.pop(0) if variant.has_bias else None
    start_ref = refs.pop(0) if variant.has_segments else None
    dq_ref, q_smem, dout_smem, lse_smem, delta_smem, k_smem, v_smem = refs[:7]
    del refs[:7]
    bias_smem = refs.pop(0) if variant.has_bias else None
    start_smem = refs.pop(0) if variant.has_segments else None
    q_ready, k_ready, v_ready, k_free, v_free = refs

    head, batch = lax.axis_index("head"), lax.axis_index("batch")
    wg = lax.axis_index("wg")
    tile_base = (tiles - 1 - lax.axis_index("tile")) * tile
    q_base = tile_base + jnp.minimum(wg, WARPGROUPS - 1) * rows
    first, far_begin, far_end, end = key_ranges(variant, start_ref, batch, tile_base, tile, q_base, rows, block)

    @pl.when(wg < WARPGROUPS)
    def _compute():
      plgpu.set_max_registers(variant.blocks.compute_registers, action="increase")
      here = pl.ds(q_base, rows)
      plgpu.copy_gmem_to_smem(q_ref.at[batch, here, head], q_smem.at[wg], q_ready.at[wg])
      plgpu.copy_gmem_to_smem(dout_ref.at[batch, here, head], dout_smem.at[wg], q_ready.at[wg])
      plgpu.copy_gmem_to_smem(lse_ref.at[batch, head, here], lse_smem.at[wg], q_ready.at[wg])
      plgpu.copy_gmem_to_smem(delta_ref.at[batch, head, here], delta_smem.at[wg], q_ready.at[wg])
      if variant.has_segments:
        plgpu.copy_gmem_to_smem(start_ref.at[batch, here], start_smem.at[wg], q_ready.at[wg])
      plgpu.barrier_wait(q_ready.at[wg])
      lse = plgpu.load(lse_smem.at[wg], layout=compat.row_layout())
      delta = plgpu.load(delta_smem.at[wg], layout=compat.row_layout())
      starts = plgpu.load(start_smem.at[wg], layout=compat.row_layout()) if variant.has_segments else None

      def step(number, dq, masked):
        slot = lax.rem(number - first, jnp.int32(stages))

        def weights(raw):
          column = plgpu.load(bias_smem.at[slot], layout=compat.column_layout()) if variant.has_bias else None
          if masked:
            s = scores_of(variant, raw, scale * LOG2E, q_base, number * block, column, starts)
          else:
            s = far_scores(raw, scale * LOG2E, column)
          return jnp.exp2(s - lax.broadcast_in_dim(lse, s.shape, [0]))

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

      dq = plgpu.layout_cast(jnp.zeros((rows, h), jnp.float32), plgpu.Layout.WGMMA)
      if variant.has_segments:
        dq = lax.fori_loop(first, far_begin, functools.partial(step, masked=True), dq)
      dq = lax.fori_loop(far_begin, far_end, functools.partial(step, masked=False), dq)
      dq = lax.fori_loop(far_end, end, functools.partial(step, masked=True), dq)
      q_smem[wg] = (dq * scale).astype(q.dtype)
      plgpu.commit_smem()
      plgpu.copy_smem_to_gmem(q_smem.at[wg], dq_ref.at[batch, here, head])
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
  vector = lambda count, length, dtype=jnp.float32: plgpu.SMEM((count, length), dtype)
  barrier = lambda count, arrivals: plgpu.Barrier(num_barriers=count, num_arrivals=arrivals)
  scratch = [matrix((WARPGROUPS, rows, h)), matrix((WARPGROUPS, rows, h)), vector(WARPGROUPS, rows)]
  scratch += [vector(WARPGROUPS, rows), matrix((stages, block, h)), matrix((stages, block, h))]
  scratch += [vector(stages, block)] if variant.has_bias else []
  scratch += [vector(WARPGROUPS, rows, jnp.int32)] if variant.has_segments else []
  scratch += [barrier(WARPGROUPS, 4 + variant.has_segments), barrier(stages, 1 + variant.has_bias), barrier(stages, 1)]
  scratch += [barrier(stages, WARPGROUPS), barrier(stages, WARPGROUPS)]
  return compat.kernel(
    body,
    out_type=jax.ShapeDtypeStruct(q.shape, q.dtype),
    scratch_types=scratch,
    grid=(n, tiles, b),
    grid_names=("head", "tile", "batch"),
    num_threads=WARPGROUPS + 1,
    thread_name="wg",
    kernel_name=f"window_bias_dq_{rows}x{block}x{stages}",
    compiler_params=plgpu.CompilerParams(approx_math=True),
  )(*inputs)


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
  inputs = [q, k, v, dout, lse, delta]
  if variant.has_bias:
    inputs.append(bias * LOG2E)
  if variant.has_segments:
    inputs.append(segment_end)

  def body(*refs):
    refs = list(refs)
    q_ref, k_ref, v_ref, dout_ref, lse_ref, delta_ref = refs[:6]
    del refs[:6]
    bias_ref = refs.pop(0) if variant.has_bias else None
    end_ref = refs.pop(0) if variant.has_segments else None
    dk_ref, dv_ref = refs[:2]
    del refs[:2]
    dbias_ref = refs.pop(0) if variant.has_bias else None
    k_smem, v_smem, q_smem, dout_smem, lse_smem, delta_smem = refs[:6]
    del refs[:6]
    bias_smem = refs.pop(0) if variant.has_bias else None
    end_smem = refs.pop(0) if variant.has_segments else None
    kv_ready, q_ready, dout_ready, free = refs

    part, batch = lax.axis_index("part"), lax.axis_index("batch")
    wg = lax.axis_index("wg")
    kv_head = lax.div(part * heads, jnp.int32(group))
    tile_base = lax.axis_index("tile") * tile  # the first tiles are seen by the most queries
    kv_base = tile_base + jnp.minimum(wg, WARPGROUPS - 1) * rows
    first, far_begin, far_end, end = query_ranges(variant, end_ref, batch, t, tile_base, tile, kv_base, rows, block)
    steps = end - first  # of one head

    @pl.when(wg < WARPGROUPS)
    def _compute():
      plgpu.set_max_registers(variant.blocks.compute_registers, action="increase")
      here = pl.ds(kv_base, rows)
      plgpu.copy_gmem_to_smem(k_ref.at[batch, here, kv_head], k_smem.at[wg], kv_ready.at[wg])
      plgpu.copy_gmem_to_smem(v_ref.at[batch, here, kv_head], v_smem.at[wg], kv_ready.at[wg])
      if variant.has_bias:
        plgpu.copy_gmem_to_smem(bias_ref.at[batch, kv_head, here], bias_smem.at[wg], kv_ready.at[wg])
      if variant.has_segments:
        plgpu.copy_gmem_to_smem(end_ref.at[batch, here], end_smem.at[wg], kv_ready.at[wg])
      plgpu.barrier_wait(kv_ready.at[wg])
      bias_row = plgpu.load(bias_smem.at[wg], layout=compat.row_layout()) if variant.has_bias else None
      ends = plgpu.load(end_smem.at[wg], layout=compat.row_layout()) if variant.has_segments else None

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
          s = raw * (scale * LOG2E)
          i, j = positions() if masked else (None, None)
          if variant.has_bias:
            biased = s + lax.broadcast_in_dim(bias_row, s.shape, [0])
            s = jnp.where(i - j > variant.window, biased, s) if masked else biased
          if masked:
            visible = i >= j
            if variant.has_segments:
              visible = visible & (i < lax.broadcast_in_dim(ends, s.shape, [0]))
            s = jnp.where(visible, s, -jnp.inf)
          column = plgpu.load(lse_smem.at[slot], layout=compat.column_layout())
          return jnp.exp2(s - lax.broadcast_in_dim(column, s.shape, [1]))

        def score_gradient(p, dp, dbias):
          column = plgpu.load(delta_smem.at[slot], layout=compat.column_layout())
          ds = p * (dp - lax.broadcast_in_dim(column, p.shape, [1]))
          if variant.has_bias and masked:
            i, j = positions()
            dbias = dbias + jnp.where(i - j > variant.window, ds, 0.0).sum(axis=1)
          elif variant.has_bias:
            dbias = dbias + ds.sum(axis=1)
          return ds.astype(q.dtype), dbias

        queries, douts = q_smem.at[slot], dout_smem.at[slot]
        queries_t, douts_t = (x.transpose((1, 0)) for x in (queries, douts))
        if variant.blocks.dkv_overlap:
          p, dp = compat.dot_pair(k_smem.at[wg], queries_t, v_smem.at[wg], douts_t, weights)
          ds = lambda dbias: score_gradient(p, dp, dbias)
          dv, dk, dbias = compat.accumulate_pair(dv, p.astype(q.dtype), douts, dk, queries, dbias, ds)
        else:
          p = weights(compat.dot(k_smem.at[wg], queries_t))
          dv = compat.accumulate(dv, p.astype(q.dtype), douts)
          dp = compat.dot(v_smem.at[wg], douts_t)
          ds, dbias = score_gradient(p, dp, dbias)
          dk = compat.accumulate(dk, ds, queries)
        compat.release(free.at[slot])
        return dk, dv, dbias

      def one_head(g, carry):
        done = g * steps
        carry = lax.fori_loop(first, far_begin, functools.partial(step, done=done, masked=True), carry)
        carry = lax.fori_loop(far_begin, far_end, functools.partial(step, done=done, masked=False), carry)
        if variant.has_segments:
          carry = lax.fori_loop(far_end, end, functools.partial(step, done=done, masked=True), carry)
        return carry

      zeros = lambda: plgpu.layout_cast(jnp.zeros((rows, h), jnp.float32), plgpu.Layout.WGMMA)
      carry = zeros(), zeros(), plgpu.layout_cast(jnp.zeros((rows,), jnp.float32), compat.row_layout())
      dk, dv, dbias = one_head(0, carry) if heads == 1 else lax.fori_loop(0, heads, one_head, carry)
      k_smem[wg] = (dk * scale).astype(k.dtype)
      v_smem[wg] = dv.astype(v.dtype)
      if variant.has_bias:
        bias_smem[wg] = dbias
      plgpu.commit_smem()
      plgpu.copy_smem_to_gmem(k_smem.at[wg], dk_ref.at[batch, here, part])
      plgpu.copy_smem_to_gmem(v_smem.at[wg], dv_ref.at[batch, here, part])
      if variant.has_bias:
        plgpu.copy_smem_to_gmem(bias_smem.at[wg], dbias_ref.at[batch, part, here])
      plgpu.wait_smem_to_gmem(0)

    @pl.when(wg == WARPGROUPS)
    def _load():
      plgpu.set_max_registers(variant.blocks.memory_registers, action="decrease")

      @pl.loop(0, steps * heads)
      def _(number):
        slot = lax.rem(number, jnp.int32(stages))
        head = part * heads + lax.div(number, steps)
        queries = pl.ds((first + lax.rem(number, steps)) * block, block)
        pl.when(number >= stages)(lambda: plgpu.barrier_wait(free.at[slot]))
        plgpu.copy_gmem_to_smem(q_ref.at[batch, queries, head], q_smem.at[slot], q_ready.at[slot])
        plgpu.copy_gmem_to_smem(lse_ref.at[batch, head, queries], lse_smem.at[slot], q_ready.at[slot])
        plgpu.copy_gmem_to_smem(dout_ref.at[batch, queries, head], dout_smem.at[slot], dout_ready.at[slot])
        plgpu.copy_gmem_to_smem(delta_ref.at[batch, head, queries], delta_smem.at[slot], dout_ready.at[slot])

      compat.drain(steps * heads, free)

  matrix = functools.partial(plgpu.SMEM, dtype=q.dtype, transforms=compat.operand_transforms())
  vector = lambda count, length, dtype=jnp.float32: plgpu.SMEM((count, length), dtype)
  barrier = lambda count, arrivals: plgpu.Barrier(num_barriers=count, num_arrivals=arrivals)
  scratch = [matrix((WARPGROUPS, rows, h)), matrix((WARPGROUPS, rows, h))]
  scratch += [matrix((stages, block, h)), matrix((stages, block, h)), vector(stages, block), vector(stages, block)]
  scratch += [vector(WARPGROUPS, rows)] if variant.has_bias else []
  scratch += [vector(WARPGROUPS, rows, jnp.int32)] if variant.has_segments else []
  scratch += [barrier(WARPGROUPS, 2 + variant.has_bias + variant.has_segments), barrier(stages, 2), barrier(stages, 2)]
  scratch += [barrier(stages, WARPGROUPS)]
  out_type = [jax.ShapeDtypeStruct((b, t, parts, h), x.dtype) for x in (k, v)]
  if variant.has_bias:
    out_type.append(jax.ShapeDtypeStruct((b, parts, t), jnp.float32))
  outs = compat.kernel(
    body,
    out_type=out_type,
    scratch_types=scratch,
    grid=(parts, t // tile, b),
    grid_names=("part", "tile", "batch"),
    num_threads=WARPGROUPS + 1,
    thread_name="wg",
    kernel_name=f"window_bias_dkv_{rows}x{block}x{stages}",
    compiler_params=plgpu.CompilerParams(approx_math=True),
  )(*inputs)
  dk, dv, dbias = (*outs, None)[:3]
  if parts != kv_heads:
    together = lambda x: x.reshape(b, t, kv_heads, group, h).astype(jnp.float32).sum(axis=3).astype(x.dtype)
    dk, dv = together(dk), together(dv)
    dbias = None if dbias is None else dbias.reshape(b, kv_heads, group, t).sum(axis=2)
  return dk, dv, dbias
