"""The base of families of generated problems that small models solve by searching in writing.

A family is a task whose problems come from a generator. A *trace* is what the model learns to write after a prompt:
random attempts, one after another, until something is found. What is found is written down once, as a *note*; then the
search goes on with the next part of the problem. The notes together give the answer, so the answer depends on tokens
that lie far back in the text, among attempts that no longer matter.

A text is words with single spaces between them, from one vocabulary for all families. Every word is one token.

Problems of tests and of training have no part in common: `is_test` hashes the canonical form of each part. All parts of
a test problem are kept for tests, and no part of a training problem is. What they share is smaller than a part, because
there is little of it: see `key` of each family.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import random
from collections.abc import Callable, Iterator, Sequence
from typing import Any, ClassVar

import numpy as np
import tokenizers
from tokenizers import models, pre_tokenizers, processors

from dms_jax.tokenizer import Tokenizer
from experiments.tasks.base import TASKS, Prompt, TasksConfig, WritingTask

LARGEST = 63  # numbers of all families are 0..63, one word each
PAD, BOS, END, UNKNOWN = "<pad>", "<bos>", "<eos>", "<unk>"
LETTERS = ("a", "b", "c", "d")  # names of the parts of a problem

VOCABULARY: tuple[str, ...] = (
  PAD, BOS, END, UNKNOWN,
  *map(str, range(LARGEST + 1)),
  "countdown", "grids", "programs", "graphs",
  "start", "try", "note", "list", "answer", "goal", "below", "above", "equal", "left", "none", ":", ";", ",", "=",
  "numbers", "targets", "+", "-", "*",
  *LETTERS, *(f"{letter}{row}" for letter in LETTERS for row in range(1, 5)), ".", "ok", "clash",
  "ops", "->", "inc", "dec", "up", "down", "double", "triple", "half", "third", "flip", "square",
  "find", "toll", "door", "dead", "seen",
)  # fmt: skip

IDS = {word: i for i, word in enumerate(VOCABULARY)}  # token ids, as those of `tokenizer()`
NUMBERS = frozenset(map(str, range(LARGEST + 1)))

# Levels of every family: one easy part; several easy parts, for notes in short texts; middling; for tests; long.
WEIGHTS = (1, 3, 2, 3, 2)  # how often a level occurs in training
LONG = 6000  # the long level occurs in training only where documents may have more words than this
TESTS = 16  # one part in so many is kept for tests
TRIES = 20_000  # parts drawn in search of one to keep, or problems in search of a new one, before there are too few


def tokenizer() -> Tokenizer:
  """The tokenizer of `VOCABULARY`: the id of a word is its place there; texts start with `<bos>`."""
  backend = tokenizers.Tokenizer(models.WordLevel(IDS, unk_token=UNKNOWN))
  backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
  backend.add_special_tokens([PAD, BOS, END, UNKNOWN])
  backend.post_processor = processors.TemplateProcessing(single=f"{BOS} $A", special_tokens=[(BOS, IDS[BOS])])
  names = {"bos_token": BOS, "eos_token": END, "pad_token": PAD, "unk_token": UNKNOWN}
  return Tokenizer(backend, {"tokenizer_class": "PreTrainedTokenizerFast", **names})


def check_families(flag: str, families: Sequence[str], tokenizer: Tokenizer) -> None:
  """Checks that these are families of generated problems, whose words a model's tokenizer has.

  Raises:
    ValueError: one is no such family, or the tokenizer lacks words; names the flag of the families.
  """
  try:
    for family in families:
      _levels(family)
  except ValueError as error:
    raise ValueError(f"{flag}: {error}") from None
  if lacking := sorted(set(VOCABULARY) - set(tokenizer.backend.get_vocab(with_added_tokens=True))):
    raise ValueError(
      f"{flag}={','.join(families)}: this model's tokenizer lacks {len(lacking)} of their words, such as "
      f"{lacking[0]!r}; they are for models of experiments.train_reasoner"
    )


Keep = Callable[[str], bool]  # whether a part of this canonical form is wanted


def is_test(part: str) -> bool:
  """Whether problems with a part of this canonical form belong to the tests; all others belong to training."""
  return int.from_bytes(hashlib.blake2b(part.encode(), digest_size=8).digest(), "big") % TESTS == 0


def is_training(part: str) -> bool:
  """Whether problems with a part of this canonical form belong to training."""
  return not is_test(part)


class TooFew(ValueError):
  """No part that is wanted was found."""


def drawn(draw: Callable[[], Any], form: Callable[[Any], str], keep: Keep) -> Any:
  """The first of the parts that `draw` gives whose canonical form, `form(part)`, is wanted.

  Raises:
    TooFew: there is none among `TRIES`.
  """
  for _ in range(TRIES):
    if keep(form(part := draw())):
      return part
  raise TooFew


# Search ---------------------------------------------------------------------------------------------------------------


class Step:
  """A step of an attempt: its words, and whether it ends the search. `state` is what `expand` needs to go on."""

  __slots__ = ("children", "count", "found", "state", "text")

  def __init__(self, text: str, state: Any = None, found: bool = False):
    self.text, self.state, self.found = text, state, found
    self.count = text.count(" ") + 1
    self.children: list[Step] | None = None


class Trace:
  """A trace as it is written: pieces of text, and how many words they have."""

  def __init__(self, rng: random.Random, longest: int | None = None):
    self.rng, self.longest = rng, longest
    self.pieces: list[str] = []
    self.count = 0

  def write(self, text: str) -> None:
    """Appends words."""
    self.pieces.append(text)
    self.count += text.count(" ") + 1

  def search(self, root: Step, expand: Callable[[Step], list[Step]]) -> Step | None:
    """Writes attempts until one finds something, and returns its last step; None once the trace is too long.

    An attempt goes from `root` to one of the next steps at random, all being equally likely, until there is none.
    `expand(step)` lists the next steps; it is called once a step.
    """
    chance, append, count = self.rng.random, self.pieces.append, self.count
    most = float("inf") if self.longest is None else self.longest
    while count <= most:
      step = root
      while True:
        if step.children is None:
          step.children = expand(step)
        if not step.children:
          break
        step = step.children[int(chance() * len(step.children))]
        append(step.text)
        count += step.count
        if step.found:
          self.count = count
          return step
    self.count = count
    return None

  @property
  def text(self) -> str:
    """All words written so far."""
    return " ".join(self.pieces)


def compare(value: int, goal: int) -> str:
  """The word for how `value` lies to `goal`."""
  return "equal" if value == goal else "below" if value < goal else "above"


# Reading --------------------------------------------------------------------------------------------------------------


def answer_words(text: str) -> list[str] | None:
  """The words after the first "answer", up to the end word; None if there is no "answer"."""
  words = text.split()
  if "answer" not in words:
    return None
  words = words[words.index("answer") + 1 :]
  return words[: words.index(END)] if END in words else words


def split(words: Sequence[str], separator: str) -> list[list[str]]:
  """Words between separators."""
  parts: list[list[str]] = [[]]
  for word in words:
    if word == separator:
      parts.append([])
    else:
      parts[-1].append(word)
  return parts


# Tasks ----------------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class ReasoningTask(WritingTask):
  """Problems of one family at one level.

  A family defines `LEVELS`, the settings of its five levels from the easiest to the longest (see `WEIGHTS`). A problem
  is a NamedTuple `PROBLEM` of numbers, strings and tuples of them. `size`: how many numbers an answer is; 0 if it is
  something else. `problems`: test problems, unless `--limit` says otherwise. `level`: number of the level.
  """

  LEVELS: ClassVar[tuple[Any, ...]]
  PROBLEM: ClassVar[type]
  size: ClassVar[int] = 0
  notes = ("note", ";")
  metrics = ("accuracy",)
  new_tokens = 3840
  problems: int = 512
  level: int = 3

  def __post_init__(self):
    self.least(problems=1, level=0)
    if self.level >= len(self.LEVELS):
      raise ValueError(f"--{self.name}.level={self.level} must be below {len(self.LEVELS)}")

  def sample(self, rng: random.Random, keep: Keep = lambda part: True) -> Any:
    """A random problem of this level, all of whose parts are wanted.

    Raises:
      TooFew: no such part was found.
    """
    raise NotImplementedError

  def parts(self, problem: Any) -> list[str]:
    """The canonical form of each part by which problems of tests and of training are told apart."""
    raise NotImplementedError

  def key(self, problem: Any) -> str:
    """The canonical form: equal for problems that differ only in the order or names of their parts."""
    raise NotImplementedError

  def prompt(self, problem: Any) -> str:
    """The prompt's words."""
    raise NotImplementedError

  def write(self, problem: Any, trace: Trace) -> bool:
    """Writes a trace of the problem, up to the answer; False if it would be too long."""
    raise NotImplementedError

  def check(self, problem: Any, text: str) -> bool:
    """Whether a text gives a right answer; whatever cannot be read is wrong."""
    raise NotImplementedError

  def trace(self, problem: Any, rng: random.Random, longest: int | None = None) -> str | None:
    """A random search written down, with the answer and the end word; None if it has more than `longest` words."""
    trace = Trace(rng, longest)
    if not self.write(problem, trace):
      return None
    trace.write(END)
    return None if longest is not None and trace.count > longest else trace.text

  def answer(self, text: str) -> str | None:
    words = answer_words(text)
    if not words or (self.size and (len(words) != self.size or not all(word in NUMBERS for word in words))):
      return None
    return " ".join(words)

  def grade(self, text: str, prompt: Prompt) -> dict[str, float]:
    return {"accuracy": 100.0 * self.check(self.problem(prompt), text)}

  def problem(self, prompt: Prompt) -> Any:
    """The problem of a prompt."""
    return self.PROBLEM(*_tuples(json.loads(prompt.references[0])))

  def tests(self, seed: int, count: int) -> list[Any]:
    """The first `count` test problems of a seed, no two alike; fewer are the start of more.

    Raises:
      ValueError: the level has too few.
    """
    rng, found = random.Random(f"{seed} {self.name} {self.level} tests"), {}
    draw = lambda: self.sample(rng, is_test)
    try:
      while len(found) < count:
        problem = drawn(draw, self.key, lambda key: key not in found)
        found[self.key(problem)] = problem
    except TooFew:
      raise ValueError(
        f"--{self.name}.level={self.level} has {len(found)} test problems, {count} are asked for: raise the level"
        + (", or ask for fewer" if found else "")
      ) from None
    return list(found.values())

  def prompts(self, config: TasksConfig, tokenizer: Tokenizer, length: int, max_positions: int) -> list[Prompt]:
    made = []
    for problem in self.tests(config.seed, config.limit or self.problems):
      text = self.prompt(problem)
      tokens = tokenizer.encode(text)
      if len(tokens) >= max_positions:
        raise ValueError(
          f"--tasks={self.name}: a prompt has {len(tokens)} tokens, and the model's context {max_positions}; "
          f"take a model with more, or a lower --{self.name}.level"
        )
      made.append(Prompt(text, tokens, (json.dumps(problem),)))
    return made


