"""Tasks: their texts against hand-written ones, choices by the seed, bad files."""

from __future__ import annotations

import bz2
import itertools
import json
import random
import re
from pathlib import Path

import pytest

from dms_jax.tokenizer import byte_tokenizer
from experiments.methods import run
from experiments.tasks import get, retrieval
from experiments.tasks.base import TasksConfig, sampled, shots_of
from experiments.tasks.gsm8k import GSM8K
from experiments.tasks.hellaswag import HellaSwag
from experiments.tasks.mmlu import MMLU
from experiments.tasks.needle import Needle
from experiments.tasks.tracking import Tracking
from tests.helpers import SIX_LINES, write_gsm8k, write_mmlu

ROOT = Path(__file__).parents[2]
NOISE = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."


def made(task, seed=3):
  return task.sample(random.Random(seed), 4096, lambda build, limit, smallest: smallest)


# Retrieval ------------------------------------------------------------------------------------------------------------


def test_needle_s_text():
  hidden = made(Needle())
  (value,) = hidden.references
  key = re.search(r"magic number for (\S+) mentioned", hidden.prefix)[1]
  assert re.fullmatch(r"[1-9]\d{6}", value) and re.fullmatch(r"[a-z]+-[a-z]+", key)
  line = f"One of the special magic numbers for {key} is: {value}."
  text = hidden.prompt(4)
  place = text.split("\n").index(line) - 1
  lines = [NOISE] * 4
  lines.insert(place, line)
  assert text == (
    "A special magic number is hidden within the following text. Make sure to memorize it. I will quiz you about the "
    "number afterwards.\n"
    + "\n".join(lines)
    + f"\nWhat is the special magic number for {key} mentioned in the provided text?"
  )
  assert hidden.prefix == f" The special magic number for {key} mentioned in the provided text is"


def test_needle_s_text_in_the_plural():
  hidden = made(Needle(keys=3, values=2, queries=2))
  text = hidden.prompt(40)
  found = dict.fromkeys(re.findall(r"numbers for (\S+) is: (\d{7})\.\n", text))
  keys = list(dict.fromkeys(key for key, _ in found))
  assert len(found) == 6 and len(keys) == 3
  asked = re.search(r"What are all the special magic numbers for (\S+), and (\S+) mentioned in", text).groups()
  assert set(hidden.references) == {value for key, value in found if key in asked} and len(hidden.references) == 4
  assert text.startswith(
    "Some special magic numbers are hidden within the following text. Make sure to memorize it. I will quiz you about "
    "the numbers afterwards.\n"
  )
  query = f"{asked[0]}, and {asked[1]}"
  assert text.endswith(f"\nWhat are all the special magic numbers for {query} mentioned in the provided text?")
  assert hidden.prefix == f" The special magic numbers for {query} mentioned in the provided text are"


def test_needles_lie_at_forty_depths():
  depths = set()
  for seed in range(150):
    lines = made(Needle(), seed).prompt(1000).split("\n")[1:-1]
    depths.add(next(i for i, text in enumerate(lines) if text != NOISE))
  assert depths <= {10 * round(i * 100 / 39) for i in range(40)} and len(depths) > 30
  assert {0, 1000} <= depths


def test_tracking_s_text():
  text = made(Tracking()).prompt(5)
  example, _, asked = text.partition("\n\n\n\n")
  assert len(made(Tracking()).references) == 5
  for part, letters in ((example, 3), (asked, 5)):
    value = re.search(r"VAR [A-Z]+ = (\d{5}) ", part)[1]
    assigned = re.findall(r"VAR ([A-Z]+) = VAR ([A-Z]+)  ?", part)
    names = [assigned[0][1], *(new for new, _ in assigned)]
    assert all(len(name) == letters for name in names) and len(set(names)) == 5
    assert [old for _, old in assigned] == names[:-1]  # each copies the one before
    pieces = [f"VAR {names[0]} = {value}", *(f"VAR {b} = VAR {a} " for a, b in itertools.pairwise(names))]
    context = part[part.index("text.\n\n") + 7 : part.index("\nQuestion")]
    bare = context
    for piece in pieces:
      assert bare.count(piece) == 1
      bare = bare.replace(piece, "")
    assert bare.split() == (NOISE.split() * 5)
    expected = (
      f"Memorize and track the chain(s) of variable assignment hidden in the following text.\n\n{context}\n"
      f"Question: Find all variables that are assigned the value {value} in the text above."
    )
    prefix = (
      " Answer: According to the chain(s) of variable assignment in the text above, 5 variables are assigned the value "
      f"{value}, they are: "
    )
    if part is example:
      assert part == f"{expected}{prefix} {' '.join(names)}"
    else:
      assert part == expected
      assert made(Tracking()).prefix == prefix and made(Tracking()).references == tuple(names)


