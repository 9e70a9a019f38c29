"""Slots written into the pages of archives: dispatch, and XLA's scatter."""

from __future__ import annotations

from collections.abc import Sequence

import jax.numpy as jnp
from jaxtyping import Array, Int, Shaped

from pallas_kernels.common import dispatch
from pallas_kernels.paged import tpu as tpu_put
from pallas_kernels.paged.pages import pages_at


def write_pages(
  pool: Shaped[Array, "P page width"],
  table: Int[Array, "*n M"],
  slots: Int[Array, "*n X"],
  rows: Shaped[Array, "*n X width"],
  *,
  implementation: str | Sequence[str] | None = None,
) -> Shaped[Array, "P page width"]:
  """`pool` with `rows` in the archives' slots: row x of archive n in slot `slots[n, x]`, as `pages.Pages` numbers them.

  Of one archive, those that go anywhere follow one another in order; a slot below 0 or past the end is nowhere.

  Args:
    table: the archives' pages; no page that is written belongs to two of them.
    implementation: None for the first able one, else a name or names in order.

  Raises:
    NotImplementedError: the implementations named cannot do the case.
  """
  return dispatch.call("put", IMPLEMENTATIONS, implementation, pool, table, slots, rows)


def scatter(pool, table, slots, rows):
  """See `write_pages`."""
  return pool.at[places(len(pool), pool.shape[1], table, slots)].set(rows, mode="drop", unique_indices=True)


def places(
  number: int, page: int, table: Int[Array, "*n M"], slots: Int[Array, "*n X"]
) -> tuple[Int[Array, "*n X"], Int[Array, "*n X"]]:
  """(page, slot in it) of archives' slots; of what goes nowhere a page of its own past the last of `number` ones.

  What is known to be unique, a GPU writes without locks.
  """
  inside = (slots >= 0) & (slots < table.shape[-1] * page)
  none = number + jnp.arange(slots.size, dtype=jnp.int32).reshape(slots.shape)
  return jnp.where(inside, pages_at(table, slots // page), none), slots % page


IMPLEMENTATIONS = {"tpu": tpu_put.write_pages, "xla": scatter}
