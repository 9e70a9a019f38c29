"""HumanEval, MBPP, LiveCodeBench: prompts against hand-written ones, grading, windows, bad files."""

from __future__ import annotations

import base64
import dataclasses
import json
import pickle
import zlib
from pathlib import Path

import pytest

from dms_jax.tokenizer import byte_tokenizer
from experiments.grading import programs, sandbox
from experiments.tasks import get, livecodebench
from experiments.tasks.base import TasksConfig
from experiments.tasks.humaneval import HumanEval
from experiments.tasks.livecodebench import LiveCodeBench
from tests.helpers import TEMPLATE

try:
  MISSING = not sandbox.isolation()
except sandbox.SandboxError:
  MISSING = True
confined = pytest.mark.skipif(MISSING, reason="this machine has no Landlock or seccomp")

ALLOWED = TasksConfig(allow_code=True, template="raw")
CHAT = dataclasses.replace(ALLOWED, template="chat")


def tokenizer():
  return dataclasses.replace(byte_tokenizer(), settings={**byte_tokenizer().settings, "chat_template": TEMPLATE})


def prompts(task, config=ALLOWED):
  return task.prompts(config, tokenizer(), 0, 100_000)


def lines(path: Path, *records) -> str:
  path.write_text("".join(json.dumps(record) + "\n" for record in records))
  return str(path)


# HumanEval and MBPP ---------------------------------------------------------------------------------------------------

DOUBLE = 'from typing import List\n\n\ndef double(x: List[int]) -> List[int]:\n    """Twice each."""\n'
RECORD = {
  "task_id": "HumanEval/0", "prompt": DOUBLE, "entry_point": "double",
  "canonical_solution": "    return [2 * y for y in x]\n",
  "test": "METADATA = {}\ndef check(candidate):\n  assert candidate([1]) == [2]\n  assert candidate([]) == double([])",
}  # fmt: skip
MBPP = {
  "task_id": 7, "text": "Write a function to add.", "code": "def add(a, b):\n  return a + b", "test_setup_code": "",
  "test_list": ["assert add(1, 2) == 3", "assert set(add([1], [2])) == {1, 2}"], "test_imports": ["import math"],
}  # fmt: skip


@pytest.fixture
def humaneval(tmp_path):
  return lines(tmp_path / "HumanEval.jsonl", RECORD, MBPP)


@confined
def test_humaneval_s_prompts(humaneval):
  mbpp = (
    "You are an expert Python programmer, and here is your task: Write a function to add. Your code should pass these "
    "tests:\n\nassert add(1, 2) == 3\nassert set(add([1], [2])) == {1, 2}\n"
  )
  wanted = "Write a solution to the following problem and make sure that it passes the tests:\n```python\n"
  wanted += f"{DOUBLE}\n```\n"
  first, second = prompts(HumanEval(data=humaneval))
  assert (first.text, second.text) == (DOUBLE, mbpp + "[BEGIN]\n") and first.tokens == tokenizer().encode(DOUBLE)
  first, second = prompts(HumanEval(data=humaneval), CHAT)
  assert first.text == f"{wanted}Here is the completed function:\n```python\n{DOUBLE}\n"
  assert second.text == mbpp + "```python\n"
  first, second = prompts(HumanEval(data=humaneval, free=True), CHAT)
  assert (first.text, second.text) == (wanted, mbpp)
  assert prompts(HumanEval(data=humaneval), dataclasses.replace(CHAT, template="auto")) == prompts(
    HumanEval(data=humaneval), CHAT
  )
  assert len(prompts(HumanEval(data=humaneval), dataclasses.replace(ALLOWED, limit=1))) == 1


