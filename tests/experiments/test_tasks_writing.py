"""Tasks answered in writing: prompts by hand, answers read from texts, data files, the hub."""

from __future__ import annotations

import csv
import json
import re
import sys
from pathlib import Path

import pytest

from dms_jax.tokenizer import byte_tokenizer
from experiments.grading import maths
from experiments.tasks import get, sources
from experiments.tasks.base import Prompt, TasksConfig
from experiments.tasks.gpqa import COLUMNS
from tests.helpers import write_gsm8k

pytest.importorskip("math_verify")

PLAIN = byte_tokenizer()
TEMPLATE = "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{% endfor %}<assistant>"
CHAT = type(PLAIN)(PLAIN.backend, {**PLAIN.settings, "chat_template": TEMPLATE})
DIRECTIVE = "\n\nPlease reason step by step, and put your final answer within \\boxed{}."
ALL = TasksConfig()


def lines(path: Path, *records: dict) -> Path:
  path.write_text("".join(json.dumps(record) + "\n" for record in records))
  return path


def write_gpqa(path: Path, count: int = 8) -> Path:
  """Questions in the layout of the hub's file: more columns than are read, line breaks and commas in the cells."""
  with path.open("w", newline="") as file:
    rows = csv.writer(file)
    rows.writerow(["Record ID", "Subdomain", *COLUMNS, "Explanation"])
    for i in range(count):
      rows.writerow(
        [f"rec{i}", "Physics", f'Which, "{i}"?\nThink.', f" right {i}\n", *(f"wrong {i}{c}" for c in "abc"), ""]
      )
  return path


def one(name: str, path: Path, tokenizer=PLAIN, config: TasksConfig = ALL, **settings) -> list[Prompt]:
  return get(name)(data=str(path), **settings).prompts(config, tokenizer, 0, 10**6)


# Maths ----------------------------------------------------------------------------------------------------------------


def test_math500(tmp_path):
  record = {"problem": " What is $1+1$?\n", "solution": "$\\boxed{2}$", "answer": "2", "subject": "Algebra", "level": 1}
  path = lines(tmp_path / "test.jsonl", record, {**record, "problem": "Half of one?", "answer": "\\frac{1}{2}"})
  first, second = one("math500", path)
  assert first.text == f"What is $1+1$?{DIRECTIVE}" and first.tokens == PLAIN.encode(first.text)
  assert one("math500", path, CHAT)[0].text == f"<user>What is $1+1$?{DIRECTIVE}<assistant>"
  task = get("math500")(data=str(path))
  assert task.grade("so $\\boxed{0.5}$", second) == {"accuracy": 100.0}
  assert task.grade("so $\\boxed{5}$", second) == task.grade("", second) == {"accuracy": 0.0}
  assert task.answer("so $\\boxed{0.5}$") == task.answer("The answer is 1/2.") == "0.5" and task.answer("what?") is None
  assert task.metrics == ("accuracy",) and not task.best_of_all and task.new_tokens == 8192


def test_aime24(tmp_path):
  path = lines(
    tmp_path / "test.jsonl", *({"id": 60 + i, "problem": "p", "answer": a} for i, a in enumerate(("033", 204)))
  )
  first, second = one("aime24", path)
  assert (first.references, second.references) == (("33",), ("204",)) and first.text == f"p{DIRECTIVE}"
  task = get("aime24")()
  assert all(
    task.grade(text, first)["accuracy"] == 100 for text in (r"\boxed{33}", r"\boxed{033}", "The answer is 33.")
  )
  assert task.grade(r"\boxed{33.5}", first)["accuracy"] == 0
  assert task.answer(r"\boxed{033}") == task.answer("The answer is 33.") == "33"