def test_tracking_without_hops():
  hidden = made(Tracking(chains=40, hops=0))
  example, _, asked = hidden.prompt(9).partition("\n\n\n\n")
  assigned = dict(re.findall(r"VAR ([A-Z]{5}) = (\d{5})", asked))
  assert len(assigned) == 40 and len(re.findall(r"VAR [A-Z]{3} = \d{5}", example)) == 40
  (name,) = hidden.references
  assert f" 1 variables are assigned the value {assigned[name]}, they are: " in hidden.prefix


def test_tracking_s_other_chains_have_other_values():
  hidden = made(Tracking(chains=3, hops=2))
  asked = hidden.prompt(9).partition("\n\n\n\n")[2]
  assert len(set(re.findall(r"VAR [A-Z]{5} = (\d{5})", asked))) == 3
  assert len(re.findall(r"VAR [A-Z]{5} = VAR", asked)) == 6 and len(hidden.references) == 3
  assert " 3 variables are assigned the value " in hidden.prefix


@pytest.mark.parametrize("name", ["needle", "tracking"])
@pytest.mark.parametrize("length", [2500, 6000])
def test_prompts_fill_their_length(name, length):
  tokenizer, config = byte_tokenizer(), TasksConfig(limit=3)
  prompts = retrieval.prompts(get(name)(), config, tokenizer, length, 8192)
  assert all(0.95 * length < len(p.tokens) <= length for p in prompts)
  assert prompts == retrieval.prompts(get(name)(), config, tokenizer, length, 8192)
  assert len({p.references for p in prompts}) == 3
  other = retrieval.prompts(get(name)(), TasksConfig(limit=3, seed=1), tokenizer, length, 8192)
  assert all(a.references != b.references for a, b in zip(prompts, other, strict=True))
  whole = retrieval.prompts(get(name)(), config, tokenizer, length, length)  # the answer must fit the context too
  room = length - get(name).new_tokens
  assert all(room - 0.05 * length < len(p.tokens) <= room and p.tokens == tokenizer.encode(p.text) for p in whole)
  assert [p.references for p in whole] == [p.references for p in prompts]


def test_lengths_that_cannot_be():
  with pytest.raises(ValueError, match=r"--lengths=300 is too short for tracking: its shortest prompt has \d+ tokens"):
    retrieval.prompts(get("tracking")(), TasksConfig(limit=1), byte_tokenizer(), 300, 8192)
  with pytest.raises(ValueError, match="--lengths=9000: the model's context is 8192 tokens"):
    retrieval.prompts(get("needle")(), TasksConfig(limit=1), byte_tokenizer(), 9000, 8192)


def test_prompts_leave_room_for_the_answer_that_is_asked_for():
  """`--max_tokens`, where it is given, in place of the task's own L: larger or smaller."""
  task, config, lengths = get("needle")(), TasksConfig(limit=1), {}
  for most in ((), (4,), (100, 300)):
    (job,) = run.prepare([task], config, (1024,), byte_tokenizer(), 1024, most)
    lengths[most] = len(job.asked[0].tokens)
    assert 1024 - 100 < lengths[most] + (most or (task.new_tokens,))[-1] <= 1024
  assert lengths[100, 300] < lengths[()] < lengths[4,]
  with pytest.raises(ValueError, match="--max_tokens=900 leaves prompts of needle 124 of the context's 1024 tokens"):
    run.prepare([task], config, (1024,), byte_tokenizer(), 1024, (900,))


def test_the_first_prompt_of_the_default_seed():
  """Python's generator gives the same on every version: figures of different machines speak of the same samples."""
  prompt = retrieval.prompts(get("needle")(), TasksConfig(limit=1), byte_tokenizer(), 560, 8192)[0]
  assert prompt.references == ("6104922",)
  assert (
    prompt.text
    == """\
A special magic number is hidden within the following text. Make sure to memorize it. I will quiz you about the number \
afterwards.
The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again.
One of the special magic numbers for faint-glacier is: 6104922.
The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again.
What is the special magic number for faint-glacier mentioned in the provided text? The special magic number for \
faint-glacier mentioned in the provided text is"""
  )


def test_prompts_are_chats_where_there_is_a_template():
  plain = byte_tokenizer()
  chat = type(plain)(plain.backend, {**plain.settings, "chat_template": "<u>{{ messages[0]['content'] }}</u><a>"})
  assert retrieval.framed(plain, "auto", "ask", " so") == "ask so"
  assert retrieval.framed(chat, "auto", "ask", " so") == "<u>ask</u><a> so"
  assert retrieval.framed(chat, "raw", "ask", " so") == "ask so"
  with pytest.raises(ValueError, match="no chat template"):
    retrieval.framed(plain, "chat", "ask", " so")


