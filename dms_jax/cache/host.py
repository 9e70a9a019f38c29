"""Host copies of rows: the content of one row of a cache, as numpy arrays.

Conversations on disk and preempted rows are host copies. A host copy is restored bit for bit into any cache with free
slots: one of another size, at another row, with pages of another size, from contiguous slots into pages and back.
Masked caches are the exception: they keep evicted tokens, so they exchange rows with masked caches alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax.sharding import PartitionSpec as P
from jaxtyping import Bool, Shaped

from dms_jax.cache import pool as pools
from dms_jax.cache.base import Cache
from dms_jax.cache.contiguous import ContiguousCache
from dms_jax.cache.masked import MaskedCache
from dms_jax.cache.paged import PagedCache, Store, Table
from dms_jax.cache.rows import BY_ROW, row_fields
from dms_jax.cache.sharded import ShardedCache, each


@struct.dataclass
class HostRow:
  """One row, numpy.

  Attributes:
    kv: [L, K, W+1, 2H], the ring in the cache's storage dtype; of a masked cache all tokens seen.
    evicted: bool [L, K, W+1], decisions about the tokens in `kv`; of a masked cache about all tokens seen.
    archived: int32 [L, K], tokens in each archive; 0 for a masked cache.
    seen: int32 [], tokens of the text.
    pages: [n, page, cells], pages of all archives, layer by layer and head by head, in the pool's format.
    scales: float32 [n, page, 2], for key and value in a quantised format, else None.
    stats: float32 [L, K, S] each, the policy's statistics of the slots in use.
    memory: float32 [L, K, own axes] each, the policy's memory.
    summaries: [L, K, M, 2H], summaries of the pages in use, for a policy that selects pages, else None.
    window, lag: those of the cache.
    page: slots of a page of a policy that selects pages, else 0.
    masked: whether the row comes from a masked cache.
  """

  kv: np.ndarray
  evicted: np.ndarray
  archived: np.ndarray
  seen: np.ndarray
  pages: np.ndarray
  scales: np.ndarray | None
  stats: dict[str, np.ndarray]
  summaries: np.ndarray | None
  memory: dict[str, np.ndarray]
  window: int = struct.field(pytree_node=False)
  lag: int = struct.field(pytree_node=False)
  page: int = struct.field(pytree_node=False)
  masked: bool = struct.field(pytree_node=False)

  @property
  def nbytes(self) -> int:
    """Bytes on the host."""
    return sum(leaf.nbytes for leaf in jax.tree.leaves(self))

  @property
  def page_size(self) -> int:
    """Slots of each of `pages`."""
    return self.pages.shape[1]

  def repaged(self, size: int) -> HostRow:
    """The same row in pages of `size` slots; with 1, `pages` holds the live slots and no others."""
    if size == self.page_size:
      return self
    counts = self.archived.ravel()
    before, after = live_slots(counts, self.page_size), live_slots(counts, size)

    def moved(x):
      slots = np.zeros((after.size, x.shape[-1]), x.dtype)
      slots[after] = x.reshape(-1, x.shape[-1])[before]
      return slots.reshape(-1, size, x.shape[-1])

    return self.replace(pages=moved(self.pages), scales=None if self.scales is None else moved(self.scales))

  def of_heads(self, heads: slice) -> HostRow:
    """The same row of some KV heads of each layer."""
    mine = np.zeros(self.archived.shape, bool)
    mine[:, heads] = True
    pages = np.repeat(mine.ravel(), -(-self.archived.ravel() // self.page_size))
    fields = {name: jax.tree.map(lambda x: x[:, heads], getattr(self, name)) for name in BY_ROW}
    scales = None if self.scales is None else self.scales[pages]
    return self.replace(**fields, pages=self.pages[pages], scales=scales)


def live_slots(counts: Shaped[np.ndarray, "heads"], page: int) -> Bool[np.ndarray, "slots"]:
  """Which slots are in use when the pages of all heads lie one after another.

  Args:
    counts: tokens of each head.
    page: slots of a page.
  """
  slots = -(-counts // page) * page
  place = np.arange(slots.sum()) - np.repeat(np.cumsum(slots) - slots, slots)
  return place < np.repeat(counts, slots)


def offload_row(cache: Cache | ShardedCache, row: int) -> HostRow:
  """A host copy of row `row`; the cache is unchanged."""
  if isinstance(cache, ShardedCache):
    return _offload_sharded(cache, row)
  get = lambda x: np.asarray(jax.device_get(x[:, row]))
  same = dict(seen=np.asarray(cache.seen[row]), window=cache.window, lag=cache.lag)
  if isinstance(cache, MaskedCache):
    length = int(cache.seen[row])
    held = lambda x: None if x is None else np.asarray(jax.device_get(x[:, row, :, :length]))
    kv = held(cache.kv)
    stats = jax.tree.map(held, cache.stats)
    return HostRow(
      kv=kv, evicted=held(cache.evicted), archived=np.zeros(kv.shape[:2], np.int32), stats=stats,
      memory=jax.tree.map(get, cache.memory),
      pages=np.zeros((0, 1, kv.shape[-1]), kv.dtype), scales=None, summaries=None, page=0, masked=True, **same,
    )  # fmt: skip
  archived = get(cache.archived)
  size = cache.page_size if isinstance(cache, PagedCache) else 1
  used = -(-archived // size)
  most = min(max(int(used.max()), 1), (cache.slots - cache.ring) // size)
  mine = np.arange(most) < used[..., None]
  fields = row_fields(cache, get, most * size)
  if isinstance(cache, PagedCache):
    numbers = get(cache.table.pages)[..., :most][mine]
    padded = np.zeros(_power_of_two(len(numbers)), np.int32)  # few shapes, so few compilations
    padded[: len(numbers)] = numbers
    pages, scales = (
      None if x is None else np.asarray(x[padded])[: len(numbers)] for x in (cache.store.pages, cache.store.scales)
    )
    scales = None if scales is None else scales.reshape(-1, size, 2)
  else:
    pages, scales = fields["kv"][:, :, cache.ring :][:, :, :most][mine][:, None], None
  fields["kv"] = fields["kv"][:, :, : cache.ring]
  return HostRow(**fields, pages=pages, scales=scales, page=cache.page, masked=False, **same)


def _offload_sharded(cache: ShardedCache, row: int) -> HostRow:
  """`offload_row` of a cache on a mesh: its heads from the devices that hold them."""
  own, (device, place) = cache.own, divmod(row, cache.rows)
  same = dict(seen=np.asarray(cache.seen[row]), window=own.window, lag=own.lag)
  masked, size = isinstance(own, MaskedCache), own.page_size if isinstance(own, PagedCache) else 1
  archived = None if masked else cache.whole(cache.shards.archived)[:, row]
  most = max(int(same["seen"]) if masked else int((-(-archived // size)).max()), 1)
  places = min(_power_of_two(most), own.slots if masked else (own.slots - own.ring) // size)  # few shapes
  most = min(most, places)
  taken = cache.on_devices(_taken(cache, np.int32(place), places=places), device)
  fields = jax.tree.map(lambda *heads: np.concatenate(heads, axis=1), *taken)
  if masked:
    cut = lambda x: x[:, :, : int(same["seen"])]
    kv, width = cut(fields["kv"]), fields["kv"].shape[-1]
    return HostRow(
      kv=kv, evicted=cut(fields["evicted"]), archived=np.zeros(kv.shape[:2], np.int32), memory=fields["memory"],
      stats=jax.tree.map(cut, fields["stats"]), pages=np.zeros((0, 1, width), kv.dtype), scales=None, summaries=None,
      page=0, masked=True, **same,
    )  # fmt: skip
  mine = np.arange(places) < -(-archived // size)[..., None]
  pages, scales = fields.pop("pages")[mine], fields.pop("scales")
  fields["stats"] = {name: x[..., : own.ring + most * size] for name, x in fields["stats"].items()}
  if fields["summaries"] is not None:
    fields["summaries"] = fields["summaries"][..., : -(-most * size // own.page), :]
  scales = None if scales is None else scales[mine].reshape(-1, size, 2)
  return HostRow(**fields, pages=pages, scales=scales, page=own.page, masked=False, **same)


@partial(jax.jit, static_argnames="places")
def _taken(cache: ShardedCache, row, *, places: int) -> dict:
  """The arrays of a device's row `row`, with `places` pages or slots of each head."""

  def take(own, row):
    get = lambda x: x[:, row]
    if isinstance(own, MaskedCache):
      fields = {name: jax.tree.map(get, getattr(own, name)) for name in ("kv", "evicted", "stats", "memory")}
      return {n: x if n == "memory" else jax.tree.map(lambda x: x[:, :, :places], x) for n, x in fields.items()}
    paged = isinstance(own, PagedCache)
    fields = row_fields(own, get, places * (own.page_size if paged else 1))
    if paged:
      numbers = jnp.clip(get(own.table.pages)[..., :places], 0, own.pages - 1)
      pages, scales = (None if x is None else x[numbers] for x in (own.store.pages, own.store.scales))
    else:
      pages, scales = fields["kv"][:, :, own.ring :][:, :, :places, None], None
    return {**fields, "kv": fields["kv"][:, :, : own.ring], "pages": pages, "scales": scales}

  return each(cache, take, row)


