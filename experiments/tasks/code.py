"""The base of tasks whose answers are programs: prompts, permission to run, grading."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import ClassVar

from dms_jax.tokenizer import Tokenizer
from experiments.grading import sandbox
from experiments.tasks.base import Prompt, TasksConfig, WritingTask, is_chat, sampled


@dataclasses.dataclass(frozen=True)
class Asked:
  """What a prompt is made of: `messages` of a chat and the answer's first words, or `text`; references for grading."""

  name: str
  messages: tuple[tuple[str, str], ...]
  prefix: str
  text: str
  references: tuple[str, ...]


class CodeTask(WritingTask):
  """Grades programs by running them in `experiments.grading.sandbox`: 100 if every test passes, else 0.

  Of several chains, one that passes makes the prompt right: pass@all, as the paper counts LiveCodeBench (arXiv
  2506.05345, section 4). Subclasses have the fields `seconds` of each test and `memory`, MiB.
  """

  metrics = ("accuracy",)
  best_of_all = True
  graded_by = ("seconds", "memory")
  seconds: ClassVar[float]
  memory: ClassVar[int]

  def __post_init__(self):
    self.least(memory=256)
    if not self.seconds > 0:
      raise ValueError(f"--{self.name}.seconds={self.seconds} must be above 0")

  def asked(self, number: int, chat: bool) -> Asked:
    """Record `number` of the data, for a chat or as plain text."""
    raise NotImplementedError

  def count(self) -> int:
    """Records of the data."""
    raise NotImplementedError

  def right(self, text: str, references: tuple[str, ...]) -> bool:
    """Runs the program in a text; True if every test passes."""
    raise NotImplementedError

  @property
  def limits(self) -> sandbox.Limits:
    return sandbox.Limits(seconds=self.seconds, memory=self.memory << 20)

  def prompts(self, config: TasksConfig, tokenizer: Tokenizer, length: int, max_positions: int) -> list[Prompt]:
    if not config.allow_code:
      raise ValueError(f"--tasks={self.name} runs programs that the model writes: --allow_code permits it")
    try:
      sandbox.isolation()
    except sandbox.SandboxError as error:
      raise ValueError(f"--allow_code: {error}") from None
    chat = is_chat(tokenizer, config.template)
    made = []
    for number in sampled(self.count(), config):
      asked = self.asked(number, chat)
      text = asked.text
      if chat:
        messages = [{"role": role, "content": content} for role, content in asked.messages]
        text = tokenizer.chat(messages) + asked.prefix
      tokens = tokenizer.encode(text)
      if len(tokens) >= max_positions:
        raise ValueError(
          f"--tasks={self.name}: {asked.name} has {len(tokens)} tokens, and the model's context {max_positions}; "
          f"take a model with more, or data without this record"
        )
      made.append(Prompt(text, tokens, asked.references))
    return made

  def grade(self, text: str, prompt: Prompt) -> dict[str, float]:
    return {"accuracy": 100.0 if self.right(text, prompt.references) else 0.0}

  def grades(self, written: Sequence[tuple[str, Prompt]], workers: int | None = None) -> Sequence[dict[str, float]]:
    """`grade` of each (text, prompt), `workers` programs at a time, by default half the processors, at most 8."""
    return sandbox.in_parallel(lambda pair: self.grade(*pair), written, workers)
