"""Families of generated problems: traces against an oracle, grading, data, lengths, windows."""

from __future__ import annotations

import hashlib
import random

import numpy as np
import pytest

from dms_jax import policies
from dms_jax import testing as tiny
from dms_jax.generation.detokenize import Detokenizer
from dms_jax.tokenizer import Tokenizer
from experiments.methods import run
from experiments.tasks import get, reasoning
from experiments.tasks.base import TasksConfig
from tests.experiments import reasoning_oracle as oracle

FAMILIES = ("countdown", "grids", "programs", "graphs")
VERIFIED = {"countdown": oracle.countdown_right, "programs": oracle.programs_right}
VOTED = {"grids": oracle.grids_answer, "graphs": oracle.graphs_answer}
DIGEST = "7e8903f40025a2bf"
LENGTHS = (240, 480, 960, 1920, 3840)
TOKENIZER = reasoning.tokenizer()
family = pytest.mark.parametrize("family", FAMILIES)


def right(family: str, prompt: str, text: str) -> bool:
  """Whether a text is right, by the oracle."""
  if family in VERIFIED:
    return VERIFIED[family](prompt, text)
  found = f" {text} ".partition(" answer ")[2].partition("<eos>")[0]
  return found.split() == VOTED[family](prompt).split()


def written(*about) -> list[tuple[str, str]]:
  """The documents of `reasoning.documents` that are short enough; few are too long."""
  found = list(reasoning.documents(*about))
  kept = [(prompt, trace) for prompt, trace in found if trace is not None]
  assert len(kept) > 0.9 * len(found)
  return kept


# Traces ---------------------------------------------------------------------------------------------------------------


def check_documents(family: str, count: int, seed: int, longest: int) -> None:
  task = get(family)()
  for prompt, trace in written([family], seed, 0, count, longest):
    notes = getattr(oracle, family)(prompt, trace)
    assert notes and right(family, prompt, trace) and task.answer(trace)
    words = f"{prompt} {trace}".split(" ")
    assert not set(words) - set(reasoning.VOCABULARY) and len(words) + 1 <= longest


@family
def test_every_claim_of_a_trace_is_true(family):
  check_documents(family, 400, seed=7, longest=4096)


@pytest.mark.slow
@family
def test_every_claim_of_many_traces_is_true(family):
  check_documents(family, 4000, seed=8, longest=4096)
  check_documents(family, 400, seed=9, longest=8192)


@family
def test_all_levels_have_true_traces(family):
  for level in range(5):
    task = get(family)(level=level)
    for number in range(8):
      rng = random.Random(number)
      problem = task.sample(rng)
      trace = task.trace(problem, rng)
      getattr(oracle, family)(task.prompt(problem), trace)
      assert task.check(problem, trace)


@family
def test_a_trace_is_as_long_as_allowed_or_absent(family):
  task = get(family)()
  for number, problem in enumerate(task.tests(3, 20)):
    whole = task.trace(problem, random.Random(number))
    count = len(whole.split(" "))
    assert task.trace(problem, random.Random(number), count) == whole
    assert task.trace(problem, random.Random(number), count - 1) is None
    assert task.trace(problem, random.Random(number + 1000)) != whole  # the search is random


# Grading --------------------------------------------------------------------------------------------------------------


@family
def test_grades(family):
  task = get(family)()
  prompts = task.prompts(TasksConfig(limit=12), TOKENIZER, 0, 4096)
  for number, (prompt, problem) in enumerate(zip(prompts, task.tests(42, 12), strict=True)):
    assert task.problem(prompt) == problem and prompt.text == task.prompt(problem)
    assert prompt.tokens == TOKENIZER.encode(prompt.text)
    trace = task.trace(problem, random.Random(number))
    text = trace.removesuffix(" <eos>")  # as decoded: without special tokens
    assert task.grade(trace, prompt) == task.grade(text, prompt) == {"accuracy": 100.0}
    assert task.answer(trace) == task.answer(text) == text.partition(" answer ")[2]
    if family in VOTED:
      assert task.answer(text) == VOTED[family](prompt.text)
    for cut in (text[: text.index("answer")], text[: text.index("answer") + 6], "", " ", "answer", "answer answer"):
      assert task.grade(cut, prompt) == {"accuracy": 0.0} and (task.answer(cut) is None or cut == "answer answer")
    other = prompts[number - 1]
    assert task.grade(text, other)["accuracy"] == 100 * right(family, other.text, text)


