"""ARC-Challenge (Clark et al. 2018): questions of school science with about four choices.

The layout is that of lm-evaluation-harness: the choices' texts are scored, not their letters. Read from the official
ARC-Challenge-Test.jsonl, from the hub's rows as JSON lines or Parquet, or from the hub: `--arc_challenge.data=
hub:allenai/ai2_arc`. Shots are sampled from the file's other records.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

from experiments.tasks.base import LikelihoodTask, Question, TasksConfig, after_shots, register
from experiments.tasks.sources import located, records

FLAG = "arc_challenge.data"


def _choices(record: dict[str, Any], where: str) -> tuple[str, list[str], list[str]]:
  """(question, texts of the choices, their labels), in the official layout or in the hub's."""
  question, choices = record["question"], record.get("choices")
  if isinstance(question, dict):  # the official file has stem and choices inside the question
    question, choices = question.get("stem"), question.get("choices")
  if isinstance(choices, list):
    whole = all(isinstance(choice, dict) for choice in choices)
    choices = {key: [choice.get(key) for choice in choices] for key in ("text", "label")} if whole else None
  texts, labels = (choices.get(key) if isinstance(choices, dict) else None for key in ("text", "label"))
  lists = all(isinstance(each, list) and all(isinstance(item, str) for item in each) for each in (texts, labels))
  if not isinstance(question, str) or not lists or len(texts) != len(labels) or len(texts) < 2:
    raise ValueError(f"{where}: a record needs a question, and choices with 'text' and 'label'")
  return question, texts, labels


def read(path: Path) -> list[Question]:
  """Every record of the file.

  Raises:
    ValueError: a malformed record or no record; names the flag and line.
  """
  questions = []
  for where, record in records(FLAG, path, {"question": str | dict, "answerKey": str}):
    question, texts, labels = _choices(record, where)
    if record["answerKey"] not in labels:
      raise ValueError(f"{where}: the answerKey must be one of {', '.join(labels)}, not {record['answerKey']!r}")
    answer = labels.index(record["answerKey"])
    questions.append(Question(f"Question: {question}\nAnswer:", tuple(texts), answer))
  return questions


@register
class ARCChallenge(LikelihoodTask):
  """`data`: the file; `shots`: answered records before each question, none in the paper."""

  data: str = ""
  shots: int = 0

  name = "arc_challenge"
  metrics = ("acc", "acc_norm", "answer_loglik")
  chance: ClassVar = {"acc": 25.0, "acc_norm": 25.0}

  def __post_init__(self):
    self.least(shots=0)

  def questions(self, config: TasksConfig) -> list[Question]:
    what = "ARC-Challenge-Test.jsonl, or hub:allenai/ai2_arc"
    found = read(located(FLAG, self.data, what, ("ARC-Challenge-Test.jsonl", "ARC-Challenge/test-*.parquet")))
    return after_shots(found, self.shots, self.name, config)
