"""Rows of a PagedCache coming and going: one row alone, rows that share a prompt, rows released, stored and back again.

A *stored row* is what one row holds, apart from any pool: a conversation on disk, or one that waits on the host while
others need its pages. It goes back into a cache of any size, bit by bit as it was.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Array, Bool, Int

from dms_jax.cache import pool as pools
from dms_jax.cache.paged import PagedCache, Store, Table


@struct.dataclass
class StoredRow:
  """One row, numpy. `kv` [L, K, W+1, 2H], `evicted` [L, K, W+1], `archived` [L, K], `seen` [].

  `pages` [n, page, 2H] and `scales` [n, page, 2] or None: the archives' pages, of layer 0 head 0 first. `scores` [L, K,
  S] and `summaries` [L, K, M, 2H], where the policy has them, for as many slots and pages as are used.
  """

  kv: np.ndarray
  evicted: np.ndarray
  archived: np.ndarray
  seen: np.ndarray
  pages: np.ndarray
  scales: np.ndarray | None
  scores: np.ndarray | None
  summaries: np.ndarray | None
  shift: int = struct.field(pytree_node=False)

  @property
  def nbytes(self) -> int:
    """Bytes on the host."""
    return sum(leaf.nbytes for leaf in jax.tree.leaves(self))


BY_ROW = ("kv", "evicted", "archived", "scores", "summaries")  # fields of [L, B, ...]


def _fields(cache: PagedCache, take: Callable, places: int) -> dict:
  """`take` of the fields BY_ROW, those with an axis of slots or pages for `places` pages of archive alone."""
  fields = {name: None if getattr(cache, name) is None else take(getattr(cache, name)) for name in BY_ROW}
  if fields["scores"] is not None:
    fields["scores"] = fields["scores"][..., : cache.ring + places * cache.page_size]
  if fields["summaries"] is not None:
    fields["summaries"] = fields["summaries"][..., :places, :]
  return fields


def alone(cache: PagedCache, row: Int[Array, ""], places: int) -> PagedCache:
  """A cache of one row, which works on the same pool; its heads have `places` pages at most."""
  take = lambda x: jax.lax.dynamic_slice_in_dim(x, row, 1, axis=1)
  fields = _fields(cache, take, places)
  table = cache.table.replace(pages=take(cache.table.pages)[..., :places], owned=take(cache.table.owned))
  return cache.replace(**fields, seen=jax.lax.dynamic_slice_in_dim(cache.seen, row, 1), table=table)


def put_back(cache: PagedCache, row: Int[Array, ""], one: PagedCache) -> PagedCache:
  """`cache` with what became of `one = alone(cache, row, ...)`."""
  put = lambda x, part: None if x is None else jax.lax.dynamic_update_slice(x, part, (0, row) + (0,) * (x.ndim - 2))
  fields = {name: put(getattr(cache, name), getattr(one, name)) for name in BY_ROW}
  table = Table(put(cache.table.pages, one.table.pages), put(cache.table.owned, one.table.owned), one.table.pool)
  seen = jax.lax.dynamic_update_slice_in_dim(cache.seen, one.seen, row, axis=0)
  return cache.replace(**fields, seen=seen, table=table, store=one.store)


@partial(jax.jit, donate_argnames="cache")
def released(cache: PagedCache, rows: Bool[Array, "B"]) -> PagedCache:
  """These rows empty again; pages that no other row shares are free."""
  table, none = cache.table, cache.pages
  mine = rows[:, None, None] & (jnp.arange(table.pages.shape[3]) < table.owned[..., None])
  pool = pools.give_back(table.pool, jnp.where(mine, table.pages, none))
  keep = ~rows[:, None]
  return cache.replace(
    archived=jnp.where(keep, cache.archived, 0), evicted=cache.evicted & keep[..., None],
    seen=jnp.where(rows, 0, cache.seen), table=table.replace(owned=jnp.where(keep, table.owned, 0), pool=pool),
  )  # fmt: skip


@partial(jax.jit, static_argnames="whole", donate_argnames="cache")
def forked(
  cache: PagedCache, source: Int[Array, ""], rows: Bool[Array, "B"], whole: bool = False
) -> tuple[PagedCache, Bool[Array, ""]]:
  """`rows`, empty before, continue the text of row `source`: full pages are shared, the ring and the last page copied.

  Args:
    whole: copy all pages, for a policy that writes into old ones.

  Returns:
    The cache, and whether there were pages enough; if not, the cache is as it was.
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
    """Its copies of pages; one row at a time, as those of all of them together might be a second pool."""
    to = jax.lax.dynamic_index_in_dim(at, b, 1, keepdims=False)
    return jax.tree.map(lambda x: x.at[to].set(x[jnp.clip(pages[:, 0], 0, none - 1)], mode="drop"), store)

  store = jax.lax.fori_loop(0, rows.shape[0], copied_row, cache.store)
  to = lambda x: None if x is None else jnp.where(rows.reshape(-1, *(1,) * (x.ndim - 2)), of_source(x), x)
  table = Table(jnp.where(shared, pages, jnp.where(wanted & enough, new, table.pages)), to(table.owned), pool)
  table = table.replace(owned=jnp.where(rows[:, None], jnp.minimum(owned, used), table.owned))
  fields = {name: to(getattr(cache, name)) for name in BY_ROW}
  return cache.replace(**fields, seen=jnp.where(rows, cache.seen[source], cache.seen), table=table, store=store), enough


