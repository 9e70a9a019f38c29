"""Runs tasks over an original and its retrofits, on the same samples, and keeps what was paired together."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np

from dms_jax.evaluation import likelihood
from dms_jax.metrics import achieved_cr
from dms_jax.model import Model
from dms_jax.tokenizer import Tokenizer
from experiments.tasks import get, retrieval
from experiments.tasks.base import LikelihoodTask, Question, RetrievalTask, TasksConfig

FIELDS = (
  "task",
  "length",
  "number",
  "references",
  "tokens",
  "question",
  "answer",
)  # of a sample's record, beside names
ASKED = 60.0  # a retrieval task says something of a retrofit where the original finds at least this share, per cent

Progress = Callable[..., Iterable]


@dataclasses.dataclass(frozen=True)
class Method:
  """A model under comparison, by a name of its own; dense without gates, or with `threshold` infinite."""

  name: str
  model: Model
  threshold: float = 0.0


@dataclasses.dataclass(frozen=True)
class Job:
  """One task, at one length where it has lengths, with everything that is asked, of questions as `likelihood.lay_out`
  has it."""

  task: LikelihoodTask | RetrievalTask
  length: int | None
  asked: list[Question] | list[retrieval.Prompt]
  rows: list[likelihood.Passage] = dataclasses.field(default_factory=list)
  spans: list[list[likelihood.Span]] = dataclasses.field(default_factory=list)


@dataclasses.dataclass(frozen=True)
class Outcome:
  """One method's results: each metric's value for every sample, its cache at the end, what to keep of each sample.

  `held` int [L, rows, K] (None: dense) of `seen` int [rows] tokens.
  """

  values: dict[str, np.ndarray]
  held: np.ndarray | None
  seen: np.ndarray
  samples: list[dict[str, Any]]

  @property
  def cr(self) -> float:
    return 1.0 if self.held is None else float(achieved_cr(self.held, self.seen))


def check_names(names: Sequence[str]) -> None:
  """Raises ValueError unless every model can be told from the others, and from the fields of a sample's record."""
  taken = [*FIELDS, *names]
  if twice := sorted({name for name in names if taken.count(name) > 1}):
    raise ValueError(
      f"--retrofit, --thresholds: {twice} would be the name of several things in the results; list each once, and a "
      "folder of such a name by its full path"
    )


def prepare(config: TasksConfig, lengths: Sequence[int], tokenizer: Tokenizer, max_positions: int) -> list[Job]:
  """Reads and lays out everything that will be asked, so that bad input ends the run before any model is loaded.

  Raises:
    ValueError: unknown tasks, data that is missing or malformed, or a text longer than the model's context.
  """
  jobs = []
  for task in [get(name) for name in config.tasks]:
    if isinstance(task, RetrievalTask):
      for length in lengths:
        jobs.append(Job(task, length, retrieval.prompts(task, config, tokenizer, length, max_positions)))
      continue
    questions = task.questions(config)
    if not questions:
      raise ValueError(f"--data.{task.name} holds no question")
    rows, spans = likelihood.lay_out(questions, tokenizer)
    if (longest := max(len(row.tokens) for row in rows)) > max_positions:
      raise ValueError(
        f"--shots.{task.name}: a question with its shots has {longest} tokens; the model's context is {max_positions}"
      )
    jobs.append(Job(task, None, questions, rows, spans))
  return jobs


def standard_error(values: np.ndarray) -> float:
  """Of the mean of independent samples; nan for fewer than two."""
  return float(values.std(ddof=1) / math.sqrt(len(values))) if len(values) > 1 else math.nan


