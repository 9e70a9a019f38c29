"""Rows of a PagedCache coming and going: one row alone, rows that share a prompt, rows released."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from dms_jax.cache import pool as pools
from dms_jax.cache.paged import PagedCache, Table
from dms_jax.cache.ring import RingCache

BY_ROW = ("kv", "evicted", "archived", "stats", "summaries", "memory")  # fields whose arrays are [L, B, ...]


def row_fields(cache: RingCache, take: Callable, archive: int) -> dict:
  """The fields BY_ROW with `take` applied to each array; statistics and summaries keep `archive` archive slots."""
  fields = {name: jax.tree.map(take, getattr(cache, name)) for name in BY_ROW}
  fields["stats"] = {name: stat[..., : cache.ring + archive] for name, stat in fields["stats"].items()}
  if fields["summaries"] is not None:
    fields["summaries"] = fields["summaries"][..., : -(-archive // cache.page), :]
  return fields


def take_row(cache: PagedCache, row: Int[Array, ""], places: int) -> PagedCache:
  """Row `row` as a cache with B = 1 on the same pool; its heads have at most `places` pages."""
  take = lambda x: jax.lax.dynamic_slice_in_dim(x, row, 1, axis=1)
  fields = row_fields(cache, take, places * cache.page_size)
  table = cache.table.replace(pages=take(cache.table.pages)[..., :places], owned=take(cache.table.owned))
  return cache.replace(**fields, seen=jax.lax.dynamic_slice_in_dim(cache.seen, row, 1), table=table)


def put_row(cache: PagedCache, row: Int[Array, ""], one: PagedCache) -> PagedCache:
  """`cache` with row `row` and the pool taken from `one`, the later state of `take_row(cache, row, ...)`."""
  put = lambda x, part: jax.lax.dynamic_update_slice(x, part, (0, row) + (0,) * (x.ndim - 2))
  fields = {name: jax.tree.map(put, getattr(cache, name), getattr(one, name)) for name in BY_ROW}
  table = Table(put(cache.table.pages, one.table.pages), put(cache.table.owned, one.table.owned), one.table.pool)
  seen = jax.lax.dynamic_update_slice_in_dim(cache.seen, one.seen, row, axis=0)
  return cache.replace(**fields, seen=seen, table=table, store=one.store)


@partial(jax.jit, donate_argnames="cache")
def free_rows(cache: PagedCache, rows: Bool[Array, "B"]) -> PagedCache:
  """`cache`, donated, with the rows marked in `rows` emptied; pages that no other row shares become free."""
  table, none = cache.table, cache.pages
  mine = rows[:, None, None] & (jnp.arange(table.pages.shape[3]) < table.owned[..., None])
  pool = pools.give_back(table.pool, jnp.where(mine, table.pages, none))
  keep = ~rows[:, None]
  return cache.replace(
    archived=jnp.where(keep, cache.archived, 0),
    evicted=cache.evicted & keep[..., None],
    seen=jnp.where(rows, 0, cache.seen),
    table=table.replace(owned=jnp.where(keep, table.owned, 0), pool=pool),
  )


@partial(jax.jit, static_argnames="whole", donate_argnames="cache")
def fork_row(
  cache: PagedCache, source: Int[Array, ""], rows: Bool[Array, "B"], whole: bool = False
) -> tuple[PagedCache, Bool[Array, ""]]:
  """Copies row `source` to the empty rows marked in `rows`: full pages are shared, ring and last page copied.

  Args:
    cache: donated.
    whole: copy all pages, for a policy that `rewrites` old ones.

  Returns:
    (cache, whether the pool had enough free pages, bool []). Without enough the cache is unchanged.
  """
  table, size, none = cache.table, cache.page_size, cache.pages
  place = jnp.arange(table.pages.shape[3])
  of_source = lambda x: jax.lax.dynamic_slice_in_dim(x, source, 1, axis=1)
  pages, owned, archived = of_source(table.pages), of_source(table.owned), of_source(cache.archived)
  used = -(-archived // size)
  full = jnp.zeros_like(archived) if whole else archived // size
  copied = (place >= full[..., None]) & (place < used[..., None])  # [L, 1, K, M]
  wanted = rows[:, None, None] & copied
  enough = jnp.sum(wanted) <= table.pool.count
  rows = rows & enough
  pool, new = pools.take(table.pool, wanted & enough)
  shared = rows[:, None, None] & (place < full[..., None])
  pool = pools.share(pool, jnp.where(shared, pages, none))
  at = jnp.where(rows[:, None, None] & copied, new, none)

  def copied_row(b, store):
    """`store` with the page copies of row `b`. Copying all rows at once might take the memory of a second pool."""
    to = jax.lax.dynamic_index_in_dim(at, b, 1, keepdims=False)
    return jax.tree.map(lambda x: x.at[to].set(x[jnp.clip(pages[:, 0], 0, none - 1)], mode="drop"), store)

  store = jax.lax.fori_loop(0, rows.shape[0], copied_row, cache.store)
  to = lambda x: jnp.where(rows.reshape(-1, *(1,) * (x.ndim - 2)), of_source(x), x)
  table = Table(jnp.where(shared, pages, jnp.where(wanted & enough, new, table.pages)), to(table.owned), pool)
  table = table.replace(owned=jnp.where(rows[:, None], jnp.minimum(owned, used), table.owned))
  fields = {name: jax.tree.map(to, getattr(cache, name)) for name in BY_ROW}
  return cache.replace(**fields, seen=jnp.where(rows, cache.seen[source], cache.seen), table=table, store=store), enough
