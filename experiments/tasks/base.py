"""What a task is, the registry of tasks, and what tasks share: questions and shots sampled by a seed.

A task is one frozen dataclass in one file. Its fields are its settings, and each becomes a flag: `--needle.keys=4`.
There are two kinds. A `LikelihoodTask` has the model score given continuations of a text; a `WritingTask` has it write
after a prompt, and grades what it wrote.
"""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Mapping, Sequence
from typing import ClassVar, Literal, TypeVar

from dms_jax.evaluation.likelihood import Question
from dms_jax.tokenizer import Tokenizer

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
  """What both kinds of task have.

  `chance`: the score of random answers, for the metrics that have one. `floor`: the score of the baseline below which
  other methods' scores say little.
  """

  name: ClassVar[str]
  metrics: ClassVar[tuple[str, ...]]
  chance: ClassVar[Mapping[str, float]] = {}
  floor: ClassVar[float | None] = None

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
class Prompt:
  """A prompt's text and ids, and the strings by which what is written after it is graded."""

  text: str
  tokens: list[int]
  references: tuple[str, ...]


class WritingTask(Task):
  """Has a model write up to `new_tokens` tokens after each prompt, and grades the text.

  The prompts of a `sized` task are made for a length; those of any other task have the length that they have.
  """

  new_tokens: ClassVar[int]
  sized: ClassVar[bool] = False

  def prompts(self, config: TasksConfig, tokenizer: Tokenizer, length: int, max_positions: int) -> list[Prompt]:
    """The prompts of this task.

    Args:
      length: T of a sized task.
      max_positions: the model's context, which holds the prompt and what is written.

    Raises:
      ValueError: data or a length that cannot be used; names the flag.
    """
    raise NotImplementedError

  def grade(self, text: str, prompt: Prompt) -> dict[str, float]:
    """{metric: value} of a text written after a prompt."""
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
