"""MATH-500 (Lightman et al. 2023): competition problems of the MATH data set, in writing.

Read from the public test.jsonl, or from the hub: `--math500.data=hub:HuggingFaceH4/MATH-500`. Answers are LaTeX and are
compared by math-verify, as in arXiv 2506.05345.
"""

from __future__ import annotations

from experiments.tasks.base import register
from experiments.tasks.problems import Problem, ProblemTask
from experiments.tasks.sources import records


@register
class Math500(ProblemTask):
  """`data`: the file, or hub:HuggingFaceH4/MATH-500."""

  data: str = ""

  what = "MATH-500's test.jsonl, or hub:HuggingFaceH4/MATH-500"
  names = ("test.jsonl",)

  def read(self, path):
    found = records(f"{self.name}.data", path, {"problem": str, "answer": str})
    return [Problem(record["problem"].strip(), record["answer"].strip()) for _, record in found]
