"""Base classes and registry of tasks, and questions and shots sampled by a seed.

A task is one frozen dataclass in one file. Its fields are its settings, and each becomes a flag: `--needle.keys=4`.
There are two kinds. In a `LikelihoodTask` the model scores given continuations of a text. In a `WritingTask` it writes
after a prompt, and the task grades its text.
"""

from __future__ import annotations

import dataclasses
import math
import random
from collections.abc import Mapping, Sequence
from typing import ClassVar, Literal, TypeVar

from dms_jax.evaluation.likelihood import Question
from dms_jax.tokenizer import Tokenizer

T = TypeVar("T")
TASKS: dict[str, type[Task]] = {}


def register(cls: type[T]) -> type[T]:
  """Class decorator: makes a task a frozen dataclass and registers its `name`, by default its class's in lower case."""
  cls.name = vars(cls).get("name", cls.__name__.lower())
  TASKS[cls.name] = cls = dataclasses.dataclass(frozen=True)(cls)
  return cls


def get(name: str) -> type[Task]:
  """The task class called `name`.

  Raises:
    ValueError: there is no such task; the message lists all tasks.
  """
  if name not in TASKS:
    raise ValueError(f"--tasks: unknown task {name!r}; there are {', '.join(sorted(TASKS))}")
  return TASKS[name]


@dataclasses.dataclass(frozen=True)
class TasksConfig:
  """Which tasks run, and on how many samples; `seed` fixes every random choice.

  `limit`: samples of each task and length; 0 takes the whole data set, or 500 generated samples. `template` is the form
  of retrieval prompts. "chat" is a user's message with the answer's first words already written, as RULER does for
  instruct models. "raw" is plain text, as RULER does for base models. "auto" is "chat" if the tokenizer has a chat
  template, else "raw". Likelihood tasks are always plain text, as in lm-evaluation-harness.

  The model writes W chains for each prompt, W the largest of `chains`; for a smaller W the summary averages over
  subsets of them. Tokens are sampled at `temperature` from the fewest likeliest whose probabilities reach `top_p`;
  temperature 0 is greedy and ignores `top_p`. The paper samples Qwen3 at temperature 0.6 and top-p 0.95
  (arXiv 2506.05345, table 2), which DeepSeek recommends for its R1 models too.

  `allow_code` permits tasks that run programs written by the model.

  Attributes:
    tasks: names, separated by commas.
    limit: samples of each task and length; 0: the whole data set, or 500 generated samples.
    template: form of retrieval prompts; auto: chat where the tokenizer has a template.
    chains: W, texts written for each prompt, such as 1,2,4.
    allow_code: run programs that the model writes.
    temperature: of sampling; 0 is greedy and ignores top_p.
    top_p: sample from the fewest likeliest tokens whose probabilities reach it.
  """

  tasks: tuple[str, ...] = dataclasses.field(default=(), metadata={"choices": TASKS})
  limit: int = 0
  seed: int = 42
  template: Literal["auto", "chat", "raw"] = "auto"
  chains: tuple[int, ...] = (1,)
  temperature: float = 0.0
  top_p: float = 1.0
  allow_code: bool = False

  def __post_init__(self):
    if isinstance(self.chains, int):
      object.__setattr__(self, "chains", (self.chains,))
    for name in ("limit", "temperature"):
      if not 0 <= (value := getattr(self, name)) < math.inf:
        raise ValueError(f"--{name}={value} must be 0 or more, and finite")
    if twice := sorted({name for name in self.tasks if self.tasks.count(name) > 1}):
      raise ValueError(f"--tasks: {twice[0]} is listed twice")
    if min(self.chains, default=0) < 1:
      raise ValueError(f"--chains={','.join(map(str, self.chains))} must be 1 or more")
    if not 0 < self.top_p <= 1:
      raise ValueError(f"--top_p={self.top_p} must be above 0 and at most 1")
    if max(self.chains) > 1 and not self.temperature:
      raise ValueError(f"--chains={max(self.chains)} would be equal: give a --temperature above 0 to sample them")


class Task:
  """The common base of both kinds of task.

  `chance`: the score of random answers, for the metrics that have one. `floor`: differences from a baseline that scores
  below it say little.
  """

  name: ClassVar[str]
  metrics: ClassVar[tuple[str, ...]]
  chance: ClassVar[Mapping[str, float]] = {}
  floor: ClassVar[float | None] = None

  def least(self, **bounds: int) -> None:
    """Raises ValueError, naming the flag, if a setting is below its bound."""
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
  """A prompt's text and ids, and the reference strings for grading the text written after it."""

  text: str
  tokens: list[int]
  references: tuple[str, ...]


