"""Common words as in RULER (arXiv 2404.06654, "cwe"): the ten most frequent of a numbered list.

Ten common words come thirty times each among others that come three times each. In prompts below 4,096 tokens they come
six times and the others once. A worked example of forty (below 4,096 tokens: twenty) words comes first. Wording,
numbers and words are RULER's. The words are nouns, adjectives and verbs of the package wonderwords (extra `ruler`).
"""

from __future__ import annotations

import functools
import random
from collections.abc import Callable, Sequence

from experiments.tasks.base import register
from experiments.tasks.retrieval import Haystack, RetrievalTask

QUESTION = (
  "Below is a numbered list of words. In these words, some appear more often than others. Memorize the ones that "
  "appear most often.\n{context}\n"
  "Question: What are the 10 most common words in the above list?"
)
PREFIX = " Answer: The top 10 words that appear most often in the list are:"
COMMON = 10
LONG = 4096  # tokens, from which on words are repeated more often


@functools.cache
def vocabulary() -> list[str]:
  """All words, sorted.

  Raises:
    ValueError: wonderwords is not installed.
  """
  try:
    from wonderwords import RandomWord
  except ImportError:
    raise ValueError("--tasks=common_words needs wonderwords: pip install 'dms_jax[ruler]'") from None
  return sorted(set(RandomWord().filter(include_categories=["noun", "adjective", "verb"])))


def numbered(words: Sequence[str]) -> str:
  """ "1. word 2. word": RULER's list."""
  return " ".join(f"{number}. {word}" for number, word in enumerate(words, 1))


def mixed(common: list[str], others: list[str], often: int, seldom: int, seed: int) -> str:
  """A numbered list in which `common` words come `often` times each and `others` come `seldom`."""
  words = common * often + others * seldom
  random.Random(seed).shuffle(words)
  return QUESTION.format(context=numbered(words))


@register
class CommonWords(RetrievalTask):
  """It has no settings."""

  name = "common_words"
  new_tokens = 120

  def sample(self, rng: random.Random, length: int, fit: Callable) -> Haystack:
    words = rng.sample(vocabulary(), len(vocabulary()))
    seeds = rng.getrandbits(64), rng.getrandbits(64)
    size, shown_repeats, repeats = (40, (10, 3), (30, 3)) if length >= LONG else (20, (3, 1), (6, 1))
    common, shown, others = words[:COMMON], words[COMMON : COMMON + size], words[COMMON + size :]
    example = mixed(shown[:COMMON], shown[COMMON:], *shown_repeats, seeds[0]) + PREFIX + numbered(shown[:COMMON])
    prompt = lambda count: f"{example}\n{mixed(common, others[:count], *repeats, seeds[1])}"
    return Haystack(prompt, PREFIX, tuple(common), smallest=COMMON, largest=len(others))