def test_gsm8k_in_plain_text_and_in_chats(tmp_path):
  path = write_gsm8k(tmp_path / "test.jsonl", 12)
  prompt = one("gsm8k_cot", path)[3]
  *shots, question = prompt.text.split("\n\n")
  assert question == "Question: How many 3?\nAnswer:" and prompt.references == ("6",)
  others = {f"Question: How many {i}?\nAnswer: {i}+{i} = {2 * i}.\n#### {2 * i}" for i in range(12) if i != 3}
  assert len(set(shots)) == 8 and set(shots) <= others  # calculator marks are gone
  assert one("gsm8k_cot", path, CHAT)[3].text == f"<user>How many 3?{DIRECTIVE}<assistant>"
  turns = one("gsm8k_cot", path, CHAT, shots=1)[3].text
  assert re.fullmatch(r"<user>How many (\d+)\?<assistant>\1\+\1 = \d+\.\n#### \d+<user>How many 3\?<assistant>", turns)
  assert one("gsm8k_cot", path, CHAT, TasksConfig(template="raw"))[3] == prompt


def test_gsm8k_s_answers():
  task, prompt = get("gsm8k_cot")(), Prompt("", [], ("1234",))
  right = (
    "2+2\n#### 1,234",
    "#### $1,234.",
    "#### 1234\nmore 5",
    r"\boxed{1234}",
    "The answer is 1,234 apples",
    "#### 1234.00",
  )
  right += ("#### Step 1\nso\n#### 1. Count\n\\boxed{1234}",)  # headings
  assert all(task.grade(text, prompt) == {"accuracy": 100.0} for text in right)
  assert {task.answer(text) for text in right} == {"1234"}
  assert task.grade("#### 7\n#### 1234", prompt)["accuracy"] == 0  # the first counts
  assert task.grade("####", prompt)["accuracy"] == 0 and task.answer("####") is None
  assert task.stop == ("\n\nQuestion:",)


# GPQA -----------------------------------------------------------------------------------------------------------------


def test_gpqa(tmp_path):
  path = write_gpqa(tmp_path / "gpqa_diamond.csv", 40)
  prompts = one("gpqa", path)
  assert len(prompts) == 40 and {p.references for p in prompts} == {(letter,) for letter in "ABCD"}
  head, question, choices = re.fullmatch(r"(.*?)\n\n(.*?)\n\n(A\).*)", prompts[3].text, re.DOTALL).groups()
  assert head == (
    "Answer the following multiple choice question. The last line of your response should be of the following format: "
    "'Answer: $LETTER' (without quotes) where LETTER is one of ABCD. Think step by step before answering."
  )
  assert question == 'Which, "3"?\nThink.'
  shown = dict(line.split(") ") for line in choices.split("\n"))
  assert shown.pop(prompts[3].references[0]) == "right 3" and list(shown.values()) == [f"wrong 3{c}" for c in "abc"]
  assert prompts == one("gpqa", path) != one("gpqa", path, config=TasksConfig(seed=1))
  few = one("gpqa", path, config=TasksConfig(limit=5))
  assert len(few) == 5 and all(prompt in prompts for prompt in few)  # the same order of choices


@pytest.mark.parametrize(
  ("text", "letter"),
  [
    ("Thus.\nAnswer: B", "B"),
    ("Answer: A\nno,\n**Answer:** $C$", "C"),
    ("**Answer: (D)**", "D"),
    ("Answer: $\\boxed{\\text{A}}$", "A"),
    ("so $\\boxed{B}$.", "B"),
    ("so \\boxed{\\textbf{(C)}}", "C"),
    ("The answer is D.", "D"),
    ("the answer is: **A**", "A"),
    ("The answer is B. Answer: C", "C"),
    ("Answer: E", None),
    ("Answer: Alpha", None),
    ("A good start", None),
    ("", None),
  ],
)
def test_letters(text, letter):
  assert get("gpqa")().answer(text) == letter
  assert get("gpqa")().grade(text, Prompt("", [], ("B",))) == {"accuracy": 100.0 * (letter == "B")}


# ARC ------------------------------------------------------------------------------------------------------------------

