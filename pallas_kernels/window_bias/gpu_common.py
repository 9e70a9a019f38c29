"""Shared by the Hopper kernels of window-bias attention: sizes, masked scores, visited keys."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from jax import lax

from pallas_kernels.common.compat import plgpu
from pallas_kernels.common.pipeline import WARPGROUPS
from pallas_kernels.common.softmax import soft_capped_by_exp2


@dataclasses.dataclass(frozen=True)
class Blocks:
  """Sizes of the three kernels. Rows are per warpgroup; shared memory holds `stages` blocks of what is streamed."""

  q: int = 64
  kv: int = 128
  stages: int = 2
  dq_q: int = 64
  dq_kv: int = 128
  dq_stages: int = 2
  dkv_kv: int = 64
  dkv_q: int = 64
  dkv_stages: int = 2
  dq_overlap: bool = True  # start both products of a block at once, which takes registers
  dkv_overlap: bool = True
  compute_registers: int = 240
  memory_registers: int = 24
  split_group: bool = False  # XLA sums dk and dv of each query head: more parallelism, more memory

  @property
  def multiple(self) -> int:
    """T is padded to a multiple of this."""
    tiles = (self.q, self.dq_q, self.dkv_kv)
    return math.lcm(*(WARPGROUPS * x for x in tiles), self.kv, self.dq_kv, self.dkv_q)


def default_blocks(head_dim: int, keys: int, processors: int) -> Blocks:
  """Sizes that fit a warpgroup's registers.

  Args:
    keys: of all rows and KV heads, B T K. At head size 128, where their tiles are fewer than two a processor, each
      query head of a group gets blocks of threads of its own.
  """
  if head_dim == 64:
    return Blocks()
  few = keys < 2 * processors * WARPGROUPS * Blocks.dkv_kv
  return Blocks(dkv_overlap=False, split_group=few)


@dataclasses.dataclass(frozen=True)
class Variant:
  """What a kernel is compiled for, besides shapes."""

  window: int
  has_bias: bool
  has_segments: bool
  blocks: Blocks
  softcap: float | None = None  # of scores in units of log 2
  by_age: bool = False  # a key's bias is multiplied by its distance to the query


def age(i, j):
  """i - j, float32. Rows and columns are converted one by one, which are fewer than pairs."""
  return i.astype(jnp.float32) - j.astype(jnp.float32)


def scores_of(variant: Variant, raw, scale, q_base, kv_base, bias, start, masked: bool):
  """(scores [queries, keys] in units of log 2 with the bias and, if `masked`, every mask; the same before those).

  `raw` is the product q k^T. Without `masked`, all keys are visible and, if there is a bias, further back than the
  window.
  """
  if masked or variant.by_age:
    i = plgpu.broadcasted_iota(jnp.int32, raw.shape, 0, layout=plgpu.Layout.WGMMA) + q_base
    j = plgpu.broadcasted_iota(jnp.int32, raw.shape, 1, layout=plgpu.Layout.WGMMA) + kv_base

  def biased(s):
    if bias is None:
      return s
    column = lax.broadcast_in_dim(bias, raw.shape, [1])
    return s + (column * age(i, j) if variant.by_age else column)

  s = capped = soft_capped_by_exp2(raw * scale, variant.softcap)
  if not masked:
    return biased(s), capped
  if bias is not None:
    s = jnp.where(i - j > variant.window, biased(s), s)
  visible = j <= i
  if start is not None:
    visible = visible & (j >= lax.broadcast_in_dim(start, raw.shape, [0]))
  return jnp.where(visible, s, -jnp.inf), capped


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


def over_ranges(ranges: tuple, step: Callable, carry: Any, before: bool, behind: bool):
  """`carry` after step(number, carry, masked=...) for each block of `ranges` (see `key_ranges`).

  Args:
    before, behind: whether there may be blocks that need masks before the others, and behind them.
  """
  first, far_begin, far_end, end = ranges
  masked, bare = functools.partial(step, masked=True), functools.partial(step, masked=False)
  carry = lax.fori_loop(first, far_begin, masked, carry) if before else carry
  carry = lax.fori_loop(far_begin, far_end, bare, carry)
  return lax.fori_loop(far_end, end, masked, carry) if behind else carry
