"""Hopper kernels in which two warpgroups compute on blocks that a third one loads by TMA.

The loader fills rings of `stages` slots in shared memory; FlashAttention-3 (arXiv 2407.08608) calls this producer and
consumers.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from pallas_kernels.common import compat
from pallas_kernels.common.compat import plgpu

WARPGROUPS = 2  # computing; one more moves data


def matrix(shape: tuple[int, ...], dtype: Any):
  """Shared memory for 16-bit matrices, laid out as the tensor cores read them."""
  return plgpu.SMEM(shape, dtype, transforms=compat.operand_transforms())


def vector(*shape: int, dtype: Any = jnp.float32):
  """Shared memory for plain numbers."""
  return plgpu.SMEM(shape, dtype)


def barriers(count: int, arrivals: int = WARPGROUPS):
  """`count` barriers that open after so many arrivals each; each warpgroup that computes arrives once by default."""
  return plgpu.Barrier(num_barriers=count, num_arrivals=arrivals)


def zeros(rows: int, columns: int):
  """A float32 accumulator in a warpgroup's registers."""
  return plgpu.layout_cast(jnp.zeros((rows, columns), jnp.float32), plgpu.Layout.WGMMA)


def filled_rows(rows: int, value: float):
  """A float32 for each row of a warpgroup's matrix, in `row_layout`."""
  return plgpu.layout_cast(jnp.full((rows,), value, jnp.float32), compat.row_layout())


def row_vector(ref, *index):
  """Numbers in shared memory, one a row of a warpgroup's matrix, to registers; None without a reference."""
  return None if ref is None else plgpu.load(ref.at[index], layout=compat.row_layout())


def column_vector(ref, *index):
  """The same, one number a column."""
  return None if ref is None else plgpu.load(ref.at[index], layout=compat.column_layout())


def fetch(slot, ready, *copies: tuple) -> None:
  """Starts loads from global memory to buffers' `slot`; `ready.at[slot]` gets an arrival of each.

  Args:
    copies: (reference or None, index in it, buffer) each; nothing is loaded for None.
  """
  for ref, index, buffer in copies:
    if ref is not None:
      plgpu.copy_gmem_to_smem(ref.at[index], buffer.at[slot], ready.at[slot])


def store(slot, *copies: tuple) -> None:
  """Stores buffers' `slot` to global memory and waits until it is there; `copies` as `fetch` takes them."""
  plgpu.commit_smem()
  for ref, index, buffer in copies:
    if ref is not None:
      plgpu.copy_smem_to_gmem(buffer.at[slot], ref.at[index])
  plgpu.wait_smem_to_gmem(0)


def stream(steps, stages: int, blocks: Callable[[Any], Sequence], *rings: tuple, before=None) -> None:
  """The loader's loop: `steps` blocks, one after the other, each into a slot that its last readers have left.

  Args:
    blocks: called with a block's number; for each ring, its `copies` as `fetch` takes them.
    rings: (barriers of free slots, barriers of loaded slots) each; None as the first: free with the ring before it.
    before: how many blocks went through the rings before; the caller awaits their last release then (`drain`).
  """
  earlier = 0 if before is None else before

  @pl.loop(0, steps)
  def _(number):
    slot = lax.rem(earlier + number, jnp.int32(stages))
    copies = blocks(number)
    full = earlier + number >= stages
    for (free, ready), ring in zip(rings, copies, strict=True):
      if free is not None:
        pl.when(full)(functools.partial(plgpu.barrier_wait, free.at[slot]))
      fetch(slot, ready, *ring)

  if before is None:
    compat.drain(steps, *(free for free, _ in rings if free is not None))


def launch(
  body: Callable, inputs: Sequence, outputs: Sequence, scratch: Sequence, grid: dict[str, int], name: str
) -> list:
  """Runs body(*inputs, *outputs, *scratch) with a reference for each, None for an absent one; returns all `outputs`.

  Args:
    inputs: arrays or None; outputs: ShapeDtypeStruct or None; scratch: shared memory, barriers or None.
    grid: size of each axis by its name. The axis "wg" counts warpgroups; number `WARPGROUPS` is the loader.
  """
  places = [*inputs, *outputs, *scratch]
  present = lambda items: [x for x in items if x is not None]

  def compact_body(*refs):
    refs = iter(refs)
    body(*(None if place is None else next(refs) for place in places))

  call = compat.kernel(
    compact_body,
    out_type=present(outputs),
    scratch_types=present(scratch),
    grid=tuple(grid.values()),
    grid_names=tuple(grid),
    num_threads=WARPGROUPS + 1,
    thread_name="wg",
    kernel_name=name,
    compiler_params=plgpu.CompilerParams(approx_math=True),
  )
  results = iter(call(*present(inputs)))
  return [None if x is None else next(results) for x in outputs]
