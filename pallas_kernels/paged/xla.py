"""Slots written into pages by XLA's scatter."""

from __future__ import annotations

from pallas_kernels.paged.pages import places


def write_pages(pool, table, slots, rows):
  """See `api.write_pages`; slots in any order."""
  return pool.at[places(len(pool), pool.shape[1], table, slots)].set(rows, mode="drop", unique_indices=True)
