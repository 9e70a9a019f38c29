"""Damaged files that programs read are refused in one line that names the file, and at once.

`tests/test_fuzz.py` says how to run more inputs.
"""

from __future__ import annotations

import base64
import bz2
import dataclasses
import json
import pickle
import zlib
from collections.abc import Callable
from pathlib import Path

import pytest

from dms_jax.tokenizer import byte_tokenizer
from experiments.ablation import sweeps, trials
from experiments.bench import cases
from experiments.common import files, requests
from experiments.common.program import save_json
from experiments.hyperscaling import cells, page
from experiments.reports import results, runs
from experiments.tasks import humaneval, livecodebench
from experiments.tasks.base import TasksConfig, WritingTask, get
from experiments.tasks.gpqa import COLUMNS
from tests import report_runs
from tests.fuzzing import PARTS, Reader, garbled, garbled_cells, garbled_json, garbled_lines
from tests.helpers import SIX_LINES, TEMPLATE, write_gsm8k, write_mmlu

TOKENIZER = byte_tokenizer()
CHAT = dataclasses.replace(TOKENIZER, settings={**TOKENIZER.settings, "chat_template": TEMPLATE})
TESTS = [{"input": "1\n[2]", "output": "[[2], 1]", "testtype": "functional"}]


def lines(path: Path, *records: dict) -> None:
  path.parent.mkdir(parents=True, exist_ok=True)
  path.write_text("".join(json.dumps(record) + "\n" for record in records))


# Readers --------------------------------------------------------------------------------------------------------------


def task(name: str, file: str, **settings) -> Callable[[Path], None]:
  """Reads the data of a task and makes its prompts."""

  def read(folder: Path) -> None:
    for module in (humaneval, livecodebench):
      module.read.cache_clear()
    own = get(name)(data=str(folder / file), **settings)
    config = TasksConfig(template="raw", allow_code=True)
    asked = own.prompts(config, TOKENIZER, 0, 10**6) if isinstance(own, WritingTask) else own.questions(config)
    for each in asked:
      TOKENIZER.encode(each.text if isinstance(own, WritingTask) else each.context + "".join(each.choices))

  return read


def read_requests(folder: Path) -> None:
  requests.read_requests(folder / "r.jsonl", CHAT, max_new_tokens=8, chains=1, temperature=0.5, seed=0, width=4)


def read_run(folder: Path) -> None:
  results.collect([runs.load(folder)])


def read_sweep(folder: Path) -> None:
  flags, groups = sweeps.read_file(folder / "s.txt", trials.TYPES)
  for flag, text in flags.items():
    sweeps.product(f"{flag}={text}", trials.TYPES, str(folder / "s.txt"))
  for group in groups:
    sweeps.product(group, trials.TYPES, str(folder / "s.txt"))


def read_cells(folder: Path) -> None:
  cells.read(folder)


def read_records_of_sweep(folder: Path) -> None:
  page.results([cells.read(folder)[0]], ["vanilla"])


def read_bench(folder: Path) -> None:
  about = {"device": "cpu", "scale": "small"}
  cases.check_same(folder / "bench.json", about)
  cases.merged(folder / "bench.json", {"b": {"name": "b", "us": 2.0, **about}}, ["a", "b"])


# Whole files ----------------------------------------------------------------------------------------------------------


