"""Three small tasks of lm-evaluation-harness on local files: choices, written answers, perplexity."""

from __future__ import annotations

import json
from pathlib import Path

NAMES = ("tiny_choice", "tiny_written", "tiny_rolling")
WORDS = "the cat sat on a mat while rain fell over old grey roofs and no one came".split()

COMMON = """task: {name}
dataset_path: json
dataset_kwargs:
  data_files:
    test: {data}
test_split: test
"""

KINDS = {
  "tiny_choice": """output_type: multiple_choice
doc_to_text: "{{text}}"
doc_to_choice: "{{choices}}"
doc_to_target: "{{label}}"
metric_list:
  - metric: acc
  - metric: acc_norm
""",
  "tiny_written": """output_type: generate_until
doc_to_text: "{{text}}"
doc_to_target: "{{choices[0]}}"
generation_kwargs:
  until: ["\\n\\n", "STOP"]
  do_sample: false
  max_gen_toks: 12
metric_list:
  - metric: exact_match
""",
  "tiny_rolling": """output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{text}}"
metric_list:
  - metric: word_perplexity
  - metric: byte_perplexity
""",
}


def write_tasks(folder: Path, stop: str = "STOP") -> Path:
  """Writes the tasks `NAMES` and their data; the texts have 8 to 300 characters, the choices 1 to 20.

  Args:
    stop: a stop string of the written answers.
  """
  folder.mkdir(parents=True, exist_ok=True)
  records = []
  for number, length in enumerate((2, 7, 12, 30, 68)):
    text = " ".join(WORDS[(number + i) % len(WORDS)] for i in range(length))
    choices = list("ABCD") if number % 2 else [text[:4], "grey rain", "é", "nobody came home so"]
    records.append({"text": text, "choices": choices, "label": number % 4})
  data = folder / "data.jsonl"
  data.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
  for name, kind in KINDS.items():
    (folder / f"{name}.yaml").write_text(COMMON.format(name=name, data=data) + kind.replace("STOP", stop))
  return folder
