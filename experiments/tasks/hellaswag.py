"""HellaSwag (Zellers et al. 2019): which of four endings follows, laid out as lm-evaluation-harness does.

Two formats are read: the official hellaswag_val.jsonl, and the six-line one (optionally .bz2) of evaluation tools in
C++: "activity: context", the answer 0-3, four endings. The latter lost where the context's second sentence begins, so
that it stays in lower case where the official one is capitalised. Shots are drawn from the other records of the file.
"""

from __future__ import annotations

import re
from pathlib import Path

from experiments.common.files import json_records, read_text, required
from experiments.tasks.base import LikelihoodTask, Question, TasksConfig, drawn, shots_of

FLAG = "data.hellaswag"


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
  if path.suffix in (".jsonl", ".json"):
    fields = {"activity_label": str, "ctx_a": str, "ctx_b": str, "endings": list}
    for where, record in json_records(FLAG, path, fields):
      if len(record["endings"]) != 4 or not all(isinstance(e, str) for e in record["endings"]):
        raise ValueError(f"{where}: 'endings' must be four texts")
      context = f"{record['activity_label']}: {record['ctx_a']} {record['ctx_b'].capitalize()}"
      answer = _answer(record.get("label"), where)
      questions.append(Question(clean(context), tuple(clean(e) for e in record["endings"]), answer))
    return questions
  lines = read_text(FLAG, path).removesuffix("\n").split("\n")
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


def questions(config: TasksConfig) -> list[Question]:
  """The questions asked, each after its shots."""
  path = required(FLAG, config.data.hellaswag, "hellaswag_val.jsonl, or the six-line text format")
  records = read(path)
  asked = []
  for number in drawn(len(records), config):
    shots = shots_of(records, number, config.shots.hellaswag, "hellaswag", config.seed)
    before = "".join(f"{shot.context} {shot.choices[shot.answer]}\n\n" for shot in shots)
    record = records[number]
    asked.append(Question(before + record.context, record.choices, record.answer))
  return asked


HELLASWAG = LikelihoodTask("hellaswag", ("acc", "acc_norm", "answer_loglik"), questions)
