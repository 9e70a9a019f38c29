"""ShardedCache: the cache of a mesh, one ordinary cache for each device's rows and KV heads.

Rows are split over the mesh axis "data", KV heads over "tensor", or rows over both (`sharding.Split`). Every
device has its own slots, and in pages its own pool, table and free pages; no array is copied to another device. In
compiled code each device works on its own cache (`dms_jax.spmd`). This module is the host's view: the face of `Cache`
outside compiled code, in global rows and heads. Over several processes the host's view is the same in each, and a row
that moves to the host moves to all.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax import lax
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Int

from dms_jax.cache.base import Cache, Common, rounded
from dms_jax.cache.paged import PagedCache
from dms_jax.collectives import among
from dms_jax.policies.base import Policy, of_rows, row_numbers
from dms_jax.processes import fetch, spans_processes
from dms_jax.sharding import Split, shard_map

DEVICE = P(("data", "tensor"))  # of an array in which those of all devices follow one another


def rows_and_scalars(tree: Any, split: Split) -> Any:
  """The partition of each array of a step: those with an axis of rows, which comes first, are split by rows."""
  return jax.tree.map(lambda x: split.spec(P("data")) if jnp.ndim(x) else P(), tree)


def policy_specs(policy: Policy, split: Split) -> Policy:
  """The partition of a policy's numbers, which may be one a row; tables are whole on every device."""
  return jax.tree.map(lambda x: rows_and_scalars(x, split) if jnp.ndim(x) == 1 else P(), policy)