def test_share_found_ignores_case():
  assert retrieval.share_found("abCDE, 12", ("ABCDE", "FGHIJ", "12", "3")) == 0.5


# Likelihood tasks -----------------------------------------------------------------------------------------------------

MARKED = {
  "activity_label": "Cooking",
  "ctx_a": "How to cook rice. [title] Wash it. [step] Take water.",
  "ctx_b": "you",
  "endings": ["[substeps] boil  it.", "b", "c", " d "],
  "label": 3,
}


def test_hellaswag_s_layout(tmp_path):
  packed, plain = tmp_path / "a.txt.bz2", tmp_path / "a.txt"
  packed.write_bytes(bz2.compress(SIX_LINES.encode()))
  plain.write_text(SIX_LINES)
  asked = HellaSwag(str(packed), shots=2).questions(TasksConfig())
  assert asked == HellaSwag(str(plain), shots=2).questions(TasksConfig())
  assert [q.answer for q in asked] == [0, 1, 2, 3]
  assert asked[2].choices == ("end 2a.", "end 2b.", "end 2c.", "end 2d.")
  *shots, last = asked[2].context.split("\n\n")
  assert last == "Act 2: First 2. she" and len(set(shots)) == 2 and last not in " ".join(shots)
  assert set(shots) <= {f"Act {i}: First {i}. she end {i}{'abcd'[i]}." for i in (0, 1, 3)}
  assert HellaSwag(str(packed), shots=0).questions(TasksConfig())[1].context == "Act 1: First 1. she"


def test_hellaswag_s_official_file_is_cleaned(tmp_path):
  (tmp_path / "val.jsonl").write_text(json.dumps(MARKED) + "\n")
  (question,) = HellaSwag(str(tmp_path / "val.jsonl"), shots=0).questions(TasksConfig())
  assert question.context == "Cooking: How to cook rice. . Wash it. Take water. You".replace("rice. . ", "rice.. ")
  assert question.choices == (" boil it.", "b", "c", "d") and question.answer == 3


def test_mmlu_s_layout(tmp_path):
  asked = MMLU(str(write_mmlu(tmp_path)), shots=2).questions(TasksConfig())
  assert len(asked) == 4 and [q.answer for q in asked] == [0, 1, 0, 1]
  assert asked[0].context == (
    "The following are multiple choice questions (with answers) about anatomy.\n\n"
    "qdev0\nA. a\nB. b\nC. c\nD. d\nAnswer: A\n\nqdev1\nA. a\nB. b\nC. c\nD. d\nAnswer: B\n\n"
    "qtest0\nA. a\nB. b\nC. c\nD. d\nAnswer:"
  )
  assert asked[3].context.startswith(
    "The following are multiple choice questions (with answers) about high school physics.\n\n"
    'Qdev0, "so"?\nA. w0\nB. x0\nC. y, 0\nD. z0\nAnswer: A\n\nQdev1, "so"?\n'
  )
  assert asked[3].context.endswith('Qtest1, "so"?\nA. w1\nB. x1\nC. y, 1\nD. z1\nAnswer:')
  assert asked[0].choices == ("A", "B", "C", "D")


def test_gsm8k_s_layout(tmp_path):
  path = write_gsm8k(tmp_path / "test.jsonl", 3)
  asked = GSM8K(str(path), shots=1).questions(TasksConfig())
  assert [q.choices for q in asked] == [(f"{i}+{i} = {2 * i}.\n#### {2 * i}",) for i in range(3)]
  shot, question = asked[1].context.split("\n\n")
  assert question == "Question: How many 1?\nAnswer:"
  assert shot in {f"Question: How many {i}?\nAnswer: {i}+{i} = {2 * i}.\n#### {2 * i}" for i in (0, 2)}


def test_choices_by_seed():
  config = TasksConfig(limit=5)
  assert sampled(100, config) == sampled(100, config) != sampled(100, TasksConfig(limit=5, seed=1))
  assert sampled(3, config) == [0, 1, 2] and sampled(7, TasksConfig()) == list(range(7))
  records = list(range(30))
  for question in (0, 17, 29):
    shots = shots_of(records, question, 29, "x", 42)
    assert sorted([*shots, question]) == records  # all others, each once
    assert shots_of(records, question, 4, "x", 42) == shots_of(records, question, 4, "x", 42)
  assert shots_of(records, 3, 4, "x", 42) != shots_of(records, 4, 4, "x", 42) != shots_of(records, 4, 4, "x", 1)


def broken(text: str, line: int, new: str | None) -> str:
  lines = text.split("\n")
  lines[line - 1 : line] = [] if new is None else [new]
  return "\n".join(lines)


