"""MMLU (Hendrycks et al. 2021): four choices, answered by their letters.

The layout is that of lm-evaluation-harness. A folder has dev/SUBJECT_dev.csv and test/SUBJECT_test.csv, with columns
question, four choices, answer. A first line of column names is skipped; the answer is 0-3 or A-D. Shots are the first
of the subject's dev file, in their order.
"""

from __future__ import annotations

import csv
import io
from pathlib import Path
from typing import ClassVar

from experiments.common.files import read_text, required
from experiments.tasks.base import LikelihoodTask, Question, TasksConfig, register, sampled

FLAG = "mmlu.data"
LETTERS = ("A", "B", "C", "D")


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
      lines = [question.strip(), *(f"{letter}. {text}" for letter, text in zip(LETTERS, choices, strict=True))]
      number = LETTERS.index(answer) if answer in LETTERS else int(answer)
      questions.append(Question("\n".join([*lines, "Answer:"]), LETTERS, number))
  except csv.Error as error:
    raise ValueError(f"--{FLAG}: {path}, line {rows.line_num}: not CSV ({error})") from None
  return questions


@register
class MMLU(LikelihoodTask):
  """`data`: the folder; `shots`: answered questions of the subject before each question."""

  data: str = ""
  shots: int = 5

  metrics = ("acc", "answer_loglik")
  chance: ClassVar = {"acc": 25.0}

  def __post_init__(self):
    self.least(shots=0)

  def _before(self, folder: Path, subject: str) -> str:
    """The text before each question of a subject: a line that names the subject, and the shots."""
    before = f"The following are multiple choice questions (with answers) about {subject.replace('_', ' ')}.\n\n"
    if not self.shots:
      return before
    dev = folder / "dev" / f"{subject}_dev.csv"
    if not dev.is_file():
      raise ValueError(f"--{FLAG}={folder}: no dev/{dev.name}, from which the shots of {subject}_test.csv come")
    shots = read(dev)
    if len(shots) < self.shots:
      raise ValueError(f"--{self.name}.shots={self.shots}: {dev} holds {len(shots)}")
    return before + "".join(f"{shot.context} {LETTERS[shot.answer]}\n\n" for shot in shots[: self.shots])

  def questions(self, config: TasksConfig) -> list[Question]:
    folder = required(FLAG, self.data, "a folder with dev/*.csv and test/*.csv")
    tests = sorted((folder / "test").glob("*_test.csv"))
    if not tests:
      raise ValueError(f"--{FLAG}={folder}: no test/SUBJECT_test.csv there")
    records: list[tuple[str, Question]] = []
    for file in tests:
      before = self._before(folder, file.name.removesuffix("_test.csv"))
      records += [(before, question) for question in read(file)]
    asked = [records[number] for number in sampled(len(records), config)]
    return [Question(before + question.context, question.choices, question.answer) for before, question in asked]
