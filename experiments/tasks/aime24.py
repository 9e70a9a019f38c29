"""AIME 2024: thirty problems of the American Invitational Mathematics Examination, in writing.

Read from JSON lines with `problem` and `answer`, such as Qwen2.5-Math's aime24/test.jsonl, or from the hub:
`--aime24.data=hub:HuggingFaceH4/aime_2024`, the paper's source. Answers are integers from 0 to 999.
"""

from __future__ import annotations

from experiments.tasks.base import register
from experiments.tasks.problems import Problem, ProblemTask
from experiments.tasks.sources import records


def _integer(answer: str | int, where: str) -> str:
  """The answer without leading zeros."""
  text = str(answer).strip()
  if not (text.isascii() and text.isdigit() and len(text) < 9 and int(text) <= 999):
    raise ValueError(f"{where}: the answer must be an integer from 0 to 999, not {answer!r:.80}")
  return str(int(text))


@register
class AIME24(ProblemTask):
  """`data`: the file, or hub:HuggingFaceH4/aime_2024."""

  data: str = ""

  what = "AIME 2024's test.jsonl, or hub:HuggingFaceH4/aime_2024"
  names = ("*.jsonl", "data/train-*.parquet")

  def read(self, path):
    found = records(f"{self.name}.data", path, {"problem": str, "answer": str | int})
    return [Problem(record["problem"].strip(), _integer(record["answer"], where)) for where, record in found]
