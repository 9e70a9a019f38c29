"""The owners of a pool's pages: a stack of free pages and a count of owners a page, in the graph.

This module counts pages by number; `PagedCache` stores what they hold. Chains of one prompt share its full pages, so a
page may have several owners. A page without owners is free.
"""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Bool, Int


@struct.dataclass
class Pool:
  """Free pages and owners.

  Attributes:
    free: int32 [P], a stack of page numbers; its first `count` entries are the free pages.
    count: int32 [], free pages.
    owners: int32 [P], owners of each page, 0 for a free page.
  """

  free: jax.Array
  count: jax.Array
  owners: jax.Array

  @classmethod
  def create(cls, pages: int) -> Pool:
    """All pages free; the lowest numbers are handed out first."""
    return cls(jnp.arange(pages, dtype=jnp.int32)[::-1], jnp.int32(pages), jnp.zeros(pages, jnp.int32))

  @property
  def pages(self) -> int:
    """P, the number of pages. As a page number, P means no page."""
    return self.free.shape[0]

  @partial(jax.jit, static_argnames="pages")
  def grow(self, pages: int) -> Pool:
    """The same pool with `pages` pages, the new ones free.

    Raises:
      ValueError: the pool has more pages.
    """
    extra = pages - self.pages
    if extra < 0:
      raise ValueError(f"cannot shrink a pool of {self.pages} pages to {pages}")
    # New pages go below the free pages on the stack, so that free pages with lower numbers are handed out first.
    new = jnp.arange(self.pages, pages, dtype=jnp.int32)[::-1]
    return Pool(jnp.concatenate([new, self.free]), self.count + extra, jnp.pad(self.owners, (0, extra)))


def take(pool: Pool, wanted: Bool[Array, "*slots"]) -> tuple[Pool, Int[Array, "*slots"]]:
  """Takes one free page for each True of `wanted`, in order.

  Returns:
    (pool, page numbers int32), P where no page was wanted or none was left.
  """
  rank = jnp.cumsum(wanted.ravel(), dtype=jnp.int32).reshape(wanted.shape) - 1
  given = wanted & (rank < pool.count)
  pages = jnp.where(given, pool.free[jnp.clip(pool.count - 1 - rank, 0, pool.pages - 1)], pool.pages)
  owners = pool.owners.at[pages].set(1, mode="drop")
  return pool.replace(count=pool.count - jnp.sum(given, dtype=jnp.int32), owners=owners), pages


def share(pool: Pool, pages: Int[Array, "*slots"]) -> Pool:
  """Adds an owner to a page for each time that `pages` lists it; P is ignored."""
  return pool.replace(owners=pool.owners.at[pages.ravel()].add(1, mode="drop"))


def give_back(pool: Pool, pages: Int[Array, "*slots"]) -> Pool:
  """Removes an owner from a page for each time that `pages` lists it; a page without owners is free. P is ignored."""
  left = jnp.zeros_like(pool.owners).at[pages.ravel()].add(1, mode="drop")
  owners = pool.owners - left
  freed = (left > 0) & (owners == 0)
  place = jnp.where(freed, pool.count + jnp.cumsum(freed, dtype=jnp.int32) - 1, pool.pages)
  free = pool.free.at[place].set(jnp.arange(pool.pages, dtype=jnp.int32), mode="drop")
  return Pool(free, pool.count + jnp.sum(freed, dtype=jnp.int32), owners)
