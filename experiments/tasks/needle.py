"""Needle in a haystack as in RULER (arXiv 2404.06654): values hidden in a long text.

The wording and the values are RULER's; keys are adjective-noun pairs from the lists below. Each needle is put between
two pieces of the haystack, at one of 40 evenly spaced depths. The haystack is repeated noise (RULER's "repeat"), an
essay read from a file, or needles that are not asked for. RULER's tasks are settings; three have names of their own:

| RULER               | here                                                                                  |
| ------------------- | ------------------------------------------------------------------------------------- |
| niah_single_1       | `needle`                                                                              |
| niah_single_2, _3   | `needle` with `--needle.essay=FILE`; _3 with `--needle.value_kind=uuids` too          |
| niah_multikey_1     | `needle_multikey` with `--needle_multikey.essay=FILE`                                 |
| niah_multikey_2, _3 | `needle_multikey` with keys=1 and haystack=needles; _3 with both kinds uuids too      |
| niah_multivalue     | `needle_multivalue` with `--needle_multivalue.essay=FILE`                             |
| niah_multiquery     | `needle_multiquery` with `--needle_multiquery.essay=FILE`                             |

RULER's essays are Paul Graham's, joined to one text; any text file is read in the same way.
"""

from __future__ import annotations

import functools
import itertools
import random
import re
import uuid
from collections.abc import Callable
from typing import Literal

import numpy as np

from experiments.common.files import read_text
from experiments.tasks.base import register
from experiments.tasks.retrieval import Haystack, RetrievalTask

NOISE = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
NEEDLE_LINE = "One of the special magic {kind} for {key} is: {value}."
DEPTHS = np.round(np.linspace(0, 100, 40)).astype(int).tolist()  # per cent
PLURAL = (
  "Some special magic {kind} are hidden within the following text. Make sure to memorize it. I will quiz you about "
  "the {kind} afterwards.\n{context}\n"
  "What are all the special magic {kind} for {query} mentioned in the provided text?",
  " The special magic {kind} for {query} mentioned in the provided text are",
)
SINGULAR = (
  "A special magic {kind} is hidden within the following text. Make sure to memorize it. I will quiz you about "
  "the {kind} afterwards.\n{context}\n"
  "What is the special magic {kind} for {query} mentioned in the provided text?",
  " The special magic {kind} for {query} mentioned in the provided text is",
)

ADJECTIVES = (
  "abrupt ample ancient bitter bold brave brief bright broad calm careful cheap clean clever cold cool curious damp "
  "dark deep dry eager early easy empty faint fair famous fast fierce fine firm flat fresh gentle giant glad grand "
  "happy heavy hollow honest huge humble idle jolly keen kind large late lazy light lively lonely loud lucky mellow "
  "mild modern narrow neat noble odd old pale plain polite proud quick quiet rapid rare rich rough round rude sharp "
  "shiny short shy silent silly simple slow small smooth soft solid sour spicy steep stiff strange strong sturdy "
  "sweet swift tall tame tender thick thin tidy tiny tired tough vague warm weak wide wild wise young"
).split()
NOUNS = (
  "acorn anchor apple arrow badge basket beach bell bench bird blanket boat book bottle bridge bucket button cabin "
  "camera candle canyon carpet castle chair cherry circle cliff clock cloud coast cookie corner cotton cradle "
  "curtain desert dinner doctor donkey dragon drawer eagle engine falcon farmer feather fence flame flower forest "
  "fountain garden glacier guitar hammer harbor helmet hill horse island jacket jungle kettle kitchen ladder lake "
  "lantern lemon letter lizard marble market meadow mirror monkey mountain needle notebook ocean orchard painter "
  "palace parrot pencil pepper piano pillow planet pocket pond potato rabbit river rocket saddle sailor shadow ship "
  "shoulder spoon station street sunset table temple ticket tower tractor tunnel valley violin wagon wallet whale "
  "window winter"
).split()


def listed(items: list[str]) -> str:
  """RULER's list: "a", or "a, b, and c"."""
  return items[0] if len(items) == 1 else f"{', '.join(items[:-1])}, and {items[-1]}"


def sampled_of(kind: str, rng: random.Random, count: int) -> list[str]:
  """Different adjective-noun pairs, numbers of seven digits, or UUIDs."""
  if kind == "uuids":
    return [str(uuid.UUID(int=rng.getrandbits(128), version=4)) for _ in range(count)]
  if kind == "numbers":
    return [str(n) for n in rng.sample(range(10**6, 10**7), count)]
  pairs = rng.sample(range(len(ADJECTIVES) * len(NOUNS)), count)
  return [f"{ADJECTIVES[pair // len(NOUNS)]}-{NOUNS[pair % len(NOUNS)]}" for pair in pairs]


