"""Countdown with several targets: a chain of operations on given numbers for each target."""

from __future__ import annotations

from typing import NamedTuple

from experiments.tasks.base import register
from experiments.tasks.reasoning import LARGEST, ReasoningTask, Step, Trace, answer_words, compare, drawn, split

NUMBERS = range(2, 21)  # the given numbers
TRIES = 50  # chains drawn for the targets of a problem, before other numbers are drawn


class Level(NamedTuple):
  """How many numbers are given, how many targets, and the operations in the chain that a target is taken from."""

  numbers: tuple[int, int]
  targets: tuple[int, int]
  operations: tuple[int, int]


class Problem(NamedTuple):
  """The given numbers, all different, and the targets, all different and none of them given."""

  numbers: tuple[int, ...]
  targets: tuple[int, ...]


def apply(operation: str, value: int, number: int) -> int | None:
  """The result of an operation; None unless it is 1..63."""
  result = value + number if operation == "+" else value - number if operation == "-" else value * number
  return result if 1 <= result <= LARGEST else None


def moves(value: int, left: tuple[int, ...]) -> list[tuple[str, int, int]]:
  """All (operation, number, result) that may come next in a chain."""
  found = []
  for number in left:
    if value + number <= LARGEST:
      found.append(("+", number, value + number))
    if value > number:
      found.append(("-", number, value - number))
    if value * number <= LARGEST:
      found.append(("*", number, value * number))
  return found


def without(numbers: tuple[int, ...], number: int) -> tuple[int, ...]:
  return tuple(n for n in numbers if n != number)


@register
class Countdown(ReasoningTask):
  """Reach every target from the given numbers; each number may be used once a target.

  A chain starts with a number and applies +, - or * with another, to the result so far. Results are 1..63. The search
  writes random chains, compares each result with the target and restates the numbers left. Any right chain counts, so a
  prompt is right if one of its W texts is.
  """

  PROBLEM = Problem
  LEVELS = (
    Level((2, 3), (1, 1), (1, 2)),
    Level((3, 3), (2, 4), (1, 2)),
    Level((3, 4), (2, 3), (1, 3)),
    Level((4, 4), (3, 4), (2, 3)),
    Level((5, 5), (4, 4), (3, 4)),
  )
  best_of_all = True

  def sample(self, rng, keep=lambda part: True):
    level, chance = self.LEVELS[self.level], rng.random
    draw = lambda: tuple(rng.sample(NUMBERS, rng.randint(*level.numbers)))
    while True:
      numbers = drawn(draw, _form, keep)
      wanted, targets = rng.randint(*level.targets), []
      for _ in range(TRIES):  # few numbers may reach too few targets
        value = numbers[int(chance() * len(numbers))]
        left = without(numbers, value)
        for _ in range(rng.randint(*level.operations)):
          if choices := moves(value, left):
            _, number, value = choices[int(chance() * len(choices))]
            left = without(left, number)
        if value not in numbers and value not in targets:
          targets.append(value)
        if len(targets) == wanted:
          return Problem(numbers, tuple(targets))

  def parts(self, problem: Problem) -> list[str]:
    return [_form(problem.numbers)]

  def key(self, problem: Problem) -> str:
    """The given numbers, which no problem of training has, and the targets.

    Shared with training: a target's chain need not use all numbers, so other given numbers may have the same chain.
    After 40,000 documents half of the chains of tests have been noted; all those of a problem, in 7 % of them.
    """
    return f"{_form(problem.numbers)} {sorted(problem.targets)}"

  def prompt(self, problem: Problem) -> str:
    numbers, targets = (" ".join(map(str, each)) for each in problem)
    return f"countdown numbers {numbers} targets {targets} start"

  def write(self, problem: Problem, trace: Trace) -> bool:
    notes = []
    for target in problem.targets:
      root = Step("", (0, problem.numbers, ""))
      found = trace.search(root, lambda step, target=target: _expand(step, target))
      if found is None:
        return False
      notes.append(f"{target} : {found.state[2]}")
      trace.write(f"note {notes[-1]} ;")
    trace.write(f"answer {' , '.join(notes)}")
    return True

  def check(self, problem: Problem, text: str) -> bool:
    numbers, targets = problem
    words = answer_words(text)
    parts = split(words or [], ",")
    return len(parts) == len(targets) and all(
      _reaches(part, numbers, target) for part, target in zip(parts, targets, strict=True)
    )


def _form(numbers: tuple[int, ...]) -> str:
  """The canonical form of the given numbers."""
  return f"countdown {sorted(numbers)}"


def _expand(step: Step, target: int) -> list[Step]:
  """The steps of a chain; a step's state is its value, the numbers left and its chain, "" before the first number."""
  value, left, chain = step.state
  if not chain:
    return [Step(f"try {number}", (number, without(left, number), str(number))) for number in left]
  made = []
  for operation, number, result in moves(value, left):
    after = without(left, number)
    rest = " ".join(map(str, after)) if after else "none"
    verdict = compare(result, target)
    text = f"{operation} {number} = {result} goal {target} {verdict}"
    found = verdict == "equal"
    ends = found or not moves(result, after)
    text += " ;" if ends else f" left {rest} ,"
    made.append(Step(text, (result, () if ends else after, f"{chain} {operation} {number}"), found))
  return made


def _reaches(words: list[str], numbers: tuple[int, ...], target: int) -> bool:
  """Whether words are "target : chain", with a chain that reaches the target from the numbers."""
  if words[:2] != [str(target), ":"] or len(words) % 2 == 0:
    return False
  chain, left = words[2:], [str(number) for number in numbers]
  value = None
  for operation, word in zip(["", *chain[1::2]], chain[::2], strict=True):
    if word not in left or operation not in ("", "+", "-", "*"):
      return False
    left.remove(word)
    value = int(word) if value is None else apply(operation, value, int(word))
    if value is None:
      return False
  return value == target
