"""Dispatch of writes into pages."""

from __future__ import annotations

from collections.abc import Sequence

from jaxtyping import Array, Int, Shaped

from pallas_kernels.common import dispatch
from pallas_kernels.paged import tpu, xla

IMPLEMENTATIONS = {"tpu": tpu.write_pages, "xla": xla.write_pages}


def write_pages(
  pool: Shaped[Array, "P page width"],
  table: Int[Array, "*n M"],
  slots: Int[Array, "*n X"],
  rows: Shaped[Array, "*n X width"],
  *,
  implementation: str | Sequence[str] | None = None,
) -> Shaped[Array, "P page width"]:
  """`pool` with `rows` in the archives' slots: row x of archive n in slot `slots[n, x]`, as `Pages` numbers them.

  Slots of one archive ascend without gaps; a row whose slot is below 0 or past the end is dropped.

  Args:
    table: the archives' pages; no page that is written belongs to two of them.
    implementation: None for the first able one, else a name or names in order.

  Raises:
    NotImplementedError: the implementations named cannot do the case.
  """
  return dispatch.call("write_pages", IMPLEMENTATIONS, implementation, pool, table, slots, rows)
