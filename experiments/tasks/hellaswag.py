"""HellaSwag (Zellers et al. 2019): which of four endings follows.

The layout is that of lm-evaluation-harness. Two formats are read. One is the official hellaswag_val.jsonl, which is
Parquet on the hub: `--hellaswag.data=hub:Rowan/hellaswag`. The other is the six-line format (optionally .bz2) of
evaluation tools in C++: "activity: context", the answer 0-3, four endings. The six-line format does not mark where the
context's second sentence begins, so that sentence stays in lower case; the official format capitalises it. Shots are
sampled from the file's other records.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import ClassVar

from experiments.common.files import read_text
from experiments.tasks.base import LikelihoodTask, Question, TasksConfig, after_shots, register
from experiments.tasks.sources import located, records

FLAG = "hellaswag.data"


def clean(text: str) -> str:
  """The harness's preprocessing: WikiHow's " [title]" ends a sentence, other marks in brackets go."""
  text = text.strip().replace(" [title]", ". ")
  return re.sub(r"\[.*?\]", "", text).replace("  ", " ")


def _answer(value: object, where: str) -> int:
  if str(value) not in ("0", "1", "2", "3"):
    raise ValueError(f"{where}: the answer must be 0, 1, 2 or 3, not {value!r}")
  return int(str(value))


def read(path: Path) -> list[Question]:
  """Every record of the file.

  Raises:
    ValueError: a malformed record; names the flag and line.
  """
  questions = []
  if path.suffix in (".jsonl", ".json", ".parquet"):
    fields = {"activity_label": str, "ctx_a": str, "ctx_b": str, "endings": list}
    for where, record in records(FLAG, path, fields):
      if len(record["endings"]) != 4 or not all(isinstance(e, str) for e in record["endings"]):
        raise ValueError(f"{where}: 'endings' must be four texts")
      context = f"{record['activity_label']}: {record['ctx_a']} {record['ctx_b'].capitalize()}"
      answer = _answer(record.get("label"), where)
      questions.append(Question(clean(context), tuple(clean(e) for e in record["endings"]), answer))
    return questions
  lines = read_text(FLAG, path).removesuffix("\n").split("\n")
  if lines == [""]:
    raise ValueError(f"--{FLAG}={path}: holds no record")
  if len(lines) % 6:
    raise ValueError(f"--{FLAG}={path}, line {len(lines)}: the last record is not whole; a record has 6 lines")
  for first in range(0, len(lines), 6):
    context, answer, *endings = lines[first : first + 6]
    for offset, text in enumerate([context, answer, *endings]):
      if not text.strip():
        raise ValueError(f"--{FLAG}={path}, line {first + offset + 1}: empty")
    label = _answer(answer.strip(), f"--{FLAG}={path}, line {first + 2}")
    questions.append(Question(clean(context), tuple(clean(e) for e in endings), label))
  return questions


@register
class HellaSwag(LikelihoodTask):
  """`data`: the file; `shots`: completed records before each question."""

  data: str = ""
  shots: int = 10

  metrics = ("acc", "acc_norm", "answer_loglik")
  chance: ClassVar = {"acc": 25.0, "acc_norm": 25.0}

  def __post_init__(self):
    self.least(shots=0)

  def questions(self, config: TasksConfig) -> list[Question]:
    what = "hellaswag_val.jsonl, the six-line text format, or hub:Rowan/hellaswag"
    found = read(located(FLAG, self.data, what, ("hellaswag_val.jsonl", "data/validation-*.parquet")))
    return after_shots(found, self.shots, self.name, config)