@family
def test_garbage_is_graded_as_the_oracle_does(family):
  task, rng = get(family)(), random.Random(0)
  graded = []
  for number, problem in enumerate(task.tests(5, 20)):
    words = task.trace(problem, random.Random(number)).split(" ")
    start = words.index("answer")
    for _ in range(60):
      damaged = words[start:]
      for _ in range(rng.randint(1, 3)):
        place = rng.randrange(len(damaged))
        change = rng.randrange(4)
        if change == 0:
          damaged[place] = rng.choice(reasoning.VOCABULARY)
        elif change == 1:
          damaged.insert(place, rng.choice([*reasoning.VOCABULARY, "\u00b2", "-3", "99999", "\ufffd"]))
        elif change == 2 and len(damaged) > 1:
          del damaged[place]
        else:
          damaged[place] = rng.choice(damaged)
      text = " ".join(damaged)
      task.answer(text)
      graded.append(task.check(problem, text))
      assert graded[-1] == right(family, task.prompt(problem), text), text
    for _ in range(20):
      text = " ".join(rng.choices(reasoning.VOCABULARY, k=30))
      assert task.check(problem, text) == right(family, task.prompt(problem), text)
  assert 0 < np.mean(graded) < 0.5  # words after the end word, or another right chain, do no harm


@pytest.mark.parametrize("family", VOTED)
def test_only_whole_numbers_vote(family):
  task = get(family)()
  numbers = ("8 4", "8", "8 4 2") if family == "grids" else ("21", "", "21 3")
  whole, short, long = (f"list ; answer {each}".strip() for each in numbers)
  assert task.answer(whole) == numbers[0] and task.answer(short) is task.answer(long) is None
  assert task.answer(f"{whole} <eos> answer 3") == numbers[0]
  assert task.answer(whole.replace(numbers[0].split()[0], "64")) is task.answer(whole.replace("answer ", "")) is None


# Data -----------------------------------------------------------------------------------------------------------------


def test_a_document_depends_on_its_number_alone():
  made = list(reasoning.documents(FAMILIES, 1, 0, 30))
  assert list(reasoning.documents(FAMILIES, 1, 10, 20)) == made[10:] and len(set(made)) == 30
  assert list(reasoning.documents(FAMILIES, 2, 0, 5)) != made[:5]
  assert {prompt.split()[0] for prompt, _ in made} == set(FAMILIES)
  cut = list(reasoning.documents(FAMILIES, 1, 0, 200, longest=300))
  whole = list(reasoning.documents(FAMILIES, 1, 0, 200, longest=5999))
  for (prompt, trace), (same, text) in zip(cut, whole, strict=True):  # none is cut: it is there as it is, or not at all
    assert prompt == same and trace == (text if text and len(f"{prompt} {text}".split()) < 300 else None)
  assert 20 < sum(trace is None for _, trace in cut) < 180
  with pytest.raises(ValueError, match="'gsm8k' is no family"):
    list(reasoning.documents(["gsm8k"], 1, 0, 1))


def test_documents_of_a_seed_stay_the_same():
  """Shipped models were trained on them: another digest means that their commands give other data."""
  text = "\n".join(f"{prompt} {trace}" for prompt, trace in written(FAMILIES, 0, 0, 100))
  assert hashlib.blake2b(text.encode(), digest_size=8).hexdigest() == DIGEST


@family
def test_tests_and_training_are_disjoint(family):
  """By the whole problem and by each of its parts, as the oracle reads them from the prompts; and by the hash alone."""
  task = get(family)()
  tests = task.tests(42, 512)
  assert len({task.key(problem) for problem in tests}) == 512
  assert task.tests(42, 20) == tests[:20] != task.tests(43, 20)
  of, parts_of = KEYS[family]
  prompts = [prompt for prompt, _ in reasoning.documents([family], 11, 0, 1500, 1200)]
  trained, tested = ({of(each) for each in some} for some in (prompts, map(task.prompt, tests)))
  assert len(tested) == 512 and not trained & tested
  parts, kept = ({part for each in some for part in parts_of(each)} for some in (prompts, map(task.prompt, tests)))
  assert len(parts) > 300 and len(kept) > 90 and not parts & kept
  # A problem of any parts has those of tests as often as chance has it, and a hash alone tells them apart.
  free = [get(family)(level=number % 4).sample(random.Random(number)) for number in range(1200)]
  found = [reasoning.is_test(part) for problem in free for part in task.parts(problem)]
  assert 0.02 < np.mean(found) < 0.12  # a sixteenth; some parts of the easier levels are common
  assert all(reasoning.is_test(part) for problem in tests for part in task.parts(problem))


def _countdown_key(prompt: str) -> str:
  numbers, targets = oracle.countdown_problem(prompt)
  return f"{sorted(numbers)} {sorted(targets)}"


