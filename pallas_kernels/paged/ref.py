"""Oracle of writes into pages: plain loops."""

from __future__ import annotations

import numpy as np


def write_pages(pool, table, slots, rows) -> np.ndarray:
  """Row x of archive n in slot `slots[n, x]` of its pages `table[n]`; slots that the table does not have are dropped.

  Args: pool [P, page, width], table [N, M], slots [N, X], rows [N, X, width].
  """
  pool, page = np.array(pool), np.shape(pool)[1]
  for archive, row in np.argwhere((slots >= 0) & (slots < np.shape(table)[1] * page)):
    slot = slots[archive, row]
    pool[table[archive, slot // page], slot % page] = rows[archive, row]
  return pool
