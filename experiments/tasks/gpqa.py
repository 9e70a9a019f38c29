"""GPQA Diamond (Rein et al. 2023): questions of graduate level, answered in writing by a letter.

Read from gpqa_diamond.csv, or from the hub: `--gpqa.data=hub:Idavidrein/gpqa`, where its terms must be accepted first.
The seed and the question's number decide the place of the right choice, for all methods and chains. The prompt is that
of Open-R1, adapted there from OpenAI's simple-evals.
"""

from __future__ import annotations

import csv
import dataclasses
import io
import random
import re
from typing import ClassVar

from experiments.common.files import read_text
from experiments.tasks.base import framed, register
from experiments.tasks.problems import Problem, ProblemTask

FLAG = "gpqa.data"
COLUMNS = ("Question", "Correct Answer", "Incorrect Answer 1", "Incorrect Answer 2", "Incorrect Answer 3")
QUESTION = (
  "Answer the following multiple choice question. The last line of your response should be of the following format: "
  "'Answer: $LETTER' (without quotes) where LETTER is one of ABCD. Think step by step before answering.\n\n"
  "{question}\n\nA) {A}\nB) {B}\nC) {C}\nD) {D}"
)
# A letter, perhaps in Markdown or LaTeX: **B**, (B), $\\boxed{\\text{B}}$.
LETTER = r"[\s*$({]*(?:\\(?:boxed|text|textbf|mathbf|mathrm)\{[\s({]*)*(?P<letter>[A-D])(?![A-Za-z0-9])"
# The last match counts, of the first pattern that matches at all.
ANSWERS = [
  re.compile(pattern + LETTER) for pattern in (r"(?i:answer)[\s*]*:", r"(?=\\boxed)", r"(?i:answer)[\s*]+is[\s*]*:?")
]


@dataclasses.dataclass(frozen=True)
class Choices(Problem):
  """A question, its right answer and the three wrong ones."""

  wrong: tuple[str, ...] = ()


@register
class GPQA(ProblemTask):
  """`data`: gpqa_diamond.csv, or hub:Idavidrein/gpqa."""

  data: str = ""

  what = "GPQA's gpqa_diamond.csv, or hub:Idavidrein/gpqa"
  names = ("gpqa_diamond.csv",)
  chance: ClassVar = {"accuracy": 25.0}

  def check(self):
    """Letters need no library."""

  def read(self, path):
    rows = csv.DictReader(io.StringIO(read_text(FLAG, path), newline=""), strict=True)
    found = []
    try:
      if missing := [column for column in COLUMNS if column not in (rows.fieldnames or ())]:
        raise ValueError(f"--{FLAG}={path}, line 1: no column {missing[0]!r}")
      for row in rows:
        if empty := [column for column in COLUMNS if not (row[column] or "").strip()]:
          raise ValueError(f"--{FLAG}={path}, line {rows.line_num}: {empty[0]!r} is empty")
        question, right, *wrong = (row[column].strip() for column in COLUMNS)
        found.append(Choices(question, right, tuple(wrong)))
    except csv.Error as error:
      raise ValueError(f"--{FLAG}={path}, line {rows.reader.line_num}: not CSV ({error})") from None
    if not found:
      raise ValueError(f"--{FLAG}={path}: holds no question")
    return found

  def ask(self, problems, number, config, tokenizer):
    problem = problems[number]
    right = random.Random(f"{config.seed} choices {number}").randrange(4)
    choices = [*problem.wrong[:right], problem.answer, *problem.wrong[right:]]
    text = QUESTION.format(question=problem.text, **dict(zip("ABCD", choices, strict=True)))
    return Problem(framed(tokenizer, config.template, text), "ABCD"[right])

  def grade(self, text, prompt):
    return {"accuracy": 100.0 * (self.answer(text) == prompt.references[0])}

  def answer(self, text):
    return next((found[-1]["letter"] for pattern in ANSWERS if (found := list(pattern.finditer(text)))), None)
