"""What a task is, its settings, and what tasks share: questions and shots drawn by a seed."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Callable, Sequence
from typing import Literal, TypeVar

from dms_jax.evaluation.likelihood import Question

T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class DataConfig:
  """Where the public data sets lie: HellaSwag's and GSM8K's file, MMLU's folder (with dev/ and test/)."""

  hellaswag: str = ""
  mmlu: str = ""
  gsm8k: str = ""


@dataclasses.dataclass(frozen=True)
class ShotsConfig:
  """Worked examples before each question."""

  hellaswag: int = 10
  mmlu: int = 5
  gsm8k: int = 5

  def __post_init__(self):
    for name, shots in vars(self).items():
      if shots < 0:
        raise ValueError(f"--shots.{name}={shots} must be 0 or more")


@dataclasses.dataclass(frozen=True)
class NeedleConfig:
  """Keys hidden in the text, values of each, and keys asked for (RULER's single, multi-key, -value and -query)."""

  keys: int = 1
  values: int = 1
  queries: int = 1

  def __post_init__(self):
    for name, value in vars(self).items():
      if value < 1:
        raise ValueError(f"--needle.{name}={value} must be 1 or more")
    if self.queries > self.keys:
      raise ValueError(f"--needle.queries={self.queries} asks for more keys than --needle.keys={self.keys}")
    if self.keys * self.values > 40:
      raise ValueError(
        f"--needle.keys={self.keys} x --needle.values={self.values}: there are 40 depths to hide them at"
      )


@dataclasses.dataclass(frozen=True)
class TrackingConfig:
  """Chains of assignments hidden in the text, and assignments that follow the first of each."""

  chains: int = 1
  hops: int = 4

  def __post_init__(self):
    for name, value in vars(self).items():
      if value < 1:
        raise ValueError(f"--tracking.{name}={value} must be 1 or more")


@dataclasses.dataclass(frozen=True)
class TasksConfig:
  """Which tasks, on how much of them; every choice is fixed by `seed`.

  `limit` samples of each task and length are drawn; 0 takes the whole data set, and 500 of the made-up ones. `template`
  decides how retrieval prompts are put: "chat" as a user's message with the answer's first words already written (as
  RULER does for instruct models), "raw" as plain text (as it does for base models), "auto" by whether the tokenizer has
  a chat template. Likelihood tasks are always plain text, as in lm-evaluation-harness.
  """

  tasks: tuple[str, ...] = ()
  limit: int = 0
  seed: int = 42
  template: Literal["auto", "chat", "raw"] = "auto"
  data: DataConfig = DataConfig()
  shots: ShotsConfig = ShotsConfig()
  needle: NeedleConfig = NeedleConfig()
  tracking: TrackingConfig = TrackingConfig()

  def __post_init__(self):
    if self.limit < 0:
      raise ValueError(f"--limit={self.limit} must be 0 (everything) or more")


@dataclasses.dataclass(frozen=True)
class LikelihoodTask:
  """`questions(config)` reads and lays out what is asked; `metrics` are those reported (see `likelihood.scores`)."""

  name: str
  metrics: tuple[str, ...]
  questions: Callable[[TasksConfig], list[Question]]


@dataclasses.dataclass(frozen=True)
class Haystack:
  """A prompt of any length: `prompt(n)` hides the same things among n units of noise, from `smallest` units on.

  The answer begins with `prefix`; right is what names every one of `references`.
  """

  prompt: Callable[[int], str]
  prefix: str
  references: tuple[str, ...]
  smallest: int


@dataclasses.dataclass(frozen=True)
class RetrievalTask:
  """`sample(config, rng, length, fit)` makes one, meant for a prompt of `length` tokens.

  `fit(build, limit, smallest)` is the most units of noise, at least `smallest`, of a text `build(n)` of `limit` tokens.
  """

  name: str
  new_tokens: int
  sample: Callable[..., Haystack]


# Choices by seed ------------------------------------------------------------------------------------------------------


def drawn(count: int, config: TasksConfig) -> list[int]:
  """Which of `count` records are asked: all in their order, or `limit` of them at random, by the seed."""
  if not config.limit or config.limit >= count:
    return list(range(count))
  return sorted(random.Random(f"{config.seed} questions").sample(range(count), config.limit))


def shots_of(records: Sequence[T], question: int, shots: int, flag: str, seed: int) -> list[T]:
  """Worked examples for record number `question`: others at random, by the seed and the record's number alone.

  Raises:
    ValueError: there are too few; names the flag.
  """
  if shots >= len(records):
    raise ValueError(f"--shots.{flag}={shots} needs more records than the {len(records)} of --data.{flag}")
  picked = random.Random(f"{seed} shots {question}").sample(range(len(records) - 1), shots)
  return [records[i + (i >= question)] for i in picked]
