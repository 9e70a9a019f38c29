"""Runs methods on tasks: every method answers the same prompts, and each answer becomes a record."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from dms_jax.evaluation import likelihood
from dms_jax.execution import fastest_form
from dms_jax.metrics import achieved_cr
from dms_jax.model import Model
from dms_jax.policies import DMS, Policy, Vanilla
from dms_jax.tokenizer import Tokenizer
from experiments.common import program
from experiments.methods.records import Record
from experiments.tasks import retrieval
from experiments.tasks.base import LikelihoodTask, Prompt, Question, Task, TasksConfig, WritingTask

Progress = Callable[..., Iterable]


@dataclasses.dataclass(frozen=True)
class Method:
  """A named model under a policy; `checkpoint` is the fingerprint of the checkpoint that it was loaded from."""

  name: str
  model: Model
  policy: Policy = Vanilla()  # noqa: RUF009  (frozen)
  checkpoint: str = ""

  @property
  def budget(self) -> dict[str, float]:
    """The bound on its cache, under the policy's own names."""
    found = {name: getattr(self.policy, name, None) for name in ("budget", "cr", "threshold")}
    return {name: float(value) for name, value in found.items() if value is not None and math.isfinite(value)}


@dataclasses.dataclass(frozen=True)
class Job:
  """One task, at one length if it has lengths, with its prompts or questions and their fingerprint `content`.

  Each prompt gets `chains` texts, sampled at `temperature` with keys from `seed`.
  """

  task: LikelihoodTask | WritingTask
  length: int | None
  asked: Sequence[Question] | Sequence[Prompt]
  seed: int = 0
  content: str = ""
  chains: int = 1
  temperature: float = 0.0

  @property
  def name(self) -> str:
    return self.task.name if self.length is None else f"{self.task.name} {self.length}"


def settings_of(job: Job, method: Method) -> str:
  """`Record.settings` for a method's records of a job."""
  return f"{job.content}-{method.checkpoint}"


def check_names(names: Sequence[str]) -> None:
  """Raises ValueError if two methods have the same name."""
  if twice := sorted({name for name in names if names.count(name) > 1}):
    raise ValueError(
      f"--retrofit, --thresholds: {twice} would be the name of several methods in the results; list each once, and a "
      "folder of such a name by its full path"
    )


def prepare(
  tasks: Sequence[Task], config: TasksConfig, lengths: Sequence[int], tokenizer: Tokenizer, max_positions: int
) -> list[Job]:
  """Reads and lays out all prompts and questions, so that bad input ends the run before any model is loaded.

  Raises:
    ValueError: data that is missing or malformed, or a text longer than the model's context.
  """
  jobs = []
  for task in tasks:
    if isinstance(task, WritingTask):
      for length in lengths if task.sized else (None,):
        prompts = task.prompts(config, tokenizer, length, max_positions)
        content = program.fingerprint([config.temperature, *((prompt.text, prompt.references) for prompt in prompts)])
        jobs.append(Job(task, length, prompts, config.seed, content, config.chains, config.temperature))
      continue
    questions = task.questions(config)
    if not questions:
      raise ValueError(f"--{task.name}.data holds no question")
    passages, _ = likelihood.lay_out(questions, tokenizer)
    if (longest := max(len(passage.tokens) for passage in passages)) > max_positions:
      raise ValueError(
        f"--{task.name}.shots: a question with its shots has {longest} tokens; the model's context is {max_positions}"
      )
    jobs.append(Job(task, None, questions, config.seed, program.fingerprint(questions)))
  return jobs


def _record(job: Job, method: Method, prompt: int, chain: int, **found) -> Record:
  """The record of one answer."""
  most = job.task.new_tokens if isinstance(job.task, WritingTask) else 0
  return Record(
    method.name, job.task.name, job.length, method.budget, chains=job.chains, max_tokens=most, seed=job.seed,
    prompt=prompt, chain=chain, settings=settings_of(job, method), **found,
  )  # fmt: skip


