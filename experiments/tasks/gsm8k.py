"""GSM8K (Cobbe et al. 2021): how likely the model finds the written solution of a word problem, in nats per token.

Read from the official test.jsonl. Calculator marks (<<48/2=24>>) are taken out. Shots are drawn from the other records
of the file.
"""

from __future__ import annotations

import re
from pathlib import Path

from experiments.common.files import json_records, required
from experiments.tasks.base import LikelihoodTask, Question, TasksConfig, drawn, shots_of

FLAG = "data.gsm8k"


def read(path: Path) -> list[Question]:
  """Every record of the file, its solution the only choice.

  Raises:
    ValueError: a malformed record; names the flag and line.
  """
  return [
    Question(f"Question: {record['question'].strip()}\nAnswer:", (re.sub(r"<<.*?>>", "", record["answer"]).strip(),))
    for _, record in json_records(FLAG, path, {"question": str, "answer": str})
  ]


def questions(config: TasksConfig) -> list[Question]:
  """The problems asked, each after its shots."""
  records = read(required(FLAG, config.data.gsm8k, "GSM8K's test.jsonl"))
  asked = []
  for number in drawn(len(records), config):
    shots = shots_of(records, number, config.shots.gsm8k, "gsm8k", config.seed)
    before = "".join(f"{shot.context} {shot.choices[0]}\n\n" for shot in shots)
    asked.append(Question(before + records[number].context, records[number].choices))
  return asked


GSM8K = LikelihoodTask("gsm8k", ("answer_loglik",), questions)
