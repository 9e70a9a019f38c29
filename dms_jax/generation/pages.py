"""The memory of a `Generator`: a paged cache within a budget, and rows offloaded to the host."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from dms_jax.cache import PagedCache
from dms_jax.cache import rows as cache_rows
from dms_jax.cache.base import GROWTH
from dms_jax.cache.host import HostRow, offload_row, restore_row
from dms_jax.generation.prefill import Chunk, read_prompts
from dms_jax.generation.results import ChainUsage
from dms_jax.metrics import Counts, count
from dms_jax.model import Model, cached_forward, last_logits
from dms_jax.policies import Policy

PLACES = 8  # least pages of a head that a prompt's program knows


class BudgetError(ValueError):
  """A row needs more memory than the whole budget.

  `ticket`: the row's request; None where the empty rows of a new generator exceed the budget.
  """

  def __init__(self, message: str, ticket: int | None = None):
    super().__init__(message if ticket is None else f"ticket {ticket}: {message}")
    self.ticket = ticket


@partial(jax.jit, static_argnames="places", donate_argnames="cache")
def _prefill_row(
  model: Model, policy: Policy, cache: PagedCache, row: Int[Array, ""], tokens: Int[Array, "1 T"],
  length: Int[Array, "1"], remaining: Int[Array, "1"], *, places: int,
) -> tuple[PagedCache, Float[Array, "1 V"], Bool[Array, "1"], Counts]:  # fmt: skip
  """`decode.prefill_chunk` for one row: (cache, logits after the chunk, whether the row had no space, counts)."""
  one = cache_rows.take_row(cache, row, places)
  out, one = cached_forward(model, policy, one, tokens, length, remaining=remaining)
  return cache_rows.put_row(cache, row, one), last_logits(model, out), out.stalled, count(out.seen)


@jax.jit
def _usage(cache: PagedCache) -> tuple[Float[Array, ""], Int[Array, ""]]:
  return jnp.sum(jnp.mean(cache.live().astype(jnp.float32), axis=(0, 2))), cache.pages - cache.table.pool.count


class PagedRows:
  """The rows of a generator in one paged cache.

  Attributes:
    cache: the paged cache of B rows.
    budget: most bytes of the cache; None: unlimited.
    limit: most pages within the budget; None: unlimited.
  """

  def __init__(
    self, cache: PagedCache, *, budget: int | None = None, budget_tokens: int | None = None, pages: int | None = None
  ):
    """Takes an empty cache that has one page for each head of each row, and enlarges its pool.

    Args:
      budget_tokens: the budget as tokens that a head may hold outside the windows, summed over rows, mean over heads.
      pages: initial pages of the pool; default as many as fit the budget, or those of `cache` without a budget.

    Raises:
      ValueError: both budgets are given.
      BudgetError: the empty rows and `pages` exceed the budget.
    """
    if budget is not None and budget_tokens is not None:
      raise ValueError("give either budget= (bytes) or budget_tokens=")
    self.cache = cache
    if budget_tokens is not None:
      budget = cache.fixed_bytes + budget_tokens * self.heads // cache.page_size * cache.page_bytes
    least = max(cache.pages, pages or 0)
    self.budget = budget
    self.limit = None if budget is None else max((budget - cache.fixed_bytes) // cache.page_bytes, 0)
    if self.limit is not None and self.limit < least:
      raise BudgetError(
        f"budget={budget} bytes: {cache.seen.shape[0]} rows and {least} pages (one a head, or pages=) take "
        f"{cache.with_pages(least).nbytes}; give a larger budget or a smaller width"
      )
    self.cache = cache.with_pages(max(pages or self.limit or 0, cache.pages))

  @property
  def heads(self) -> int:
    """KV heads of all layers, which is the number of archives of a row."""
    layers, _, heads = self.cache.archived.shape
    return layers * heads

  @property
  def extent(self) -> str:
    """The budget in words."""
    cache = self.cache
    return f"budget={self.budget} bytes ({cache.pages} pages of {cache.page_size} slots for {self.heads} heads)"

  def usage(self) -> tuple[float, int]:
    """(tokens held by all rows, mean over layers and heads; pages in use, each shared page counted once)."""
    tokens, pages = jax.device_get(_usage(self.cache))
    return float(tokens), int(pages)

  def free_pages(self) -> int:
    """Pages that no row owns."""
    return int(self.cache.table.pool.count)

  def grow(self, lacking: int) -> bool:
    """Adds `lacking` pages or more to the pool; false if the old and the new pool together exceed the budget."""
    pages = max(self.cache.pages + lacking, int(self.cache.pages * GROWTH))
    if self.limit is not None:
      pages = min(pages, self.limit - self.cache.pages)  # the old pool exists until it is copied
      if pages < self.cache.pages + lacking:
        return False
    self.cache = self.cache.with_pages(pages)
    return True

  def reserve(self, slots: int, extra: int = 0) -> None:
    """Enlarges the pool, within the budget, to pages for `slots` slots of every head, and `extra` more in one row.

    A pool that is large enough from the start is not copied, and no program is compiled for its larger shape.
    """
    rows, size = self.cache.seen.shape[0], self.cache.page_size
    wanted = self.heads * (rows * -(-slots // size) + -(-extra // size))
    if self.limit is not None:
      wanted = min(wanted, self.limit)
    if wanted > self.cache.pages:
      self.cache = self.cache.with_pages(wanted)

  def read(
    self, model: Model, policy: Policy, row: int, ids: Int[np.ndarray, "T"], chunk: int, usage: ChainUsage
  ) -> Float[Array, "1 V"] | None:
    """Reads a prompt into a row; returns the logits after it. None: pages ran out, and the row is half read.

    Args:
      policy: for one row.
      usage: filled in for the prompt.
    """
    logits = None

    def feed(part: Chunk) -> np.ndarray:
      nonlocal logits
      places = self._places(int(self.cache.seen[row]) + int(part.lengths[0]))
      self.cache, logits, stalled, counts = _prefill_row(
        model, policy, self.cache, jnp.int32(row), part.tokens, part.lengths, part.remaining, places=places
      )
      counts = jax.device_get(counts)
      usage.prompt_held = int(counts.live.sum())
      usage.prompt_peak = max(usage.prompt_peak, int(counts.held.max()))
      usage.prompt_reads += int(counts.reads.sum(dtype=np.int64))
      return np.asarray(stalled)

    enlarge = lambda lengths: self.grow(self.heads * -(-int(lengths[0]) // self.cache.page_size))
    usage.prompt = int(self.cache.seen[row]) + len(ids)
    read = read_prompts([ids], chunk, feed, enlarge=enlarge)
    return logits if read[0] == len(ids) else None

  def _places(self, tokens: int) -> int:
    """Pages a head may need for `tokens` tokens, rounded up to a power of two of at least PLACES: few compilations."""
    most = self.cache.table.pages.shape[3]
    needed = max(-(-tokens // self.cache.page_size), PLACES)
    return min(1 << (needed - 1).bit_length(), most)

  def fork(self, row: int, others: list[int], whole: bool) -> bool:
    """Forks `row` into the empty rows `others`; false if pages ran out.

    `whole`: copy all pages, for a policy that writes into old pages.
    """
    mask = np.isin(np.arange(self.cache.seen.shape[0]), others)
    while others:
      self.cache, enough = cache_rows.fork_row(self.cache, jnp.int32(row), mask, whole=whole)
      if bool(enough):
        break
      pages = int(np.asarray(self.cache.table.owned[:, row]).sum()) if whole else self.heads
      if not self.grow(len(others) * pages):
        return False
    return True

  def free(self, rows: list[int]) -> None:
    """Empties rows and frees each page that no other row shares."""
    self.cache = cache_rows.free_rows(self.cache, np.isin(np.arange(self.cache.seen.shape[0]), rows))

  def offload(self, row: int) -> HostRow:
    """A copy of a row in host memory."""
    return offload_row(self.cache, row)

  def restore(self, row: int, stored: HostRow) -> bool:
    """Puts a host copy into an empty row; false if pages ran out."""
    while True:
      self.cache, enough = restore_row(self.cache, row, stored)
      if enough or not self.grow(len(stored.pages)):
        return enough
