"""Pruning of a ring cache: due rows are cut, a few at a time, in small caches of one layer.

Rows become due at different times, so that in a large batch some are before nearly every step. A cut of all rows, over
all slots of their archives, would cost a multiple of the step: R-KV compares each key with each other.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool

from dms_jax.cache import chunk
from dms_jax.policies import Policy
from dms_jax.policies.base import of_places

if TYPE_CHECKING:
  from dms_jax.cache.ring import RingCache

# Rows that are cut together: a 32nd of the batch, as about so many become due in a step, and LEAST_ROWS or more, as all
# may become due at once. A cut has programs for narrow archives, of at least LEAST_WIDTH slots.
SHARE, LEAST_ROWS, LEAST_WIDTH = 32, 4, 256


def prune(cache: RingCache, policy: Policy, due: Bool[Array, "B"]) -> RingCache:
  """The cache after the policy's cut of the rows `due`, in archives as wide as the longest of them needs."""
  (layers, b, _), count = cache.archived.shape, jnp.sum(due)
  together = max(b // SHARE, min(b, LEAST_ROWS))
  first = jnp.argsort(~due, stable=True)  # the rows that are due come first
  longest = jnp.max(jnp.where(due[:, None], cache.archived, 0))

  def cut(archive, step, cache):
    layer, place = step % layers, step // layers * together + jnp.arange(together)
    rows = jnp.where(place < count, jnp.take(first, place, mode="clip"), b)
    if cache.sliding is not None:  # no row of a layer that slides
      rows = jnp.where(cache.sliding.at(layer), b, rows)
    own = cache._rows_of(layer, rows, archive)
    return cache._with_rows(layer, rows, chunk.pruned(own, of_places(policy, rows), layer, rows < b))

  # Loops of as many steps as there is work, most of none: XLA updates their carry in place, where a `cond` may copy the
  # cache.
  before = -1
  for archive in widths(cache):
    here = (longest > before) & (longest <= archive)
    steps = jnp.where(here, -(-count // together) * layers, 0)
    cache, before = jax.lax.fori_loop(0, steps, partial(cut, archive), cache), archive
  return cache


def widths(cache: RingCache) -> list[int]:
  """Slots of an archive for which a cut has a program of its own, ascending; the last are all."""
  slots, unit = cache.slots - cache.ring, cache._unit
  narrow = {-(-slots // (part * unit)) * unit for part in (16, 4)}
  return [*sorted(width for width in narrow if LEAST_WIDTH <= width < slots), slots]