def store_row(cache: PagedCache, row: int) -> StoredRow:
  """What a row holds, on the host; the cache keeps it too."""
  get = lambda x: np.asarray(jax.device_get(x[:, row]))
  used = -(-get(cache.archived) // cache.page_size)
  most = max(int(used.max()), 1)
  mine = np.arange(most) < used[..., None]
  numbers = get(cache.table.pages)[..., :most][mine]
  padded = np.zeros(_power_of_two(len(numbers)), np.int32)  # few shapes, so few compilations
  padded[: len(numbers)] = numbers
  pages, scales = (
    None if x is None else np.asarray(x[padded])[: len(numbers)] for x in (cache.store.pages, cache.store.scales)
  )
  return StoredRow(
    **_fields(cache, get, most), seen=np.asarray(cache.seen[row]), pages=pages, scales=scales, shift=cache.shift
  )


def restored(cache: PagedCache, row: int, stored: StoredRow) -> tuple[PagedCache, bool]:
  """`stored` in an empty row of `cache`; False where the pool has too few free pages, and the cache is as it was.

  Raises:
    ValueError: a row of another model, window, page size or archive; or too long for the table.
  """
  size = stored.pages.shape[1]
  for name, theirs, ours in (
    ("layers, KV heads", stored.archived.shape, cache.archived[:, 0].shape),
    ("2H", stored.kv.shape[3], cache.kv.shape[4]), ("window", stored.kv.shape[2] - 1, cache.window),
    ("page", size, cache.page_size), ("shift", stored.shift, cache.shift),
    ("dtype", stored.kv.dtype, cache.kv.dtype), ("archive", stored.pages.dtype, cache.store.pages.dtype),
    ("scores", stored.scores is not None, cache.scores is not None),
    ("summaries", stored.summaries is not None, cache.summaries is not None),
  ):  # fmt: skip
    if theirs != ours:
      raise ValueError(f"a stored row with {name} {theirs} does not fit a cache with {ours}")
  used = -(-stored.archived // size)
  places = cache.table.pages.shape[3]
  if used.max(initial=0) > places:
    raise ValueError(f"a stored row of {used.max() * size} archive slots does not fit a table of {places * size}")
  if int(cache.table.pool.count) < used.sum():
    return cache, False
  # Pages come in the order of heads, as `store_row` left them; padded, so that few shapes are compiled.
  extra = _power_of_two(len(stored.pages)) - len(stored.pages)
  pad = lambda x: None if x is None else np.concatenate([x, np.zeros((extra, *x.shape[1:]), x.dtype)])
  fields = {name: getattr(stored, name) for name in BY_ROW}
  for name, axis, full in (("scores", 2, cache.slots), ("summaries", 2, places)):
    x = fields[name]
    if x is not None:
      widths = [(0, 0)] * x.ndim
      widths[axis] = (0, max(full - x.shape[axis], 0))
      fields[name] = np.pad(x, widths)[:, :, :full]
  return _restored(
    cache, jnp.int32(row), fields, stored.seen, used.astype(np.int32), pad(stored.pages), pad(stored.scales)
  ), True


@partial(jax.jit, donate_argnames="cache")
def _restored(cache, row, fields, seen, used, pages, scales):
  table, place = cache.table, jnp.arange(cache.table.pages.shape[3])
  mine = place < used[..., None]
  pool, numbers = pools.take(table.pool, mine)
  rank = jnp.cumsum(mine.ravel()).reshape(mine.shape) - 1
  target = jnp.full(pages.shape[0], cache.pages).at[jnp.where(mine, rank, pages.shape[0])].set(numbers, mode="drop")
  put = lambda x, new: None if x is None else x.at[target].set(new, mode="drop")
  store = Store(put(cache.store.pages, pages), put(cache.store.scales, scales))
  at = lambda x, new: None if x is None else x.at[:, row].set(new)
  table = Table(at(table.pages, numbers), at(table.owned, used), pool)
  fields = {name: at(getattr(cache, name), new) for name, new in fields.items()}
  return cache.replace(**fields, seen=cache.seen.at[row].set(seen), table=table, store=store)


def _power_of_two(n: int) -> int:
  return 1 << max(n - 1, 0).bit_length()
