"""Shared by the TPU kernels of window-bias attention: sizes, visible blocks, launch, scores.

A grid step handles one block of keys of one KV head against one block of queries of all G query heads that read it.
Only visible pairs of blocks are stepped over: their list, in the order of the steps, is prefetched into scalar memory.
Without segments it is the causal triangle, a constant; with segments it is made in the graph and the grid is as long as
the list. The list says of each pair whether all of its keys are free of bias, all are far (bias, no comparison), or
each must be compared.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl

from pallas_kernels.common.compat_tpu import pltpu
from pallas_kernels.common.softmax import LOG2E, soft_capped

LANES = 128
MIXED, FREE, FAR = range(3)  # kinds of pairs of blocks
SCALAR_BYTES = 2**19  # that the list of pairs may take of a megabyte of scalar memory


class Tile(NamedTuple):
  """Queries and keys of one grid step."""

  q: int
  kv: int


@dataclasses.dataclass(frozen=True)
class Blocks:
  """Tiles of the three kernels; on a TPU multiples of 128."""

  forward: Tile
  dq: Tile
  dkv: Tile

  @property
  def multiple(self) -> int:
    """T is padded to a multiple of this."""
    return math.lcm(*self.forward, *self.dq, *self.dkv)


def default_blocks(tokens: int, group: int, head_dim: int, itemsize: int) -> Blocks:
  """Tiles that fit 16 MiB of vector memory, which holds each operand with a row per query head and channel twice."""
  longest = LANES * pl.cdiv(tokens, LANES)
  rows = group * head_dim * itemsize
  q, kv = (512, 512) if rows <= 2048 else (256, 512) if rows <= 4096 else (128, 256)
  # A power of two no longer than the text, so that padding is short.
  fit = lambda size: min(size, LANES << max(0, (longest // LANES).bit_length() - 1))
  tile = Tile(fit(q), fit(kv))
  return Blocks(tile, tile, tile)


@dataclasses.dataclass(frozen=True)
class Variant:
  """What a kernel is compiled for, besides shapes."""

  window: int
  has_bias: bool
  blocks: Blocks
  softcap: float | None = None  # of scores in units of log 2
  by_age: bool = False  # a key's bias is multiplied by its distance to the query


def triangle(tokens: int, tile: Tile) -> int:
  """Pairs of blocks on and below the diagonal."""
  first = np.arange(tokens // tile.q) * tile.q
  return int(((first + tile.q - 1) // tile.kv + 1).sum())


class Pairs(NamedTuple):
  """Visible pairs of blocks in the order of the steps; the first `count` are real.

  `places` int32 [P]: 4 * row + kind; `blocks` int32 [P]: 65536 * block of queries + block of keys. `rows`: how many
  rows share the list, each entry's row then being relative to one of them. `by_keys`: whether they are sorted by block
  of keys, not of queries.
  """

  places: Any
  blocks: Any
  count: Any
  rows: int
  tile: Tile
  by_keys: bool


def visible_pairs(variant: Variant, tile: Tile, batch: int, tokens: int, start, by_keys: bool) -> Pairs:
  """The pairs sorted by block of queries, or of keys; `start` int32 [B, 1, 1, T], each query's first visible key."""
  i = np.arange(0, tokens, tile.q)[None, :, None]
  j = np.arange(0, tokens, tile.kv)[None, None]
  i_last, j_last = i + (tile.q - 1), j + (tile.kv - 1)
  seen, whole = j <= i_last, j_last <= i
  free = (i_last - j <= variant.window) if variant.has_bias else np.bool_(True)
  far = (i - j_last > variant.window) if variant.has_bias else np.bool_(False)
  if start is not None:
    seen = seen & (j_last >= start[:, 0, 0, :: tile.q, None])
    whole = whole & (j >= start[:, 0, 0, tile.q - 1 :: tile.q, None])
  xp = np if start is None else jnp
  kinds = xp.where(whole & far, np.int32(FAR), xp.where(whole & free, np.int32(FREE), np.int32(MIXED)))
  row = np.arange(seen.shape[0], dtype=np.int32)[:, None, None]
  places = xp.broadcast_to(4 * row + kinds, seen.shape)
  blocks = xp.broadcast_to(((i // tile.q << 16) + j // tile.kv).astype(np.int32), seen.shape)
  flat = lambda x: (x.swapaxes(1, 2) if by_keys else x).reshape(-1)
  if start is None:
    at = np.flatnonzero(flat(seen))
    count, rows = len(at), batch
  else:
    at = jnp.flatnonzero(flat(seen), size=batch * triangle(tokens, tile), fill_value=0)
    count, rows = seen.sum(dtype=jnp.int32), 1
  return Pairs(jnp.asarray(flat(places)[at]), jnp.asarray(flat(blocks)[at]), count, rows, tile, by_keys)


class Step(NamedTuple):
  """A grid step's first query and key, its kind, and whether it is its owner's first or last."""

  q_base: Any
  kv_base: Any
  kind: Any
  first: Any
  last: Any


def _current(tile: Tile, by_keys: bool, places, blocks) -> Step:
  """The running step. Its owner, whose results are being summed, is a block of queries, or of keys."""
  step, count = pl.program_id(2), pl.num_programs(2)
  block_of = (lambda x: x & 0xFFFF) if by_keys else (lambda x: x >> 16)
  owner = lambda at: (places[at] >> 2, block_of(blocks[at]))
  differs = lambda a, b: (a[0] != b[0]) | (a[1] != b[1])
  mine = owner(step)
  first = (step == 0) | differs(mine, owner(jnp.maximum(step - 1, 0)))
  last = (step == count - 1) | differs(mine, owner(jnp.minimum(step + 1, count - 1)))
  q_base, kv_base = (blocks[step] >> 16) * tile.q, (blocks[step] & 0xFFFF) * tile.kv
  return Step(q_base, kv_base, places[step] & 3, first, last)


def launch(body: Callable, pairs: Pairs, inputs: Sequence, outputs: Sequence, scratch: Sequence, name: str):
  """Runs `body(step, *inputs, *outputs, *scratch)` for every KV head and visible pair of blocks.

  Args:
    inputs: (axis, array [B, K or 1, R, T] or None) each; `axis` is "q" or "kv", whose block [R, tile] the body gets.
    outputs: (axis, ShapeDtypeStruct) each.
    scratch: (shape, dtype) of each vector memory buffer.
  """
  tile = pairs.tile

  def spec(axis, x):
    if x is None:
      return None

    def index(head, row, step, places, blocks):
      block = blocks[step] >> 16 if axis == "q" else blocks[step] & 0xFFFF
      return row + (places[step] >> 2), head if x.shape[1] > 1 else 0, 0, block

    return pl.BlockSpec((None, None, x.shape[2], getattr(tile, axis)), index)

  def kernel(places, blocks, *refs):
    body(_current(tile, pairs.by_keys, places, blocks), *refs)

  heads = outputs[0][1].shape[1]
  return pl.pallas_call(
    kernel,
    out_shape=[x for _, x in outputs],
    grid_spec=pltpu.PrefetchScalarGridSpec(
      num_scalar_prefetch=2,
      grid=(heads, pairs.rows, pairs.count),
      in_specs=[spec(*x) for x in inputs],
      out_specs=[spec(*x) for x in outputs],
      scratch_shapes=[pltpu.VMEM(*x) for x in scratch],
    ),
    compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel", "arbitrary")),
    name=f"{name}_{tile.q}x{tile.kv}",
  )(pairs.places, pairs.blocks, *(x for _, x in inputs))


def for_kind(variant: Variant, step: Step, run: Callable[[int], None]) -> None:
  """Calls `run` with the step's kind as a Python number: its code is compiled once for each kind."""
  for kind in (MIXED, FREE, FAR) if variant.has_bias else (MIXED, FREE):
    pl.when(step.kind == kind)(functools.partial(run, kind))


def for_heads(group: int, size: int, run: Callable[[Any, Any], None]) -> None:
  """Calls run(one, rows) for each query head: its row in arrays with one a head, its rows in arrays with `size`."""
  if group == 1:
    run(pl.ds(0, 1), pl.ds(0, size))
  else:
    lax.fori_loop(0, group, lambda g, _: run(pl.ds(g, 1), pl.ds(pl.multiple_of(g * size, size), size)), None)


def dot(a, b, contract: tuple[int, int] = (1, 0)) -> jax.Array:
  """Product of two matrices of one dtype, in float32; float32 operands are not rounded first."""
  precision = lax.Precision.HIGHEST if a.dtype == jnp.float32 else lax.Precision.DEFAULT
  dimensions = ((contract[:1], contract[1:]), ((), ()))
  return lax.dot_general(a, b, dimensions, precision=precision, preferred_element_type=jnp.float32)


def added_to_scores(variant: Variant, tile: Tile, step: Step, kind: int, bias_ref, start_ref):
  """(the addend of scores [keys, queries]: None, [keys, 1] or whole; how many times it holds the key's bias, or None
  for once everywhere)."""
  if kind == FREE:
    return None, None
  column = None
  if variant.has_bias:  # from lanes to sublanes
    column = jnp.broadcast_to(bias_ref[...], (LANES, tile.kv)).T[:, :1]
  if kind == FAR and not variant.by_age:
    return column, None
  i = lax.broadcasted_iota(jnp.int32, (tile.kv, tile.q), 1) + step.q_base
  j = lax.broadcasted_iota(jnp.int32, (tile.kv, tile.q), 0) + step.kv_base
  visible = j <= i
  if start_ref is not None:
    visible = visible & (j >= start_ref[...])
  if column is None:
    return jnp.where(visible, 0.0, -jnp.inf), None
  far = i - j > variant.window
  age = (i - j).astype(jnp.float32) if variant.by_age else jnp.float32(1.0)
  return jnp.where(visible, jnp.where(far, column * age, 0.0), -jnp.inf), jnp.where(far, age, 0.0)


def scores(variant: Variant, keys, queries, added) -> tuple[jax.Array, jax.Array]:
  """[keys, queries] in units of log 2, with what is `added` and without: `keys` [keys, H], `queries` [H, queries]."""
  s = soft_capped(dot(keys, queries) * (LOG2E * queries.shape[0] ** -0.5), variant.softcap)
  return s if added is None else s + added, s
