"""A growing cache's next size, for which decode steps are compiled before a row needs it."""

from __future__ import annotations

import concurrent.futures
from collections.abc import Callable, Iterable
from concurrent.futures import Future

import jax
import numpy as np
from jaxtyping import Int

from dms_jax.cache import Cache
from dms_jax.policies import Policy

AHEAD = 4  # blocks of decode steps; on two cores SmolLM2's steps compile for a new size in about so many

_compiling = concurrent.futures.ThreadPoolExecutor(1, thread_name_prefix="compiling")


class Growth:
  """Grows a cache while its rows write, as `Cache.ensure_capacity` does.

  Each new size is a new shape, whose programs take seconds to compile. The size is therefore settled AHEAD blocks
  early, and a thread compiles for it while steps go on. A text that ends within these blocks has compiled in vain.
  """

  def __init__(self, policy: Policy, most: int, lower: Callable[[Cache], Iterable[jax.stages.Lowered]] | None):
    """`most`: tokens of the longest text. `lower`: programs of a cache by its shapes; None: nothing is ever ahead."""
    self._policy, self._most, self._lower = policy, most, lower
    self._next: tuple[int, Future] | None = None

  def fit(self, cache: Cache, coming: Int[np.ndarray, "B"], left: Int[np.ndarray, "B"]) -> Cache:
    """The cache with places for the next `coming` tokens of each row, of which at most `left` will come in all."""
    if self._lower is None:
      return cache.ensure_capacity(self._policy, coming, self._most)
    needed = self._size(cache, coming)
    if needed > cache.size and self._next is not None:
      (size, compiled), self._next = self._next, None
      compiled.result()
      cache = cache.resized(size, self._most)
      needed = self._size(cache, coming)
    cache = cache.resized(needed, self._most)
    if self._next is None and (size := self._size(cache, np.minimum(AHEAD * coming, left))) > cache.size:
      shapes = jax.eval_shape(lambda cache: cache.resized(size, self._most), cache)
      self._next = size, _compiling.submit(_compile, list(self._lower(placed(shapes, cache))))
    return cache

  def _size(self, cache: Cache, coming: Int[np.ndarray, "B"]) -> int:
    return cache.size_for(self._policy, coming, self._most)


def placed(shapes, like: Cache):
  """`shapes` where the arrays of `like` are committed to be, as calls find their programs by it, too."""
  kept = like.seen
  sharding = kept.sharding if getattr(kept, "committed", True) else None  # shapes are where they say
  return jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding, weak_type=x.weak_type), shapes
  )


def _compile(programs: list[jax.stages.Lowered]) -> None:
  for program in programs:
    program.compile()
