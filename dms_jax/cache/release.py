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

from dms_jax import bisection
from dms_jax.cache.base import packed
from dms_jax.cache.compact import moves
from dms_jax.cache.paged import PagedCache
from dms_jax.collectives import summed


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
  count = summed(jnp.sum(scores < jnp.inf, axis=(0, 2, 3)))
  given = (count.astype(jnp.float32) * share).astype(jnp.int32)
  keys = bisection.keys(scores)
  below = lambda key: summed(jnp.sum(keys < key[:, None, None], axis=(0, 2, 3)))
  least = bisection.highest(lambda key: below(key) <= given, len(given))  # number `given` of the row, from 0
  return jnp.where(given > 0, bisection.numbers(least), -jnp.inf)


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
  return cache._after(carry, archived=archived, evicted=evicted).without_idle_pages(), summed(lost)