class WritingTask(Task):
  """Has a model write after each prompt, and grades the text.

  `new_tokens`: L, the most tokens of a text, unless `--max_tokens` says otherwise. `stop`: strings that end a text and
  are cut off. `best_of_all`: of several chains, one that is right makes the prompt right (pass@all, for programs);
  otherwise the chains vote by their `answer`. `graded_by`: settings that change grades, not prompts. `notes`: the words
  between which a text writes down what it will need, both included; None for texts without notes.

  Prompts of a `sized` task are made for a given length; the data decide the length of other prompts. The main metric of
  a task whose answers are right or wrong is "accuracy": 100 or 0.
  """

  new_tokens: ClassVar[int]
  stop: ClassVar[tuple[str, ...]] = ()
  best_of_all: ClassVar[bool] = False
  graded_by: ClassVar[tuple[str, ...]] = ()
  sized: ClassVar[bool] = False
  notes: ClassVar[tuple[str, str] | None] = None

  def prompts(self, config: TasksConfig, tokenizer: Tokenizer, length: int, max_positions: int) -> list[Prompt]:
    """The prompts of this task.

    Args:
      length: T of a sized task, whose `prompts` takes one more argument: the most new tokens, to leave room for.
      max_positions: the model's context, which holds the prompt and the text written.

    Raises:
      ValueError: data or a length that cannot be used; names the flag.
    """
    raise NotImplementedError

  def grade(self, text: str, prompt: Prompt) -> dict[str, float]:
    """{metric: value} of a text written after a prompt, per cent; a text that cannot be read is wrong, not an error."""
    raise NotImplementedError

  def grades(self, written: Sequence[tuple[str, Prompt]]) -> Sequence[dict[str, float]]:
    """`grade` of each (text, prompt); a task whose grading is slow may grade several at once."""
    return [self.grade(text, prompt) for text, prompt in written]

  def answer(self, text: str) -> str | None:
    """The answer that a text gives, in a canonical form: equal answers are equal strings.

    None if the text gives none, or if the task's answers cannot be compared.
    """
    return None


# Prompts --------------------------------------------------------------------------------------------------------------


def is_chat(tokenizer: Tokenizer, template: str) -> bool:
  """Whether prompts are chats under `--template`: "auto" is one if the tokenizer has a chat template."""
  return template == "chat" or (template == "auto" and bool(tokenizer.settings.get("chat_template")))


def framed(tokenizer: Tokenizer, template: str, prompt: str, prefix: str = "") -> str:
  """The text a model reads: `prompt` as a user's message or as it is, and the first words of the answer."""
  if is_chat(tokenizer, template):
    prompt = tokenizer.chat([{"role": "user", "content": prompt}])
  return prompt + prefix


# Choices by seed ------------------------------------------------------------------------------------------------------


def sampled(count: int, config: TasksConfig) -> list[int]:
  """Numbers of the records to ask: all `count` in order, or `limit` of them sampled by the seed."""
  if not config.limit or config.limit >= count:
    return list(range(count))
  return sorted(random.Random(f"{config.seed} questions").sample(range(count), config.limit))


def shots_of(records: Sequence[T], question: int, shots: int, task: str, seed: int) -> list[T]:
  """Worked examples for record number `question`: other records, sampled by the seed and that number.

  Raises:
    ValueError: there are too few records; the message names the flag.
  """
  if shots >= len(records):
    raise ValueError(f"--{task}.shots={shots} needs more records than the {len(records)} of --{task}.data")
  picked = random.Random(f"{seed} shots {question}").sample(range(len(records) - 1), shots)
  return [records[i + (i >= question)] for i in picked]


def after_shots(questions: Sequence[Question], shots: int, task: str, config: TasksConfig) -> list[Question]:
  """The questions to ask (`sampled`), each after `shots` others with their answers (`shots_of`).

  Raises:
    ValueError: as `shots_of`.
  """
  asked = []
  for number in sampled(len(questions), config):
    others = shots_of(questions, number, shots, task, config.seed)
    before = "".join(f"{shot.context} {shot.choices[shot.answer]}\n\n" for shot in others)
    asked.append(dataclasses.replace(questions[number], context=before + questions[number].context))
  return asked
