"""RULER's tasks beside the single needle, against its own wording, numbers and counts."""

from __future__ import annotations

import collections
import math
import random
import re
import sys

import pytest

from dms_jax.tokenizer import byte_tokenizer
from experiments.tasks import common_words, get, retrieval
from experiments.tasks.base import TasksConfig

NOISE = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
TOKENIZER = byte_tokenizer()


def made(name: str, length: int = 4096, seed: int = 3, **settings):
  return get(name)(**settings).sample(random.Random(seed), length, lambda build, limit, smallest: smallest)


def needles(text: str, kind: str = "numbers") -> list[tuple[str, str]]:
  return re.findall(rf"One of the special magic {kind} for (\S+) is: (\S+)\.(?=\s)", text)


# Needles --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
  ("name", "keys", "values", "asked"),
  [("needle_multikey", 4, 1, 1), ("needle_multivalue", 1, 4, 1), ("needle_multiquery", 4, 1, 4)],
)
def test_presets_of_the_needle(name, keys, values, asked):
  hidden = made(name)
  found = needles(hidden.prompt(50))
  assert len({key for key, _ in found}) == keys and len(found) == keys * values
  assert len(hidden.references) == asked * values
  queries = {key for key, value in found if value in hidden.references}
  assert len(queries) == asked and all(key in hidden.prefix for key in queries)
  single = asked * values == 1
  assert hidden.prefix.startswith(f" The special magic number{'' if single else 's'} for ")
  assert hidden.prefix.endswith(f" mentioned in the provided text {'is' if single else 'are'}")
  assert get(name).name == name and get(name)().grade(" ".join(hidden.references), hidden) == {"score": 100.0}
  half = " ".join(hidden.references[: len(hidden.references) // 2])
  assert get(name)().grade(half, hidden)["score"] == (0.0 if single else 50.0)


def test_a_haystack_of_needles():
  hidden = made("needle_multikey", keys=1, haystack="needles", key_kind="uuids", value_kind="uuids")
  few, more = hidden.prompt(10), hidden.prompt(30)
  found = needles(more, "uuids")
  assert len(found) == 31 and len(dict(found)) == 31
  assert all(re.fullmatch(r"[0-9a-f]{8}-[0-9a-f]{4}-4[0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}", x) for x in found[0])
  (reference,) = hidden.references
  (key,) = [key for key, value in found if value == reference]
  assert hidden.prefix == f" The special magic uuid for {key} mentioned in the provided text is"
  assert set(needles(few, "uuids")) <= set(found)  # more noise leaves the facts as they are
  assert "A special magic uuid is hidden within the following text." in few and NOISE not in few


def test_an_essay_as_haystack(tmp_path):
  (tmp_path / "essay.txt").write_text("One two.\n\nThree  four! Five\tsix? Seven.\n")
  hidden = made("needle", essay=str(tmp_path / "essay.txt"))
  text = hidden.prompt(11)
  context = text.partition("quiz you about the number afterwards.\n")[2].partition("\nWhat is")[0]
  (line,) = [f"One of the special magic numbers for {key} is: {value}." for key, value in needles(text)]
  before, after = context.split(line)
  assert f"{before}{after}".split() == "One two. Three four! Five six? Seven. One two. Three four!".split()
  assert before == "" or re.search(r"[.!?] $", before)
  with pytest.raises(ValueError, match=r"--needle.essay=\S+none: no such file"):
    made("needle", essay=str(tmp_path / "none"))
  (tmp_path / "empty").write_text(" \n")
  with pytest.raises(ValueError, match="holds no word"):
    made("needle", essay=str(tmp_path / "empty"))
  with pytest.raises(ValueError, match=r"is a haystack of its own: leave out --needle.haystack=needles"):
    get("needle")(essay="x", haystack="needles")
  with pytest.raises(ValueError, match=r"--needle_multikey.queries=5 asks for more keys than --needle_multikey.keys=4"):
    get("needle_multikey")(queries=5)


# Words ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
  ("length", "example", "asked"), [(4096, (30, 10, 3), (25, 30, 3)), (2048, (10, 3, 1), (25, 6, 1))]
)
def test_common_words(length, example, asked):
  pytest.importorskip("wonderwords")
  hidden = made("common_words", length)
  question, answer = (
    r"Below is a numbered list of words\. In these words, some appear more often than others\. Memorize the ones that "
    r"appear most often\.\n(.*)\nQuestion: What are the 10 most common words in the above list\?",
    r" Answer: The top 10 words that appear most often in the list are:",
  )
  shown, listed, context = re.fullmatch(f"{question}{answer}(.*)\n{question}", hidden.prompt(25), re.DOTALL).groups()
  assert hidden.prefix == " Answer: The top 10 words that appear most often in the list are:"
  split = lambda text: re.split(r"(?:^| )\d+\. ", text)[1:]
  for words, references, (others, often, seldom) in (
    (split(shown), split(listed), example), (split(context), hidden.references, asked),
  ):  # fmt: skip
    counts = collections.Counter(words)
    assert len(references) == 10 and {counts[word] for word in references} == {often}
    assert sorted(counts.values()) == [seldom] * others + [often] * 10
    assert " ".join(f"{i}. {word}" for i, word in enumerate(words, 1)) in (shown, context)
  assert not set(split(shown)) & set(split(context))
  assert made("common_words", 10**5).references == hidden.references  # the same facts at every length


def test_common_words_run_out():
  """No endless search where the list of words is shorter than the prompt asked for."""
  pytest.importorskip("wonderwords")
  hidden = made("common_words")
  assert hidden.largest == 8116
  assert retrieval.most_units(lambda n: n, 10**9, hidden.smallest, hidden.largest) == hidden.largest
  assert retrieval.most_units(lambda n: n, 1000, hidden.smallest, hidden.largest) == 1000
  assert retrieval.most_units(lambda n: n, 9, 10, 20) == 9


def test_common_words_need_their_package(monkeypatch):
  monkeypatch.setitem(sys.modules, "wonderwords", None)
  common_words.vocabulary.cache_clear()
  with pytest.raises(ValueError, match=r"--tasks=common_words needs wonderwords: pip install 'dms_jax\[ruler\]'"):
    made("common_words")


def test_frequent_words():
  hidden = made("frequent_words")
  text = hidden.prompt(700)
  words = re.fullmatch(
    r"Read the following coded text and track the frequency of each coded word\. Find the three most frequently "
    r"appeared coded words\. (.*)\nQuestion: Do not provide any explanation\. Please ignore the dots '\.\.\.\.'\. What "
    r"are the three most frequently appeared words in the above coded text\?",
    text,
  )[1].split()
  assert hidden.prefix == " Answer: According to the coded text above, the three most frequently appeared words are:"
  counts = collections.Counter(words)
  zeta = sum(k**-2.0 for k in range(1, 10**6)) + 1e-6  # zeta(2), from its sum
  expected = [math.floor(700 * k**-2 / zeta) for k in range(1, 4096 // 50 + 1)]
  assert sorted(counts.values(), reverse=True) == [n for n in expected if n]
  assert [word for word, _ in counts.most_common(4)] == ["...", *hidden.references]
  assert all(re.fullmatch("[a-z]{6}", word) for word in counts if word != "...")
  assert made("frequent_words", 1024).references == hidden.references
  fewest = collections.Counter(made("frequent_words").prompt(hidden.smallest).split())
  assert all(fewest[word] > 1 for word in hidden.references)


@pytest.mark.parametrize("name", ["needle_multikey", "common_words", "frequent_words"])
def test_prompts_fill_their_length(name):
  if name == "common_words":
    pytest.importorskip("wonderwords")
  for length in (2500, 4000):
    prompts = retrieval.prompts(get(name)(), TasksConfig(limit=2), TOKENIZER, length, 8192)
    assert all(0.93 * length < len(prompt.tokens) <= length for prompt in prompts)
    assert prompts[0].references != prompts[1].references
  with pytest.raises(ValueError, match=f"--lengths=400 is too short for {name}: its shortest prompt has"):
    retrieval.prompts(get(name)(), TasksConfig(limit=1), TOKENIZER, 400, 8192)
