"""ContiguousCache: ring and archive in one array, with the same number of slots in every head."""

from __future__ import annotations

import jax.numpy as jnp
from flax import struct

from dms_jax.attention import decode_attention
from dms_jax.cache.base import empty_memory, padded, storage_dtype
from dms_jax.cache.ring import RingCache
from dms_jax.collectives import on_all
from pallas_kernels.paged.format import floats
from pallas_kernels.paged.pages import Pages


@struct.dataclass
class ContiguousCache(RingCache):
  """`kv` [L, B, K, S, 2H] holds the ring in slots 0 .. W, then the archive."""

  @classmethod
  def create(cls, layers, batch, heads, head_dim, *, capacity, policy, lag, dtype, group=1, sliding=None):
    """An empty cache.

    Args:
      capacity: slots a head, the ring's W + 1 included; fewer than W + 1 are rounded up to it.
      policy, lag, dtype, group: see `cache.create`.
      sliding: the layers that slide; None for none.
    """
    ring, page, lead, dtype = policy.window + 1, policy.page, (layers, batch, heads), storage_dtype(dtype)
    cache = cls(
      kv=jnp.zeros((*lead, ring, 2 * head_dim), dtype), evicted=jnp.zeros((*lead, ring), bool),
      archived=jnp.zeros(lead, jnp.int32), seen=jnp.zeros((batch,), jnp.int32),
      stats={name: jnp.zeros((*lead, ring), jnp.float32) for name in policy.stats},
      memory=empty_memory(policy, lead, group, head_dim),
      summaries=jnp.zeros((*lead, 0, 2 * head_dim), dtype) if page else None,
      window=policy.window, lag=lag, sliding=sliding, page=page,
    )  # fmt: skip
    return cache.grow(max(capacity, ring))

  def grow(self, slots: int) -> ContiguousCache:
    """The same cache with `slots` slots a head, rounded up to whole pages if the policy selects pages.

    Raises:
      ValueError: the cache has more slots.
    """
    if slots < self.slots:
      raise ValueError(f"cannot shrink a cache of {self.slots} slots a head to {slots}")
    extra = slots - self.slots
    if self.page:
      extra += -slots % self.page
    kv, stats = padded((self.kv, self.stats), count=extra)
    return self.replace(kv=kv, stats=stats, summaries=padded(self.summaries, count=extra // max(self.page, 1)))

  def _reserved(self, new, most):
    return on_all(jnp.all((new == 0) | (self.ring + self.archived + new <= self.slots), axis=(0, 2))), None

  def _written(self, carry, reserved, layer, target, rows, in_order=True):
    b, k, _ = target.shape
    at = layer, jnp.arange(b)[:, None, None], jnp.arange(k)[:, None], target
    return carry.replace(kv=carry.kv.at[at].set(rows, mode="drop"))

  def _moved(self, carry, reserved, target, rows):
    lead = jnp.ix_(*(jnp.arange(n) for n in target.shape))
    return carry.replace(kv=carry.kv.at[(*lead, target)].set(rows, mode="drop", unique_indices=True))

  def _archive(self, carry, reserved, layer):
    return floats(carry.kv[layer, :, :, self.ring :])

  def _all_slots(self, carry, reserved, layer):
    return floats(carry.kv[layer])

  def _archive_at(self, carry, reserved, layer, index):
    b, k, _ = index.shape
    return floats(carry.kv[layer, jnp.arange(b)[:, None, None], jnp.arange(k)[:, None], self.ring + index])

  def _attended(self, carry, reserved, layer, q, in_ring, archived, mass=False):
    out = decode_attention(q, carry.kv, layer, in_ring + archived, mass=mass)
    return (out[0], out[1][0]) if mass else (out, None)

  def _attended_pages(self, carry, reserved, layer, q, in_ring, order, length):
    # `kv`, reshaped, is a pool of pages: those of a head are its ring's, then its archive's.
    _, b, k, slots, width = carry.kv.shape
    page, first = self.page, self.ring // self.page
    pairs = ((layer * b + jnp.arange(b)[:, None]) * k + jnp.arange(k)).astype(jnp.int32)
    ring = jnp.broadcast_to(jnp.arange(first, dtype=jnp.int32), (b, k, first))
    table = pairs[..., None] * (slots // page) + jnp.concatenate([ring, first + order], axis=-1)
    pool = carry.kv.reshape(-1, page, width)
    return decode_attention(q, None, 0, None, pages=Pages(pool, table[None], in_ring + length))
