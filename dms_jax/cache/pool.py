"""The owners of a pool's pages: a stack of free pages and a count of owners a page, in the graph.

Nothing here knows what a page holds. `PagedCache` keeps the pages; a page is shared where chains of one prompt refer to
it, and is free again when its last owner has let go.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Bool, Int


@struct.dataclass
class Pool:
  """`free` int32 [P], of which the first `count` (int32 []) are the free pages; `owners` int32 [P], 0 where free."""

  free: jax.Array
  count: jax.Array
  owners: jax.Array

  @classmethod
  def create(cls, pages: int) -> Pool:
    """All pages free; the lowest numbers are handed out first."""
    return cls(jnp.arange(pages, dtype=jnp.int32)[::-1], jnp.int32(pages), jnp.zeros(pages, jnp.int32))

  @property
  def pages(self) -> int:
    """P, also the number that stands for no page."""
    return self.free.shape[0]

  def grow(self, pages: int) -> Pool:
    """The same pool with `pages` pages, the new ones free."""
    extra = pages - self.pages
    if extra < 0:
      raise ValueError(f"cannot shrink a pool of {self.pages} pages to {pages}")
    # New pages go below the free ones of the stack, so that the old ones are handed out first.
    new = jnp.arange(self.pages, pages, dtype=jnp.int32)[::-1]
    return Pool(jnp.concatenate([new, self.free]), self.count + extra, jnp.pad(self.owners, (0, extra)))


def take(pool: Pool, wanted: Bool[Array, "*slots"]) -> tuple[Pool, Int[Array, "*slots"]]:
  """Hands out one page for each True, in order; P where none was wanted, or where none was left."""
  rank = jnp.cumsum(wanted.ravel(), dtype=jnp.int32).reshape(wanted.shape) - 1
  given = wanted & (rank < pool.count)
  pages = jnp.where(given, pool.free[jnp.clip(pool.count - 1 - rank, 0, pool.pages - 1)], pool.pages)
  owners = pool.owners.at[pages].set(1, mode="drop")
  return pool.replace(count=pool.count - jnp.sum(given, dtype=jnp.int32), owners=owners), pages


def share(pool: Pool, pages: Int[Array, "*slots"]) -> Pool:
  """One more owner for each of `pages`, as often as it stands there; P is no page."""
  return pool.replace(owners=pool.owners.at[pages.ravel()].add(1, mode="drop"))


def give_back(pool: Pool, pages: Int[Array, "*slots"]) -> Pool:
  """One owner less for each of `pages`; those without any are free again. P is no page."""
  left = jnp.zeros_like(pool.owners).at[pages.ravel()].add(1, mode="drop")
  owners = pool.owners - left
  freed = (left > 0) & (owners == 0)
  place = jnp.where(freed, pool.count + jnp.cumsum(freed, dtype=jnp.int32) - 1, pool.pages)
  free = pool.free.at[place].set(jnp.arange(pool.pages, dtype=jnp.int32), mode="drop")
  return Pool(free, pool.count + jnp.sum(freed, dtype=jnp.int32), owners)
