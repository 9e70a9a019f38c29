"""Seconds of a chain where as many chains as fit a fixed cache memory are written together."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from dms_jax import BudgetError
from dms_jax.model import Model
from dms_jax.tokenizer import Tokenizer
from experiments.hyperscaling.cells import Cell
from experiments.methods.method import Method
from experiments.methods.records import Record
from experiments.methods.run import Job
from experiments.methods.write import write

FILL = 0.9  # share of the memory that the tokens of full rows may take; the rest is for pages that are partly empty
BATCHES = 2  # chains that are timed, in full batches


class _WarmUp(Exception):
  """Everything is compiled."""


class _Ungraded:
  """A task whose texts are not graded, which would be part of the time."""

  def __init__(self, task: Any):
    self.stop = task.stop

  def grades(self, written: Sequence[Any]) -> list[dict[str, float]]:
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


def rows(model: Model, cell: Cell, memory: int, least: int, most: int) -> int:
  """The rows of a batch: as many as hold their mean peak in FILL of `memory` bytes, from `least` to `most`."""
  cfg = model.config
  token = 2 * cfg.num_layers * cfg.num_kv_heads * cfg.head_dim * model.params["embed"].dtype.itemsize
  return int(min(max(FILL * memory / (token * float(cell.peak.mean())), least), most))


def seconds_a_chain(
  job: Job, method: Method, most: int, cell: Cell, tokenizer: Tokenizer, memory: int, width: int,
  tick: Callable[[int], None],
) -> dict[str, float]:  # fmt: skip
  """Writes BATCHES full batches of a job's chains, compiled before; nothing is graded or recorded.

  Args:
    most: L, the most new tokens.
    cell: the records of the same chains, which say how many tokens they hold.
    memory: bytes of the cache.
    width: most rows of a batch.

  Returns:
    seconds (of a chain: wall-clock over chains), chains timed, rows of a batch.
  """
  batch = rows(method.model, cell, memory, job.chains, width)
  timed = dataclasses.replace(job, task=_Ungraded(job.task), max_tokens=(most,))
  wanted = timed.keys[: max(BATCHES * batch, job.chains)]
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
  return {"seconds": (time.perf_counter() - start) / count, "chains": count, "rows": batch}