def check_fits(cache: Cache | ShardedCache, stored: HostRow) -> None:
  """Checks that a stored row fits `cache` in everything but its size.

  Raises:
    ValueError: the row is of another model, window, policy or kind of cache.
  """
  cache, parts = (cache.own, cache.split.head_parts) if isinstance(cache, ShardedCache) else (cache, 1)
  heads = cache.kv.shape[0], cache.kv.shape[2] * parts
  cells = cache.store.pages.dtype if isinstance(cache, PagedCache) else cache.kv.dtype
  masked = isinstance(cache, MaskedCache)
  for name, theirs, ours in (
    ("layers, KV heads", stored.kv.shape[:2], heads), ("2H", stored.kv.shape[3], cache.kv.shape[4]),
    ("window", stored.window, cache.window), ("lag", stored.lag, cache.lag),
    ("dtype", stored.kv.dtype, cache.kv.dtype), ("archive", stored.pages.dtype, cells),
    ("masked", stored.masked, masked), ("page of the policy", stored.page, 0 if masked else cache.page),
    ("tokens of sliding layers", *_sliding_tokens(cache, stored)),
    ("statistics", sorted(stored.stats), sorted(cache.stats)), ("memory", sorted(stored.memory), sorted(cache.memory)),
  ):  # fmt: skip
    if theirs != ours:
      raise ValueError(f"a stored row with {name} {theirs} does not fit a cache with {ours}")


