"""LiveCodeBench (Jain et al. 2024, arXiv 2403.07974): problems of programming contests.

Read from files of code_generation_lite or code_generation as the hub has them, JSON lines: question_content,
starter_code, platform, contest_date, metadata, public_test_cases and private_test_cases. Problems with a contest in a
window are asked, by default the DMS paper's, August 2024 to January 2025. Its problems came with releases 4 and 5:
`--livecodebench.data=hub:livecodebench/code_generation_lite/test4.jsonl,hub:...`, each file with its own `hub:`.

Prompts, the place of the program in a text, the comparison of outputs and the 6 s for each test are those of
LiveCodeBench's own harness (lcb_runner).

Private tests are a pickled string in the hub's files. They are read without unpickling: any opcode but those of one
string is an error.
"""

from __future__ import annotations

import base64
import binascii
import datetime
import functools
import json
import pickletools
import zlib
from pathlib import Path
from typing import Any, Literal

from experiments.common.files import json_records
from experiments.grading import programs
from experiments.tasks.base import register
from experiments.tasks.code import Asked, CodeTask
from experiments.tasks.sources import located

FLAG = "livecodebench.data"
MOST_TEST_BYTES = 1 << 30  # of one problem's private tests, decompressed
SYSTEM = (
  "You are an expert Python programmer. You will be given a question (problem specification) and will generate a "
  "correct Python program that matches the specification and passes all tests."
)
ALONE = " You will NOT return anything except for the program."
REASONING = (
  "You will be given a question (problem specification) and will generate a correct Python program that matches the "
  "specification and passes all tests.\n\n"
)
WITH_STARTER = (
  "You will use the following starter code to write the solution to the problem "
  "and enclose your code within delimiters."
)  # fmt: skip
WITHOUT_STARTER = (
  "Read the inputs from stdin solve the problem and write the answer to stdout (do not directly test on the sample "
  "inputs). Enclose your code within delimiters as follows."
)
FIELDS = {
  "question_content": str, "starter_code": str, "platform": str, "contest_date": str, "public_test_cases": str,
  "private_test_cases": str,
}  # fmt: skip
STRINGS = {"SHORT_BINUNICODE", "BINUNICODE", "BINUNICODE8", "UNICODE"}
HARMLESS = {"PROTO", "FRAME", "MEMOIZE", "BINPUT", "LONG_BINPUT", "PUT", "STOP"}


def pickled_string(data: bytes) -> str:
  """The string that `data` pickles, read opcode by opcode; nothing is unpickled.

  Raises:
    ValueError: it is anything but one string.
  """
  texts = []
  for opcode, argument, _ in pickletools.genops(data):
    if opcode.name in STRINGS:
      texts.append(argument)
    elif opcode.name not in HARMLESS:
      raise ValueError(f"a pickle of more than a string ({opcode.name})")
  if len(texts) != 1:
    raise ValueError(f"a pickle of {len(texts)} strings")
  return texts[0]


def read_tests(text: str) -> list[dict[str, str]]:
  """Test cases, from JSON or from JSON that is pickled, compressed and written in base64.

  Raises:
    ValueError: anything else.
  """
  if not text.lstrip().startswith("["):
    try:
      unpacked = zlib.decompressobj()
      data = unpacked.decompress(base64.b64decode(text, validate=True), MOST_TEST_BYTES)
    except (binascii.Error, zlib.error) as error:
      raise ValueError(f"neither JSON nor compressed base64 ({error})") from None
    if not unpacked.eof:
      raise ValueError(f"cut short, or more than {MOST_TEST_BYTES} bytes")
    text = pickled_string(data)
  tests = json.loads(text)
  if not isinstance(tests, list):
    raise ValueError("not a list")
  for test in tests:
    if not isinstance(test, dict) or not all(isinstance(test.get(name), str) for name in ("input", "output")):
      raise ValueError("a test needs the texts 'input' and 'output'")
  return tests


@functools.lru_cache(maxsize=4)  # of the chains of a problem, which are graded together
def tests_of(function: str, public: str, private: str) -> list[tuple[Any, Any]]:
  """(input, output) of every test: texts, or arguments and value if a function is called.

  Raises:
    ValueError: tests that are no tests, or none.
  """
  tests = [(test["input"], test["output"]) for each in (public, private) for test in read_tests(each)]
  if not tests:
    raise ValueError("there are none")
  if function:
    return [([json.loads(line) for line in given.split("\n")], json.loads(value)) for given, value in tests]
  return tests


