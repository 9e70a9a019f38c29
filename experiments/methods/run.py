"""Runs methods on tasks: every method answers the same prompts, and each answer becomes a record."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence

from dms_jax.evaluation import likelihood
from dms_jax.tokenizer import Tokenizer
from experiments.common import program
from experiments.methods.method import Method as Method
from experiments.methods.method import check_names
from experiments.methods.records import Record
from experiments.methods.score import score
from experiments.methods.write import write
from experiments.tasks.base import LikelihoodTask, Prompt, Question, Task, TasksConfig, WritingTask


@dataclasses.dataclass(frozen=True)
class Job:
  """One task, at one length if it has lengths, with its prompts or questions and their fingerprint `content`.

  Each prompt gets `chains` texts, sampled at `temperature` and `top_p` with keys from `seed`. A text has at most
  `max_tokens` new tokens; each of several numbers gets records of its own.
  """

  task: LikelihoodTask | WritingTask
  length: int | None
  asked: Sequence[Question] | Sequence[Prompt]
  seed: int = 0
  content: str = ""
  chains: int = 1
  temperature: float = 0.0
  top_p: float = 1.0
  max_tokens: tuple[int, ...] = (0,)
  passages: tuple[Sequence[likelihood.Passage], Sequence[list[likelihood.Span]]] = ((), ())

  @property
  def name(self) -> str:
    return self.task.name if self.length is None else f"{self.task.name} {self.length}"

  @property
  def keys(self) -> list[tuple[int, int, int]]:
    """(prompt, chain, most new tokens) of every record that a method makes."""
    return [(n, c, most) for n in range(len(self.asked)) for c in range(self.chains) for most in self.max_tokens]

  def totals(self, most: int) -> list[int]:
    """Tokens of each text with `most` new ones; for questions those of each passage."""
    if self.passages[0]:
      return [len(passage.tokens) for passage in self.passages[0]]
    return [len(prompt.tokens) + most for prompt in self.asked]

  def work(self, method: Method, prompt: int, most: int) -> int:
    """The most tokens read and written for a record: a chain of `most` new ones, or a question's passages.

    A chain that is the start of a longer one costs 0.
    """
    if self.passages[0]:
      return sum(len(self.passages[0][row].tokens) for row in {row for row, _ in self.passages[1][prompt]})
    part = most < max(self.max_tokens) and not method.given.follows_length
    return 0 if part else len(self.asked[prompt].tokens) + most


def settings_of(job: Job, method: Method) -> str:
  """`Record.settings` for a method's records of a job."""
  return f"{job.content}-{method.checkpoint}"


def prepare(
  tasks: Sequence[Task], config: TasksConfig, lengths: Sequence[int], tokenizer: Tokenizer, max_positions: int,
  max_tokens: Sequence[int] = (),
) -> list[Job]:  # fmt: skip
  """Reads and lays out all prompts and questions; bad input thus ends a run before any model is loaded.

  Args:
    max_tokens: L of the tasks that write; none: each task's own.

  Raises:
    ValueError: data that is missing or malformed, or a text longer than the model's context.
  """
  jobs = []
  for task in tasks:
    if isinstance(task, WritingTask):
      most = tuple(sorted(set(max_tokens))) or (task.new_tokens,)
      for length in lengths if task.sized else (None,):
        room = (most[-1],) if task.sized else ()
        prompts = task.prompts(config, tokenizer, length, max_positions, *room)
        if not prompts:
          raise ValueError(f"--{task.name}.data holds no problem")
        longest = max(len(prompt.tokens) for prompt in prompts)
        if longest + most[-1] > max_positions:
          raise ValueError(
            f"--max_tokens={most[-1]}: a prompt of {task.name} has {longest} tokens, and the model's context is "
            f"{max_positions}; give at most --max_tokens={max_positions - longest}"
          )
        about = [config.temperature, *((prompt.text, prompt.references) for prompt in prompts)]
        about += [{"top_p": config.top_p}] if config.top_p < 1 and config.temperature else []
        about += [{"stop": task.stop}] if task.stop else []
        about += [{name: getattr(task, name) for name in task.graded_by}] if task.graded_by else []
        jobs.append(Job(
          task, length, prompts, config.seed, program.fingerprint(about), max(config.chains), config.temperature,
          config.top_p, most,
        ))  # fmt: skip
      continue
    questions = task.questions(config)
    if not questions:
      raise ValueError(f"--{task.name}.data holds no question")
    passages = likelihood.lay_out(questions, tokenizer)
    if (longest := max(len(passage.tokens) for passage in passages[0])) > max_positions:
      raise ValueError(
        f"--{task.name}.shots: a question with its shots has {longest} tokens; the model's context is {max_positions}"
      )
    jobs.append(Job(task, None, questions, config.seed, program.fingerprint(questions), passages=passages))
  return jobs


def check(job: Job, method: Method) -> str:
  """Checks that a method can do a job; returns a remark about its budgets, "" for none.

  Raises:
    ValueError: the policy cannot keep to its budget.
  """
  remarks = [method.fitted(job, most)[1] for most in job.max_tokens]
  return "; ".join(dict.fromkeys(filter(None, remarks)))


def missing(job: Job, method: Method, done: Sequence[Record]) -> list[tuple[int, int, int]]:
  """(prompt, chain, most new tokens) of the records that are not in `done` yet."""
  own = *method.key, job.task.name, job.length, job.chains, job.seed
  about = lambda r: (*r.cell, r.chains, r.seed)
  there = {(record.prompt, record.chain, record.max_tokens) for record in done if about(record) == own}
  return [key for key in job.keys if key not in there]


def run(
  job: Job, methods: Sequence[Method], tokenizer: Tokenizer, *, batch: int = 1, width: int = 8,
  memory: int | None = None, done: Sequence[Record] = (), tick: Callable[[str, int], None] = lambda what, tokens: None,
) -> Iterator[list[Record]]:  # fmt: skip
  """Yields the records of one job as they are made, method by method.

  Args:
    batch: rows that are scored together.
    width: rows that write together; least: the chains of a prompt.
    memory: most bytes of the cache of the rows that write; None: unlimited.
    done: records that exist already; these chains are not written again.
    tick: called between steps with the name of the job and method, and the tokens that unfinished chains have written.

  Raises:
    ValueError: two methods have one name and budget, or a method cannot do this task.
  """
  check_names(methods)
  for method in methods:
    wanted = missing(job, method, done)
    if not wanted:
      continue

    def record(prompt: int, chain: int, most: int, method: Method = method, **found) -> Record:
      return Record(
        method.name, job.task.name, job.length, method.budget, chains=job.chains, max_tokens=most, seed=job.seed,
        prompt=prompt, chain=chain, settings=settings_of(job, method), **found,
      )  # fmt: skip

    shown = lambda tokens, method=method: tick(f"{job.name}, {method.label}", tokens)
    if isinstance(job.task, WritingTask):
      yield from write(job, method, wanted, tokenizer, record, width=width, memory=memory, tick=shown)
    else:
      yield from score(job, method, wanted, record, batch=batch, tick=shown)
