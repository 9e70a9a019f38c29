"""PagedCache: rings in one array, archives in pages of a pool that layers, heads and rows share.

Heads and rows hold very different numbers of tokens, so a head takes another page only when its last one is full. A
table, int32 [L, B, K, M], lists the pages of each head by their numbers in the pool [P, page, cells]. Before the layers
of a step every head gets the pages that it may need; pages that a chunk of a prompt did not need go back to the pool
after its layers. `cache.rows` copies, frees and forks rows between compiled calls.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Array, Bool, Int, Shaped

from dms_jax.attention import decode_attention, write_pages
from dms_jax.cache import pool as pools
from dms_jax.cache.base import empty_memory, packed, padded, rounded, storage_dtype
from dms_jax.cache.pool import Pool
from dms_jax.cache.ring import RingCache
from dms_jax.collectives import on_all
from dms_jax.policies.base import capacity_of
from pallas_kernels.paged.format import FORMATS, PageFormat, floats, format_of, scale_places
from pallas_kernels.paged.pages import Pages, pages_at, places

ENDLESS = 2**24  # tokens, for a text of any length
# The slots of a ring are a multiple of TILE. With other numbers XLA makes another axis the innermost one on TPU v4, v5p
# and tpu7x, and copies all rings in each step.
TILE = 16
SHAPES = 2  # a pool grows to a multiple of SHAPES pages a head, because each new shape is a compilation


@struct.dataclass
class Store:
  """The contents of the pool.

  Attributes:
    pages: [P, page, cells], in the dtype of the page format.
    scales: float32 [P, 1, 2 * page], of each slot's key and value; None for a format without scales.
  """

  pages: jax.Array
  scales: jax.Array | None

  @property
  def format(self) -> PageFormat:
    """The page format, recognised by the dtype of `pages`."""
    return format_of(self.pages.dtype)


@struct.dataclass
class Table:
  """The pages of each head.

  Attributes:
    pages: int32 [L, B, K, M], page numbers; the first `owned` of a head are its own, the others mean nothing.
    owned: int32 [L, B, K], pages of each head.
    pool: the free pages, and the number of owners of each page.
  """

  pages: jax.Array
  owned: jax.Array
  pool: Pool


@struct.dataclass
class PagedCache(RingCache):
  """`kv` [L, B, K, R, 2H] holds the rings, R = W + 1 rounded up to a multiple of TILE.

  Archives lie in the pages of `store`; `table` lists the pages of each head.
  """

  store: Store
  table: Table
  page_size: int = struct.field(pytree_node=False)

  @classmethod
  def create(
    cls, layers, batch, heads, head_dim, *, capacity, policy, lag, dtype, group=1, sliding=None, longest=None,
    page_size=None, page_format=None,
  ):  # fmt: skip
    """An empty cache.

    Args:
      capacity: slots a head, the ring included, averaged over heads and rows; it sets the number of pages.
      policy, lag, dtype, group: see `cache.create`.
      sliding: the layers that slide; None for none.
      longest: the most slots that one head may hold, the ring included; default `capacity`.
      page_size: slots of a page; default the policy's, else the format's.
      page_format: a key of `pallas_kernels.paged.FORMATS`: "int8" and "float8" store the archive in 8 bits, with a
        scale for each key and value. Rings are never quantised.

    Raises:
      ValueError: an unknown `page_format`, or a `page_size` that is not the policy's.
    """
    ring, lead, stored = policy.window + 1, (layers, batch, heads), storage_dtype(dtype)
    if page_format is not None and page_format not in FORMATS:
      raise ValueError(f"page_format={page_format!r} is not one of {sorted(FORMATS)}")
    form = format_of(stored) if page_format is None else FORMATS[page_format]
    size = page_size or policy.page or form.page_size()
    if policy.page and size != policy.page:
      raise ValueError(f"page_size={size}, but {type(policy).__name__} selects pages of {policy.page} slots")
    table = Table(jnp.zeros((*lead, 0), jnp.int32), jnp.zeros(lead, jnp.int32), Pool.create(0))
    store = Store(*form.empty(0, size, head_dim))
    cache = cls(
      kv=jnp.zeros((*lead, -(-ring // TILE) * TILE, 2 * head_dim), stored), evicted=jnp.zeros((*lead, ring), bool),
      archived=jnp.zeros(lead, jnp.int32), seen=jnp.zeros((batch,), jnp.int32),
      stats={name: jnp.zeros((*lead, ring), jnp.float32) for name in policy.stats},
      memory=empty_memory(policy, lead, group, head_dim),
      summaries=jnp.zeros((*lead, 0, 2 * head_dim), stored) if policy.page else None,
      window=policy.window, lag=lag, sliding=sliding, page=policy.page, store=store, table=table, page_size=size,
    )  # fmt: skip
    return cache.with_capacity(capacity, longest or 0)

  @property
  def slots(self) -> int:
    """The most slots that a head may hold: its ring, and all places of its table."""
    return self.ring + self.table.pages.shape[3] * self.page_size

  @property
  def pages(self) -> int:
    """Pages of the pool, P."""
    return self.table.pool.pages

  def bytes_live(self) -> int:
    """Bytes of the keys and values held, with their scales; pages shared by rows count for each row."""
    seen, archived = jax.device_get((self.seen, self.archived))
    in_ring = int(np.minimum(seen, self.ring).sum()) * archived.size // seen.size
    return in_ring * self.slot_bytes + int(archived.sum()) * self.archive_slot_bytes

  @property
  def page_bytes(self) -> int:
    """Bytes that a page adds to the cache: its slots, their scales, and its places in the pool's lists."""
    lists = sum(leaf.dtype.itemsize for leaf in (self.table.pool.free, self.table.pool.owners))
    return self.page_size * self.archive_slot_bytes + lists

  @property
  def archive_slot_bytes(self) -> int:
    """Bytes of one archived token's key and value, with their scales."""
    return self.store.format.slot_bytes(self.kv.shape[-1] // 2)

  @property
  def fixed_bytes(self) -> int:
    """Bytes of everything but the pages."""
    return self.nbytes - self.pages * self.page_bytes

  def grow(self, slots: int) -> PagedCache:
    """The same cache whose heads may hold `slots` slots each; the pool is unchanged.

    Raises:
      ValueError: heads may hold more slots already.
    """
    if slots < self.slots:
      raise ValueError(f"cannot shrink a cache of {self.slots} slots a head to {slots}")
    more = -(-(slots - self.slots) // self.page_size)
    if not more:
      return self
    pages, summaries = padded((self.table.pages, self.summaries), count=more)
    stats = padded(self.stats, count=more * self.page_size)
    return self.replace(table=self.table.replace(pages=pages), stats=stats, summaries=summaries)

  def row_pages(self, slots: int, tokens: int | None = None, least: int = 0) -> int:
    """Pages of a row whose heads need `slots` slots each, the ring's included, `least` or more a head.

    Args:
      tokens: of the row's text, which bound the slots in layers that slide; default `slots`.
    """
    layers, _, heads = self.archived.shape
    pages = lambda archived: heads * max(-(-archived // self.page_size), least)
    if self.sliding is None:
      return layers * pages(slots - self.ring)
    sliding = sum(self.sliding.layers)
    own = min((slots if tokens is None else tokens) - self.ring, self.sliding.span)
    return (layers - sliding) * pages(slots - self.ring) + sliding * pages(own)

  def with_capacity(self, capacity, longest):
    """The same tokens with a pool for `capacity` slots a head on average, and tables for `longest` slots a head.

    Raises:
      ValueError: the pool has more pages than `capacity` needs.
    """
    pages = self.archived.shape[1] * self.row_pages(capacity, least=1)
    if pages < self.pages:
      raise ValueError(f"capacity={capacity} is below the {self.pages} pages of {self.page_size} slots there are")
    return self.grow(max(capacity, longest, self.ring + 1, self.slots)).with_pages(pages)

  def with_pages(self, pages: int) -> PagedCache:
    """The same cache with a pool of `pages` pages.

    Raises:
      ValueError: the pool has more pages.
    """
    pool = self.table.pool.grow(pages)
    store = padded(self.store, count=pages - self.pages, axis=0)
    return self.replace(store=store, table=self.table.replace(pool=pool))

  @jax.jit
  def free_tokens(self, policy, rows=None):
    """Tokens that each row can take for certain, int32 [B], whatever the other rows take.

    Each head counts on its own pages and an equal share of the free ones; only heads of `rows` share. A row whose
    policy never needs more slots than these can take ENDLESS tokens.
    """
    layers, batch, heads = self.archived.shape
    sharing = batch if rows is None else jnp.maximum(jnp.sum(rows), 1)
    sharers = layers * sharing * heads
    if self.sliding is not None:  # those of sliding layers that own all they will ever need share nothing
      full = self.sliding.heads & (self.table.owned * self.page_size >= self.sliding.span)
      mine = True if rows is None else rows[:, None]
      sharers = jnp.maximum(jnp.sum(~full & mine), 1)
    places = jnp.minimum(self.table.owned + self.table.pool.count // sharers, self.table.pages.shape[3])
    slots = places * self.page_size
    if self.sliding is not None:
      lacks = self.sliding.heads & (slots < self.sliding.span)
      slots = jnp.where(self.sliding.heads & ~lacks, 2 * ENDLESS, slots)
    room = jnp.min(slots - self.archived, axis=(0, 2)) + jnp.maximum(self.ring - self.seen, 0)
    bounded = policy.capacity(self.seen + ENDLESS) <= self.ring + jnp.min(slots, axis=(0, 2))
    if self.sliding is not None:
      bounded &= ~jnp.any(lacks, axis=(0, 2))
    return jnp.where(bounded, ENDLESS, room)

  @property
  def size(self):
    return self.pages

  def size_for(self, policy, coming, most):
    """The size that `ensure_capacity` gives: pages for the next `coming` tokens of each row, numpy int [B].

    A pool that lacks pages takes the lacking ones or doubles, whichever is more. It stops doubling at the pages that
    all rows will need for `most` tokens each, if every head keeps tokens at its rate so far.
    """
    content = jax.device_get((self.archived, self.table.owned, self.seen, self.table.pool.count))
    return self.pages_for(policy, coming, most, *content)

  def resized(self, size, most):
    cache = self.grow(max(rounded(most), self.slots))
    return cache if size == self.pages else cache.with_pages(size)

  def pages_for(self, policy, coming, most, archived, owned, seen, free) -> int:
    """The pages of the pool that `ensure_capacity` gives, from the content of the arrays, numpy, that it depends on."""
    size, ring = self.page_size, self.ring
    # slots of a head, whatever is kept
    bound = (np.asarray(capacity_of(policy, np.int32(seen + coming))) - ring)[:, None]
    longest = most - ring
    if self.sliding is not None:
      bound = np.where(self.sliding.heads, self.sliding.span, bound)
      longest = np.where(self.sliding.heads, min(self.sliding.span, longest), longest)
    entering = np.maximum(seen + coming - ring, 0) - np.maximum(seen - ring, 0)
    after = np.minimum(archived + entering[:, None], np.maximum(bound, archived))
    lack = int(np.maximum(-(-after // size) - owned, 0).sum()) - int(free)
    if lack <= 0:
      return self.pages
    rate = archived / np.maximum(seen - ring, 1)[:, None]
    whole = np.minimum(np.maximum(rate * (most - ring), archived), longest)
    foreseen = int((-(-whole // size)).sum() + (-(-after // size) - archived // size).sum())
    pages, few = self.pages + max(lack, min(self.pages, foreseen - self.pages)), SHAPES * archived.size
    return -(-pages // few) * few

  # Where the archive lies ---------------------------------------------------------------------------------------------

  def _store(self):
    return self.store

  def _reserved(self, new, most):
    table, size = self.table, self.page_size
    lacking = jnp.where(new > 0, jnp.maximum(-(-(self.archived + new) // size) - table.owned, 0), 0)
    fits = jnp.all(table.owned + lacking <= table.pages.shape[3], axis=(0, 2))
    room = on_all(fits & _granted(jnp.where(fits, jnp.sum(lacking, axis=(0, 2)), 0), table.pool.count))
    lacking = jnp.where(room[:, None], lacking, 0)
    place = jnp.arange(-(-most // size))
    pool, pages = pools.take(table.pool, place < lacking[..., None])
    place = jnp.where(place < lacking[..., None], table.owned[..., None] + place, table.pages.shape[3])
    lead = jnp.ix_(*(jnp.arange(n) for n in place.shape[:3]))
    at = tuple(x[..., None] for x in lead) + (place,)
    return room, Table(table.pages.at[at].set(pages, mode="drop"), table.owned + lacking, pool)

  def _after(self, carry, **fields):
    return super()._after(carry, store=carry.archive, **fields)

  def _place(self):
    return self.table

  @property
  def _unit(self):
    return self.page_size

  def _rows_of(self, layer, rows, archive):
    table, places = self.table, slice(archive // self.page_size)
    pages = table.pages.at[layer, rows, :, places].get(mode="fill", fill_value=0)[None]
    owned = table.owned.at[layer, rows].get(mode="fill", fill_value=0)[None]
    return super()._rows_of(layer, rows, archive).replace(table=table.replace(pages=pages, owned=owned))

  def _with_rows(self, layer, rows, part):
    return super()._with_rows(layer, rows, part).replace(store=part.store)

  def commit(self, plan, carry, states, evict=None):
    cache = super().commit(plan, carry, states, evict)
    cache = cache.replace(table=plan.placement.reserved)
    step = plan.placement.step
    # A chunk has taken pages as if it evicted nothing; a step may have removed tokens.
    return cache.without_idle_pages() if step is None or step.closing is not None else cache

  def without_idle_pages(self) -> PagedCache:
    """The same tokens; pages of heads in which no token lies are given back to the pool."""
    table, used = self.table, -(-self.archived // self.page_size)
    place = jnp.arange(table.pages.shape[3])
    idle = (place >= used[..., None]) & (place < table.owned[..., None])
    pool = pools.give_back(table.pool, jnp.where(idle, table.pages, self.pages))
    return self.replace(table=Table(table.pages, jnp.minimum(table.owned, used), pool))

  def _written(self, carry, reserved, layer, target, rows, in_order=True):
    carry = carry.replace(archive=self._stored(carry.archive, reserved.pages[layer], target, rows, in_order))
    return self._ringed(carry, layer, target, rows)

  def _exchanged(self, carry, reserved, layer, target, leaves, newest, enters):
    store = self._stored(carry.archive, reserved.pages[layer], target[..., None], leaves[:, :, None])
    return self._ringed(carry.replace(archive=store), layer, newest[..., None], enters[:, :, None])

  def _ringed(self, carry, layer, target: Int[Array, "B K X"], rows: Shaped[Array, "B K X width"]):
    """`carry` with rows written to the ring; rows whose slot `target` is past the ring are dropped."""
    b, k, _ = target.shape
    row, head = jnp.arange(b)[:, None, None], jnp.arange(k)[:, None]
    in_ring = jnp.where(target < self.ring, target, carry.kv.shape[3])  # others point past the end of `kv`
    return carry.replace(kv=carry.kv.at[layer, row, head, in_ring].set(rows, mode="drop"))

  def _moved(self, carry, reserved, target, rows):
    store = self._stored(carry.archive, reserved.pages, target[..., None], rows[..., None, :])
    return carry.replace(archive=store)

  def _stored(
    self, store: Store, table: Int[Array, "*n M"], target: Int[Array, "*n X"], rows: Shaped[Array, "*n X width"],
    in_order: bool = True,
  ) -> Store:  # fmt: skip
    """`store` with rows written to the archive; a slot `target` in the ring or past the last slot is dropped."""
    slots = target - self.ring
    cells, scales = store.format.encode(rows)
    store = store.replace(pages=write_pages(store.pages, table, slots, cells, in_order=in_order))
    if scales is None:
      return store
    page, slot = places(self.pages, self.page_size, table, slots)
    at = page[..., None], 0, scale_places(slot)
    return store.replace(scales=store.scales.at[at].set(scales, mode="drop", unique_indices=True))

  def _archive(self, carry, reserved, layer):
    b, k, most = reserved.pages.shape[1:]
    index = jnp.broadcast_to(jnp.arange(most * self.page_size), (b, k, most * self.page_size))
    return self._archive_at(carry, reserved, layer, index)

  def _archive_at(self, carry, reserved, layer, index):
    store, slot = carry.archive, index % self.page_size
    page = jnp.clip(pages_at(reserved.pages[layer], index // self.page_size), 0, self.pages - 1)
    scales = None if store.scales is None else store.scales[page[..., None], 0, scale_places(slot)]
    return floats(packed(store.format.decode(store.pages[page, slot], scales), carry.kv.dtype))

  def _attended(self, carry, reserved, layer, q, in_ring, archived, mass=False):
    in_ring = jnp.broadcast_to(in_ring, archived.shape)
    pages = Pages(carry.archive.pages, reserved.pages, archived, carry.archive.scales)
    out = decode_attention(q, carry.kv, layer, in_ring, pages=pages, mass=mass)
    if not mass:
      return out, None
    out, (of_ring, of_archive) = out
    return out, jnp.concatenate([of_ring[..., : self.ring], of_archive], axis=-1)

  def _attended_pages(self, carry, reserved, layer, q, in_ring, order, length):
    table = jnp.take_along_axis(reserved.pages[layer], order, axis=-1)
    kv = jax.lax.dynamic_index_in_dim(carry.kv, layer, 0)
    return decode_attention(
      q, kv, 0, in_ring, pages=Pages(carry.archive.pages, table[None], length, carry.archive.scales)
    )


def _granted(asked: Int[Array, "B"], free: Int[Array, ""]) -> Bool[Array, "B"]:
  """Which rows get all pages they ask for: rows in order while pages last, then later rows that still fit."""
  granted = jnp.cumsum(asked) <= free
  left = free - jnp.sum(jnp.where(granted, asked, 0))
  fitting = jnp.where(granted | (asked > left), 0, asked)
  return granted | ((asked <= left) & (jnp.cumsum(fitting) <= left))