@functools.lru_cache(maxsize=4)
def words_of(flag: str, path: str) -> tuple[str, ...]:
  """The words of a text file.

  Raises:
    ValueError: no such file, or one without a word; names the flag.
  """
  if not (words := read_text(flag, path).split()):
    raise ValueError(f"--{flag}={path}: holds no word")
  return tuple(words)


@register
class Needle(RetrievalTask):
  """A needle in a haystack.

  Attributes:
    keys, values, queries: keys hidden, values of each, and keys asked for.
    key_kind, value_kind: what keys and values are.
    haystack: repeated sentences ("noise"), or facts of other keys ("needles").
    essay: text file that is the haystack instead, repeated where it is too short.
  """

  keys: int = 1
  values: int = 1
  queries: int = 1
  key_kind: Literal["words", "uuids"] = "words"
  value_kind: Literal["numbers", "uuids"] = "numbers"
  haystack: Literal["noise", "needles"] = "noise"
  essay: str = ""

  new_tokens = 128

  def __post_init__(self):
    self.least(keys=1, values=1, queries=1)
    flag = f"--{self.name}"
    if self.essay and self.haystack != "noise":
      raise ValueError(f"{flag}.essay={self.essay} is a haystack of its own: leave out {flag}.haystack={self.haystack}")
    if self.queries > self.keys:
      raise ValueError(f"{flag}.queries={self.queries} asks for more keys than {flag}.keys={self.keys}")
    if self.keys * self.values > len(DEPTHS):
      raise ValueError(
        f"{flag}.keys={self.keys} x {flag}.values={self.values}: there are {len(DEPTHS)} depths to hide them at"
      )

  def _line(self, key: str, value: str) -> str:
    return NEEDLE_LINE.format(kind=self.value_kind, key=key, value=value)

  def _units(self, seed: int, used: list[str]) -> Callable[[int], tuple[list[str], str]]:
    """A function of n: the first n units of the haystack as the pieces that needles may lie between, and their glue."""
    if self.essay:
      words = words_of(f"{self.name}.essay", self.essay)
      text = lambda n: " ".join(itertools.islice(itertools.cycle(words), n))
      return lambda n: (re.split(r"(?<=[.!?]) ", text(n)), " ")
    if self.haystack == "noise":
      return lambda n: ([NOISE] * n, "\n")
    rng, others = random.Random(seed), []

    def distractors(n: int) -> tuple[list[str], str]:
      while len(others) < n:  # the first n lines are the same for every n
        (key,), (value,) = sampled_of(self.key_kind, rng, 1), sampled_of(self.value_kind, rng, 1)
        if key not in used:
          others.append(self._line(key, value))
      return others[:n], "\n"

    return distractors

  def sample(self, rng: random.Random, length: int, fit: Callable) -> Haystack:
    keys = sampled_of(self.key_kind, rng, self.keys)
    values = {key: sampled_of(self.value_kind, rng, self.values) for key in keys}
    lines = [self._line(key, value) for key in keys for value in values[key]]
    rng.shuffle(lines)
    depths = sorted(rng.sample(DEPTHS, len(lines)))
    asked = rng.sample(keys, self.queries)
    single = self.queries * self.values == 1
    question, prefix = SINGULAR if single else PLURAL
    about = {"kind": self.value_kind.removesuffix("s") if single else self.value_kind, "query": listed(asked)}
    units = self._units(rng.getrandbits(64), keys)

    def prompt(count: int) -> str:
      text, glue = units(count)
      places = [len(text) * depth // 100 for depth in depths]
      for place, line in reversed(list(zip(places, lines, strict=True))):
        text.insert(place, line)
      return question.format(context=glue.join(text), **about)

    references = tuple(value for key in asked for value in values[key])
    return Haystack(prompt, prefix.format(**about), references, smallest=1)


@register
class NeedleMultiKey(Needle):
  """Four keys with a value each, one of them asked for (RULER's niah_multikey)."""

  name = "needle_multikey"
  keys: int = 4


@register
class NeedleMultiValue(Needle):
  """One key with four values, all asked for (RULER's niah_multivalue)."""

  name = "needle_multivalue"
  values: int = 4


@register
class NeedleMultiQuery(Needle):
  """Four keys with a value each, all asked for (RULER's niah_multiquery)."""

  name = "needle_multiquery"
  keys: int = 4
  queries: int = 4