OFFICIAL = {
  "id": "a", "answerKey": "2",
  "question": {"stem": "Why?", "choices": [{"text": "so", "label": "1"}, {"text": "or so", "label": "2"}]},
}  # fmt: skip
OF_THE_HUB = {
  "id": "b",
  "answerKey": "C",
  "question": "Who?",
  "choices": {"text": ["i", "you", "we"], "label": ["A", "B", "C"]},
}


def test_arc_challenge(tmp_path):
  task = get("arc_challenge")(data=str(lines(tmp_path / "a.jsonl", OFFICIAL, OF_THE_HUB)))
  first, second = task.questions(ALL)
  assert (first.context, first.choices, first.answer) == ("Question: Why?\nAnswer:", ("so", "or so"), 1)
  assert (second.context, second.choices, second.answer) == ("Question: Who?\nAnswer:", ("i", "you", "we"), 2)
  first, _ = get("arc_challenge")(data=task.data, shots=1).questions(ALL)
  assert first.context == "Question: Who?\nAnswer: we\n\nQuestion: Why?\nAnswer:"


# Files ----------------------------------------------------------------------------------------------------------------

WORD = {"question": "q", "answer": "no number"}
PROBLEM = {"problem": "p", "answer": "5"}


@pytest.mark.parametrize(
  ("name", "text", "message"),
  [
    ("math500", "", ": holds no record"),
    ("math500", '{"problem": "p"}', "line 1: a record needs 'answer' (str)"),
    ("math500", json.dumps(PROBLEM) + '\n{"problem": 3, "answer": "5"}', "line 2: a record needs 'problem' (str)"),
    ("math500", "[]", "line 1: a record needs 'problem' (str)"),
    ("aime24", "{", "line 1: not valid JSON"),
    ("aime24", json.dumps({**PROBLEM, "answer": "1000"}), "line 1: the answer must be an integer from 0 to 999, not '"),
    ("aime24", json.dumps({**PROBLEM, "answer": True}), "the answer must be an integer from 0 to 999, not True"),
    ("aime24", json.dumps({**PROBLEM, "answer": None}), "line 1: a record needs 'answer' (str | int)"),
    ("gsm8k_cot", json.dumps(WORD), "line 1: the answer has no final number after '####'"),
    ("gpqa", "", "line 1: no column 'Question'"),
    ("gpqa", "Question,Correct Answer\nq,r\n", "line 1: no column 'Incorrect Answer 1'"),
    ("gpqa", ",".join(COLUMNS) + "\n", ": holds no question"),
    ("gpqa", ",".join(COLUMNS) + '\n"q\n",r,1,2,3\nq,r,1,2\n', "line 4: 'Incorrect Answer 3' is empty"),
    ("gpqa", ",".join(COLUMNS) + '\n"q\n', "line 2: not CSV"),
    ("arc_challenge", "", ": holds no record"),
    ("aime24", "", ": holds no record"),
    ("gsm8k_cot", "", ": holds no record"),
    ("arc_challenge", json.dumps({**OF_THE_HUB, "answerKey": "D"}), "answerKey must be one of A, B, C, not 'D'"),
    ("arc_challenge", json.dumps({**OF_THE_HUB, "choices": ["x"]}), "line 1: a record needs a question, and choices"),
    ("arc_challenge", json.dumps({**OFFICIAL, "question": {"stem": "Why?"}}), "line 1: a record needs a question"),
  ],
)  # fmt: skip
def test_malformed_files_name_flag_and_line(tmp_path, name, text, message):
  (tmp_path / "data").write_text(text)
  task = get(name)(data=str(tmp_path / "data"))
  with pytest.raises(ValueError) as caught:
    task.questions(ALL) if name == "arc_challenge" else task.prompts(ALL, PLAIN, 0, 10**6)
  assert message in str(caught.value) and str(caught.value).startswith(f"--{name}.data={tmp_path / 'data'}")