def _countdown_parts(prompt: str) -> list[str]:
  """Each target with the given numbers."""
  numbers, targets = oracle.countdown_problem(prompt)
  return [f"{sorted(numbers)} {target}" for target in targets]


def _grids_key(prompt: str) -> str:
  return str(sorted(rows for _, rows in oracle.grids_problem(prompt)))


def _grids_parts(prompt: str) -> list[str]:
  return [str(rows) for _, rows in oracle.grids_problem(prompt)]


def _programs_key(prompt: str) -> str:
  operations, parts = oracle.programs_problem(prompt)
  return f"{sorted(operations)} {sorted(sorted(examples) for examples in parts.values())}"


def _programs_parts(prompt: str) -> list[str]:
  return [str(sorted(examples)) for examples in oracle.programs_problem(prompt)[1].values()]


def _graphs_parts(prompt: str) -> list[str]:
  """All doors and one room sought."""
  start, doors, goals = oracle.graphs_problem(prompt)
  return [_ways_to(start, doors, [goal]) for goal in goals]


def _graphs_key(prompt: str) -> str:
  return _ways_to(*oracle.graphs_problem(prompt))


def _ways_to(start: int, doors: dict[int, list[int]], goals: list[int]) -> str:
  """The doors on the way to every room, and whether it is sought: names do not matter."""
  paths, open_ways = [], [((), start)]
  for path, room in open_ways:
    paths.append((path, room in goals))
    open_ways += [((*path, door), behind) for door, behind in enumerate(doors.get(room, ()))]
  return str(sorted(paths))


KEYS = {
  "countdown": (_countdown_key, _countdown_parts), "grids": (_grids_key, _grids_parts),
  "programs": (_programs_key, _programs_parts), "graphs": (_graphs_key, _graphs_parts),
}  # fmt: skip


def test_canonical_forms():
  countdown, grids, programs, graphs = (get(name)() for name in FAMILIES)
  some, same, other = ((2, 3, 9), (5, 6)), ((9, 2, 3), (6, 5)), ((2, 3, 9), (5, 7))
  some, same, other = (countdown.key(countdown.PROBLEM(*each)) for each in (some, same, other))
  assert some == same != other
  rng = random.Random(0)
  some = grids.sample(rng)
  assert grids.key(some) == grids.key(grids.PROBLEM(some.grids[::-1])) != grids.key(grids.PROBLEM(some.grids[1:]))
  some = programs.sample(rng)
  same = programs.PROBLEM(some.operations[::-1], tuple(examples[::-1] for examples in some.programs[::-1]))
  assert programs.key(some) == programs.key(same) != programs.key(some._replace(operations=some.operations[1:]))
  some, names = graphs.sample(rng), rng.sample(range(64), 64)
  renamed = [(names[room], tuple(names[behind] for behind in doors)) for room, doors in some.rooms]
  same = graphs.PROBLEM((renamed[0], *renamed[:0:-1]), tuple(names[room] for room in some.goals[::-1]))
  mirrored = tuple((room, doors[::-1]) for room, doors in some.rooms)
  assert graphs.key(some) == graphs.key(same) != graphs.key(some._replace(rooms=mirrored))


def test_tokenizer(tmp_path):
  assert len(reasoning.VOCABULARY) == len(set(reasoning.VOCABULARY)) == TOKENIZER.vocab_size <= 136
  TOKENIZER.save(tmp_path)
  loaded = Tokenizer.load(tmp_path)
  for prompt, trace in written(FAMILIES, 3, 0, 20):
    ids = [*TOKENIZER.encode(prompt), *TOKENIZER.encode(trace, continues=True)]
    assert ids == [reasoning.VOCABULARY.index(word) for word in ("<bos>", *prompt.split(), *trace.split())]
    assert loaded.encode(prompt) == TOKENIZER.encode(prompt) and loaded.eos_token_ids == (ids[-1],)
    assert TOKENIZER.decode(ids) == f"{prompt} {trace}".removesuffix(" <eos>")
    row, pieces = Detokenizer.create(TOKENIZER, None), ""
    ids = TOKENIZER.encode(trace, continues=True)
    for end in range(50, len(ids), 50):
      pieces += row.advance(ids[:end])
    assert pieces + row.advance(ids, "eos") == trace.removesuffix(" <eos>")
  assert TOKENIZER.token_bytes()[5] == b" 1"  # words are joined by spaces