@confined
def test_humaneval_s_grades(humaneval):
  right, wrong = RECORD["canonical_solution"], "    return x\n"
  block = "<think>\n```\ntry\n```\n</think>\n```python\n{}\n```\nDone."
  whole = "def double(x: List[int]):\n" + right
  for config, free, graded in (
    (ALLOWED, False, {right: 100, wrong: 0, right + "\ndef more(": 100, "": 0, right + "\nassert False": 0}),
    (CHAT, False, {right: 100, right + "```\nSo it is.": 100, right + "```\n```python\nfail()\n```": 100, wrong: 0}),
    (CHAT, True, {block.format(whole): 100, block.format(right): 100, block.format(wrong): 0, whole: 0, "```": 0}),
  ):
    task = HumanEval(data=humaneval, free=free)
    prompt = prompts(task, config)[0]
    for text, score in graded.items():
      assert task.grade(text, prompt) == {"accuracy": score}, text
  task = HumanEval(data=humaneval)
  first, second = prompts(task)
  code = MBPP["code"]
  texts = [
    (code + "\n[DONE]\nassert False", second),
    ("def add(a, b): return 3", second),
    (right, first),
    (right, second),
  ]
  assert [graded["accuracy"] for graded in task.grades(texts, workers=2)] == [100, 0, 100, 0]


def test_humaneval_s_bad_files(tmp_path):
  path = tmp_path / "bad.jsonl"
  for record, message in (
    ({}, "line 1: a record needs 'task_id'"),
    ({"task_id": 1, "prompt": ""}, r"line 1: a record needs 'entry_point' \(HumanEval's\), or a list 'test_list'"),
    (RECORD | {"entry_point": "other"}, "line 1: 'prompt' does not define 'entry_point', 'other'"),
    (MBPP | {"test_list": []}, "line 1: a record of MBPP needs"),
    (MBPP | {"test_list": ["assert"]}, "line 1: 'test_list' is not Python"),
    (MBPP | {"code": ""}, "line 1: 'test_list' calls no function that 'code' defines"),
  ):
    path = tmp_path / f"{abs(hash(message))}.jsonl"
    with pytest.raises(ValueError, match=f"^--humaneval.data=.*{message}"):
      HumanEval(data=lines(path, record)).count()
  with pytest.raises(ValueError, match=r"--humaneval.data=.*: holds no record"):
    HumanEval(data=lines(tmp_path / "empty.jsonl")).count()
  with pytest.raises(ValueError, match=r"--humaneval.data=PATH is needed"):
    HumanEval().count()


# LiveCodeBench --------------------------------------------------------------------------------------------------------


def pickled(tests) -> str:
  """Private tests as the hub's files hold them."""
  return base64.b64encode(zlib.compress(pickle.dumps(json.dumps(tests)))).decode()


STDIN = {
  "question_title": "Sum", "question_content": "Add the numbers.", "platform": "atcoder", "question_id": "abc1",
  "contest_date": "2024-08-01T00:00:00", "starter_code": "", "difficulty": "easy", "metadata": "{}",
  "public_test_cases": json.dumps([{"input": "1 2\n", "output": "3\n", "testtype": "stdin"}]),
  "private_test_cases": pickled([{"input": "5 6\n", "output": "11\n", "testtype": "stdin"}]),
}  # fmt: skip
CALLED = STDIN | {
  "question_content": "Swap.", "platform": "leetcode", "question_id": "3", "contest_date": "2025-01-31T19:30:00",
  "starter_code": "class Solution:\n    def swap(self, a: int, b: List[int]) -> List[int]:\n        ",
  "metadata": json.dumps({"func_name": "swap"}),
  "public_test_cases": json.dumps([{"input": "1\n[2]", "output": "[[2], 1]", "testtype": "functional"}]),
  "private_test_cases": json.dumps([{"input": "0\n[]", "output": "[[], 0]", "testtype": "functional"}]),
}  # fmt: skip
SUM = "a, b = map(int, input().split())\nprint(a + b)"
SWAP = "class Solution:\n  def swap(self, a: int, b: List[int]) -> List[int]:\n    return (b, a)"


@pytest.fixture
def contests(tmp_path):
  late = STDIN | {"question_id": "late", "contest_date": "2025-02-01T00:00:00"}
  early = STDIN | {"question_id": "early", "contest_date": "2024-07-31T23:59:00", "platform": "codeforces"}
  lines(tmp_path / "test.jsonl", early, STDIN)
  lines(tmp_path / "test2.jsonl", late, CALLED)
  return str(tmp_path)


