"""Prompts of a `Generator`: several rows read in one call, each as if it were alone.

Every call reads the next chunk of up to `PromptReader.rows` prompts, and fewer leave rows empty. Its width T and the
pages that it knows follow from each prompt's own length, and only prompts with equal ones share a call. So a prompt is
read by the same programs whatever is read beside it.

A prompt is read `together` with others only if pages for all its tokens are free for certain (`Claims`);
otherwise `alone`, from a pool that grows if the budget allows it. Smaller chunks, which claim fewer pages, are a last
resort, for a request that has the whole pool to itself: they sum in another order than whole ones.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from dms_jax import spmd
from dms_jax.cache import PagedCache, ShardedCache
from dms_jax.cache import rows as cache_rows
from dms_jax.cache.base import Plan, Usage
from dms_jax.decoder import Model
from dms_jax.generation.conversation import place_like
from dms_jax.generation.layerwise import reads_apart, run_layers, unbroken
from dms_jax.generation.pages import PagedRows
from dms_jax.generation.prefill import Chunk, read_prompts
from dms_jax.generation.results import ChainUsage, add_prompts
from dms_jax.metrics import Counts, count
from dms_jax.model import StepOutput, cached_forward, end_chunk, last_logits
from dms_jax.policies import Policy
from dms_jax.policies.base import capacity_of, with_numbers
from dms_jax.processes import fetch, replicated
from dms_jax.spmd import on_mesh

PLACES = 8  # least pages of a head that a prompt's program knows
LEAST_WIDTH = 16  # least width of a chunk's program
MOST_ROWS = 64  # most prompts of a call by default: more bring no speed


def _prefill_rows(
  model: Model, policy: Policy, cache: PagedCache | ShardedCache, rows: Int[np.ndarray, "R"],
  tokens: Int[np.ndarray, "R T"], lengths: Int[np.ndarray, "R"], remaining: Int[np.ndarray, "R"],
  logits: Float[Array, "B V"], *, places: int,
) -> tuple[PagedCache | ShardedCache, Float[Array, "B V"], Bool[Array, "R"], Counts]:  # fmt: skip
  """`layerwise.read_chunk` for the rows `rows`, those past the last row being none; on a mesh R rows of each pool.

  It consumes `cache` and `logits`.
  """
  if not reads_apart(model, policy, tokens.shape):
    return _whole(model, policy, cache, rows, tokens, lengths, remaining, logits, places=places)
  part, others = _take(cache, rows, places=places)
  head, part, plan, x, layers = run_layers(model, policy, part, tokens, lengths, remaining)
  cache, part = others.replace(store=part.store), part.replace(store=None)
  return _put(head, cache, part, plan, x, layers, rows, remaining, logits)


@partial(jax.jit, static_argnames="places", donate_argnames=("cache", "logits"))
@on_mesh(spmd.CACHE, spmd.ROWS, spmd.ROWS, spmd.COUNTS)
def _whole(
  model: Model, policy: Policy, cache: PagedCache, rows: Int[Array, "R"], tokens: Int[Array, "R T"],
  lengths: Int[Array, "R"], remaining: Int[Array, "R"], logits: Float[Array, "B V"], *, places: int,
) -> tuple[PagedCache, Float[Array, "B V"], Bool[Array, "R"], Counts]:  # fmt: skip
  """`_prefill_rows` in one program."""
  part = cache_rows.take_rows(cache, rows, places)
  out, part = cached_forward(model, policy, part, tokens, lengths, remaining=remaining)
  return _results(model, cache, part, out, rows, remaining, logits)


@partial(jax.jit, static_argnames="places", donate_argnames="cache")
def _take(cache: PagedCache, rows: Int[Array, "R"], *, places: int) -> tuple[PagedCache, PagedCache]:
  """(the rows `rows` with the pool, `cache` without its pool)."""
  return cache_rows.take_rows(cache, rows, places), cache.replace(store=None)


@partial(jax.jit, donate_argnames=("cache", "logits"))
def _put(
  model: Model, cache: PagedCache, part: PagedCache, plan: Plan, x: Float[Array, "R T D"],
  layers: list[tuple[Any, Usage]], rows: Int[Array, "R"], remaining: Int[Array, "R"], logits: Float[Array, "B V"],
) -> tuple[PagedCache, Float[Array, "B V"], Bool[Array, "R"], Counts]:  # fmt: skip
  """The end of `_prefill_rows` after all layers: `part` is without its pool, which `cache` has."""
  out, part = end_chunk(part.replace(store=cache.store), plan, x, layers)
  return _results(model, cache, part, out, rows, remaining, logits)


def _results(
  model: Model, cache: PagedCache, part: PagedCache, out: StepOutput, rows: Array, remaining: Array, logits: Array
) -> tuple[PagedCache, Array, Array, Counts]:
  """What `_prefill_rows` returns, from the later state `part` of its rows."""
  ended = (out.lengths > 0) & (remaining == 0)
  logits = logits.at[jnp.where(ended, rows, len(logits))].set(last_logits(model, out), mode="drop")
  return cache_rows.put_rows(cache, rows, part), logits, out.stalled, count(out.seen)


@dataclasses.dataclass(frozen=True)
class Prompt:
  """A prompt to be read into an empty row, or one that continues what the row holds.

  Attributes:
    row: where it is read.
    ids: its tokens, int32.
    numbers: of the policy.
    usage: filled in for the prompt.
    before: tokens that the row holds already.
  """

  row: int
  ids: np.ndarray
  numbers: dict[str, int | float]
  usage: ChainUsage
  before: int = 0


def default_rows(width: int) -> int:
  """Prompts that one call reads in a batch of `width` rows: a 64th of them, because so many rows end in a block."""
  return min(max(width // 64, 1), MOST_ROWS)


class PromptReader:
  """Reads prompts into the rows of a paged cache.

  Args:
    model: in its fastest form.
    policy: with scalar numbers, which those of the prompts replace.
    memory: the rows.
    chunk: most tokens of a prompt that one call reads.
    rows: most prompts that one call reads.
  """

  def __init__(self, model: Model, policy: Policy, memory: PagedRows, chunk: int, rows: int):
    self.model, self.policy, self.memory, self.chunk, self.rows = model, policy, memory, chunk, rows

  def no_logits(self, width: int) -> Float[Array, "B V"]:
    """A place for the logits after the prompts of `width` rows."""
    return place_like(self.model, np.zeros((width, self.model.config.vocab_size), np.float32))

  def claims(self, free: int) -> Claims:
    """Nothing claimed yet of `free` pages of a pool."""
    return Claims(self, free)

  def least(self, tokens: int, chains: int) -> int:
    """Pages below which reading a prompt alone is hardly worth a try: of its first chunk, and one a head and chain."""
    return self.memory.own.row_pages(min(tokens, self.chunk), least=1) + self.memory.pool_heads * (chains - 1)

  def together(self, prompts: Sequence[Prompt], logits: Float[Array, "B V"]) -> tuple[Float[Array, "B V"], list]:
    """Reads prompts that are certain to find pages (`Claims`); waits for nothing.

    Returns:
      (logits, replaced for the prompts' rows; what `account` takes).
    """
    left, first, pending = list(prompts), 0, []
    while left:
      calls: dict[tuple[int, int], list[Prompt]] = {}
      for prompt in left:
        calls.setdefault(self._shape(prompt, first, min(len(prompt.ids) - first, self.chunk)), []).append(prompt)
      for (width, places), alike in calls.items():
        for part in self._parts(alike):
          lengths = [min(len(prompt.ids) - first, self.chunk) for prompt in part]
          chunks = [prompt.ids[first : first + length] for prompt, length in zip(part, lengths, strict=True)]
          after = [len(prompt.ids) - first - length for prompt, length in zip(part, lengths, strict=True)]
          logits, stalled, counts = self._call(part, chunks, after, width, places, logits)
          pending.append((part, self._places_of(part), stalled, counts))
      first += self.chunk
      left = [prompt for prompt in left if len(prompt.ids) > first]
    return logits, pending

  def alone(
    self, prompt: Prompt, logits: Float[Array, "B V"], enlarge: Callable[[int], bool], halve: bool
  ) -> tuple[Float[Array, "B V"], bool]:
    """Reads one prompt; (logits, whether all of it was read).

    If not, pages ran out and the row is half read.

    Args:
      enlarge: finds so many more free pages; false if it finds none.
      halve: read smaller chunks where pages lack for whole ones; they round otherwise.
    """
    heads, size, total = self.memory.pool_heads, self.memory.own.page_size, len(prompt.ids)
    place = self._places_of([prompt])

    def read(first: int, length: int, width: int | None = None) -> np.ndarray:
      nonlocal logits
      whole, places = self._shape(prompt, first, length)
      chunk, after = prompt.ids[first : first + length], total - first - length
      logits, stalled, counts = self._call([prompt], [chunk], [after], width or whole, places, logits)
      account([([prompt], place, None, counts)])
      return fetch(stalled)[place]

    def feed(part: Chunk) -> np.ndarray:
      return read(int(part.start[0]), int(part.lengths[0]), 1 if part.tokens.shape[1] == 1 else None)

    find = lambda lengths: enlarge(heads * -(-int(lengths[0]) // size))
    if halve:
      done = read_prompts([prompt.ids], self.chunk, feed, enlarge=find)
      return logits, bool(done[0] == total)
    for first in range(0, total, self.chunk):
      length = min(total - first, self.chunk)
      while read(first, length).any():
        if not find(np.array([length])):
          return logits, False
    return logits, True

  def _call(
    self, prompts: Sequence[Prompt], chunks: Sequence[np.ndarray], after: Sequence[int], width: int, places: int, logits
  ) -> tuple[Any, Any, Counts]:
    """One call for some prompts: (logits, which rows had no space, counts), by `_places_of` the prompts."""
    count, own = self.rows * self.memory.pools, self.memory.pool_rows
    rows, tokens = np.full(count, own, np.int32), np.zeros((count, width), np.int32)
    lengths, remaining = np.zeros(count, np.int32), np.zeros(count, np.int32)
    numbers = [prompts[0].numbers] * count
    for prompt, place, chunk, left in zip(prompts, self._places_of(prompts), chunks, after, strict=True):
      rows[place], lengths[place], remaining[place] = prompt.row % own, len(chunk), left
      tokens[place, : len(chunk)], numbers[place] = chunk, prompt.numbers
    policy = with_numbers(self.policy, {name: [own[name] for own in numbers] for name in numbers[0]})
    with unbroken():
      self.memory.cache, logits, stalled, counts = _prefill_rows(
        self.model, policy, self.memory.cache, rows, tokens, lengths, remaining, logits, places=places
      )
    return logits, *replicated((stalled, counts))

  def _parts(self, prompts: Sequence[Prompt]) -> Iterator[list[Prompt]]:
    """The prompts of one call after another: up to `rows` of each pool."""
    pools = [[p for p in prompts if p.row // self.memory.pool_rows == pool] for pool in range(self.memory.pools)]
    for start in range(0, max(map(len, pools)), self.rows):
      yield [prompt for pool in pools for prompt in pool[start : start + self.rows]]

  def _places_of(self, prompts: Sequence[Prompt]) -> list[int]:
    """The row of a call that reads each of its prompts: those of pool p begin at p * `rows`."""
    places, following = [], [pool * self.rows for pool in range(self.memory.pools)]
    for prompt in prompts:
      pool = prompt.row // self.memory.pool_rows
      places.append(following[pool])
      following[pool] += 1
    return places

  def _shape(self, prompt: Prompt, first: int, length: int) -> tuple[int, int]:
    """(width, pages of a head) of the program that reads `length` tokens of a prompt from its token `first`.

    The width is that of a whole chunk, a quarter or a 16th of it: few compilations.
    """
    widths = (-(-self.chunk // 16), -(-self.chunk // 4), self.chunk)
    width = next(width for width in widths if width >= min(max(length, LEAST_WIDTH), self.chunk))
    return width, self._places(prompt.before + first + length)

  def _places(self, tokens: int) -> int:
    """Pages a head may need for `tokens` tokens, rounded up to PLACES times a power of 4: few compilations."""
    cache = self.memory.own
    needed, most = -(-tokens // cache.page_size), PLACES
    while most < needed:
      most *= 4
    return min(most, cache.table.pages.shape[3])


@dataclasses.dataclass
class Claims:
  """Prompts that surely find pages in one pool, counted one by one.

  Attributes:
    free: pages of the pool that no row owns.
    taken: the most pages that the prompts counted so far take.
    found: their number.
  """

  reader: PromptReader
  free: int
  taken: int = 0
  found: int = 0
  _most: int = 0

  def add(self, tokens: int, chains: int, numbers: Mapping[str, Any]) -> bool:
    """Counts a prompt in if it surely finds pages, too.

    Args:
      tokens, chains: of the prompt, and that share it.
      numbers: the policy's for them.
    """
    cache, heads, policy = self.reader.memory.own, self.reader.memory.pool_heads, self.reader.policy
    its = policy.replace(**numbers)
    slots = min(tokens, int(np.asarray(capacity_of(its, tokens)).max())) if its.compacts else tokens
    own = cache.row_pages(slots, tokens)
    copied = own if policy.rewrites else min(own, heads)
    if cache.sliding is not None and not policy.rewrites:  # pages of sliding layers are not shared
      copied = min(own, heads + cache.row_pages(0, tokens))
    needed = own + (chains - 1) * copied
    if policy.exact_prefill:  # rows find room by equal shares of the free pages
      if tokens > self.reader.chunk:
        return False
      needed = max(self._most, needed)
      taken = needed * (self.found + 1)
    else:
      taken = self.taken + needed
    if taken > self.free:
      return False
    self.found, self.taken, self._most = self.found + 1, taken, needed
    return True


def account(pending: list[tuple[Sequence[Prompt], Sequence[int], Any, Counts]]) -> None:
  """Adds what calls have read and held to the usage of their prompts, by the row of the call that read each.

  Raises:
    RuntimeError: a prompt that was certain to find pages found none.
  """
  found = fetch([(stalled, counts) for *_, stalled, counts in pending])
  for (prompts, places, *_), (stalled, counts) in zip(pending, found, strict=True):
    if stalled is not None and stalled[places].any():
      raise RuntimeError("a prompt found no page, though pages for all its tokens were counted as free")
    live, reads, held = counts.live[:, places], counts.reads[:, places], counts.held[:, places]
    add_prompts([prompt.usage for prompt in prompts], counts.replace(live=live, reads=reads, held=held))
