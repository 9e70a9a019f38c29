"""Seconds of a chain where as many chains as fit a fixed cache memory are written together."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from dms_jax import BudgetError
from dms_jax.generation.pages import PagedRows
from dms_jax.tokenizer import Tokenizer
from experiments.hyperscaling.cells import Cell
from experiments.methods.method import Method
from experiments.methods.records import Record
from experiments.methods.run import Job
from experiments.methods.write import generator_of, write


class _WarmUp(Exception):
  """Everything is compiled."""


class _Ungraded:
  """A task whose texts are not graded, which would be part of the time."""

  def __init__(self, task: Any):
    self.stop = task.stop

  def grades(self, written: Any) -> list[dict[str, float]]:
    return [{} for _ in written]

  def answer(self, text: str) -> None:
    return None


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


def row_bytes(rows: PagedRows, cell: Cell) -> float:
  """Bytes of the cache that a chain takes at its peak, mean over the chains of a cell.

  They are its ring, its tables, and the pages of its heads, the last of which is half full on average.

  Args:
    rows: empty, of the method that wrote the cell.
  """
  cache = rows.cache
  width, ring = cache.seen.shape[0], cache.window + 1
  chains = cell.chains
  once = cell.shared * (chains - 1) / chains  # of the prompt: the chains of a problem share its pages
  archived = np.maximum(cell.peak - np.minimum(cell.peak, ring) - once, 0)
  pages = rows.heads * float(np.mean(archived / cache.page_size + 0.5))
  return cache.fixed_bytes / width + max(pages, rows.heads) * cache.page_bytes


def seconds_a_chain(
  job: Job, method: Method, most: int, cell: Cell, tokenizer: Tokenizer, memory: int, problems: int,
  tick: Callable[[int], None],
) -> dict[str, float]:  # fmt: skip
  """Writes all chains of a job's first problems in the largest batch that fits; nothing is graded or recorded.

  What is compiled was compiled before. The largest batch holds as many chains as can be at their peaks together, so
  none has to wait on the host; it has all chains if the memory holds more.

  Args:
    most: L, the most new tokens.
    cell: the records of the same chains, which say how many tokens they hold.
    memory: bytes of the cache.
    problems: the same for all methods, so that they write the same chains.

  Returns:
    seconds (of a chain: wall-clock over chains), chains written, rows of a batch, and `full`: whether the batch was as
    large as fits, and not limited by the number of chains.
  """
  timed = dataclasses.replace(job, task=_Ungraded(job.task), max_tokens=(most,))
  wanted = [key for key in timed.keys if key[0] < problems]
  groups, _ = method.fitted(timed, most)
  empty = generator_of(timed, method, max(groups, key=lambda group: len(group.rows)), tokenizer, most, job.chains, None)
  fitting = int(memory / row_bytes(empty.memory, cell))
  del empty
  batch = max(min(fitting, len(wanted)), job.chains)
  made = lambda prompt, chain, most, **found: (prompt, chain)

  def warm(tokens: int) -> None:
    raise _WarmUp

  while True:
    begin = lambda ticks, batch=batch: write(
      timed, method, wanted, tokenizer, made, width=batch, memory=memory, tick=ticks
    )
    try:
      for _ in begin(warm):
        pass
    except _WarmUp:
      break
    except ValueError as error:
      if not too_wide(error) or batch // 2 < job.chains:
        raise
      batch //= 2
  start = time.perf_counter()
  count = sum(len(found) for found in begin(tick))
  seconds = (time.perf_counter() - start) / count
  return {"seconds": seconds, "chains": count, "rows": batch, "full": batch < len(wanted)}