def test_what_else_is_refused(tmp_path, monkeypatch):
  path = lines(tmp_path / "p.jsonl", PROBLEM, PROBLEM)
  with pytest.raises(ValueError, match=r"--math500.data=PATH is needed: MATH-500's test.jsonl, or hub:Hugging"):
    get("math500")().prompts(ALL, PLAIN, 0, 10**6)
  size = len(f"p{DIRECTIVE}")
  assert len(get("aime24")(data=str(path)).prompts(ALL, PLAIN, 0, size + 1)) == 2
  with pytest.raises(ValueError, match=f"--aime24.data: problem 0 is a prompt of {size} tokens; the model's"):
    get("aime24")(data=str(path)).prompts(ALL, PLAIN, 0, size)
  with pytest.raises(ValueError, match=r"--gsm8k_cot.shots=-1 must be 0 or more"):
    get("gsm8k_cot")(shots=-1)
  with pytest.raises(ValueError, match=r"--gsm8k_cot.shots=8 needs more records than the 3 of --gsm8k_cot.data"):
    one("gsm8k_cot", write_gsm8k(tmp_path / "g.jsonl", 3))
  for wrong in (0.0, 1.5):
    with pytest.raises(ValueError, match=f"--top_p={wrong} must be above 0 and at most 1"):
      TasksConfig(top_p=wrong)
  monkeypatch.setattr(maths, "check", lambda: (_ for _ in ()).throw(ValueError("not installed")))
  with pytest.raises(ValueError, match="not installed"):
    one("math500", path)
  assert len(one("gpqa", write_gpqa(tmp_path / "g.csv"))) == 8  # letters need no library


# The hub --------------------------------------------------------------------------------------------------------------


@pytest.fixture
def hub(tmp_path, monkeypatch):
  """A fake huggingface_hub with a few data sets; the files downloaded so far."""
  (tmp_path / "test.jsonl").write_text(json.dumps(PROBLEM) + "\n")
  files = {"someone/set": ["README.md", "test.jsonl", "data/test.jsonl"], "someone/other": ["a.csv", "b.csv"]}
  files["someone/mmlu"] = ["dev.jsonl", "test.jsonl"]
  asked = []

  class Hub:
    class HfApi:
      def list_repo_files(self, repo_id, repo_type, revision):
        if repo_id not in files:
          raise RuntimeError("401 Client Error.\nmuch more")
        assert repo_type == "dataset"
        return files[repo_id]

    @staticmethod
    def hf_hub_download(repo_id, filename, repo_type, revision):
      asked.append((repo_id, filename, revision))
      return str(tmp_path / Path(filename).name)

  monkeypatch.setitem(sys.modules, "huggingface_hub", Hub)
  return asked


def test_data_sets_of_the_hub(hub):
  assert one("math500", "hub:someone/set")[0].text == f"p{DIRECTIVE}"
  one("math500", "hub:someone/set@v1")
  one("math500", "hub:someone/set/data/test.jsonl@v1")
  assert hub == [
    ("someone/set", "test.jsonl", None), ("someone/set", "test.jsonl", "v1"), ("someone/set", "data/test.jsonl", "v1"),
  ]  # fmt: skip


def test_mmlu_of_the_hub(hub, tmp_path):
  row = {"question": " Why? ", "subject": "high_school_physics", "choices": ["a", "b", "c", "d"], "answer": 2}
  lines(tmp_path / "dev.jsonl", {**row, "subject": "anatomy"}, row)
  lines(tmp_path / "test.jsonl", row, {**row, "subject": "anatomy", "answer": 0})
  first, second = get("mmlu")(data="hub:someone/mmlu", shots=1).questions(ALL)
  asked = "Why?\nA. a\nB. b\nC. c\nD. d\nAnswer:"
  about = "The following are multiple choice questions (with answers) about"
  assert (first.context, first.answer) == (f"{about} anatomy.\n\n{asked} C\n\n{asked}", 0)
  assert second.context.startswith(f"{about} high school physics.") and second.answer == 2
  for shots, value, message in (
    (2, "", r"--mmlu.shots=2: --mmlu.data has 1 dev questions of anatomy"),
    (1, "/test.jsonl", r"--mmlu.data=hub:someone/mmlu/test.jsonl: two files are read; give hub:OWNER/NAME"),
  ):
    with pytest.raises(ValueError, match=message):
      get("mmlu")(data=f"hub:someone/mmlu{value}", shots=shots).questions(ALL)
  lines(tmp_path / "test.jsonl", {**row, "answer": 4})
  with pytest.raises(ValueError, match=r"test.jsonl, line 1: a record needs four choices and an answer 0-3"):
    get("mmlu")(data="hub:someone/mmlu", shots=0).questions(ALL)