@pytest.mark.parametrize(
  ("task", "file", "text", "message"),
  [
    ("hellaswag", "h.txt", broken(SIX_LINES, 8, "4"), "line 8: the answer must be 0, 1, 2 or 3, not '4'"),
    ("hellaswag", "h.txt", broken(SIX_LINES, 24, None), "line 23: the last record is not whole; a record has 6 lines"),
    ("hellaswag", "h.txt", broken(SIX_LINES, 5, " "), "line 5: empty"),
    ("hellaswag", "h.txt.bz2", "not bzip2", "cannot be read"),
    ("hellaswag", "h.jsonl", '{"a"', "line 1: not valid JSON"),
    ("hellaswag", "h.jsonl", "", "holds no record"),
    ("hellaswag", "h.txt", "", "holds no record"),
    ("gsm8k", "g.jsonl", "", "holds no record"),
    ("mmlu", "dev/anatomy_dev.csv", "", "has 0 dev questions of anatomy"),
    ("hellaswag", "h.jsonl", "\n" + json.dumps({**MARKED, "endings": ["a"]}), "line 2: 'endings' must be four texts"),
    ("hellaswag", "h.jsonl", json.dumps({**MARKED, "label": ""}), "line 1: the answer must be 0, 1, 2 or 3, not ''"),
    (
      "gsm8k",
      "g.jsonl",
      '{"question": "a", "answer": "b"}\n{"question": 3}',
      "line 2: a record needs 'question' (str)",
    ),
    ("gsm8k", "g.jsonl", '{"question": "a", "answer": "b"}\n[]', "line 2: a record needs 'question' (str)"),
    ("gsm8k", "g.jsonl", '{"question": "a", "answer": "b"}\n' * 5, "--gsm8k.shots=5 needs more records than the 5"),
    ("mmlu", "test/anatomy_test.csv", "q,a,b,c,d,A\nq,a,b,c,2\n", "anatomy_test.csv, line 2: 5 fields"),
    ("mmlu", "test/anatomy_test.csv", 'q,a,b,c,d,A\nq,"a\n', "line 2: not CSV"),
    ("mmlu", "dev/anatomy_dev.csv", "q,a,b,c,d,E\n", "anatomy_dev.csv, line 1: the answer must be 0-3 or A-D, not 'E'"),
    ("mmlu", "dev/anatomy_dev.csv", "q,a,b,c,d,A\n", "has 1 dev questions of anatomy"),
  ],
)
def test_malformed_files_name_flag_and_line(tmp_path, task, file, text, message):
  root = write_mmlu(tmp_path / "mmlu") if task == "mmlu" else tmp_path
  (root / file).write_text(text)
  settings = dict(data=str(root), shots=2) if task == "mmlu" else dict(data=str(root / file))
  with pytest.raises(ValueError) as caught:
    get(task)(**settings).questions(TasksConfig())
  assert message in str(caught.value) and (
    f"--{task}.data" in str(caught.value) or f"--{task}.shots" in str(caught.value)
  )


def test_missing_files_name_the_flag(tmp_path):
  for task in ("hellaswag", "mmlu", "gsm8k"):
    with pytest.raises(ValueError, match=f"--{task}.data=PATH is needed"):
      get(task)().questions(TasksConfig())
    with pytest.raises(ValueError, match=rf"--{task}.data=\S+none: nothing there"):
      get(task)(data=str(tmp_path / "none")).questions(TasksConfig())
  with pytest.raises(ValueError, match=r"--gsm8k.data=.*a folder, where a file is expected"):
    GSM8K(data=str(tmp_path)).questions(TasksConfig())
  with pytest.raises(ValueError, match=r"no test/SUBJECT_test.csv there"):
    MMLU(data=str(tmp_path)).questions(TasksConfig())
  with pytest.raises(ValueError, match="--tasks: unknown task 'piqa'; there are aime24, arc_challenge, common_words"):
    get("piqa")


def test_settings_that_cannot_be():
  for make, message in (
    (lambda: MMLU(shots=-1), "--mmlu.shots=-1"),
    (lambda: Needle(keys=1, queries=2), "--needle.queries=2"),
    (lambda: Needle(keys=21, values=2), "--needle.keys=21 x --needle.values=2"),
    (lambda: Tracking(hops=-1), "--tracking.hops=-1"),
    (lambda: TasksConfig(limit=-2), "--limit=-2"),
    (lambda: TasksConfig(tasks=("needle", "gsm8k", "needle")), "--tasks: needle is listed twice"),
    (lambda: TasksConfig(temperature=float("nan")), "--temperature=nan"),
    (lambda: TasksConfig(temperature=float("inf")), "--temperature=inf"),
  ):
    with pytest.raises(ValueError, match=message):
      make()