def function_name(metadata: Any) -> str:
  """`func_name` of a problem's metadata, a dictionary or its JSON; "" if the program reads standard input."""
  if isinstance(metadata, str):
    metadata = json.loads(metadata or "{}")
  name = (metadata or {}).get("func_name") if isinstance(metadata or {}, dict) else None
  if name is not None and not isinstance(name, str):
    raise ValueError("'func_name' is no text")
  return name or ""


def date(flag: str, text: str) -> datetime.date:
  """A day, from YYYY-MM-DD with or without a time.

  Raises:
    ValueError: something else; the message begins with `flag`.
  """
  try:
    return datetime.datetime.fromisoformat(text).date()
  except ValueError:
    raise ValueError(f"{flag}: {text!r} is no date like 2024-08-01") from None


@functools.cache
def read(files: tuple[Path, ...], start: datetime.date, end: datetime.date, platform: str) -> list[dict[str, Any]]:
  """Every problem of the files, in order, with a contest in the window.

  Raises:
    ValueError: a malformed record, or no problem in the window; names the flag and line.
  """
  found, count = [], 0
  for file in files:
    for where, record in json_records(FLAG, file, FIELDS):
      count += 1
      held = date(f"{where}: 'contest_date'", record["contest_date"])
      if not start <= held <= end or platform not in ("all", record["platform"]):
        continue
      try:
        name = function_name(record.get("metadata"))
      except ValueError as error:
        raise ValueError(f"{where}: 'metadata': {error}") from None
      fields = ("question_content", "starter_code", "public_test_cases", "private_test_cases")
      kept = {field: record[field] for field in fields}
      found.append(kept | {"name": str(record.get("question_id", where)), "where": where, "function": name})
  if not count:
    raise ValueError(f"--{FLAG}={','.join(map(str, files))}: holds no record")
  if not found:
    raise ValueError(
      f"--{FLAG}={','.join(map(str, files))}: none of its {count} problems is from {start} to {end} "
      f"(--livecodebench.start, .end) and of --livecodebench.platform={platform}"
    )
  return found


@register
class LiveCodeBench(CodeTask):
  """`data`: files, folders of *.jsonl or files of the hub, separated by commas.

  `start` and `end` of the window, both included; `platform` of the contests. `style` of the prompt: "generic" is for
  instruct models; "reasoning" is for models that think before they answer, and what the harness gives QwQ and
  DeepSeek's R1. `seconds` for each test of a program; `memory` of a program, MiB.

  Attributes:
    style: of the prompt, for instruct models or for models that think before they answer.
  """

  data: str = ""
  start: str = "2024-08-01"
  end: str = "2025-01-31"
  platform: Literal["all", "leetcode", "codeforces", "atcoder"] = "all"
  style: Literal["generic", "reasoning"] = "generic"
  seconds: float = 6.0
  memory: int = 4096

  new_tokens = 8192

  @property
  def records(self) -> list[dict[str, Any]]:
    window = [date(f"--{self.name}.{end}", getattr(self, end)) for end in ("start", "end")]
    what = "LiveCodeBench's test.jsonl, test2.jsonl, ..., or a folder of such"
    files = []
    for each in self.data.split(","):
      place = located(FLAG, each.strip(), what, ("*.jsonl",))
      own = sorted(place.glob("*.jsonl")) if place.is_dir() else [place]
      if not own:
        raise ValueError(f"--{FLAG}={place}: no *.jsonl there; it should be {what}")
      files += own
    return read(tuple(files), *window, self.platform)

  def count(self) -> int:
    return len(self.records)

  def asked(self, number: int, chat: bool) -> Asked:
    record = self.records[number]
    question, starter = record["question_content"], record["starter_code"]
    wanted = WITH_STARTER if starter else WITHOUT_STARTER
    block = f"```python\n{starter or '# YOUR CODE HERE'}\n```\n\n"
    if self.style == "reasoning":
      text = f"{REASONING}Question: {question}\n\n{wanted}\n{block}"
      messages = (("user", text),)
    else:
      user = f"### Question:\n{question}\n\n### Format: {wanted}\n{block}"
      user += "### Answer: (use the provided format with backticks)\n\n"
      messages, text = (("system", SYSTEM + ALONE), ("user", user)), f"{SYSTEM}{ALONE}\n\n{user}"
    references = (record["function"], record["public_test_cases"], record["private_test_cases"])
    try:
      tests_of(*references)
    except (ValueError, RecursionError) as error:
      raise ValueError(f"{record['where']}: its tests cannot be read ({error})") from None
    return Asked(record["name"], messages, "", text, references)

  def right(self, text: str, references: tuple[str, ...]) -> bool:
    tests = tests_of(*references)
    if not (code := programs.last_block(text)):
      return False
    if function := references[0]:
      return programs.returns_right(code, function, tests, self.limits)
    return programs.prints_right(code, tests, self.limits)
