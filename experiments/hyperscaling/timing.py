"""Seconds of a chain where as many chains as fit a fixed cache memory are written together.

A cell's *batch* is as many rows as fit the memory if each holds what a chain of the cell holds at its peak, but no more
than the task has chains. A timed cell writes chains in such a batch, which stays full: three times as many as it has
rows are asked for, and the clock stops when none of them waits to begin. Wall-clock without compilation, over the
tokens written meanwhile, is the seconds of a token; prompts and the host's work have their share in it. A chain takes
these seconds for each token that a chain of the cell writes, mean over all of its chains.

Few cells are timed. The batches of a method fill the same memory, so that a step reads as much cache whatever the cell.
What else a step takes is a constant and a share for each row. So its seconds are a line in the rows, and those of the
other cells are interpolated over the rows, between timed cells of the method of whatever task, CR and L.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence

import jax
import numpy as np

from dms_jax import BudgetError
from dms_jax import cache as caches
from dms_jax.cache import PagedCache
from dms_jax.tokenizer import Tokenizer
from experiments.hyperscaling.cells import Cell
from experiments.methods.method import Method
from experiments.methods.records import Record
from experiments.methods.run import Job
from experiments.methods.stopwatch import ChainTimes
from experiments.methods.write import chain_keys, generator_of, longest_text

ROUNDS = 2  # batches that begin while a cell is timed, beside the first


def too_wide(error: ValueError) -> bool:
  """Whether `write` refused a width because its empty rows alone exceed the memory."""
  cause = error.__context__
  return isinstance(cause, BudgetError) and cause.ticket is None


def narrowing(begin: Callable[[int], Iterator[list[Record]]], width: int, least: int) -> Iterator[list[Record]]:
  """What `begin(width)` yields, at half the width where its empty rows exceed the memory, down to `least`.

  Args:
    begin: starts or continues the work at a width; it knows what was yielded before.
  """
  while True:
    try:
      yield from begin(width)
      return
    except ValueError as error:
      if not too_wide(error) or width // 2 < least:
        raise
    width //= 2


def row_bytes(cache: PagedCache, cell: Cell) -> float:
  """Bytes of the cache that a chain takes at its peak, mean over the chains of a cell.

  They are its ring, its tables, and the pages of its heads, the last of which is half full on average.

  Args:
    cache: empty, of the method that wrote the cell; shapes are enough.
  """
  (layers, width, heads), ring = cache.archived.shape, cache.window + 1
  chains = cell.chains
  once = cell.shared * (chains - 1) / chains  # of the prompt: the chains of a problem share its pages
  archived = np.maximum(cell.peak - np.minimum(cell.peak, ring) - once, 0)
  pages = layers * heads * float(np.mean(archived / cache.page_size + 0.5))
  return cache.fixed_bytes / width + max(pages, layers * heads) * cache.page_bytes


def rows_that_fit(job: Job, method: Method, most: int, cell: Cell, memory: int) -> int:
  """Rows of the batch in which a cell's chains are written.

  Args:
    most: L, the most new tokens.
    cell: the records of the chains, which say how many tokens they hold.
    memory: bytes of the cache.
  """
  group, _ = method.fitted(job, most)
  longest = longest_text(job, method, group, most)

  def empty() -> PagedCache:
    size = dict(batch=job.chains, capacity=group.policy.window + 2, longest=longest)
    cache = caches.for_model(method.model, group.policy, kind="paged", **size)
    assert isinstance(cache, PagedCache), "a sweep is timed on one device"
    return cache

  fitting = int(memory / row_bytes(jax.eval_shape(empty), cell))
  return max(min(fitting, len(job.asked) * job.chains), job.chains)


def spread(rows: Sequence[int], count: int) -> list[int]:
  """The numbers of the `count` cells that are timed, given the rows of a method's cells: evenly over log rows.

  Those with the fewest and the most rows are always among them; of cells with equal rows the first.
  """
  order = sorted(range(len(rows)), key=lambda number: (rows[number], number))
  if len(order) <= count:
    return order
  wanted = np.linspace(np.log(rows[order[0]]), np.log(rows[order[-1]]), max(count, 2))
  nearest = [min(order, key=lambda number: abs(np.log(rows[number]) - at)) for at in wanted]
  return list(dict.fromkeys(nearest))


def interpolated(rows: float, timed: Sequence[tuple[int, float]]) -> float:
  """Seconds of a step of `rows` rows from timed ones, (rows, seconds): lines between them, level beyond their ends."""
  found: dict[int, list[float]] = {}
  for own, seconds in timed:
    found.setdefault(own, []).append(seconds)
  places = sorted(found)
  return float(np.interp(rows, places, [np.mean(found[place]) for place in places]))


def new_tokens(job: Job, cell: Cell) -> float:
  """Tokens that a chain of a cell writes, mean over its chains; the last one of a chain is never read."""
  return float(np.mean(cell.tokens)) - float(np.mean([len(prompt.tokens) for prompt in job.asked])) + 1


def step_seconds(
  job: Job, method: Method, most: int, rows: int, tokenizer: Tokenizer, memory: int, tick: Callable[[int], None]
) -> dict[str, float]:  # fmt: skip
  """Writes chains of a cell in a batch that stays full, and times its steps; nothing is graded or recorded.

  The sweep's chains begin in order, and where they are too few their prompts again with other keys.

  Args:
    rows: of the batch; halved while its empty rows alone exceed the memory.
    memory: bytes of the cache.
    tick: called after each decode block with the tokens written so far.

  Returns:
    rows, step_seconds, and what they are from: tokens written in how many timed_seconds, without compilation.
  """
  timed = dataclasses.replace(job, max_tokens=(most,))
  group, _ = method.fitted(timed, most)
  while True:
    try:
      generator = generator_of(timed, method, group, tokenizer, most, rows, memory)
      break
    except ValueError as error:
      if not too_wide(error) or rows // 2 < job.chains:
        raise
      rows //= 2
  times, count = ChainTimes(generator), -(-(1 + ROUNDS) * rows // job.chains)
  for number in range(count):
    again, place = divmod(number, len(group.rows))
    prompt, chains = group.rows[place], range(again * job.chains, (again + 1) * job.chains)
    request = dict(chains=job.chains, key=chain_keys(timed, prompt, chains), **group.of_row(place))
    if not number:
      times.warm_up(job.asked[prompt].tokens, most, **request)
    generator.submit(job.asked[prompt].tokens, max_new_tokens=most, **request)
  tokens = 0
  while generator.waiting:
    tokens += sum(len(new) for _, _, new, _ in times.step())
    tick(tokens)
  seconds = times.watch.seconds
  return {"rows": rows, "step_seconds": seconds * rows / tokens, "tokens": tokens, "timed_seconds": seconds}
