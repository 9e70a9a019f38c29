"""The memory of a `Generator`: a paged cache within a budget, and rows offloaded to the host."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Shaped

from dms_jax import cache as caches
from dms_jax.cache import PagedCache, ShardedCache
from dms_jax.cache import rows as cache_rows
from dms_jax.cache.base import GROWTH
from dms_jax.cache.host import HostRow, offload_row, restore_row
from dms_jax.cache.pool import Pool
from dms_jax.cache.sharded import on_each
from dms_jax.processes import fetch

PART = 256  # pages that are copied from the host at once


class BudgetError(ValueError):
  """A row needs more memory than the whole budget.

  `ticket`: the row's request; None where the empty rows of a new generator exceed the budget.
  """

  def __init__(self, message: str, ticket: int | None = None):
    super().__init__(message if ticket is None else f"ticket {ticket}: {message}")
    self.ticket = ticket


@partial(jax.jit, donate_argnames="cache")
@on_each
def _settled(cache: PagedCache, over: Bool[Array, "B"]) -> tuple[PagedCache, tuple]:
  tokens = jnp.sum(jnp.mean(cache.live().astype(jnp.float32), axis=(0, 2)))
  pages = cache.pages - cache.table.pool.count
  cache = cache_rows.free_rows(cache, over)
  return cache, (tokens, pages, cache.table.pool.count)


@partial(jax.jit, static_argnames="pages")
@on_each
def _grown_pool(cache: PagedCache, *, pages: int) -> Pool:
  """The owners of `pages` pages, those of the cache first."""
  return cache.table.pool.grow(pages)


@partial(jax.jit, donate_argnames="new")
def _filled(new: Shaped[Array, "P ..."], part: Shaped[Array, "n ..."], first: Int[Array, ""]) -> Shaped[Array, "P ..."]:
  return jax.lax.dynamic_update_slice_in_dim(new, part, first, 0)


def _regrown(x: Shaped[Array, "P ..."], pages: int) -> Shaped[Array, "pages ..."]:
  """`x` with `pages` pages, by way of host memory: the old array, deleted, and the new one never exist at once."""
  sharding = x.sharding
  if len(sharding.device_set) > 1:
    parts = [_regrown(shard.data, pages) for shard in x.addressable_shards]  # one device after another
    return jax.make_array_from_single_device_arrays((len(sharding.device_set) * pages, *x.shape[1:]), sharding, parts)
  content, count = np.asarray(x), len(x)
  x.delete()
  new = jax.device_put(jnp.zeros((pages, *content.shape[1:]), content.dtype), sharding)
  part = min(PART, count)
  for first in range(0, count, part):
    first = min(first, count - part)  # equal parts compile once
    new = _filled(new, content[first : first + part], jnp.int32(first))
  return new


class PagedRows:
  """The rows of a generator in one paged cache.

  On a mesh every device has a pool for its rows and heads, of the same number of pages. Devices of the same rows are
  counted as one: their free pages are those of the device that has fewest.

  Attributes:
    cache: the paged cache of B rows.
    budget: most bytes of the cache on each device; None: unlimited.
    limit: most pages of a pool within the budget; None: unlimited.
  """

  def __init__(
    self,
    cache: PagedCache | ShardedCache,
    *,
    budget: int | None = None,
    budget_tokens: int | None = None,
    pages: int | None = None,
  ):
    """Takes an empty cache that has one page for each head of each row, and enlarges its pool.

    Args:
      budget_tokens: the budget as tokens that a head may hold outside the windows, summed over a device's rows, mean
        over heads.
      pages: initial pages of each pool; default as many as fit the budget, or those of `cache` without a budget.

    Raises:
      ValueError: both budgets are given.
      BudgetError: the empty rows and `pages` exceed the budget.
    """
    if budget is not None and budget_tokens is not None:
      raise ValueError("give either budget= (bytes) or budget_tokens=")
    self.cache = cache
    own = self.own
    if budget_tokens is not None:
      budget = own.fixed_bytes + budget_tokens * self.pool_heads // own.page_size * own.page_bytes
    least = max(own.pages, pages or 0)
    self.budget = budget
    self.limit = None if budget is None else max((budget - own.fixed_bytes) // own.page_bytes, 0)
    if self.limit is not None and self.limit < least:
      each = " on each device" if isinstance(self.cache, ShardedCache) else ""
      raise BudgetError(
        f"budget={budget} bytes: {self.pool_rows} rows and {least} pages (one a head, or pages=) take "
        f"{own.fixed_bytes + least * own.page_bytes}{each}; give a larger budget or a smaller width"
      )
    self.cache = cache.with_pages(max(pages or self.limit or 0, own.pages))

  @property
  def own(self) -> PagedCache:
    """The cache of one device; on a mesh as shapes."""
    return caches.of_device(self.cache)

  @property
  def pools(self) -> int:
    """Pools that rows are split over: a row's pages come from one, or from one on each device of its heads."""
    return self.cache.split.row_parts if isinstance(self.cache, ShardedCache) else 1

  @property
  def pool_rows(self) -> int:
    """Rows of each pool: pool p has rows p * pool_rows .. ."""
    return len(self.cache.seen) // self.pools

  @property
  def pool_heads(self) -> int:
    """Archives of a row in its pool."""
    layers, _, heads = self.own.archived.shape
    return layers * heads

  @property
  def heads(self) -> int:
    """KV heads of all layers, which is the number of archives of a row."""
    return self.pool_heads * (self.cache.split.head_parts if isinstance(self.cache, ShardedCache) else 1)

  def pages_of(self, stored: HostRow) -> int:
    """Pages that a host copy takes of its pool."""
    tensor = self.heads // self.pool_heads
    used = -(-stored.archived // self.own.page_size)
    return int(used.reshape(used.shape[0], tensor, -1).sum(axis=(0, 2)).max())

  @property
  def extent(self) -> str:
    """The budget in words."""
    own = self.own
    return f"budget={self.budget} bytes ({own.pages} pages of {own.page_size} slots for {self.pool_heads} heads)"

  def settle(self, over: Bool[Array, "B"]) -> tuple[Float[Array, "*n"], Int[Array, "*n"], Int[Array, "*n"]]:
    """Empties the rows `over`; waits for nothing. Returns what `settled` takes, on the devices."""
    self.cache, found = _settled(self.cache, over)
    return found

  def settled(self, tokens, pages, free) -> tuple[float, int, Int[np.ndarray, "pools"]]:
    """What `settle` has found, from its arrays on the host.

    Returns:
      (tokens held before by all rows, mean over layers and heads; pages in use before, each shared page counted once;
      pages of each pool free afterwards).
    """
    by_pool = lambda x: np.reshape(x, (self.pools, -1))
    return float(by_pool(tokens).mean(axis=1).sum()), int(by_pool(pages).sum()), self.free_of(free)

  def by_row(self, x: Shaped[np.ndarray, "n"]) -> Shaped[np.ndarray, "B"]:
    """Numbers of rows, of all devices one after another, on which those of one row agree."""
    return x.reshape(self.pools, -1, self.pool_rows)[:, 0].reshape(-1)

  def free_pages(self) -> Int[np.ndarray, "pools"]:
    """Pages of each pool that no row owns."""
    count = (self.cache.shards if isinstance(self.cache, ShardedCache) else self.cache).table.pool.count
    return self.free_of(fetch(count))

  def free_of(self, counts: Int[np.ndarray, "*n"]) -> Int[np.ndarray, "pools"]:
    """Free pages of each pool, from those of each device."""
    return np.reshape(counts, (self.pools, -1)).min(axis=1)

  @property
  def grows(self) -> bool:
    """Whether the budget leaves room for a larger pool."""
    return self.limit is None or self.limit > self.own.pages

  def grow(self, lacking: int) -> bool:
    """Adds `lacking` pages or more to each pool, or as many as the budget still allows; false if it allows none.

    Where the old and the new pool together exceed the budget, the pages pass through host memory.
    """
    if not self.grows:
      return False
    before = self.own.pages
    pages = max(before + lacking, int(before * GROWTH))
    if self.limit is not None:
      pages = min(pages, self.limit)
    if self.limit is None or before + pages <= self.limit:
      self.cache = self.cache.with_pages(pages)
      return True
    sharded, pool = isinstance(self.cache, ShardedCache), _grown_pool(self.cache, pages=pages)
    arrays = self.cache.shards if sharded else self.cache
    store = jax.tree.map(lambda x: _regrown(x, pages), arrays.store)
    arrays = arrays.replace(store=store, table=arrays.table.replace(pool=pool))
    self.cache = self.cache.replace(shards=arrays) if sharded else arrays
    return True

  def reserve(self, slots: int, extra: int = 0) -> None:
    """Enlarges the pool, within the budget, to pages for `slots` slots of every head, and `extra` more in one row.

    A pool that is large enough from the start is not copied, and no program is compiled for its larger shape.
    """
    own = self.own
    wanted = self.pool_rows * own.row_pages(slots + own.ring) + own.row_pages(extra + own.ring)
    if self.limit is not None:
      wanted = min(wanted, self.limit)
    if wanted > own.pages:
      self.cache = self.cache.with_pages(wanted)

  def fork(self, row: int, others: list[int], whole: bool) -> bool:
    """Forks `row` into the empty rows `others`; false if pages ran out.

    `whole`: copy all pages, for a policy that writes into old pages.
    """
    mask = np.isin(np.arange(len(self.cache.seen)), others)
    while others:
      self.cache, enough = cache_rows.fork_row(self.cache, jnp.int32(row % self.pool_rows), mask, whole=whole)
      if np.all(fetch(enough)):
        break
      pages = self._owned(row) if whole or self.own.sliding is not None else self.pool_heads
      if not self.grow(len(others) * pages):
        return False
    return True

  def fork_all(self, sources: Int[np.ndarray, "B"], rows: Bool[np.ndarray, "B"], whole: bool) -> None:
    """Forks row `sources[b]` into each empty row b of `rows` of its pool that has pages for it; waits for nothing."""
    self.cache, _ = cache_rows.fork_row(self.cache, sources % self.pool_rows, rows, whole=whole)

  def _owned(self, row: int) -> int:
    """Pages of a row in its pool."""
    if not isinstance(self.cache, ShardedCache):
      return int(np.asarray(self.cache.table.owned[:, row]).sum())
    owned = self.cache.by_device(self.cache.shards.table.owned)[row // self.pool_rows]
    return int(owned[:, :, row % self.pool_rows].sum(axis=(1, 2)).max())

  def free(self, rows: list[int]) -> None:
    """Empties rows and frees each page that no other row shares."""
    self.cache = cache_rows.free_rows(self.cache, np.isin(np.arange(len(self.cache.seen)), rows))

  def offload(self, row: int) -> HostRow:
    """A copy of a row in host memory."""
    return offload_row(self.cache, row)

  def restore(self, row: int, stored: HostRow) -> bool:
    """Puts a host copy into an empty row; false if pages ran out."""
    while True:
      self.cache, enough = restore_row(self.cache, row, stored)
      if enough or not self.grow(self.pages_of(stored)):
        return enough
