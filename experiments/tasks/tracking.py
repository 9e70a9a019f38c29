"""Variable tracking as in RULER (arXiv 2404.06654): which variables hold a value.

A worked example with three-letter names comes first. It has RULER's 500 tokens, or half the prompt if that is less. The
defaults are RULER's; arXiv 2506.05345 takes 40 chains without hops.
"""

from __future__ import annotations

import itertools
import random
import string
from collections.abc import Callable

from experiments.tasks.base import register
from experiments.tasks.needle import NOISE
from experiments.tasks.retrieval import Haystack, RetrievalTask

QUESTION = (
  "Memorize and track the chain(s) of variable assignment hidden in the following text.\n\n{context}\n"
  "Question: Find all variables that are assigned the value {query} in the text above."
)
PREFIX = (
  " Answer: According to the chain(s) of variable assignment in the text above, {n} variables are assigned the value "
  "{query}, they are: "
)
EXAMPLE_TOKENS = 500
NEW_TOKENS = 30


def chains(rng: random.Random, count: int, hops: int, letters: int) -> tuple[list[list[str]], list[list[str]]]:
  """(names, assignments) of each chain: the first assignment is a number of 5 digits, each later one copies a name."""
  names: dict[str, None] = {}
  while len(names) < count * (hops + 1):
    names["".join(rng.choices(string.ascii_uppercase, k=letters))] = None
  each = [list(names)[i : i + hops + 1] for i in range(0, len(names), hops + 1)]
  values = rng.sample(range(10000, 99999), count)
  return each, [
    [f"VAR {chain[0]} = {value}", *(f"VAR {new} = VAR {old} " for old, new in itertools.pairwise(chain))]
    for chain, value in zip(each, values, strict=True)
  ]


def haystack(rng: random.Random, count: int, hops: int, letters: int) -> Haystack:
  """Chains among lines of noise, their assignments in order at random places; the question asks for the first chain."""
  names, assignments = chains(rng, count, hops, letters)
  value = assignments[0][0].split(" = ")[1]
  places = rng.getrandbits(64)

  def prompt(units: int) -> str:
    text, order = [NOISE + "\n"] * units, random.Random(places)
    for chain in assignments:
      for number, place in enumerate(sorted(order.sample(range(len(text)), len(chain)))):
        text.insert(place + number, chain[number])
    return QUESTION.format(context=" ".join(text), query=value)

  return Haystack(prompt, PREFIX.format(n=hops + 1, query=value), tuple(names[0]), smallest=hops + 1)


@register
class Tracking(RetrievalTask):
  """Chains of assignments hidden in a text.

  Attributes:
    chains: chains of assignments hidden in the text.
    hops: assignments after the first of each chain.
  """

  chains: int = 1
  hops: int = 4

  new_tokens = NEW_TOKENS

  def __post_init__(self):
    self.least(chains=1, hops=0)

  def sample(self, rng: random.Random, length: int, fit: Callable) -> Haystack:
    shown = haystack(rng, self.chains, min(10, self.hops), letters=3)
    asked = haystack(rng, self.chains, self.hops, letters=5)
    worked = lambda units: f"{shown.prompt(units)}{shown.prefix} {' '.join(shown.references)}\n\n\n\n"
    example = worked(fit(worked, min(EXAMPLE_TOKENS, length // 2) - NEW_TOKENS, shown.smallest))
    return Haystack(lambda units: example + asked.prompt(units), asked.prefix, asked.references, asked.smallest)
