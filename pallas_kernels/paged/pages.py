"""Archives in pages of one pool."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from pallas_kernels.paged.format import PageFormat, format_of


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Pages:
  """The archive of each (layer, row, KV head): slot s lies in page `table[l, b, k, s // page]`, at s % page.

  Fields:
    pool: [P, page, 2H], a slot's key and value side by side; its dtype says the format: floats, uint16 (the bits of
      bfloat16), int8 or float8_e4m3fn.
    table: int32 [L, B, K, M], page numbers; entries for pages with nothing live are never used and may be arbitrary.
    lengths: int32 [B, K], live slots in the layer that is read.
    scales: float32 [P, 1, 2 * page] or None; the key of slot s of a page is multiplied by entry 2 s, its value by 2 s +
      1. One row a page: rows of two numbers would each take 128 lanes of a TPU's memory.
  """

  pool: jax.Array
  table: jax.Array
  lengths: jax.Array
  scales: jax.Array | None = None

  @property
  def format(self) -> PageFormat:
    return format_of(self.pool.dtype)


def pages_at(table: Int[Array, "*n M"], place: Int[Array, "*n X"]) -> Int[Array, "*n X"]:
  """Page numbers at `place` of archives' tables; the last one past the end."""
  return jnp.take_along_axis(table, jnp.clip(place, 0, table.shape[-1] - 1), axis=-1)


def places(
  number: int, page: int, table: Int[Array, "*n M"], slots: Int[Array, "*n X"]
) -> tuple[Int[Array, "*n X"], Int[Array, "*n X"]]:
  """(page, slot in it) of archives' slots in a pool of `number` pages.

  A slot that the table does not have gets a page of its own past the last: the places are unique, and a GPU scatters to
  unique ones without locks.
  """
  inside = (slots >= 0) & (slots < table.shape[-1] * page)
  none = number + jnp.arange(slots.size, dtype=jnp.int32).reshape(slots.shape)
  return jnp.where(inside, pages_at(table, slots // page), none), slots % page