def lengths(task: ReasoningTask, problems: int, chains: int, seed: int, longest: int = 8192) -> np.ndarray:
  """Words of the traces of a searcher that makes no mistake, int64 [problems, chains], on test problems of a seed.

  A text of L words is right if its trace has at most L. So the share of traces that are this short bounds the accuracy
  of a model that has learned the search, and the share of problems with one such trace bounds that of W chains. A trace
  longer than `longest` counts as `longest + 1`.
  """
  found = np.full((problems, chains), longest + 1)
  for row, problem in enumerate(task.tests(seed, problems)):
    for chain in range(chains):
      text = task.trace(problem, random.Random(f"{seed} {row} {chain} lengths"), longest)
      if text is not None:
        found[row, chain] = text.count(" ") + 1
  return found


def _tuples(value: Any) -> Any:
  """Tuples for the lists of a value read from JSON."""
  return tuple(map(_tuples, value)) if isinstance(value, list) else value


@functools.cache
def _levels(family: str) -> tuple[ReasoningTask, ...]:
  known = {name: cls for name, cls in TASKS.items() if issubclass(cls, ReasoningTask)}
  if family not in known:
    raise ValueError(f"{family!r} is no family of generated problems; there are {', '.join(sorted(known))}")
  return tuple(known[family](level=level) for level in range(len(known[family].LEVELS)))


def documents(
  families: Sequence[str], seed: int, start: int, count: int, longest: int = 4096
) -> Iterator[tuple[str, str | None]]:
  """Training documents `start` to `start + count - 1` of a seed, as (prompt, trace).

  Each draws its family, its level by `WEIGHTS`, a problem without parts of test problems, and a trace. Document i
  depends on (families, seed, longest, i) alone.

  Args:
    families: names of registered families, all equally likely.
    longest: most words of a document, `<bos>` and the end word included. The trace of a longer one is None: it is not
      written to its end, and whoever packs rows counts it.

  Raises:
    ValueError: an unknown family.
  """
  tasks = [_levels(family) for family in families]
  weights = WEIGHTS if longest > LONG else WEIGHTS[:-1]
  for number in range(start, start + count):
    rng = random.Random(f"{seed} {number}")
    levels = tasks[int(rng.random() * len(tasks))]
    task = rng.choices(levels[: len(weights)], weights)[0]
    problem = task.sample(rng, is_training)
    prompt = task.prompt(problem)
    yield prompt, task.trace(problem, rng, longest - prompt.count(" ") - 2)