@struct.dataclass
class ShardedCache:
  """`shards` is a cache whose arrays are those of all devices, one after another along their first axis.

  Device (d, t) holds rows d B / data .. and KV heads t K / tensor .. , and by rows the rows (d tensor + t) B /
  (data tensor) .. with all heads. Another axis for the devices would be of size 1 on each, and XLA copies a whole cache
  to remove it.
  """

  shards: Cache
  split: Split = struct.field(pytree_node=False)

  @classmethod
  def create(cls, split: Split, batch: int, make: Callable[[int, int], Cache]) -> ShardedCache:
    """An empty cache; `make(rows, devices)` makes that of one device, for its rows and its part of the KV heads.

    Raises:
      ValueError: the mesh does not divide the rows.
    """
    mesh, data, tensor = split.mesh, split.mesh.shape["data"], split.mesh.shape["tensor"]
    if split.by_rows and batch % mesh.size:
      raise ValueError(
        f"mesh.data={data} x mesh.tensor={tensor} does not divide {batch} rows: give a multiple of {mesh.size}, since "
        "mesh.tensor splits rows where it does not divide the KV heads"
      )
    if batch % data:
      raise ValueError(f"mesh.data={data} does not divide {batch} rows: give a multiple of {data} rows")
    own = lambda: cls.of_device(make(batch // split.row_parts, split.head_parts), split)
    return jax.jit(shard_map(own, mesh, in_specs=(), out_specs=DEVICE))()

  @classmethod
  def of_device(cls, own: Cache, split: Split) -> ShardedCache:
    """The cache of the device that is traced as its part of the whole, inside `jax.shard_map`."""
    return cls(_with_count(own, lambda count: count[None]), split)

  def local(self) -> Cache:
    """The inverse of `of_device`."""
    return _with_count(self.shards, lambda count: count[0])

  @property
  def mesh(self) -> Mesh:
    return self.split.mesh

  @property
  def own(self) -> Cache:
    """The cache of one device, as shapes."""
    size = self.mesh.size
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct((len(x) // size, *x.shape[1:]), x.dtype), self.shards)
    return _with_count(shapes, lambda count: jax.ShapeDtypeStruct((), count.dtype))

  @property
  def devices(self) -> np.ndarray:
    """The devices [parts of the rows, parts of the heads]."""
    return self.mesh.devices.reshape(self.split.parts)

  def on_devices(self, tree: Any, part: int) -> list[Any]:
    """What each device of one part of the rows holds of the arrays of `each`, on the host."""
    if spans_processes(self.mesh):
      sent, places = _sent(tree, np.int32(part), split=self.split), self.split.head_parts
      found = jax.tree.map(lambda x: fetch(x).reshape(places, -1, *x.shape[1:]), sent)  # one array at a time
      return [jax.tree.map(lambda x, place=place: x[place], found) for place in range(places)]
    shard = lambda device: lambda x: next(np.asarray(s.data) for s in x.addressable_shards if s.device == device)
    return [jax.tree.map(shard(device), tree) for device in self.devices[part]]

  def by_device(self, x: Any) -> np.ndarray:
    """An array of all devices on the host, [parts of the rows, parts of the heads, ...]."""
    return fetch(x).reshape(*self.split.parts, -1, *x.shape[1:])

  # The face of a cache ------------------------------------------------------------------------------------------------

  @property
  def window(self) -> int:
    return self.shards.window

  @property
  def lag(self) -> int:
    return self.shards.lag

  @property
  def slots(self) -> int:
    return self.own.slots

  @property
  def batch(self) -> int:
    """B, rows of all devices."""
    return self.split.row_parts * self.rows

  @property
  def rows(self) -> int:
    """Rows of each device."""
    return len(self.shards.seen) // self.mesh.size

  @property
  def seen(self) -> Int[np.ndarray, "B"]:
    return self.by_device(self.shards.seen)[:, 0].reshape(-1)

  @property
  def nbytes(self) -> int:
    """Bytes of all devices' arrays."""
    return sum(leaf.nbytes for leaf in jax.tree.leaves(self.shards))

  @property
  def device_bytes(self) -> int:
    """Bytes of each device's arrays."""
    return self.nbytes // self.mesh.size

  def live(self) -> Int[np.ndarray, "L B K"]:
    return self.whole(_live(self))

  def whole(self, x: Any) -> np.ndarray:
    """An array [L, B, K, ...] of devices as one of all rows and heads, on the host."""
    x = np.moveaxis(self.by_device(x), (0, 1), (1, 3))
    return x.reshape(x.shape[0], x.shape[1] * x.shape[2], x.shape[3] * x.shape[4], *x.shape[5:])

  def bytes_live(self) -> int:
    own, total = self.own, int(self.live().sum()) * self.shards.slot_bytes
    if isinstance(own, PagedCache):
      total += int(fetch(self.shards.archived).sum()) * (own.archive_slot_bytes - own.slot_bytes)
    return total

  def check(self, policy: Policy) -> None:
    self.own.check(policy)

  def free_tokens(self, policy: Policy, rows: Bool[np.ndarray, "B"] | None = None) -> Int[np.ndarray, "B"]:
    rows = np.ones(self.batch, bool) if rows is None else rows
    return self.by_device(_free_tokens(self, policy, rows)).min(axis=1).reshape(-1)

  def grow(self, slots: int) -> ShardedCache:
    return _grown(self, slots=slots)

  def with_capacity(self, capacity: int, longest: int) -> ShardedCache:
    """The same tokens with `capacity` slots a head, in pages a mean over the heads of each device."""
    return _with_capacity(self, capacity=capacity, longest=longest)

  def with_pages(self, pages: int) -> ShardedCache:
    """The same cache with `pages` pages in each device's pool."""
    return _with_pages(self, pages=pages)

  def ensure_capacity(self, policy: Policy, coming: Int[np.ndarray, "B"], most: int) -> ShardedCache:
    """As a cache of one device does; every device's pool grows like that which lacks most."""
    if not isinstance(own := self.own, PagedCache):
      return Common.resized(self, Common.size_for(self, policy, coming, most), most)
    table, rows = self.shards.table, self.rows
    parts = (self.shards.archived, table.owned, self.shards.seen, table.pool.count)
    archived, owned, seen, free = map(self.by_device, fetch(parts))
    pages, varies = own.pages, any(np.ndim(number) for number in row_numbers(policy).values())
    for d, t in np.ndindex(self.split.parts):
      part = np.arange(d * rows, (d + 1) * rows)
      its = of_rows(policy, self.batch, part) if varies else policy
      needed = own.pages_for(
        its, coming[part], most, archived[d, t], owned[d, t], seen[d, t], free[d, t, 0]
      )  # fmt: skip
      pages = max(pages, needed)
    cache = self.grow(max(rounded(most), self.slots))
    return cache if pages == own.pages else cache.with_pages(pages)


def each(cache: ShardedCache, fn: Callable, *args: Any, specs: tuple = ()) -> Any:
  """`fn(its cache, *args)` on every device, in compiled code; arrays of the result follow one another.

  Args:
    fn: caches in its result become `ShardedCache`, scalars entries of an array.
    specs: partitions of `args` where "tensor" splits heads; default `rows_and_scalars`.
  """
  split = cache.split

  def body(cache, *args):
    with among(split):
      out = fn(cache.local(), *args)
    kept = lambda x: ShardedCache.of_device(x, split) if isinstance(x, Common) else jnp.atleast_1d(x)
    return jax.tree.map(kept, out, is_leaf=lambda x: isinstance(x, Common))

  specs = tuple(map(split.spec, specs))
  specs = specs or tuple((policy_specs if isinstance(x, Policy) else rows_and_scalars)(x, split) for x in args)
  return shard_map(body, cache.mesh, in_specs=(DEVICE, *specs), out_specs=DEVICE)(cache, *args)


def on_each(fn: Callable) -> Callable:
  """A decorator of compiled functions whose first argument is a cache: `each` where that is a `ShardedCache`.

  Keyword arguments are static.
  """

  @functools.wraps(fn)
  def call(cache: Cache | ShardedCache, *args: Any, **static: Any) -> Any:
    if not isinstance(cache, ShardedCache):
      return fn(cache, *args, **static)
    return each(cache, functools.partial(fn, **static), *args)

  return call


def _with_count(cache: Cache, change: Callable) -> Cache:
  """`cache` with its only scalar changed: the free pages of a pool."""
  if not isinstance(cache, PagedCache):
    return cache
  pool = cache.table.pool
  return cache.replace(table=cache.table.replace(pool=pool.replace(count=change(pool.count))))


@partial(jax.jit, static_argnames="split")
def _sent(tree: Any, part: Int[Array, ""], *, split: Split) -> Any:
  """The arrays of `each` of one part of the rows, on the devices of all parts: one after another along "tensor"."""
  [axes] = split.spec(P("data"))

  def send(tree, part):
    mine = lax.axis_index(axes) == part

    def one(x):  # as bits, which a sum with zeros leaves as they are
      flag, unsigned = x.dtype == jnp.bool_, jnp.dtype(f"uint{8 * x.dtype.itemsize}")
      bits = x.astype(unsigned) if flag else lax.bitcast_convert_type(x, unsigned)
      bits = lax.psum(jnp.where(mine, bits, 0), axes)
      return bits.astype(x.dtype) if flag else lax.bitcast_convert_type(bits, x.dtype)

    return jax.tree.map(one, tree)

  return shard_map(send, split.mesh, in_specs=(DEVICE, P()), out_specs=split.spec(P("tensor")))(tree, part)


@jax.jit
def _live(cache: ShardedCache):
  return each(cache, lambda own: own.live())


@jax.jit
def _free_tokens(cache: ShardedCache, policy: Policy, rows):
  return each(cache, lambda own, policy, rows: own.free_tokens(policy, rows), policy, rows)


@partial(jax.jit, static_argnames="slots")
def _grown(cache: ShardedCache, *, slots: int):
  return each(cache, lambda own: own.grow(slots))


@partial(jax.jit, static_argnames=("capacity", "longest"))
def _with_capacity(cache: ShardedCache, *, capacity: int, longest: int):
  return each(cache, lambda own: own.with_capacity(capacity, longest))


@partial(jax.jit, static_argnames="pages")
def _with_pages(cache: ShardedCache, *, pages: int):
  return each(cache, lambda own: own.with_pages(pages))