def _score(
  job: Job, method: Method, wanted: Sequence[tuple[int, int]], tokenizer: Tokenizer, batch: int, progress: Progress
) -> Iterator[list[Record]]:
  """Scores all questions at once, so that batches have passages of similar length."""
  questions = [job.asked[number] for number, _ in wanted]
  passages, spans = likelihood.lay_out(questions, tokenizer)
  policy = method.policy
  if isinstance(policy, Vanilla):
    policy = None
  elif isinstance(policy, DMS) and policy.window is None and not policy.bounded:
    policy = policy.threshold  # a mask on the whole text gives the same scores as a cache
  (scored,) = likelihood.score([(method.model, policy)], passages, batch=batch, progress=progress)
  found = []
  for (number, chain), question, own in zip(wanted, questions, spans, strict=True):
    grades = likelihood.scores(question, [scored[passage].logprobs[part] for passage, part in own])
    read = sorted({passage for passage, _ in own})
    tokens = np.array([len(passages[passage].tokens) for passage in read])
    held = None if policy is None else np.stack([scored[passage].held for passage in read], axis=1)
    found.append(_record(
      job, method, number, chain, tokens=float(tokens.mean()), reads=None, peak=None,
      achieved_cr=1.0 if held is None else float(achieved_cr(held, tokens)),
      grades={metric: grades[metric] for metric in job.task.metrics},
    ))  # fmt: skip
  yield found


def _write(
  job: Job, method: Method, wanted: Sequence[tuple[int, int]], tokenizer: Tokenizer, batch: int, progress: Progress
) -> Iterator[list[Record]]:
  """Writes `batch` chains at a time, so that a killed run loses little."""
  key_of = lambda number, chain: jax.random.fold_in(jax.random.fold_in(jax.random.key(job.seed), number), chain)
  model = fastest_form(method.model)
  for start in progress(range(0, len(wanted), batch)):
    part = wanted[start : start + batch]
    prompts = [job.asked[number] for number, _ in part]
    out = retrieval.write(
      model, tokenizer, prompts, job.task.new_tokens, policy=method.policy, batch=batch, temperature=job.temperature,
      keys=jnp.stack([key_of(*each) for each in part]) if job.temperature else None,
    )  # fmt: skip
    yield [
      _record(
        job, method, number, chain, tokens=int(out.seen[row]), reads=float(out.reads[row]), peak=float(out.peak[row]),
        achieved_cr=float(achieved_cr(out.held[:, row : row + 1], out.seen[row : row + 1])),
        grades=job.task.grade(out.texts[row], prompts[row]), text=out.texts[row],
      )
      for row, (number, chain) in enumerate(part)
    ]  # fmt: skip


def run(
  job: Job, methods: Sequence[Method], tokenizer: Tokenizer, *, batch: int = 1, done: Sequence[Record] = (),
  progress: Progress = lambda items, desc="": items,
) -> Iterator[list[Record]]:  # fmt: skip
  """Yields the records of one job as they are made, method by method.

  Args:
    batch: rows at a time.
    done: records that exist already; these chains are not written again.
    progress: wraps the iteration over batches; `desc` names the job and method.

  Raises:
    ValueError: two methods have one name, or a method cannot do this task.
  """
  check_names([method.name for method in methods])
  answer = _write if isinstance(job.task, WritingTask) else _score
  for method in methods:
    own = method.name, job.task.name, job.length, method.budget, job.chains, job.seed
    about = lambda r: (r.method, r.task, r.length, r.budget, r.chains, r.seed)
    there = {(record.prompt, record.chain) for record in done if about(record) == own}
    chains = ((number, chain) for number in range(len(job.asked)) for chain in range(job.chains))
    wanted = [each for each in chains if each not in there]
    shown = lambda items, method=method: progress(items, desc=f"{job.name}, {method.name}")
    if wanted:
      yield from answer(job, method, wanted, tokenizer, batch, shown)
