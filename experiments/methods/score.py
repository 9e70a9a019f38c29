"""Scores given texts under a method: questions of likelihood tasks, and a long text in chunks."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from dms_jax.evaluation import likelihood
from dms_jax.evaluation.text import text_quality
from dms_jax.masks import causal_reads
from dms_jax.metrics import achieved_cr
from dms_jax.model import Model
from dms_jax.policies import DMS, Policy, Vanilla
from dms_jax.spmd import rounded_rows
from experiments.methods.budgets import Budget, fitted
from experiments.methods.method import Method
from experiments.methods.records import Record
from experiments.methods.stopwatch import Stopwatch


def masked(policy: Policy, budget: Budget) -> float | Policy | None:
  """None or a threshold if a mask on the whole text gives the same scores as a cache under `policy`, else `policy`.

  A budget needs a cache, be it the policy's own or `budget`.
  """
  if isinstance(policy, Vanilla):
    return None
  if type(policy) is DMS and policy.window is None and not (policy.bounded or policy.steady or budget.given):
    return float(policy.limit)
  return policy


def score(
  job: Any, method: Method, wanted: Sequence[tuple[int, int, int]], record: Callable[..., Record], *, batch: int,
  tick: Callable[[int], None],
) -> Iterator[list[Record]]:  # fmt: skip
  """Scores questions, `batch` at a time, the longest first; on a mesh as many more as its devices need for equal parts.

  All questions of the job decide the blocks and their shapes; a resumed run thus gives the same numbers.
  """
  passages, spans = job.passages
  limit = masked(method.policy, method.given)
  group = fitted(method.model, method.policy, method.given, job.totals(0))[0] if isinstance(limit, Policy) else None
  rows_of = [sorted({row for row, _ in own}) for own in spans]
  longest = [max(len(passages[row].tokens) for row in rows) for rows in rows_of]
  order = sorted(range(len(spans)), key=lambda number: -longest[number])
  lacking, batch = {number for number, _, _ in wanted}, rounded_rows(method.model, batch)
  for start in range(0, len(order), batch):
    block = order[start : start + batch]
    if not lacking.intersection(block):
      continue
    rows = [row for number in block for row in rows_of[number]]
    watch, own_limit = Stopwatch(), limit if group is None else group.at(rows).batched()
    with watch.running():
      scored = _scored(method.model, own_limit, rows, passages, batch)
    seconds = watch.seconds / len(block) if watch.compiling < 0.01 * watch.seconds else None
    found = []
    for number in sorted(lacking.intersection(block)):
      question, own = job.asked[number], rows_of[number]
      grades = likelihood.scores(question, [scored[row].logprobs[part] for row, part in spans[number]])
      tokens = np.array([len(passages[row].tokens) for row in own])
      held = None if limit is None else np.stack([scored[row].held for row in own], axis=1)
      found.append(record(
        number, 0, 0, tokens=float(tokens.mean()), reads=None, peak=None,
        achieved_cr=1.0 if held is None else float(achieved_cr(held, tokens)),
        grades={metric: grades[metric] for metric in job.task.metrics}, seconds=seconds,
      ))  # fmt: skip
    yield found
    tick(0)


def _scored(
  model: Model, limit: float | Policy | None, rows: list[int], passages: Sequence[likelihood.Passage], batch: int
) -> dict[int, likelihood.Scored]:
  (found,) = likelihood.score([(model, limit)], [passages[row] for row in rows], batch=batch, shaped_like=passages)
  return dict(zip(rows, found, strict=True))


def score_text(
  original: Model, method: Method, chunks: np.ndarray, wanted: Sequence[int],
  record: Callable[..., Record], *, batch: int, tick: Callable[[int], None],
) -> Iterator[list[Record]]:  # fmt: skip
  """Scores chunks of texts: `nll` and `kl` = KL(original || method), nats per token; lower is better.

  Args:
    chunks: int [n, T].
    wanted: their numbers; blocks of `batch` chunks are scored together, the same in a resumed run.
    batch: on a mesh as many more as its devices need for equal parts.
  """
  length, batch = chunks.shape[1], rounded_rows(original, batch)
  limit = masked(method.policy, method.given)
  if isinstance(limit, Policy):
    group, _ = fitted(method.model, method.policy, method.given, [length])
    settings: dict[str, Any] = {"model": method.model, "policy": group.policy}
    if steady := getattr(group.policy, "steady", 0):  # the chunks change no score
      settings["chunk"] = min(steady, length)
  elif limit is None:
    settings = {"model": None if method.model is original else method.model}
  else:
    settings = {"model": method.model, "threshold": limit}
  for start in range(0, len(chunks), batch):
    block = range(start, min(start + batch, len(chunks)))
    if not set(block).intersection(wanted):
      continue
    part = chunks[start : block.stop].reshape(-1)
    found = text_quality(original, tokens=part, length=length, batch=batch, **settings)["by_chunk"]
    held = found.get("held", np.full(len(block), length))
    reads = found.get("reads", np.full(len(block), causal_reads(length)))
    nll = found.get("nll", found["nll_original"])
    kl = found.get("kl", np.zeros(len(block)))
    yield [
      record(
        number, 0, 0, tokens=length, reads=float(reads[i]), peak=None, achieved_cr=float(length / held[i]),
        grades={"nll": float(nll[i]), "kl": float(kl[i])},
      )
      for i, number in enumerate(block)
      if number in wanted
    ]  # fmt: skip
    tick(0)