def test_what_the_hub_cannot_give(hub, monkeypatch):
  for value, message in (
    ("hub:secret/set", r"--x.data=hub:secret/set: the hub could not give it: 401 Client Error\.$"),
    ("hub:someone/other", r"has no file test\.jsonl or \*\.parquet; name another, as in hub:someone/other/PATH"),
    ("hub:someone", "a data set of the hub is hub:OWNER/NAME"),
  ):
    with pytest.raises(ValueError, match=message):
      sources.located("x.data", value, "a file", ("test.jsonl", "*.parquet"))
  with pytest.raises(ValueError, match=r"has 2 files \*\.csv; name one, as in hub:someone/other/a\.csv"):
    sources.located("x.data", "hub:someone/other", "a file", ("*.csv",))
  monkeypatch.setitem(sys.modules, "huggingface_hub", None)
  with pytest.raises(ValueError, match=r"needs huggingface_hub: pip install 'dms_jax\[hub\]'"):
    sources.located("x.data", "hub:someone/set", "a file", ("*.csv",))


def test_parquet(tmp_path, monkeypatch):
  arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
  path = tmp_path / "train-00000-of-00001.parquet"
  parquet.write_table(arrow.Table.from_pylist([PROBLEM, {**PROBLEM, "problem": "another"}]), path)
  assert [prompt.text for prompt in one("aime24", path)] == [f"p{DIRECTIVE}", f"another{DIRECTIVE}"]
  parquet.write_table(arrow.Table.from_pylist([PROBLEM, {"problem": None, "answer": "5"}]), path)
  with pytest.raises(ValueError, match=r"--aime24.data=\S+, row 2: a record needs 'problem' \(str\)"):
    one("aime24", path)
  hub_rows = [{**OF_THE_HUB, "choices": {"text": ["i", "you", "we"], "label": ["A", "B", "C"]}}]
  parquet.write_table(arrow.Table.from_pylist(hub_rows), path)
  (question,) = get("arc_challenge")(data=str(path)).questions(ALL)
  assert question.choices == ("i", "you", "we") and question.answer == 2
  solved = {"question": "How many?", "answer": "1+1 = <<1+1=2>>2\n#### 2"}
  parquet.write_table(arrow.Table.from_pylist([solved]), path)
  assert one("gsm8k_cot", path, CHAT)[0].references == ("2",)
  (question,) = get("gsm8k")(data=str(path), shots=0).questions(ALL)
  assert question.choices == ("1+1 = 2\n#### 2",)
  story = {"activity_label": "Act", "ctx_a": "A.", "ctx_b": "b", "endings": ["c", "d", "e", "f"], "label": "1"}
  parquet.write_table(arrow.Table.from_pylist([story]), path)
  (question,) = get("hellaswag")(data=str(path), shots=0).questions(ALL)
  assert (question.context, question.choices[question.answer]) == ("Act: A. B", "d")
  path.write_bytes(b"PAR1 no more")
  with pytest.raises(ValueError, match=r"--aime24.data=\S+: not a Parquet file"):
    one("aime24", path)
  monkeypatch.setitem(sys.modules, "pyarrow", None)
  with pytest.raises(ValueError, match=r"Parquet files need pyarrow: pip install 'dms_jax\[hub\]'"):
    one("aime24", path)
