"""The attention mass of each key on Hopper GPUs, summed over queries after the forward kernel.

A block owns 128 gathered keys of a KV head, 64 for each of two warpgroups, and passes once over the tiles of queries
that see them, fed by a third warpgroup. All is transposed, keys in rows: each thread sums the probabilities of its keys
in its own registers, in a fixed order, and rows are added up once at the end.
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
from pallas_kernels.common.softmax import LOG2E, in_log2, soft_capped_by_exp2
from pallas_kernels.common.warpgroup import ROWS
from pallas_kernels.prefill import plan as planning
from pallas_kernels.prefill.gpu_common import Tile

KEYS = QUERIES = WARPGROUPS * ROWS  # keys a block owns; rows of a tile of queries
COMPUTE_REGISTERS, MEMORY_REGISTERS = 240, 24


def key_mass(tile: Tile, softcap: float | None, q, keys, rows, bounds, row, logs, query_weights):
  """Mass float32 [B, K, S] of the keys, from what the forward kernel was given and its log-sum-exp.

  Args:
    softcap: caps natural scores, if not None.
    q: [B, T or a few more, N, H].
    keys, bounds: [B, K, R, H] and [B, K, 2, R], gathered; row: [B, K, S], as in `Plan`.
    rows: positions int32 [B, tiles, 2, 64].
    logs: float32 [B, parts, tiles, 2, 64] in units of log 2.
    query_weights: [B, T].
  """
  return planning.take(_sum(tile, softcap, *_prepare(tile, q, keys, rows, bounds, logs, query_weights)), row, 0.0)


@functools.partial(jax.jit, static_argnums=0)
def _prepare(tile: Tile, q, keys, rows, bounds, logs, query_weights):
  """The arguments of `_sum`."""
  b, t = query_weights.shape
  queries = rows.shape[1] * tile.queries
  weights = jnp.pad(query_weights.astype(jnp.float32), ((0, 0), (0, queries - t)))
  q = jnp.pad(q, ((0, 0), (0, queries - q.shape[1]), (0, 0), (0, 0)))
  weights = tile.arrange(weights.reshape(b, -1, tile.queries), 0.0)
  flat = lambda x: x.reshape(*x.shape[:-2], QUERIES)
  rows, logs = flat(rows), flat(logs)
  # Probabilities of queries that see nothing or do not count are 0, also of keys that they do not see.
  logs = jnp.where((weights == 0)[:, None] | jnp.isneginf(logs), jnp.inf, logs)
  pad = (0, 0), (0, 0), (0, -keys.shape[2] % KEYS)
  keys = jnp.pad(keys, (*pad, (0, 0)))
  bounds = [jnp.pad(bounds[:, :, i], pad, constant_values=x) for i, x in enumerate((planning.NEVER, -1))]
  bounds = jnp.stack(bounds, axis=2)
  ranges = planning.visitors(jnp.where(weights == 0, -2, rows), bounds, block=KEYS)
  return tile.split(q), keys, rows, bounds, logs, weights, ranges


def _sum(tile: Tile, softcap: float | None, q, keys, rows, bounds, logs, weights, ranges):
  """Mass float32 [B, K, R] of gathered keys.

  q [B, parts, tiles, 128, H], keys [B, K, R, H], rows and weights [B, tiles, 128], bounds [B, K, 2, R], logs [B, parts,
  tiles, 128], ranges [B, K, R / 128, 3]: see `plan.visitors`.
  """
  b, k, r, h = keys.shape
  parts = q.shape[1] // k  # of a group of query heads, each with tiles of its own
  stages = {64: 4, 128: 3, 256: 2}[h]
  scale = h**-0.5 * LOG2E
  i32 = jnp.int32

  def body(q_ref, k_ref, rows_ref, bounds_ref, logs_ref, weights_ref, ranges_ref, out_ref, *scratch):
    k_smem, bounds_smem, mass_smem, q_smem, rows_smem, logs_smem, weights_smem, k_ready, q_ready, free = scratch
    head, batch, wg = lax.axis_index("head"), lax.axis_index("batch"), lax.axis_index("wg")
    number = lax.axis_index("block")  # the first keys are seen by the most queries
    start, whole, stop = (ranges_ref[batch, head, number, i] for i in range(3))
    masked, steps = (whole - start) * parts, (stop - start) * parts

    @pl.when(wg < WARPGROUPS)
    def _compute():
      plgpu.set_max_registers(COMPUTE_REGISTERS, action="increase")
      here = pl.ds(number * KEYS + wg * ROWS, ROWS)
      bounds = bounds_ref, (batch, head, slice(None), here), bounds_smem
      pipeline.fetch(wg, k_ready, (k_ref, (batch, head, here), k_smem), bounds)
      plgpu.barrier_wait(k_ready.at[wg])
      first, last = (pipeline.row_vector(bounds_smem, wg, x) for x in range(2))

      def step(i, acc, masked):
        slot = lax.rem(i, i32(stages))
        plgpu.barrier_wait(q_ready.at[slot])
        s = compat.dot(k_smem.at[wg], q_smem.at[slot].transpose((1, 0))) * scale
        s = soft_capped_by_exp2(s, in_log2(softcap))
        column = lambda ref: lax.broadcast_in_dim(pipeline.column_vector(ref, slot), s.shape, [1])
        if masked:
          query = column(rows_smem)
          low, high = (lax.broadcast_in_dim(x, s.shape, [0]) for x in (first, last))
          s = jnp.where((low <= query) & (query <= high), s, -jnp.inf)
        acc = acc + jnp.exp2(s - column(logs_smem)) * column(weights_smem)
        compat.release(free.at[slot])
        return acc

      acc = lax.fori_loop(0, masked, functools.partial(step, masked=True), pipeline.zeros(ROWS, QUERIES))
      acc = lax.fori_loop(masked, steps, functools.partial(step, masked=False), acc)
      mass_smem[wg] = acc.sum(axis=1)
      pipeline.store(wg, (out_ref, (batch, head, here), mass_smem))

    @pl.when(wg == WARPGROUPS)
    def _load():
      plgpu.set_max_registers(MEMORY_REGISTERS, action="decrease")

      def copies(i):
        tile, part = start + lax.div(i, i32(parts)), head * parts + lax.rem(i, i32(parts))
        of_part = (q_ref, (batch, part, tile), q_smem), (logs_ref, (batch, part, tile), logs_smem)
        return [(*of_part, (rows_ref, (batch, tile), rows_smem), (weights_ref, (batch, tile), weights_smem))]

      pipeline.stream(steps, stages, copies, (free, q_ready))

  scratch = [pipeline.matrix((WARPGROUPS, ROWS, h), q.dtype), pipeline.vector(WARPGROUPS, 2, ROWS, dtype=i32)]
  scratch += [pipeline.vector(WARPGROUPS, ROWS), pipeline.matrix((stages, QUERIES, h), q.dtype)]
  scratch += [pipeline.vector(stages, QUERIES, dtype=dtype) for dtype in (i32, jnp.float32, jnp.float32)]
  scratch += [pipeline.barriers(WARPGROUPS, 2), pipeline.barriers(stages, 4), pipeline.barriers(stages)]
  (mass,) = pipeline.launch(
    body,
    [q, keys, rows, bounds, logs, weights, ranges],
    [jax.ShapeDtypeStruct((b, k, r), jnp.float32)],
    scratch,
    {"head": k, "block": r // KEYS, "batch": b},
    f"prefill_mass_{tile.heads}x{tile.queries}",
  )
  return mass
