"""MMLU (Hendrycks et al. 2021): four choices, answered by their letters, laid out as lm-evaluation-harness does.

Read from a folder with dev/SUBJECT_dev.csv and test/SUBJECT_test.csv: question, four choices, answer. A header line may
come first, and the answer be 0-3 or A-D. Shots are the first of the subject's dev file, in their order.
"""

from __future__ import annotations

import csv
import io
from pathlib import Path

from experiments.common.files import read_text, required
from experiments.tasks.base import LikelihoodTask, Question, TasksConfig, drawn

FLAG = "data.mmlu"
LETTERS = ("A", "B", "C", "D")


def read(path: Path) -> list[Question]:
  """A subject's questions, their letters as the choices.

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


def questions(config: TasksConfig) -> list[Question]:
  """The questions asked, of all subjects, each after its subject's shots."""
  folder = required(FLAG, config.data.mmlu, "a folder with dev/*.csv and test/*.csv")
  tests = sorted((folder / "test").glob("*_test.csv"))
  if not tests:
    raise ValueError(f"--{FLAG}={folder}: no test/SUBJECT_test.csv there")
  records: list[tuple[str, Question]] = []
  for file in tests:
    subject = file.name.removesuffix("_test.csv")
    before = f"The following are multiple choice questions (with answers) about {subject.replace('_', ' ')}.\n\n"
    if config.shots.mmlu:
      dev = folder / "dev" / f"{subject}_dev.csv"
      if not dev.is_file():
        raise ValueError(f"--{FLAG}={folder}: no dev/{dev.name}, from which the shots of {file.name} come")
      shots = read(dev)
      if len(shots) < config.shots.mmlu:
        raise ValueError(f"--shots.mmlu={config.shots.mmlu}: {dev} holds {len(shots)}")
      before += "".join(f"{shot.context} {LETTERS[shot.answer]}\n\n" for shot in shots[: config.shots.mmlu])
    records += [(before, question) for question in read(file)]
  asked = [records[number] for number in drawn(len(records), config)]
  return [Question(before + question.context, question.choices, question.answer) for before, question in asked]


MMLU = LikelihoodTask("mmlu", ("acc", "answer_loglik"), questions)