@confined
def test_livecodebench_s_prompts(contests):
  system = (
    "You are an expert Python programmer. You will be given a question (problem specification) and will generate a "
    "correct Python program that matches the specification and passes all tests. You will NOT return anything except "
    "for the program."
  )
  first = (
    "### Question:\nAdd the numbers.\n\n### Format: Read the inputs from stdin solve the problem and write the answer "
    "to stdout (do not directly test on the sample inputs). Enclose your code within delimiters as follows.\n```python"
    "\n# YOUR CODE HERE\n```\n\n### Answer: (use the provided format with backticks)\n\n"
  )
  second = (
    "### Question:\nSwap.\n\n### Format: You will use the following starter code to write the solution to the problem "
    f"and enclose your code within delimiters.\n```python\n{CALLED['starter_code']}\n```\n\n"
    "### Answer: (use the provided format with backticks)\n\n"
  )
  assert [p.text for p in prompts(LiveCodeBench(data=contests), CHAT)] == [system + first, system + second]
  assert [p.text for p in prompts(LiveCodeBench(data=contests))] == [f"{system}\n\n{first}", f"{system}\n\n{second}"]
  thinks = prompts(LiveCodeBench(data=contests, style="reasoning"), CHAT)[0].text
  assert thinks == (
    "You will be given a question (problem specification) and will generate a correct Python program that matches the "
    "specification and passes all tests.\n\nQuestion: Add the numbers.\n\nRead the inputs from stdin solve the problem "
    "and write the answer to stdout (do not directly test on the sample inputs). Enclose your code within delimiters "
    "as follows.\n```python\n# YOUR CODE HERE\n```\n\n"
  )


def test_livecodebench_s_window(contests):
  names = lambda **settings: [record["name"] for record in LiveCodeBench(data=contests, **settings).records]
  assert names() == ["abc1", "3"]
  assert names(start="2024-01-01", end="2025-12-31") == ["early", "abc1", "late", "3"]
  assert names(start="2024-01-01", end="2025-12-31", platform="codeforces") == ["early"]
  assert names(end="2024-08-01") == ["abc1"]
  files = f"{contests}/test2.jsonl, {contests}/test.jsonl"
  assert [record["name"] for record in LiveCodeBench(data=files).records] == ["3", "abc1"]
  with pytest.raises(ValueError, match=r"none of its 4 problems is from 2020-01-01 to 2020-01-02"):
    names(start="2020-01-01", end="2020-01-02")
  with pytest.raises(ValueError, match=r"--livecodebench.start: 'August' is no date"):
    names(start="August")


@confined
def test_livecodebench_s_grades(contests):
  task = LiveCodeBench(data=contests, seconds=1.0)
  fenced = "I think.\n```python\nprint(3)\n```\nNo:\n```python\n{}\n```\nDone.".format
  first, second = prompts(task)
  for text, prompt, score in (
    (fenced(SUM), first, 100), (fenced("print(3)"), first, 0), (SUM, first, 0), (fenced(SUM + "\n1 / 0"), first, 0),
    (fenced("while True: pass"), first, 0), (fenced("import os\nos._exit(0)"), first, 0),
    (fenced("print(sum(map(int, stdin.read().split())))"), first, 100),  # the harness imports * from sys
    (fenced(SWAP), second, 100), (fenced(SWAP.replace("b, a", "a, b")), second, 0), (fenced(SUM), second, 0),
    (fenced(SWAP + "\nimport os\nos._exit(0)"), second, 0), (fenced("def swap(a, b): return [b, a]"), second, 100),
  ):  # fmt: skip
    assert task.grade(text, prompt) == {"accuracy": score}, text
  assert task.best_of_all and task.metrics == ("accuracy",)


def test_private_tests_are_not_unpickled(tmp_path):
  class Harm:
    def __reduce__(self):
      return Path.touch, (tmp_path / "harm",)

  pack = lambda data: base64.b64encode(zlib.compress(data)).decode()
  tests = [{"input": "ä", "output": "b" * 300}]
  for protocol in range(6):
    assert livecodebench.read_tests(pack(pickle.dumps(json.dumps(tests), protocol))) == tests
  for text, message in (
    (pack(pickle.dumps(Harm())), r"a pickle of more than a string \("),
    (pack(pickle.dumps(["[]"])), "more than a string"),
    (pack(pickle.dumps(1)), "more than a string"), (pack(b"."), "a pickle of 0 strings"), (pack(b"\x80\x04"), "pickle"),
    ("!", "neither JSON nor compressed base64"), (pack(pickle.dumps("[]"))[:-8], "cut short|neither"),
    ('{"a": 1', "neither JSON"), ("[1]", "a test needs"), (pack(pickle.dumps("{}")), "not a list"),
  ):  # fmt: skip
    with pytest.raises(ValueError, match=message):
      livecodebench.read_tests(text)
  assert not (tmp_path / "harm").exists()


