"""Pruning of a ring cache: layers of due rows are cut, some at a time, in caches of one layer.

Rows become due at different times, so that in a large batch some are before nearly every step. A cut of all rows, over
all slots of their archives, would cost a multiple of the step: R-KV compares each key with each other.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool

from dms_jax.cache import chunk
from dms_jax.execution import Execution
from dms_jax.policies import Policy
from dms_jax.policies.base import of_places

if TYPE_CHECKING:
  from dms_jax.cache.ring import RingCache

# Layers of rows that are cut together: a SHARE-th of all, as about so many rows become due in a step, and LEAST or
# more, but no more than MOST slots of heads, each of which a policy may compare with 256 others at once; FEW under
# `Execution.small_cuts`. A fourth of the archives' slots has a program besides all, if it is LEAST_WIDTH or more.
SHARE, LEAST, MOST, FEW, LEAST_WIDTH = 32, 4, 2**18, 2**11, 256


def prune(cache: RingCache, policy: Policy, due: Bool[Array, "B"]) -> RingCache:
  """The cache after the policy's cut of the rows `due`, in archives as wide as the longest of them needs.

  Each layer of a row is cut as a row of its own. A GPU's host waits for the device before each turn of a loop, so the
  loops are few and short.
  """
  (_, b, heads), layers = cache.archived.shape, np.arange(len(cache.archived))
  if cache.sliding is not None:
    layers = layers[~np.array(cache.sliding.layers)]
  if not layers.size:
    return cache
  work, pairs = jnp.sum(due) * layers.size, b * layers.size
  most = FEW if Execution.choose().small_cuts else MOST
  first = jnp.argsort(~due, stable=True)  # the rows that are due come first
  longest = jnp.max(jnp.where(due[:, None], cache.archived, 0))

  def cut(archive, together, turn, cache):
    number = turn * together + jnp.arange(together)
    layer = jnp.asarray(layers)[number % layers.size]
    rows = jnp.where(number < work, jnp.take(first, number // layers.size, mode="clip"), b)
    own = cache._rows_of(layer, rows, archive)
    return cache._with_rows(layer, rows, chunk.pruned(own, of_places(policy, rows), layer, rows < b))

  # Loops of as many turns as there is work, most of none: XLA updates their carry in place, where a `cond` may copy the
  # cache.
  before = -1
  for archive in widths(cache):
    together = min(pairs, max(LEAST, min(pairs // SHARE, most // (heads * archive))))
    here = (longest > before) & (longest <= archive)
    turns = jnp.where(here, -(-work // together), 0)
    cache, before = jax.lax.fori_loop(0, turns, partial(cut, archive, together), cache), archive
  return cache


def widths(cache: RingCache) -> list[int]:
  """Slots of an archive for which a cut has a program of its own, ascending; the last are all."""
  slots, unit = cache.slots - cache.ring, cache._unit
  narrow = -(-slots // (4 * unit)) * unit
  return [narrow, slots] if LEAST_WIDTH <= narrow < slots else [slots]
