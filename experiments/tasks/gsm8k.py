"""GSM8K (Cobbe et al. 2021): likelihood of the written solutions of word problems.

Read from the official test.jsonl, or from the hub: `--gsm8k.data=hub:openai/gsm8k`. Calculator marks (<<48/2=24>>) are
removed. Shots are sampled from the file's other records. In `gsm8k_cot` the model writes the solutions.
"""

from __future__ import annotations

import re
from pathlib import Path

from experiments.tasks.base import LikelihoodTask, Question, TasksConfig, after_shots, register
from experiments.tasks.sources import located, records

FLAG = "gsm8k.data"
WHAT = "GSM8K's test.jsonl, or hub:openai/gsm8k"
NAMES = ("test.jsonl", "main/test-*.parquet")


def asked(question: str) -> str:
  """A problem as plain text, before its solution."""
  return f"Question: {question.strip()}\nAnswer:"


def unmarked(solution: str) -> str:
  """A solution without calculator marks."""
  return re.sub(r"<<.*?>>", "", solution).strip()


def read(path: Path) -> list[Question]:
  """Every record of the file, with its solution as the only choice.

  Raises:
    ValueError: a malformed record; names the flag and line.
  """
  return [
    Question(asked(record["question"]), (unmarked(record["answer"]),))
    for _, record in records(FLAG, path, {"question": str, "answer": str})
  ]


@register
class GSM8K(LikelihoodTask):
  """`data`: the file; `shots`: worked problems before each question."""

  data: str = ""
  shots: int = 5

  metrics = ("answer_loglik",)

  def __post_init__(self):
    self.least(shots=0)

  def questions(self, config: TasksConfig) -> list[Question]:
    return after_shots(read(located(FLAG, self.data, WHAT, NAMES)), self.shots, self.name, config)
