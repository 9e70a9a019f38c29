"""Needle in a haystack as in RULER (arXiv 2404.06654): numbers hidden in repeated noise.

The wording and the numbers are RULER's; keys are adjective-noun pairs from the lists below. Each needle is put between
two lines of noise, at one of 40 evenly spaced depths.
"""

from __future__ import annotations

import random
from collections.abc import Callable

import numpy as np

from experiments.tasks.base import register
from experiments.tasks.retrieval import Haystack, RetrievalTask

NOISE = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
NEEDLE_LINE = "One of the special magic numbers for {key} is: {value}."
DEPTHS = np.round(np.linspace(0, 100, 40)).astype(int).tolist()  # per cent
PLURAL = (
  "Some special magic numbers are hidden within the following text. Make sure to memorize it. I will quiz you about "
  "the numbers afterwards.\n{context}\n"
  "What are all the special magic numbers for {query} mentioned in the provided text?",
  " The special magic numbers for {query} mentioned in the provided text are",
)
SINGULAR = (
  "A special magic number is hidden within the following text. Make sure to memorize it. I will quiz you about "
  "the number afterwards.\n{context}\n"
  "What is the special magic number for {query} mentioned in the provided text?",
  " The special magic number for {query} mentioned in the provided text is",
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


@register
class Needle(RetrievalTask):
  """Settings: keys hidden, values of each key, keys asked for (RULER's single, multi-key, multi-value, multi-query)."""

  keys: int = 1
  values: int = 1
  queries: int = 1

  new_tokens = 128

  def __post_init__(self):
    self.least(keys=1, values=1, queries=1)
    if self.queries > self.keys:
      raise ValueError(f"--needle.queries={self.queries} asks for more keys than --needle.keys={self.keys}")
    if self.keys * self.values > len(DEPTHS):
      raise ValueError(
        f"--needle.keys={self.keys} x --needle.values={self.values}: there are {len(DEPTHS)} depths to hide them at"
      )

  def sample(self, rng: random.Random, length: int, fit: Callable) -> Haystack:
    pairs = rng.sample(range(len(ADJECTIVES) * len(NOUNS)), self.keys)
    keys = [f"{ADJECTIVES[pair // len(NOUNS)]}-{NOUNS[pair % len(NOUNS)]}" for pair in pairs]
    values = {key: [str(n) for n in rng.sample(range(10**6, 10**7), self.values)] for key in keys}
    lines = [NEEDLE_LINE.format(key=key, value=value) for key in keys for value in values[key]]
    rng.shuffle(lines)
    depths = sorted(rng.sample(DEPTHS, len(lines)))
    asked = rng.sample(keys, self.queries)
    question, prefix = SINGULAR if self.queries * self.values == 1 else PLURAL

    def prompt(units: int) -> str:
      text = [NOISE] * units
      for depth, line in reversed(list(zip(depths, lines, strict=True))):
        text.insert(units * depth // 100, line)
      return question.format(context="\n".join(text), query=listed(asked))

    references = tuple(value for key in asked for value in values[key])
    return Haystack(prompt, prefix.format(query=listed(asked)), references, smallest=1)