def write_tasks(root: Path) -> None:
  problem = {"problem": "What is 1 + 1?", "answer": "2"}
  official = {"stem": "Why?", "choices": [{"text": "so", "label": "1"}, {"text": "or so", "label": "2"}]}
  choices = {"text": ["i", "you", "we"], "label": ["A", "B", "C"]}
  lines(root / "problems" / "p.jsonl", problem, problem | {"answer": 7})
  lines(root / "maths" / "p.jsonl", problem, problem)
  lines(root / "arc" / "a.jsonl", {"answerKey": "2", "question": official},
        {"answerKey": "C", "question": "Who?", "choices": choices})  # fmt: skip
  (root / "gpqa").mkdir()
  cell = lambda text: '"' + text.replace('"', '""') + '"'
  rows = [[*COLUMNS], *(['Which, "x"?\nThink.', "right", "a", "b", "c, d"] for _ in range(2))]
  (root / "gpqa" / "g.csv").write_text("".join(",".join(map(cell, row)) + "\r\n" for row in rows))
  (root / "gsm8k").mkdir()
  write_gsm8k(root / "gsm8k" / "g.jsonl")
  marked = {"activity_label": "Cooking", "ctx_a": "Take [step] it.", "ctx_b": "you", "endings": [*"abcd"], "label": 3}
  lines(root / "hellaswag" / "h.jsonl", marked, marked)
  (root / "hellaswag" / "h.txt").write_text(SIX_LINES)
  (root / "packed").mkdir()
  (root / "packed" / "h.txt.bz2").write_bytes(bz2.compress(SIX_LINES.encode()))
  write_mmlu(root / "mmlu")
  about = {"task_id": "HumanEval/0", "prompt": 'def double(x):\n    """Twice."""\n', "entry_point": "double"}
  mbpp = {"task_id": 7, "text": "Add.", "code": "def add(a, b):\n  return a + b", "test_setup_code": ""}
  mbpp |= {"test_list": ["assert add(1, 2) == 3"], "test_imports": ["import math"]}
  lines(root / "code" / "h.jsonl", about | {"test": "def check(f):\n  assert f(1) == 2"}, mbpp)
  packed = base64.b64encode(zlib.compress(pickle.dumps(json.dumps(TESTS)))).decode()
  contest = {"question_content": "Swap.", "starter_code": "", "platform": "leetcode", "question_id": "3"}
  contest |= {"contest_date": "2025-01-31T19:30:00", "metadata": json.dumps({"func_name": "swap"})}
  contest |= {"public_test_cases": json.dumps(TESTS), "private_test_cases": packed}
  lines(root / "contests" / "l.jsonl", contest, contest | {"metadata": "{}", "private_test_cases": "[]"})
  parquet = pytest.importorskip("pyarrow.parquet")
  (root / "rows").mkdir()
  rows = pytest.importorskip("pyarrow").Table.from_pylist([{"answerKey": "C", "question": "Who?", "choices": choices}])
  parquet.write_table(rows, root / "rows" / "a.parquet")


def write_runs(root: Path) -> None:
  report_runs.write(root / "run", report_runs.made_up(), traced=True)
  rows = [{"method": "dms", "budget": {}, "task": "aime24", "length": None, "chains": 1, "max_tokens": 9}]
  rows = [row | {"metric": "accuracy", "mean": 5.0, "standard_error": 1.0, "samples": 3} for row in rows]
  save_json(root / "run" / "summary.json", {"summary": [dataclasses.asdict(runs.Entry(**row)) for row in rows]})
  graded = dict(task="letters", length=None, grades={"accuracy": 100.0}, answer="7")
  found = [report_runs.record("vanilla", i, 0, chains=2, chain=c, **graded) for i in range(2) for c in range(2)]
  report_runs.write(root / "sweep", found, traced=True)
  (root / "cells").mkdir()
  cells.save(root / "cells" / cells.CELLS, cells.of_records(found)[0])
  lines(root / "cells" / cells.TIMES, dict(task="letters", method="vanilla", cr=1, max_tokens=64, seconds=1, gib=0.5))
  save_json(root / "cells" / "config.json", {"config": {"checkpoint": "x"}, "environment": {"device": "cpu"}})
  (root / "ablation").mkdir()
  text = (
    "--retrofit.seq_len=64  # tokens\n\ndms.window=0,16 'dms.gate=neuron,adapter'\nlora.targets=q_proj,k_proj|q_proj\n"
  )
  (root / "ablation" / "s.txt").write_text(text)
  row = {"name": "a", "us": 1.0, "device": "cpu", "scale": "small"}
  save_json(root / "bench" / "bench.json", {"rows": [row]})


