"""GSM8K (Cobbe et al. 2021) in writing: word problems, worked step by step.

Read from the official test.jsonl, or from the hub: `--gsm8k_cot.data=hub:openai/gsm8k`. Worked examples are sampled
from the file's other records, calculator marks (<<48/2=24>>) removed. In plain text they have the layout of
lm-evaluation-harness; in a chat they are earlier turns. A chat without examples is asked for a boxed answer.

The number of the first line "#### 42" counts, as for the harness's strict match; without one, the answer that
math-verify finds.
"""

from __future__ import annotations

import re

from experiments.grading import maths
from experiments.tasks import gsm8k
from experiments.tasks.base import is_chat, register, shots_of
from experiments.tasks.problems import Problem, ProblemTask, directed
from experiments.tasks.sources import records

MARK = re.compile(r"####\s*([-$\d.,]*\d)\.?\s*$", re.MULTILINE)  # unlike a heading such as "#### Step 1"


def final(text: str) -> str | None:
  """The number after the first "####", without dollar signs and commas."""
  return re.sub("[$,]", "", mark[1]) if (mark := MARK.search(text)) else None


def read_by(text: str) -> str:
  """What math-verify reads of a text: the number after the first "####", or else all of the text."""
  return text if (number := final(text)) is None else f"\\boxed{{{number}}}"


@register
class GSM8KCoT(ProblemTask):
  """`data`: the file, or hub:openai/gsm8k; `shots`: worked examples, by default 8 in plain text and none in a chat."""

  data: str = ""
  shots: int | None = None

  name = "gsm8k_cot"
  what, names = gsm8k.WHAT, gsm8k.NAMES
  new_tokens = 512
  stop = ("\n\nQuestion:",)

  def __post_init__(self):
    if self.shots is not None:
      self.least(shots=0)

  def read(self, path):
    found = []
    for where, record in records(f"{self.name}.data", path, {"question": str, "answer": str}):
      solution = gsm8k.unmarked(record["answer"])
      if final(solution) is None:
        raise ValueError(f"{where}: the answer has no final number after '####'")
      found.append(Problem(record["question"].strip(), solution))
    return found

  def ask(self, problems, number, config, tokenizer):
    question, answer = problems[number].text, final(problems[number].answer)
    chat = is_chat(tokenizer, config.template)
    shots = (0 if chat else 8) if self.shots is None else self.shots
    worked = shots_of(problems, number, shots, self.name, config.seed)
    if not chat:
      before = "".join(f"{gsm8k.asked(shot.text)} {shot.answer}\n\n" for shot in worked)
      return Problem(before + gsm8k.asked(question), answer)
    if not worked:
      return Problem(directed(tokenizer, config.template, question), answer)
    turns = []
    for shot in worked:
      turns += [{"role": "user", "content": shot.text}, {"role": "assistant", "content": shot.answer}]
    return Problem(tokenizer.chat([*turns, {"role": "user", "content": question}]), answer)

  def grade(self, text, prompt):
    return super().grade(read_by(text), prompt)

  def answer(self, text):
    return maths.answer(read_by(text))
