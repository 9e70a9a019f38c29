"""The memory of a `Generator`: a paged cache within a budget, and rows offloaded to the host."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Shaped

from dms_jax.cache import PagedCache
from dms_jax.cache import rows as cache_rows
from dms_jax.cache.base import GROWTH
from dms_jax.cache.host import HostRow, offload_row, restore_row

PART = 256  # pages that are copied from the host at once


class BudgetError(ValueError):
  """A row needs more memory than the whole budget.

  `ticket`: the row's request; None where the empty rows of a new generator exceed the budget.
  """

  def __init__(self, message: str, ticket: int | None = None):
    super().__init__(message if ticket is None else f"ticket {ticket}: {message}")
    self.ticket = ticket


@partial(jax.jit, donate_argnames="cache")
def _settled(cache: PagedCache, over: Bool[Array, "B"]) -> tuple[PagedCache, tuple]:
  tokens = jnp.sum(jnp.mean(cache.live().astype(jnp.float32), axis=(0, 2)))
  pages = cache.pages - cache.table.pool.count
  cache = cache_rows.free_rows(cache, over)
  return cache, (tokens, pages, cache.table.pool.count)


@partial(jax.jit, donate_argnames="new")
def _filled(new: Shaped[Array, "P ..."], part: Shaped[Array, "n ..."], first: Int[Array, ""]) -> Shaped[Array, "P ..."]:
  return jax.lax.dynamic_update_slice_in_dim(new, part, first, 0)


def _regrown(x: Shaped[Array, "P ..."], pages: int) -> Shaped[Array, "pages ..."]:
  """`x` with `pages` pages, by way of host memory: the old array, deleted, and the new one never exist at once."""
  content, sharding, count = np.asarray(x), x.sharding, len(x)
  x.delete()
  new = jax.device_put(jnp.zeros((pages, *content.shape[1:]), content.dtype), sharding)
  part = min(PART, count)
  for first in range(0, count, part):
    first = min(first, count - part)  # equal parts compile once
    new = _filled(new, content[first : first + part], jnp.int32(first))
  return new


class PagedRows:
  """The rows of a generator in one paged cache.

  Attributes:
    cache: the paged cache of B rows.
    budget: most bytes of the cache; None: unlimited.
    limit: most pages within the budget; None: unlimited.
  """

  def __init__(
    self, cache: PagedCache, *, budget: int | None = None, budget_tokens: int | None = None, pages: int | None = None
  ):
    """Takes an empty cache that has one page for each head of each row, and enlarges its pool.

    Args:
      budget_tokens: the budget as tokens that a head may hold outside the windows, summed over rows, mean over heads.
      pages: initial pages of the pool; default as many as fit the budget, or those of `cache` without a budget.

    Raises:
      ValueError: both budgets are given.
      BudgetError: the empty rows and `pages` exceed the budget.
    """
    if budget is not None and budget_tokens is not None:
      raise ValueError("give either budget= (bytes) or budget_tokens=")
    self.cache = cache
    if budget_tokens is not None:
      budget = cache.fixed_bytes + budget_tokens * self.heads // cache.page_size * cache.page_bytes
    least = max(cache.pages, pages or 0)
    self.budget = budget
    self.limit = None if budget is None else max((budget - cache.fixed_bytes) // cache.page_bytes, 0)
    if self.limit is not None and self.limit < least:
      raise BudgetError(
        f"budget={budget} bytes: {cache.seen.shape[0]} rows and {least} pages (one a head, or pages=) take "
        f"{cache.with_pages(least).nbytes}; give a larger budget or a smaller width"
      )
    self.cache = cache.with_pages(max(pages or self.limit or 0, cache.pages))

  @property
  def heads(self) -> int:
    """KV heads of all layers, which is the number of archives of a row."""
    layers, _, heads = self.cache.archived.shape
    return layers * heads

  @property
  def extent(self) -> str:
    """The budget in words."""
    cache = self.cache
    return f"budget={self.budget} bytes ({cache.pages} pages of {cache.page_size} slots for {self.heads} heads)"

  def settle(self, over: Bool[Array, "B"]) -> tuple[Float[Array, ""], Int[Array, ""], Int[Array, ""]]:
    """Empties the rows `over`; waits for nothing.

    Returns:
      (tokens held before by all rows, mean over layers and heads; pages in use before, each shared page counted once;
      pages free afterwards), on the device.
    """
    self.cache, found = _settled(self.cache, over)
    return found

  def free_pages(self) -> int:
    """Pages that no row owns."""
    return int(self.cache.table.pool.count)

  @property
  def grows(self) -> bool:
    """Whether the budget leaves room for a larger pool."""
    return self.limit is None or self.limit > self.cache.pages

  def grow(self, lacking: int) -> bool:
    """Adds `lacking` pages or more to the pool, or as many as the budget still allows; false if it allows none.

    Where the old and the new pool together exceed the budget, the pages pass through host memory.
    """
    if not self.grows:
      return False
    pages = max(self.cache.pages + lacking, int(self.cache.pages * GROWTH))
    if self.limit is not None:
      pages = min(pages, self.limit)
    if self.limit is None or self.cache.pages + pages <= self.limit:
      self.cache = self.cache.with_pages(pages)
    else:
      store = jax.tree.map(lambda x: _regrown(x, pages), self.cache.store)
      self.cache = self.cache.replace(
        store=store, table=self.cache.table.replace(pool=self.cache.table.pool.grow(pages))
      )
    return True

  def reserve(self, slots: int, extra: int = 0) -> None:
    """Enlarges the pool, within the budget, to pages for `slots` slots of every head, and `extra` more in one row.

    A pool that is large enough from the start is not copied, and no program is compiled for its larger shape.
    """
    rows, size = self.cache.seen.shape[0], self.cache.page_size
    wanted = self.heads * (rows * -(-slots // size) + -(-extra // size))
    if self.limit is not None:
      wanted = min(wanted, self.limit)
    if wanted > self.cache.pages:
      self.cache = self.cache.with_pages(wanted)

  def fork(self, row: int, others: list[int], whole: bool) -> bool:
    """Forks `row` into the empty rows `others`; false if pages ran out.

    `whole`: copy all pages, for a policy that writes into old pages.
    """
    mask = np.isin(np.arange(self.cache.seen.shape[0]), others)
    while others:
      self.cache, enough = cache_rows.fork_row(self.cache, jnp.int32(row), mask, whole=whole)
      if bool(enough):
        break
      pages = int(np.asarray(self.cache.table.owned[:, row]).sum()) if whole else self.heads
      if not self.grow(len(others) * pages):
        return False
    return True

  def fork_all(self, sources: Int[np.ndarray, "B"], rows: Bool[np.ndarray, "B"], whole: bool) -> None:
    """Forks row `sources[b]` into each empty row b of `rows`, for which there are pages; waits for nothing."""
    self.cache, _ = cache_rows.fork_row(self.cache, sources, rows, whole=whole)

  def free(self, rows: list[int]) -> None:
    """Empties rows and frees each page that no other row shares."""
    self.cache = cache_rows.free_rows(self.cache, np.isin(np.arange(self.cache.seen.shape[0]), rows))

  def offload(self, row: int) -> HostRow:
    """A copy of a row in host memory."""
    return offload_row(self.cache, row)

  def restore(self, row: int, stored: HostRow) -> bool:
    """Puts a host copy into an empty row; false if pages ran out."""
    while True:
      self.cache, enough = restore_row(self.cache, row, stored)
      if enough or not self.grow(len(stored.pages)):
        return enough
