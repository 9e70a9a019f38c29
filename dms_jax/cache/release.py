"""Release: archived tokens of a paged cache given up, those with the least scores first.

A token's score is the policy's statistic "score"; DMS stores negative gate logits (`DMS.scored`). After a release the
row holds what it would hold if every token had been decided at the new floor: archived tokens below it are gone, and
tokens of the window below it leave for good once the window has passed. Pages without a token return to the pool.

Tokens in pages that several chains share stay, because the other chains read them.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from dms_jax.cache.base import packed
from dms_jax.cache.compact import moves
from dms_jax.cache.paged import PagedCache


def _own(cache: PagedCache) -> Bool[Array, "L B K A"]:
  """The archive slots in use that lie in pages of one owner, but none of a sliding layer, which keeps its window."""
  table = cache.table
  owners = table.pool.owners[jnp.clip(table.pages, 0, cache.pages - 1)]
  single = jnp.repeat(owners == 1, cache.page_size, axis=-1)
  if cache.sliding is not None:
    single &= ~cache.sliding.heads[..., None]
  return single & (jnp.arange(single.shape[-1]) < cache.archived[..., None])


def score_floor(cache: PagedCache, share: float | Float[Array, ""]) -> Float[Array, "B"]:
  """The floor at which each row gives up `share` of the tokens that it can, rounded down; fewer where scores tie.

  They are counted over all layers and heads. A row that can give up none gets the floor -inf.
  """
  scores = jnp.where(_own(cache), cache.stats["score"][..., cache.ring :], jnp.inf)
  count = jnp.sum(scores < jnp.inf, axis=(0, 2, 3))
  given = (count.astype(jnp.float32) * share).astype(jnp.int32)
  return jnp.where(given > 0, _ranked(scores, given), -jnp.inf)


def _ranked(x: Float[Array, "L B K A"], rank: Int[Array, "B"]) -> Float[Array, "B"]:
  """Number `rank` of each row's numbers, float32, in ascending order from 0.

  It is found bit by bit, since a sort of a row's numbers takes far longer than to count them 32 times.
  """
  sign = jnp.uint32(1 << 31)
  bits = jax.lax.bitcast_convert_type(x, jnp.uint32)
  keys = jnp.where(bits < sign, bits | sign, ~bits)  # in the order of the numbers

  def body(step, found):
    more = found | sign >> step.astype(jnp.uint32)
    below = jnp.sum(keys < more[:, None, None], axis=(0, 2, 3))
    return jnp.where(below <= rank, more, found)

  found = jax.lax.fori_loop(0, 32, body, jnp.zeros_like(rank, jnp.uint32))
  return jax.lax.bitcast_convert_type(jnp.where(found < sign, ~found, found ^ sign), jnp.float32)


def release(cache: PagedCache, floor: Float[Array, "B"], in_order: bool = True) -> tuple[PagedCache, Int[Array, "B"]]:
  """Gives up the tokens whose score is below `floor`, in every layer and head.

  Args:
    in_order: the archives are in text order and stay so.

  Returns:
    (cache, tokens given up by each row, summed over layers and heads; those of the window count at once).
  """
  ring, slots, floor = cache.ring, cache.slots, floor[:, None, None]
  (_, b, heads), archive = cache.archived.shape, jnp.arange(slots - ring)
  scores, row, head = cache.stats["score"], jnp.arange(b)[:, None, None], jnp.arange(heads)[:, None]
  stays = (archive < cache.archived[..., None]) & ~(_own(cache) & (scores[..., ring:] < floor))

  newest = cache.seen[:, None] - 1
  position = newest - (newest - jnp.arange(ring)) % ring  # of the token in each slot of the ring
  decided = ((position >= 0) & (position < cache.seen[:, None] - cache.lag))[:, None]
  evicted = cache.evicted | (decided & (scores[..., :ring] < floor))
  if cache.sliding is not None:
    evicted = jnp.where(cache.sliding.heads[..., None], cache.evicted, evicted)

  def body(layer, state):
    carry, archived = state
    rows = cache._archive(carry, cache._place(), layer)
    rows, stay, carry = jax.lax.optimization_barrier((rows, stays[layer], carry))  # read before the write
    moved = moves(stay, slots - ring, in_order)
    target = jnp.where(moved.target < slots - ring, ring + moved.target, slots)
    stats = {n: x.at[layer, row, head, target].set(x[layer, :, :, ring:], mode="drop") for n, x in carry.stats.items()}
    carry = cache._written(carry, cache._place(), layer, target, packed(rows, carry.kv.dtype), in_order)
    return carry.replace(stats=stats), archived.at[layer].set(moved.archived)

  carry, archived = jax.lax.fori_loop(0, len(cache.kv), body, (cache.layer_carry(), cache.archived))
  lost = jnp.sum(cache.archived - archived, axis=(0, 2)) + jnp.sum(evicted & ~cache.evicted, axis=(0, 2, 3))
  return cache._after(carry, archived=archived, evicted=evicted).without_idle_pages(), lost
