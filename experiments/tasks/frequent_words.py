"""Frequent words as in RULER (arXiv 2404.06654, "fwe"): the three most frequent of a coded text.

Words are six random letters. In a text of n words the k-th comes n k^-2 / zeta(2) times, rounded down; dots take the
place of the first. A prompt of T tokens has T / 50 different words. The wording and the numbers are RULER's.
"""

from __future__ import annotations

import math
import random
import string
from collections.abc import Callable

from experiments.tasks.base import register
from experiments.tasks.retrieval import Haystack, RetrievalTask

QUESTION = (
  "Read the following coded text and track the frequency of each coded word. Find the three most frequently appeared "
  "coded words. {context}\n"
  "Question: Do not provide any explanation. Please ignore the dots '....'. What are the three most frequently "
  "appeared words in the above coded text?"
)
PREFIX = " Answer: According to the coded text above, the three most frequently appeared words are:"
DOTS = "..."
ZETA = math.pi**2 / 6  # zeta(2)
LEAST = 74  # n (4^-2 - 5^-2) / zeta(2) > 1: the third word after the dots comes more often than the fourth


@register
class FrequentWords(RetrievalTask):
  """It has no settings."""

  name = "frequent_words"
  new_tokens = 50

  def sample(self, rng: random.Random, length: int, fit: Callable) -> Haystack:
    seed = rng.getrandbits(64)
    words = {DOTS: None}
    while len(words) < max(4, length // 50):
      words["".join(rng.choices(string.ascii_lowercase, k=6))] = None

    def prompt(count: int) -> str:
      text = [word for k, word in enumerate(words, 1) for _ in range(int(count / k**2 / ZETA))]
      random.Random(seed).shuffle(text)
      return QUESTION.format(context=" ".join(text))

    return Haystack(prompt, PREFIX, tuple(words)[1:4], smallest=LEAST)
