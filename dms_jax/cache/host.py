"""Host copies of rows: the content of one row of a cache, as numpy arrays.

Conversations on disk and preempted rows are host copies. A host copy is restored bit for bit into any cache with free
slots: one of another size, at another row, with pages of another size, from contiguous slots into pages and back.
Masked caches are the exception: they keep evicted tokens, so they exchange rows with masked caches alone.
"""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Bool, Shaped

from dms_jax.cache import pool as pools
from dms_jax.cache.base import Cache
from dms_jax.cache.contiguous import ContiguousCache
from dms_jax.cache.masked import MaskedCache
from dms_jax.cache.paged import PagedCache, Store, Table
from dms_jax.cache.rows import BY_ROW, row_fields


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


def live_slots(counts: Shaped[np.ndarray, "heads"], page: int) -> Bool[np.ndarray, "slots"]:
  """Which slots are in use when the pages of all heads lie one after another.

  Args:
    counts: tokens of each head.
    page: slots of a page.
  """
  slots = -(-counts // page) * page
  place = np.arange(slots.sum()) - np.repeat(np.cumsum(slots) - slots, slots)
  return place < np.repeat(counts, slots)


def offload_row(cache: Cache, row: int) -> HostRow:
  """A host copy of row `row`; the cache is unchanged."""
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


def check_fits(cache: Cache, stored: HostRow) -> None:
  """Checks that a stored row fits `cache` in everything but its size.

  Raises:
    ValueError: the row is of another model, window, policy or kind of cache.
  """
  heads = cache.kv.shape[0], cache.kv.shape[2]
  cells = cache.store.pages.dtype if isinstance(cache, PagedCache) else cache.kv.dtype
  masked = isinstance(cache, MaskedCache)
  for name, theirs, ours in (
    ("layers, KV heads", stored.kv.shape[:2], heads), ("2H", stored.kv.shape[3], cache.kv.shape[4]),
    ("window", stored.window, cache.window), ("lag", stored.lag, cache.lag),
    ("dtype", stored.kv.dtype, cache.kv.dtype), ("archive", stored.pages.dtype, cells),
    ("masked", stored.masked, masked), ("page of the policy", stored.page, 0 if masked else cache.page),
    ("statistics", sorted(stored.stats), sorted(cache.stats)), ("memory", sorted(stored.memory), sorted(cache.memory)),
  ):  # fmt: skip
    if theirs != ours:
      raise ValueError(f"a stored row with {name} {theirs} does not fit a cache with {ours}")


def restore_row(cache: Cache, row: int, stored: HostRow) -> tuple[Cache, bool]:
  """Writes a host copy into row `row`, which must be empty.

  Args:
    cache: donated if the row is written.

  Returns:
    (cache, whether the row was written). A pool with too few free pages leaves the cache unchanged.

  Raises:
    ValueError: the row is of another model, window, archive format or policy, or too long for a head of the cache.
  """
  check_fits(cache, stored)
  if isinstance(cache, MaskedCache):
    return _restored_masked(cache, row, stored), True
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
    slots = np.zeros(cache.kv[:, row].shape, stored.kv.dtype)
    slots[:, :, : cache.ring] = stored.kv
    slots[:, :, cache.ring :][np.arange(places) < stored.archived[..., None]] = stored.pages[:, 0]
    return _restored(cache, jnp.int32(row), {**fields, "kv": slots}, stored.seen), True
  if int(cache.table.pool.count) < used.sum():
    return cache, False
  # `offload_row` ordered the pages by head. They are padded to a power of two, so that few shapes are compiled.
  pad = lambda x: None if x is None else _fitted(x, 0, _power_of_two(len(x)))
  fields["kv"] = _fitted(stored.kv, 2, cache.kv.shape[3])
  return _restored_pages(cache, jnp.int32(row), fields, stored.seen, used, pad(stored.pages), pad(stored.scales)), True


def _fitted(x: np.ndarray, axis: int, size: int) -> np.ndarray:
  """`x` with `axis` made `size` long: padded with zeros, or cut at its end."""
  widths = [(0, 0)] * x.ndim
  widths[axis] = (0, max(size - x.shape[axis], 0))
  return np.take(np.pad(x, widths), np.arange(size), axis=axis) if x.shape[axis] > size else np.pad(x, widths)


def _restored_masked(cache: MaskedCache, row: int, stored: HostRow) -> MaskedCache:
  if int(stored.seen) > cache.slots:
    raise ValueError(f"a stored row of {int(stored.seen)} tokens does not fit a cache of {cache.slots}")
  fields = {name: getattr(stored, name) for name in ("kv", "evicted", "stats")}
  fields = jax.tree.map(lambda x: _fitted(x, 2, cache.slots), fields)
  return _restored(cache, jnp.int32(row), {**fields, "memory": stored.memory}, stored.seen)


@partial(jax.jit, donate_argnames="cache")
def _restored(cache, row, fields, seen):
  at = lambda x, new: x.at[:, row].set(new)
  fields = {name: jax.tree.map(at, getattr(cache, name), new) for name, new in fields.items()}
  return cache.replace(**fields, seen=cache.seen.at[row].set(seen))


@partial(jax.jit, donate_argnames="cache")
def _restored_pages(cache, row, fields, seen, used, pages, scales):
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
  return _restored(cache.replace(table=table, store=store), row, fields, seen)


def _power_of_two(n: int) -> int:
  return 1 << max(n - 1, 0).bit_length()
