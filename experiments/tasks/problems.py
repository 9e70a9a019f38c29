"""Tasks of problems with one right answer, which the model writes."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import ClassVar

from dms_jax.tokenizer import Tokenizer
from experiments.grading import maths
from experiments.tasks.base import Prompt, TasksConfig, WritingTask, framed, sampled
from experiments.tasks.sources import located

# What Open-R1 gives as system prompt for MATH-500 and AIME24 (README of huggingface/open-r1). Here it ends the user's
# message, as DeepSeek recommends for its R1 models and because some chat templates have no system prompt.
DIRECTIVE = "Please reason step by step, and put your final answer within \\boxed{}."


def directed(tokenizer: Tokenizer, template: str, statement: str) -> str:
  """The text that a model reads: a problem's statement, and the directive to box the answer."""
  return framed(tokenizer, template, f"{statement}\n\n{DIRECTIVE}")


@dataclasses.dataclass(frozen=True)
class Problem:
  """A problem's statement and its right answer."""

  text: str
  answer: str


class ProblemTask(WritingTask):
  """The problems of a file; a text is right or wrong by its final answer.

  `data` is the file's path or hub id. `what` describes the file in errors, and `names` are patterns of its path in a
  data set of the hub. The default L is the smallest of the paper's for these tasks (8K, 16K and 32K tokens).
  """

  what: ClassVar[str]
  names: ClassVar[tuple[str, ...]]
  data: str

  metrics = ("accuracy",)
  new_tokens = 8192

  def read(self, path: Path) -> list[Problem]:
    """Every problem of the file.

    Raises:
      ValueError: a malformed record or no record; names the flag, file and line.
    """
    raise NotImplementedError

  def ask(self, problems: list[Problem], number: int, config: TasksConfig, tokenizer: Tokenizer) -> Problem:
    """The text that the model reads for a problem, and the reference by which its answer is graded."""
    problem = problems[number]
    return Problem(directed(tokenizer, config.template, problem.text), problem.answer)

  def check(self) -> None:
    """Raises ValueError if answers cannot be graded here."""
    maths.check()

  def prompts(self, config, tokenizer, length, max_positions):
    self.check()
    flag = f"{self.name}.data"
    problems = self.read(located(flag, self.data, self.what, self.names))
    made = []
    for number in sampled(len(problems), config):
      asked = self.ask(problems, number, config, tokenizer)
      tokens = tokenizer.encode(asked.text)
      if len(tokens) >= max_positions:
        raise ValueError(
          f"--{flag}: problem {number} is a prompt of {len(tokens)} tokens; the model's context is {max_positions}"
        )
      made.append(Prompt(asked.text, tokens, (asked.answer,)))
    return made

  def grade(self, text, prompt):
    return {"accuracy": 100.0 * maths.correct(text, prompt.references[0])}

  def answer(self, text):
    return maths.answer(text)
