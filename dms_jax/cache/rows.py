"""Rows of a PagedCache coming and going: some rows alone, rows that share a prompt, rows released."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from dms_jax.cache import pool as pools
from dms_jax.cache.paged import PagedCache, Table
from dms_jax.cache.ring import RingCache
from dms_jax.cache.sharded import on_each
from dms_jax.collectives import on_all

BY_ROW = ("kv", "evicted", "archived", "stats", "summaries", "memory")  # fields whose arrays are [L, B, ...]
TOGETHER = 32  # rows that a fork copies at once where each copies one page a head: their copies take little memory


def row_fields(cache: RingCache, take: Callable, archive: int) -> dict:
  """The fields BY_ROW with `take` applied to each array; statistics and summaries keep `archive` archive slots."""
  fields = {name: jax.tree.map(take, getattr(cache, name)) for name in BY_ROW}
  fields["stats"] = {name: stat[..., : cache.ring + archive] for name, stat in fields["stats"].items()}
  if fields["summaries"] is not None:
    fields["summaries"] = fields["summaries"][..., : -(-archive // cache.page), :]
  return fields


def take_rows(cache: PagedCache, rows: Int[Array, "R"], places: int) -> PagedCache:
  """The rows `rows` as a cache of R rows on the same pool, whose heads have at most `places` pages.

  A number past the last row gives an empty row.
  """
  take = lambda x: jnp.take(x, rows, axis=1, mode="fill", fill_value=0)
  fields = row_fields(cache, take, places * cache.page_size)
  table = cache.table.replace(pages=take(cache.table.pages)[..., :places], owned=take(cache.table.owned))
  return cache.replace(**fields, seen=jnp.take(cache.seen, rows, mode="fill", fill_value=0), table=table)


def put_rows(cache: PagedCache, rows: Int[Array, "R"], part: PagedCache) -> PagedCache:
  """`cache` with the rows `rows` and the pool of `part`, the later state of `take_rows(cache, rows, ...)`."""

  def put(x, new):
    return x.at[(slice(None), rows, *(slice(size) for size in new.shape[2:]))].set(new, mode="drop")

  fields = {name: jax.tree.map(put, getattr(cache, name), getattr(part, name)) for name in BY_ROW}
  table = Table(put(cache.table.pages, part.table.pages), put(cache.table.owned, part.table.owned), part.table.pool)
  return cache.replace(**fields, seen=cache.seen.at[rows].set(part.seen, mode="drop"), table=table, store=part.store)


@partial(jax.jit, donate_argnames="cache")
@on_each
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
@on_each
def fork_row(
  cache: PagedCache, source: Int[Array, "*B"], rows: Bool[Array, "B"], whole: bool = False
) -> tuple[PagedCache, Bool[Array, ""]]:
  """Copies rows to the empty rows marked in `rows`: full pages are shared, ring and last page copied.

  Args:
    cache: donated.
    source: the row that is copied, or that of each marked row [B]; on a mesh by its place among a device's rows.
    whole: copy all pages, for a policy that `rewrites` old ones; sliding layers, which do so too, always copy theirs.

  Returns:
    (cache, whether the pool had enough free pages, bool []). Without enough the cache is unchanged.
  """
  table, size, none = cache.table, cache.page_size, cache.pages
  source = jnp.broadcast_to(source, rows.shape)
  place = jnp.arange(table.pages.shape[3])
  pages, owned, archived = (x[:, source] for x in (table.pages, table.owned, cache.archived))
  used = -(-archived // size)
  full = jnp.zeros_like(archived) if whole else archived // size
  if cache.sliding is not None:
    full = jnp.where(cache.sliding.heads, 0, full)
  copied = (place >= full[..., None]) & (place < used[..., None])  # [L, B, K, M]
  wanted = rows[:, None, None] & copied
  enough = on_all(jnp.sum(wanted) <= table.pool.count)
  rows = rows & enough
  pool, new = pools.take(table.pool, wanted & enough)
  shared = rows[:, None, None] & (place < full[..., None])
  pool = pools.share(pool, jnp.where(shared, pages, none))
  old, to = jnp.clip(pages, 0, none - 1), jnp.where(wanted & enough, new, none)
  width = 1
  if not whole:  # the last page alone, or all of a sliding layer
    copy = jnp.minimum(full, place.size - 1)[..., None]
    if cache.sliding is not None:
      width = min(max(-(-cache.sliding.span // size), 1), place.size)
      copy = jnp.where(cache.sliding.heads[..., None], jnp.arange(width), copy)
    old, to = jnp.take_along_axis(old, copy, axis=-1), jnp.take_along_axis(to, copy, axis=-1)
  marked = jnp.argsort(~rows, stable=True)  # the marked rows come first
  count, together = jnp.sum(rows), 1 if whole else min(max(TOGETHER // width, 1), rows.size)

  def copied_rows(index, state):
    """The fields and the store with the copies of some rows. All at once might take the memory of a second pool."""
    fields, store = state
    place = index * together + jnp.arange(together)
    row = jnp.take(marked, place, mode="clip")
    target = jnp.where(place < count, row, rows.size)
    fields = jax.tree.map(lambda x: x.at[:, target].set(x[:, source[row]], mode="drop"), fields)
    page = jnp.where((place < count)[:, None, None], to[:, row], none)
    return fields, jax.tree.map(lambda x: x.at[page].set(x[old[:, row]], mode="drop"), store)

  fields = {name: getattr(cache, name) for name in BY_ROW}
  fields, store = jax.lax.fori_loop(0, -(-count // together), copied_rows, (fields, cache.store))
  table = Table(
    jnp.where(shared, pages, jnp.where(wanted & enough, new, table.pages)),
    jnp.where(rows[:, None], jnp.minimum(owned, used), table.owned),
    pool,
  )
  return cache.replace(**fields, seen=jnp.where(rows, cache.seen[source], cache.seen), table=table, store=store), enough