def _sliding_tokens(cache: Cache, stored: HostRow) -> tuple[list[int], list[int]]:
  """(numbers of tokens in the archives of layers that slide, those that there must be)."""
  if cache.sliding is None or stored.masked:
    return [], []
  found = np.unique(stored.archived[cache.sliding.heads[:, 0, 0]])
  return found.tolist(), [min(max(int(stored.seen) - cache.ring, 0), cache.sliding.span)]


def device_pages(cache: PagedCache | ShardedCache, rows: Sequence[HostRow]) -> int:
  """Pages that these rows, in order, take of a device's pool; the most of all devices."""
  own, parts = (cache.own, cache.split.parts) if isinstance(cache, ShardedCache) else (cache, (1, 1))
  used = np.stack([-(-row.archived // own.page_size) for row in rows])
  return int(used.reshape(parts[0], -1, used.shape[1], parts[1], used.shape[2] // parts[1]).sum(axis=(1, 2, 4)).max())


def restore_row(cache: Cache | ShardedCache, row: int, stored: HostRow) -> tuple[Cache | ShardedCache, bool]:
  """Writes a host copy into row `row`, which must be empty.

  Args:
    cache: donated if the row is written.

  Returns:
    (cache, whether the row was written). A pool with too few free pages leaves the cache unchanged.

  Raises:
    ValueError: the row is of another model, window, archive format or policy, or too long for a head of the cache.
  """
  check_fits(cache, stored)
  if not isinstance(cache, ShardedCache):
    whole = _prepared(cache, stored)
    if isinstance(cache, PagedCache) and int(cache.table.pool.count) < whole.used.sum():
      return cache, False
    return _restored(cache, jnp.int32(row), whole), True
  own, (device, place) = cache.own, divmod(row, cache.rows)
  heads = np.arange(stored.kv.shape[1]).reshape(cache.split.head_parts, -1)
  parts = [stored.of_heads(slice(part[0], part[-1] + 1)) for part in heads]
  prepared = [_prepared(own, part) for part in parts]
  if isinstance(own, PagedCache):
    free = cache.by_device(cache.shards.table.pool.count)[device, :, 0]
    if any(free[t] < part.used.sum() for t, part in enumerate(prepared)):
      return cache, False
    longest = max(len(part.pages) for part in prepared)
    prepared = [part.padded(longest) for part in prepared]
  places = np.full(cache.split.row_parts, cache.rows, np.int32)  # none, on devices of other rows
  places[device] = place
  whole = jax.tree.map(lambda *heads: np.concatenate(heads), *(part.replace(seen=part.seen[None]) for part in prepared))
  return _restored_sharded(cache, places, whole), True


@struct.dataclass
class Prepared:
  """The arrays of a stored row as a cache takes them.

  Attributes:
    fields: of the cache by name, without the axis of rows.
    seen: int32 [], tokens of the text.
    used: int32 [L, K], pages of each head; None without pages.
    pages, scales: of all heads, ordered as in `HostRow`, then padding; None without.
  """

  fields: dict
  seen: np.ndarray
  used: np.ndarray | None = None
  pages: np.ndarray | None = None
  scales: np.ndarray | None = None

  def padded(self, pages: int) -> Prepared:
    """The same with `pages` pages."""
    pad = lambda x: None if x is None else _fitted(x, 0, pages)
    return self.replace(pages=pad(self.pages), scales=pad(self.scales))


def _prepared(cache: Cache, stored: HostRow) -> Prepared:
  """A stored row that fits `cache` in everything but its size, for `_restored`; of `cache` shapes matter alone.

  Raises:
    ValueError: the row is too long.
  """
  if isinstance(cache, MaskedCache):
    return _prepared_masked(cache, stored)
  size = cache.page_size if isinstance(cache, PagedCache) else 1
  most, places = int(stored.archived.max(initial=0)), (cache.slots - cache.ring) // size
  if most > places * size:
    kind = f"table of {places * size}" if isinstance(cache, PagedCache) else f"cache of {places}"
    raise ValueError(f"a stored row of {most} archive slots does not fit a {kind}")
  stored = stored.repaged(size)
  used = (-(-stored.archived // size)).astype(np.int32)
  fields = {name: getattr(stored, name) for name in BY_ROW}
  pages = places * size // max(cache.page, 1)
  for name, full in (("stats", cache.slots), ("summaries", pages)):
    fields[name] = jax.tree.map(lambda x, full=full: _fitted(x, 2, full), fields[name])
  if isinstance(cache, ContiguousCache):
    slots = np.zeros((*stored.kv.shape[:2], cache.slots, stored.kv.shape[3]), stored.kv.dtype)
    slots[:, :, : cache.ring] = stored.kv
    slots[:, :, cache.ring :][np.arange(places) < stored.archived[..., None]] = stored.pages[:, 0]
    return Prepared({**fields, "kv": slots}, stored.seen)
  # `offload_row` ordered the pages by head. They are padded to a power of two, so that few shapes are compiled.
  fields["kv"] = _fitted(stored.kv, 2, cache.kv.shape[3])
  prepared = Prepared(fields, stored.seen, used, stored.pages, stored.scales)
  return prepared.padded(_power_of_two(len(stored.pages)))


def _fitted(x: np.ndarray, axis: int, size: int) -> np.ndarray:
  """`x` with `axis` made `size` long: padded with zeros, or cut at its end."""
  widths = [(0, 0)] * x.ndim
  widths[axis] = (0, max(size - x.shape[axis], 0))
  return np.take(np.pad(x, widths), np.arange(size), axis=axis) if x.shape[axis] > size else np.pad(x, widths)


def _prepared_masked(cache: MaskedCache, stored: HostRow) -> Prepared:
  if int(stored.seen) > cache.slots:
    raise ValueError(f"a stored row of {int(stored.seen)} tokens does not fit a cache of {cache.slots}")
  fields = {name: getattr(stored, name) for name in ("kv", "evicted", "stats")}
  fields = jax.tree.map(lambda x: _fitted(x, 2, cache.slots), fields)
  return Prepared({**fields, "memory": stored.memory}, stored.seen)


@partial(jax.jit, donate_argnames="cache")
def _restored_sharded(cache: ShardedCache, places, stored: Prepared) -> ShardedCache:
  """`_restored` on the devices whose row exists, of `places`, one for each part of the rows; `stored` has all heads."""

  def put(own, place, stored):
    row = place[0]
    if stored.used is not None:
      stored = stored.replace(used=jnp.where(row < len(own.seen), stored.used, 0))
    return _put(own, row, stored.replace(seen=stored.seen[0]))

  return each(cache, put, places, stored, specs=(P("data"), P("tensor")))


def _put(cache, row, stored: Prepared):
  at = lambda x, new: x.at[:, row].set(new)
  if stored.used is not None:
    cache = _put_pages(cache, row, stored.used, stored.pages, stored.scales)
  fields = {name: jax.tree.map(at, getattr(cache, name), new) for name, new in stored.fields.items()}
  return cache.replace(**fields, seen=cache.seen.at[row].set(stored.seen))


_restored = jax.jit(_put, donate_argnames="cache")


def _put_pages(cache, row, used, pages, scales):
  table, place = cache.table, jnp.arange(cache.table.pages.shape[3])
  mine = place < used[..., None]
  pool, numbers = pools.take(table.pool, mine)
  rank = jnp.cumsum(mine.ravel()).reshape(mine.shape) - 1
  target = jnp.full(pages.shape[0], cache.pages).at[jnp.where(mine, rank, pages.shape[0])].set(numbers, mode="drop")
  put = lambda x, new: None if x is None else x.at[target].set(new, mode="drop")
  at = lambda x, new: x.at[:, row].set(new)
  scales = None if scales is None else scales.reshape(len(scales), *cache.store.scales.shape[1:])
  store = Store(put(cache.store.pages, pages), put(cache.store.scales, scales))
  table = Table(at(table.pages, numbers), at(table.owned, used), pool)
  return cache.replace(table=table, store=store)


def _power_of_two(n: int) -> int:
  return 1 << max(n - 1, 0).bit_length()
