"""MMLU (Hendrycks et al. 2021): four choices, answered by their letters.

The layout is that of lm-evaluation-harness. A folder has dev/SUBJECT_dev.csv and test/SUBJECT_test.csv, with columns
question, four choices, answer. A first line of column names is skipped; the answer is 0-3 or A-D. The hub has all
subjects in one file: `--mmlu.data=hub:cais/mmlu`. Shots are the first dev questions of the subject, in their order.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar

from experiments.common.files import read_text, required
from experiments.tasks.base import LikelihoodTask, Question, TasksConfig, register, sampled
from experiments.tasks.sources import HUB, located, records

FLAG = "mmlu.data"
LETTERS = ("A", "B", "C", "D")


def _question(question: str, choices: Sequence[str], answer: int) -> Question:
  lines = [question.strip(), *(f"{letter}. {text}" for letter, text in zip(LETTERS, choices, strict=True))]
  return Question("\n".join([*lines, "Answer:"]), LETTERS, answer)


def read(path: Path) -> list[Question]:
  """A subject's questions, with letters as the choices.

  Raises:
    ValueError: a malformed row; names the flag, file and line.
  """
  questions = []
  rows = csv.reader(io.StringIO(read_text(FLAG, path), newline=""), strict=True)
  try:
    for row in rows:
      where = f"--{FLAG}: {path}, line {rows.line_num}"
      if not row or (rows.line_num == 1 and row[0] == "question" and row[-1] == "answer"):
        continue
      if len(row) != 6:
        raise ValueError(f"{where}: {len(row)} fields; a question, four choices and the answer are 6")
      question, *choices, answer = row
      if answer not in ("0", "1", "2", "3", *LETTERS):
        raise ValueError(f"{where}: the answer must be 0-3 or A-D, not {answer!r}")
      questions.append(_question(question, choices, LETTERS.index(answer) if answer in LETTERS else int(answer)))
  except csv.Error as error:
    raise ValueError(f"--{FLAG}: {path}, line {rows.line_num}: not CSV ({error})") from None
  return questions


def read_rows(path: Path) -> dict[str, list[Question]]:
  """The questions of each subject, from rows as the hub has them.

  Raises:
    ValueError: a malformed row; names the flag, file and row.
  """
  fields = {"question": str, "subject": str, "choices": list, "answer": int}
  subjects: dict[str, list[Question]] = {}
  for where, row in records(FLAG, path, fields):
    if len(row["choices"]) != 4 or not 0 <= row["answer"] < 4:
      raise ValueError(f"{where}: a record needs four choices and an answer 0-3")
    subjects.setdefault(row["subject"], []).append(_question(row["question"], row["choices"], row["answer"]))
  return subjects


@register
class MMLU(LikelihoodTask):
  """`data`: the folder, or hub:cais/mmlu; `shots`: answered questions of the subject before each question."""

  data: str = ""
  shots: int = 5

  metrics = ("acc", "answer_loglik")
  chance: ClassVar = {"acc": 25.0}

  def __post_init__(self):
    self.least(shots=0)

  def _subjects(self) -> list[tuple[str, list[Question], list[Question]]]:
    """(subject, dev questions, test questions), subjects in alphabetical order; without shots no dev files are read."""
    if self.data.startswith(HUB):
      if self.data.count("/") > 1:
        raise ValueError(f"--{FLAG}={self.data}: two files are read; give hub:OWNER/NAME")
      rows = lambda part: read_rows(
        located(FLAG, self.data, "rows of MMLU", (f"all/{part}-*.parquet", f"{part}.jsonl"))
      )
      shots = rows("dev") if self.shots else {}
      return [(subject, shots.get(subject, []), test) for subject, test in sorted(rows("test").items())]
    folder = required(FLAG, self.data, "a folder with dev/*.csv and test/*.csv, or hub:cais/mmlu")
    found = []
    for file in sorted((folder / "test").glob("*_test.csv")):
      subject = file.name.removesuffix("_test.csv")
      dev = folder / "dev" / f"{subject}_dev.csv"
      if self.shots and not dev.is_file():
        raise ValueError(f"--{FLAG}={folder}: no dev/{dev.name}, from which the shots of {file.name} come")
      found.append((subject, read(dev) if self.shots else [], read(file)))
    if not found:
      raise ValueError(f"--{FLAG}={folder}: no test/SUBJECT_test.csv there")
    return found

  def questions(self, config: TasksConfig) -> list[Question]:
    asked = []
    for subject, dev, test in self._subjects():
      if len(dev) < self.shots:
        raise ValueError(f"--{self.name}.shots={self.shots}: --{FLAG} has {len(dev)} dev questions of {subject}")
      before = f"The following are multiple choice questions (with answers) about {subject.replace('_', ' ')}.\n\n"
      before += "".join(f"{shot.context} {LETTERS[shot.answer]}\n\n" for shot in dev[: self.shots])
      asked += [Question(before + question.context, question.choices, question.answer) for question in test]
    return [asked[number] for number in sampled(len(asked), config)]
