"""Retrieval tasks: prompts of a given length that hide facts."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Callable

from dms_jax.tokenizer import Tokenizer
from experiments.tasks.base import Prompt, TasksConfig, WritingTask, framed

SAMPLES = 500  # of each length without a limit; RULER's number


@dataclasses.dataclass(frozen=True)
class Haystack:
  """A prompt of any length: `prompt(n)` hides the same facts among n units of noise.

  n is at least `smallest`, and at most `largest` where the noise is limited. The answer begins with `prefix`; a right
  one names every one of `references`.
  """

  prompt: Callable[[int], str]
  prefix: str
  references: tuple[str, ...]
  smallest: int
  largest: int | None = None


class RetrievalTask(WritingTask):
  """The model reads a long text and writes the hidden facts; the score is the share of references found, per cent."""

  metrics = ("score",)
  floor = 60.0
  sized = True

  def sample(self, rng: random.Random, length: int, fit: Callable) -> Haystack:
    """One text with its question, meant for a prompt of `length` tokens.

    Args:
      fit: `fit(build, limit, smallest)` is the most units n of noise, at least `smallest`, for which `build(n)` has no
        more than `limit` tokens.
    """
    raise NotImplementedError

  def prompts(self, config, tokenizer, length, max_positions, new_tokens=None):
    return prompts(self, config, tokenizer, length, max_positions, new_tokens)

  def grade(self, text, prompt):
    return {"score": 100 * share_found(text, prompt.references)}


def most_units(count: Callable[[int], int], limit: int, smallest: int, largest: int | None = None) -> int:
  """The largest n with `count(n) <= limit`, at most `largest`; `smallest - 1` if not even `smallest` fits."""
  low, high = smallest - 1, smallest
  while count(high) <= limit:
    if high == largest:
      return high
    low, high = high, 2 * high if largest is None else min(2 * high, largest)
  while high - low > 1:
    middle = (low + high) // 2
    low, high = (middle, high) if count(middle) <= limit else (low, middle)
  return low


def prompts(
  task: RetrievalTask, config: TasksConfig, tokenizer: Tokenizer, length: int, max_positions: int,
  new_tokens: int | None = None,
) -> list[Prompt]:  # fmt: skip
  """The prompts of one length: as much noise as fits `length` and leaves the context room for the answer.

  Prompt i hides the same facts at every length. The answer is not part of the length, unlike in RULER.

  Args:
    new_tokens: L, the most new tokens; None: the task's own.

  Raises:
    ValueError: `length` is too short for the task, exceeds the model's context, or leaves no room for the answer.
  """
  new_tokens = task.new_tokens if new_tokens is None else new_tokens
  if length > max_positions:
    raise ValueError(f"--lengths={length}: the model's context is {max_positions} tokens")

  def fit(build: Callable[[int], str], limit: int, smallest: int, largest: int | None = None) -> int:
    return max(smallest, most_units(lambda n: len(tokenizer.encode(build(n))), limit, smallest, largest))

  limit = min(length, max_positions - new_tokens)
  made = []
  for number in range(config.limit or SAMPLES):
    hidden = task.sample(random.Random(f"{config.seed} {task.name} {number}"), length, fit)
    build = lambda n, hidden=hidden: framed(tokenizer, config.template, hidden.prompt(n), hidden.prefix)
    text = build(fit(build, limit, hidden.smallest, hidden.largest))
    tokens = tokenizer.encode(text)
    if len(tokens) > limit:
      if limit < length:
        raise ValueError(
          f"--max_tokens={new_tokens} leaves prompts of {task.name} {max(limit, 0)} of the context's {max_positions} "
          f"tokens: its shortest has {len(tokens)}"
        )
      raise ValueError(f"--lengths={length} is too short for {task.name}: its shortest prompt has {len(tokens)} tokens")
    made.append(Prompt(text, tokens, hidden.references))
  return made


def share_found(text: str, references: tuple[str, ...]) -> float:
  """Share of `references` that `text` holds, case ignored."""
  return sum(reference.lower() in text.lower() for reference in references) / len(references)