def _likelihoods(job: Job, methods: Sequence[Method], batch: int, progress) -> list[Outcome]:
  models = [(c.model, None if c.model.dms is None else c.threshold) for c in methods]
  outcomes = []
  for scored in likelihood.score(models, job.rows, batch=batch, progress=progress):
    each = [
      likelihood.scores(question, [scored[row].logprobs[part] for row, part in span])
      for question, span in zip(job.asked, job.spans, strict=True)
    ]
    each = [{name: values[name] for name in job.task.metrics} for values in each]
    held = None if scored[0].held is None else np.stack([s.held for s in scored], axis=1)
    values = {name: np.array([e[name] for e in each]) for name in job.task.metrics}
    outcomes.append(Outcome(values, held, np.array([len(row.tokens) for row in job.rows]), each))
  return outcomes


def _retrievals(job: Job, methods: Sequence[Method], tokenizer: Tokenizer, batch: int, progress) -> list[Outcome]:
  outcomes = []
  for method in methods:
    written = retrieval.write(
      method.model, tokenizer, job.asked, job.task.new_tokens, threshold=method.threshold, batch=batch,
      progress=progress,
    )  # fmt: skip
    found = [retrieval.share_found(t, p.references) for t, p in zip(written.texts, job.asked, strict=True)]
    values = {"score": 100 * np.array(found)}
    samples = [{"score": 100 * f, "text": t} for f, t in zip(found, written.texts, strict=True)]
    held = None if method.model.dms is None else written.held
    outcomes.append(Outcome(values, held, written.seen, samples))
  return outcomes


def compare(job: Job, methods: Sequence[Method], outcomes: Sequence[Outcome]) -> list[dict[str, Any]]:
  """A row for each metric and retrofit (one without a retrofit where there is none): means and standard errors, of the
  original, of the retrofit, and of original minus retrofit sample by sample."""
  original, rows = outcomes[0], []
  for name, before in original.values.items():
    row: dict[str, Any] = {
      "task": job.task.name, "length": job.length, "metric": name, "samples": len(before),
      "mean_tokens": float(original.seen.mean()), "original": float(before.mean()),
      "original_se": standard_error(before),
    }  # fmt: skip
    if isinstance(job.task, RetrievalTask):
      row["original_at_least_60"] = row["original"] >= ASKED
    if len(outcomes) == 1:
      rows.append(row)
    for method, outcome in zip(methods[1:], outcomes[1:], strict=True):
      after = outcome.values[name]
      rows.append({
        **row, "retrofit": method.name, "threshold": method.threshold, "score": float(after.mean()),
        "score_se": standard_error(after), "difference": float((before - after).mean()),
        "difference_se": standard_error(before - after), "achieved_cr": outcome.cr,
      })  # fmt: skip
  return rows


def run(
  jobs: Sequence[Job], methods: Sequence[Method], tokenizer: Tokenizer, *, batch: int = 1,
  progress: Progress = lambda items, desc="": items,
) -> Iterator[tuple[list[dict[str, Any]], list[dict[str, Any]]]]:  # fmt: skip
  """For each job (rows of `compare`, one record a sample).

  Args:
    methods: the original first.
    batch: rows at a time.
    progress: wraps the iteration over batches, `desc` saying of what.

  Raises:
    ValueError: two methods have one name.
  """
  check_names([method.name for method in methods])
  for job in jobs:
    where = job.task.name if job.length is None else f"{job.task.name} {job.length}"
    shown = lambda items, where=where: progress(items, desc=where)
    if isinstance(job.task, RetrievalTask):
      outcomes = _retrievals(job, methods, tokenizer, batch, shown)
    else:
      outcomes = _likelihoods(job, methods, batch, shown)
    samples = []
    for number, asked in enumerate(job.asked):
      record: dict[str, Any] = {"task": job.task.name, "length": job.length, "number": number}
      if isinstance(asked, retrieval.Prompt):
        record |= {"references": asked.references, "tokens": len(asked.tokens)}
      else:
        record |= {"question": asked.context.rsplit("\n\n", 1)[-1], "answer": asked.choices[asked.answer]}
      for method, outcome in zip(methods, outcomes, strict=True):
        record[method.name] = outcome.samples[number]
      samples.append(record)
    yield compare(job, methods, outcomes), samples