@confined
def test_livecodebench_s_bad_files(tmp_path):
  for number, (change, message) in enumerate((
    ({"starter_code": None}, "line 1: a record needs 'starter_code'"),
    ({"contest_date": "soon"}, "line 1: 'contest_date': 'soon' is no date"),
    ({"metadata": "{"}, "line 1: 'metadata': "), ({"metadata": '{"func_name": 1}'}, "line 1: 'metadata': 'func_name'"),
    ({"private_test_cases": "x"}, "line 1: its tests cannot be read"),
    ({"private_test_cases": "[]", "public_test_cases": "[]"}, r"line 1: its tests cannot be read \(there are none\)"),
    ({"metadata": '{"func_name": "f"}', "public_test_cases": '[{"input": "x", "output": "1"}]'}, "cannot be read"),
  )):  # fmt: skip
    with pytest.raises(ValueError, match=f"^--livecodebench.data=.*{message}"):
      prompts(LiveCodeBench(data=lines(tmp_path / f"{number}.jsonl", STDIN | change)))


@confined
def test_livecodebench_s_empty_files(tmp_path):
  for path, message in ((lines(tmp_path / "none.jsonl"), "holds no record"), (tmp_path / "sub", r"no \*.jsonl there")):
    (tmp_path / "sub").mkdir(exist_ok=True)
    with pytest.raises(ValueError, match=f"^--livecodebench.data={path}: {message}"):
      prompts(LiveCodeBench(data=str(path)))


# What both share ------------------------------------------------------------------------------------------------------


def test_outputs_that_are_the_same():
  same = programs.same_output
  assert same("3\n", "3") and same(" 1  2 \n3\n\n", "1  2\n3") and same("1.50 2", "1.5  2.0") and same("1e3", "1000")
  assert not same("3", "4") and not same("1\n2", "1 2") and not same("", "0") and not same("1 x", "1  x")
  assert not same("sNaN", "1") and not same("NaN", "nan") and same("a\r\nb", "a\nb")
  assert not same("50000000000000000", "50000000000000001")


def test_blocks():
  assert programs.last_block("a\n```python\nb\nc\n```\nd") == "b\nc"
  assert programs.last_block("```\na\n```\n```py\nb\n```") == "b"
  assert programs.last_block("```\na") == programs.last_block("") == ""
  assert programs.before_fence("  a\n```\nb\n```") == "  a\n"
  assert programs.cut("a\ndef b\n#", ("\n#", "\ndef")) == "a"


def test_programs_run_with_permission_alone(humaneval, monkeypatch):
  for task in (HumanEval(data=humaneval), get("livecodebench")(data=humaneval)):
    with pytest.raises(
      ValueError, match=f"--tasks={task.name} runs programs that the model writes: --allow_code permits"
    ):
      prompts(task, TasksConfig())
  monkeypatch.setattr(sandbox.sys, "platform", "darwin")
  sandbox.isolation.cache_clear()
  with pytest.raises(ValueError, match=r"^--allow_code: programs cannot run here safely: they need Linux"):
    prompts(HumanEval(data=humaneval))
  monkeypatch.undo()


@confined
def test_prompts_that_the_model_cannot_read(humaneval):
  with pytest.raises(ValueError, match=r"HumanEval/0 has \d+ tokens, and the model's context 20"):
    HumanEval(data=humaneval).prompts(ALLOWED, tokenizer(), 0, 20)


def test_settings():
  for task, name in ((HumanEval, "humaneval"), (LiveCodeBench, "livecodebench")):
    with pytest.raises(ValueError, match=f"--{name}.seconds=0 must be above 0"):
      task(seconds=0)
    with pytest.raises(ValueError, match=f"--{name}.memory=1 must be 256 or more"):
      task(memory=1)
