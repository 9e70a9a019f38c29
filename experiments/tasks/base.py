"""What a task is, the registry of tasks, and what tasks share: questions and shots sampled by a seed.

A task is one frozen dataclass in one file. Its fields are its settings, and each becomes a flag: `--needle.keys=4`.
There are two kinds. A `LikelihoodTask` has the model score given continuations of a text; a `RetrievalTask` has it read
a long text and write what was hidden there.
"""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Callable, Mapping, Sequence
from typing import ClassVar, Literal, TypeVar

from dms_jax.evaluation.likelihood import Question

T = TypeVar("T")
TASKS: dict[str, type[Task]] = {}


def register(cls: type[T]) -> type[T]:
  """Class decorator: makes a task a frozen dataclass and available by its lower-case class name."""
  cls.name = cls.__name__.lower()
  TASKS[cls.name] = cls = dataclasses.dataclass(frozen=True)(cls)
  return cls


def get(name: str) -> type[Task]:
  """The task class called `name`.

  Raises:
    ValueError: there is none; lists those there are.
  """
  if name not in TASKS:
    raise ValueError(f"--tasks: unknown task {name!r}; there are {', '.join(TASKS)}")
  return TASKS[name]


@dataclasses.dataclass(frozen=True)
class TasksConfig:
  """Which tasks, and how many samples of each; `seed` fixes every choice.

  `limit` samples of each task and length are used; 0 takes the whole data set, or 500 generated samples. `template`
  decides how retrieval prompts are put: "chat" as a user's message with the answer's first words already written (as
  RULER does for instruct models), "raw" as plain text (as it does for base models), "auto" by whether the tokenizer has
  a chat template. Likelihood tasks are always plain text, as in lm-evaluation-harness.
  """

  tasks: tuple[str, ...] = ()
  limit: int = 0
  seed: int = 42
  template: Literal["auto", "chat", "raw"] = "auto"

  def __post_init__(self):
    if self.limit < 0:
      raise ValueError(f"--limit={self.limit} must be 0 (everything) or more")


class Task:
  """What both kinds of task have. `chance`: the score of random answers in a metric, where there is such a score."""

  name: ClassVar[str]
  metrics: ClassVar[tuple[str, ...]]
  chance: ClassVar[Mapping[str, float]] = {}

  def least(self, **bounds: int) -> None:
    """Raises ValueError, naming the flag, where a setting is below its bound."""
    for setting, bound in bounds.items():
      if (value := getattr(self, setting)) < bound:
        raise ValueError(f"--{self.name}.{setting}={value} must be {bound} or more")


class LikelihoodTask(Task):
  """Scores given continuations; `metrics` are names of `dms_jax.evaluation.likelihood.scores`."""

  def questions(self, config: TasksConfig) -> list[Question]:
    """The questions asked, each after its shots.

    Raises:
      ValueError: data that is missing or malformed; names the flag.
    """
    raise NotImplementedError


@dataclasses.dataclass(frozen=True)
class Haystack:
  """A prompt of any length: `prompt(n)` hides the same things among n units of noise, from `smallest` units on.

  The answer begins with `prefix`; a right one names every one of `references`.
  """

  prompt: Callable[[int], str]
  prefix: str
  references: tuple[str, ...]
  smallest: int


class RetrievalTask(Task):
  """Writes up to `new_tokens` tokens after a long text; the score is the share of references in them, per cent."""

  metrics = ("score",)
  new_tokens: ClassVar[int]

  def sample(self, rng: random.Random, length: int, fit: Callable) -> Haystack:
    """One text with its question, meant for a prompt of `length` tokens.

    Args:
      fit: `fit(build, limit, smallest)` is the most units n of noise, at least `smallest`, for which `build(n)` has no
        more than `limit` tokens.
    """
    raise NotImplementedError


# Choices by seed ------------------------------------------------------------------------------------------------------


def sampled(count: int, config: TasksConfig) -> list[int]:
  """Which of `count` records are asked: all in their order, or `limit` of them sampled by the seed."""
  if not config.limit or config.limit >= count:
    return list(range(count))
  return sorted(random.Random(f"{config.seed} questions").sample(range(count), config.limit))


def shots_of(records: Sequence[T], question: int, shots: int, task: str, seed: int) -> list[T]:
  """Worked examples for record number `question`: others, sampled by the seed and the record's number alone.

  Raises:
    ValueError: there are too few; names the flag.
  """
  if shots >= len(records):
    raise ValueError(f"--{task}.shots={shots} needs more records than the {len(records)} of --{task}.data")
  picked = random.Random(f"{seed} shots {question}").sample(range(len(records) - 1), shots)
  return [records[i + (i >= question)] for i in picked]