@pytest.mark.slow
def test_a_model_answers_under_a_policy():
  cfg = tiny.config(vocab_size=TOKENIZER.vocab_size, max_position_embeddings=512)
  method = run.Method("dms", tiny.model(cfg, tiny.dms(scale=1.0, offset=0.0)), policies.DMS())
  config = TasksConfig(limit=2, chains=(2,), temperature=1.0)
  (job,) = run.prepare([get("graphs")(level=1)], config, (), TOKENIZER, 512, (12,))
  found = [record for part in run.run(job, [method], TOKENIZER, width=4) for record in part]
  assert len(found) == 4 and all(set(record.text.split()) <= set(reasoning.VOCABULARY) for record in found)
  assert any(record.text for record in found) and {record.grades["accuracy"] for record in found} <= {0.0, 100.0}


def test_refusals():
  with pytest.raises(ValueError, match=r"--grids.level=5 must be below 5"):
    get("grids")(level=5)
  with pytest.raises(ValueError, match=r"--graphs.problems=0 must be 1 or more"):
    get("graphs")(problems=0)
  with pytest.raises(ValueError, match=r"--graphs.level=0 has \d+ test problems, \d+ are asked for: raise"):
    get("graphs")(level=0).tests(1, 500)
  with pytest.raises(ValueError, match=r"a prompt has .* the model's context 20"):
    get("grids")().prompts(TasksConfig(limit=2), TOKENIZER, 0, 20)
  for name in ("mazes", "math500"):
    with pytest.raises(
      ValueError, match=f"--data.families: '{name}' is no family .*; there are countdown, graphs, grids, p"
    ):
      reasoning.check_families("--data.families", ["grids", name], TOKENIZER)


# Lengths, and what a window can know ----------------------------------------------------------------------------------


@family
def test_accuracy_of_a_faultless_search_rises_with_length_and_chains(family):
  """Neither saturated at the shortest L nor near zero at the longest, for one text and for the best of eight."""
  found = reasoning.lengths(get(family)(), problems=120, chains=8, seed=1)
  one = [100 * (found <= most).mean() for most in LENGTHS]
  eight = [100 * (found <= most).any(axis=1).mean() for most in LENGTHS]
  print(family, *(f"L {most}: {a:.0f} {b:.0f};" for most, a, b in zip(LENGTHS, one, eight, strict=True)))
  assert 0.3 < one[0] < 10 and 80 < one[-1] < 99 and min(np.diff(one)) > 5
  assert 2 < eight[0] < 50 and eight[-2] > 90 and eight[1] - eight[0] > 15


@family
def test_documents_have_many_lengths(family):
  counts = [trace.count(" ") + 1 for _, trace in written([family], 5, 0, 400)]
  low, middle, high = np.percentile(counts, [5, 50, 98])
  print(family, f"words of traces: 5 % {low:.0f}, 50 % {middle:.0f}, 98 % {high:.0f}, most {max(counts)}")
  assert low < 120 and 200 < middle < 900 and high > 2000
  long = [trace.count(" ") + 1 for _, trace in reasoning.documents([family], 5, 0, 200, 8192) if trace is not None]
  assert max(long) > 5000


def distances(family: str, trace: str) -> list[int]:
  """How many words back each noted fact lies where the answer takes it up: from its latest mention to its copy."""
  words = trace.split(" ")
  first = words.index("list" if family in VOTED else "answer")
  mentioned: dict[str, int] = {}
  found = []
  for place, word in enumerate(words):
    if word == "note" and place < first:
      mentioned[words[place + 1]] = place + 1
    elif word == "toll" and words[place - 1] in mentioned:  # a room that is reached again shows its toll again
      mentioned[words[place - 1]] = place - 1
    elif place >= first and word in (",", words[first]):
      found.append(place + 1 - mentioned[words[place + 1]])
  return found


@family
def test_the_prompt_and_a_window_of_48_do_not_hold_the_answer(family):
  """The last note lies near the answer, the others far: one answer in a hundred at most can be read from a window.

  A reader that has lost a note can only guess. The test prints how often the commonest answer is right.
  """
  task, answers, near, whole = get(family)(), [], [], []
  for number, problem in enumerate(task.tests(2, 150)):
    for chain in range(2):
      trace = task.trace(problem, random.Random(2 * number + chain))
      found = [distance <= 48 for distance in distances(family, trace)]
      near += found
      whole.append(all(found))
    answers.append(task.answer(trace))
  guess = max(answers.count(answer) for answer in answers) / len(answers)
  print(family, f"notes within 48: {100 * np.mean(near):.1f} %, all of them: {100 * np.mean(whole):.1f} %,",
        f"commonest answer: {100 * guess:.1f} %")  # fmt: skip
  assert np.mean(near) < 0.4 and np.mean(whole) < 0.01 and guess < 0.15