@pytest.fixture(scope="module")
def readers(tmp_path_factory) -> dict[str, Reader]:
  root = tmp_path_factory.mktemp("whole")
  write_tasks(root)
  write_runs(root)
  chat = [{"role": "user", "content": "Wie geht's?"}]
  asked = [{"prompt": "Once", "id": "a", "temperature": 1}, {"messages": chat, "chains": 2, "seed": 3}, {"prompt": "x"}]
  lines(root / "requests" / "r.jsonl", *asked)
  row = {"id": "a", "chain": 0, "fingerprint": "0", "text": "b", "finish_reason": "eos"}
  lines(root / "answers" / "r.jsonl", row, row | {"chain": 1}, row | {"id": 3})
  answers = lambda folder: requests.finished_chains(folder / "r.jsonl", {"a": "0", 3: "0"})
  (root / "prompts").mkdir()
  (root / "prompts" / "p.txt").write_text("Eins\n\nZwei äöü\r\n", encoding="utf-8")
  prompts = lambda folder: [*files.text_lines("prompts_file", folder / "p.txt")]
  of_task = lambda share, folder, change, name, file, **settings: Reader(
    share, root / folder, file, change, task(name, file, **settings), said=f"--{name}.data", refuses=0.1
  )
  mmlu = lambda part: dataclasses.replace(of_task(10, "mmlu", garbled_cells, "mmlu", ".", shots=2), name=part)
  return {
    "requests": Reader(20, root / "requests", "r.jsonl", garbled_lines, read_requests),
    "answers": Reader(15, root / "answers", "r.jsonl", garbled_lines, answers),
    "prompts": Reader(5, root / "prompts", "p.txt", garbled, prompts, refuses=0),
    "aime24": of_task(10, "problems", garbled_lines, "aime24", "p.jsonl"),
    "math500": of_task(10, "maths", garbled_lines, "math500", "p.jsonl"),
    "arc_challenge": of_task(15, "arc", garbled_lines, "arc_challenge", "a.jsonl"),
    "gpqa": of_task(10, "gpqa", garbled_cells, "gpqa", "g.csv"),
    "gsm8k": of_task(5, "gsm8k", garbled_lines, "gsm8k", "g.jsonl", shots=1),
    "gsm8k_cot": of_task(10, "gsm8k", garbled_lines, "gsm8k_cot", "g.jsonl", shots=1),
    "hellaswag": of_task(10, "hellaswag", garbled_lines, "hellaswag", "h.jsonl", shots=1),
    "hellaswag text": of_task(5, "hellaswag", garbled, "hellaswag", "h.txt", shots=1),
    "packed text": of_task(10, "packed", garbled, "hellaswag", "h.txt.bz2", shots=1),
    "mmlu test": mmlu("test"),
    "mmlu dev": mmlu("dev"),
    "humaneval": of_task(15, "code", garbled_lines, "humaneval", "h.jsonl"),
    "livecodebench": of_task(15, "contests", garbled_lines, "livecodebench", "l.jsonl"),
    "parquet": of_task(15, "rows", garbled, "arc_challenge", "a.parquet"),
    "records": Reader(20, root / "run", runs.RECORDS, garbled_lines, read_run, said="--runs"),
    "traces": Reader(10, root / "run", "traces.jsonl", garbled_lines, read_run, said="--runs"),
    "run's flags": Reader(10, root / "run", runs.CONFIG, garbled_json, read_run, refuses=0.1),
    "summary": Reader(10, root / "run", runs.SUMMARY, garbled_json, read_run, refuses=0.1),
    "cells": Reader(15, root / "cells", cells.CELLS, garbled, read_cells),
    "times": Reader(5, root / "cells", cells.TIMES, garbled_lines, read_cells),
    "sweep's flags": Reader(5, root / "cells", "config.json", garbled_json, read_cells, refuses=0.1),
    "records of a sweep": Reader(10, root / "sweep", cells.RECORDS, garbled_lines, read_records_of_sweep),
    "ablation": Reader(15, root / "ablation", "s.txt", garbled, read_sweep, refuses=0.1),
    "bench": Reader(5, root / "bench", "bench.json", garbled_json, read_bench),
  }


NAMES = (
  "requests", "answers", "prompts", "aime24", "math500", "arc_challenge", "gpqa", "gsm8k", "gsm8k_cot", "hellaswag",
  "hellaswag text", "packed text", "mmlu test", "mmlu dev", "humaneval", "livecodebench", "parquet", "records",
  "traces", "run's flags", "summary", "cells", "times", "sweep's flags", "records of a sweep", "ablation", "bench",
)  # fmt: skip


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("name", NAMES)
def test_damaged_files_are_refused_in_one_line(readers, tmp_path, name, part):
  readers[name].check(tmp_path / "damaged", part)


def test_every_reader_is_named(readers):
  assert tuple(readers) == NAMES
