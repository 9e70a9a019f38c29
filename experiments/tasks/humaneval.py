"""HumanEval (Chen et al. 2021, arXiv 2107.03374) and MBPP (Austin et al. 2021, arXiv 2108.07732).

Read from JSON lines or the hub's Parquet: HumanEval.jsonl, or any file of its fields task_id, prompt, entry_point and
test, such as HumanEval+; mbpp.jsonl, or records of its fields task_id, text or prompt, code and test_list.
`--humaneval.data=hub:openai/openai_humaneval` or `hub:google-research-datasets/mbpp` downloads one.

A chat model gets the message and the first words of the answer that lm-evaluation-harness gives (humaneval_instruct),
or with `--humaneval.free` no first words: it may then think, and the last fenced block of its text counts. A plain text
is HumanEval's prompt itself, whose continuation ends where the paper's stop strings are. MBPP's message is the paper's.

The tests run in a process that the program cannot reach, and exchange only Python's own values with it. Tests that pass
functions or objects of the solution's classes (a few of MBPP, which need `test_setup_code`) count as wrong.
"""

from __future__ import annotations

import ast
import functools
import json
from pathlib import Path
from typing import Any

from experiments.grading import sandbox
from experiments.grading.programs import before_fence, cut, last_block
from experiments.tasks.base import register
from experiments.tasks.code import Asked, CodeTask
from experiments.tasks.sources import located, records

FLAG = "humaneval.data"
NAMES = ("*openai_humaneval/test-*.parquet", "*HumanEval*.jsonl", "sanitized/test-*.parquet")  # MBPP's the last
QUESTION = (
  "Write a solution to the following problem and make sure that it passes the tests:\n```python\n{prompt}\n```\n"
)
BEGUN = "Here is the completed function:\n```python\n{prompt}\n"
MBPP_QUESTION = (
  "You are an expert Python programmer, and here is your task: {text} Your code should pass these tests:\n\n{tests}\n"
)
STOPS = ("\nclass", "\ndef", "\n#", "\nif", "\nprint")  # HumanEval's paper, section 2
DONE = ("[DONE]",)


def parsed(code: str) -> ast.Module | None:
  """A module; None if it is no Python, or nested too deep."""
  try:
    return ast.parse(code)
  except (SyntaxError, ValueError, RecursionError, MemoryError):
    return None


def completed(prompt: str) -> str:
  """HumanEval's prompt as a module: its last function has a docstring alone, or gets `pass`."""
  return f"{prompt}\n    pass\n" if parsed(prompt) is None else prompt


def defined(code: str) -> list[str]:
  """Names of the functions that a module defines; none if it is no Python."""
  module = parsed(code)
  return [] if module is None else [node.name for node in module.body if isinstance(node, ast.FunctionDef)]


@functools.cache
def read(path: Path) -> list[dict[str, Any]]:
  """Every record, with `kind` "humaneval" or "mbpp", `before` the program, `calls`, `setup` and `tests`.

  Raises:
    ValueError: a malformed record, or none; names the flag and line.
  """
  found = []
  for where, record in records(FLAG, path, {"task_id": str | int}):
    if isinstance(record.get("test_list"), list):
      found.append(_mbpp(where, record))
      continue
    for name in ("prompt", "entry_point", "test"):
      if not isinstance(record.get(name), str):
        raise ValueError(f"{where}: a record needs {name!r} (HumanEval's), or a list 'test_list' (MBPP's)")
    setup = completed(record["prompt"])
    if record["entry_point"] not in defined(setup):
      raise ValueError(f"{where}: 'prompt' does not define 'entry_point', {record['entry_point']!r}")
    tests = f"{record['test']}\ncheck({record['entry_point']})\n"
    found.append(
      {
        "name": str(record["task_id"]), "kind": "humaneval", "question": record["prompt"], "before": record["prompt"],
        "calls": [record["entry_point"]], "setup": setup, "tests": tests,
      }
    )  # fmt: skip
  return found


def _mbpp(where: str, record: dict[str, Any]) -> dict[str, Any]:
  text, tests = record.get("text", record.get("prompt")), record["test_list"]
  code, before, imports = record.get("code", ""), record.get("test_setup_code", ""), record.get("test_imports", [])
  listed = isinstance(imports, list) and all(isinstance(line, str) for line in (*tests, *imports))
  if not all(isinstance(each, str) for each in (text, code, before)) or not listed or not tests:
    raise ValueError(f"{where}: a record of MBPP needs a text 'text' or 'prompt' and 'code', and texts in 'test_list'")
  modules = [parsed(test) for test in tests]
  if None in modules:
    raise ValueError(f"{where}: 'test_list' is not Python ({tests[modules.index(None)][:80]!r})")
  called = {node.id for module in modules for node in ast.walk(module) if isinstance(node, ast.Name)}
  if not (calls := [name for name in defined(code) if name in called]):
    raise ValueError(f"{where}: 'test_list' calls no function that 'code' defines")
  setup = "\n".join([*imports, before])
  question = MBPP_QUESTION.format(text=text.strip(), tests="\n".join(tests))
  return {
    "name": f"MBPP/{record['task_id']}", "kind": "mbpp", "question": question, "before": "", "calls": calls,
    "setup": setup, "tests": "\n".join(tests),
  }  # fmt: skip


@register
class HumanEval(CodeTask):
  """`data`: the file; `free`: a chat model starts its answer itself.

  `seconds` for all tests of a program; `memory` of a program, MiB.
  """

  data: str = ""
  free: bool = False
  seconds: float = 10.0
  memory: int = 2048

  new_tokens = 512

  @property
  def records(self) -> list[dict[str, Any]]:
    return read(located(FLAG, self.data, "HumanEval.jsonl, MBPP as JSON lines, or hub:openai/openai_humaneval", NAMES))

  def count(self) -> int:
    return len(self.records)

  def asked(self, number: int, chat: bool) -> Asked:
    record = self.records[number]
    question, prefix, text, form = record["question"], "", record["question"], "text"
    if record["kind"] == "mbpp":
      text += "[BEGIN]\n"
      prefix = "" if self.free else "```python\n"
    else:
      question = QUESTION.format(prompt=record["before"])
      prefix = "" if self.free else BEGUN.format(prompt=record["before"])
    if chat:
      form = "free" if self.free else "begun"
    kept = {name: record[name] for name in ("kind", "before", "calls", "setup", "tests")}
    return Asked(record["name"], (("user", question),), prefix, text, (form, json.dumps(kept)))

  def right(self, text: str, references: tuple[str, ...]) -> bool:
    form, record = references[0], json.loads(references[1])
    if form == "free":
      written = "\n" + last_block(text)
    elif form == "begun":
      written = before_fence(text)
    else:
      written = cut(text, STOPS if record["kind"] == "humaneval" else DONE)
    program = record["before"] + written
    return sandbox.run_tests(program, record["calls"], record["tests"], record["setup"], self.limits)[0] == "passed"
