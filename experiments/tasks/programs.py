"""Programs of two operations from examples of their inputs and outputs, several in one problem."""

from __future__ import annotations

from typing import NamedTuple

from experiments.tasks.base import register
from experiments.tasks.reasoning import (
  LARGEST,
  LETTERS,
  ReasoningTask,
  Step,
  Trace,
  answer_words,
  compare,
  drawn,
  split,
)

# Every operation maps 0..63 to 0..63; results are taken modulo 64.
OPERATIONS = {
  "inc": lambda x: x + 1,
  "dec": lambda x: x - 1,
  "up": lambda x: x + 10,
  "down": lambda x: x - 10,
  "double": lambda x: 2 * x,
  "triple": lambda x: 3 * x,
  "half": lambda x: x // 2,
  "third": lambda x: x // 3,
  "flip": lambda x: LARGEST - x,
  "square": lambda x: x * x,
}
RESULTS = {name: [run(x) % (LARGEST + 1) for x in range(LARGEST + 1)] for name, run in OPERATIONS.items()}


class Level(NamedTuple):
  """How many operations may be used, how many programs are sought, and how many examples each has."""

  operations: tuple[int, int]
  programs: tuple[int, int]
  examples: tuple[int, int]


class Problem(NamedTuple):
  """The operations that may be used, and for each program its examples (input, output)."""

  operations: tuple[str, ...]
  programs: tuple[tuple[tuple[int, int], ...], ...]


@register
class Programs(ReasoningTask):
  """Find programs that map each input to its output; a program is two of the operations listed, one after the other.

  The search tries random pairs of operations on the examples in order, up to the first output that differs. Any program
  that agrees with all examples counts, so a prompt is right if one of its W texts is.
  """

  PROBLEM = Problem
  LEVELS = (
    Level((2, 4), (1, 1), (2, 3)),
    Level((2, 3), (2, 4), (2, 2)),
    Level((3, 6), (2, 3), (2, 3)),
    Level((4, 8), (3, 4), (2, 3)),
    Level((9, 10), (4, 4), (2, 3)),
  )
  best_of_all = True

  def sample(self, rng, keep=lambda part: True):
    level, chance = self.LEVELS[self.level], rng.random
    operations = tuple(rng.sample(list(OPERATIONS), rng.randint(*level.operations)))

    def examples() -> tuple[tuple[int, int], ...]:
      first, second = (RESULTS[operations[int(chance() * len(operations))]] for _ in range(2))
      inputs = rng.sample(range(LARGEST + 1), rng.randint(*level.examples))
      return tuple((x, second[first[x]]) for x in inputs)

    programs = tuple(drawn(examples, _form, keep) for _ in range(rng.randint(*level.programs)))
    return Problem(operations, programs)

  def parts(self, problem: Problem) -> list[str]:
    return [_form(examples) for examples in problem.programs]

  def key(self, problem: Problem) -> str:
    """The operations, and the examples of the programs, which no program of training has.

    Shared with training: the programs themselves, 100 pairs of operations, with other examples.
    """
    return f"programs {sorted(problem.operations)} {sorted(sorted(examples) for examples in problem.programs)}"

  def prompt(self, problem: Problem) -> str:
    parts = []
    for letter, examples in zip(LETTERS, problem.programs, strict=False):
      parts.append(f"{letter} {' , '.join(f'{x} -> {y}' for x, y in examples)} ;")
    return f"programs ops {' '.join(problem.operations)} ; {' '.join(parts)} start"

  def write(self, problem: Problem, trace: Trace) -> bool:
    notes = []
    for letter, examples in zip(LETTERS, problem.programs, strict=False):
      expand = lambda step, letter=letter, examples=examples: _expand(step, letter, problem.operations, examples)
      found = trace.search(Step("", ()), expand)
      if found is None:
        return False
      notes.append(f"{letter} {' '.join(found.state)}")
      trace.write(f"note {notes[-1]} ;")
    trace.write(f"answer {' , '.join(notes)}")
    return True

  def check(self, problem: Problem, text: str) -> bool:
    operations, programs = problem
    parts = split(answer_words(text) or [], ",")
    return len(parts) == len(programs) and all(
      len(part) == 3
      and part[0] == letter
      and all(name in operations for name in part[1:])
      and all(RESULTS[part[2]][RESULTS[part[1]][x]] == y for x, y in examples)
      for letter, part, examples in zip(LETTERS, parts, programs, strict=False)
    )


def _form(examples: tuple[tuple[int, int], ...]) -> str:
  """The canonical form of a program's examples."""
  return f"programs {sorted(examples)}"


def _expand(step: Step, letter: str, operations: tuple[str, ...], examples: tuple[tuple[int, int], ...]) -> list[Step]:
  """The first operations, then the second ones with the examples; a step's state is the operations so far."""
  if len(step.state) == 2:
    return []
  if not step.state:
    return [Step(f"try {letter} {name}", (name,)) for name in operations]
  (first,) = step.state
  made = []
  for second in operations:
    runs, agrees = [], True
    for x, y in examples:
      between = RESULTS[first][x]
      result = RESULTS[second][between]
      runs.append(f"{x} {between} {result} goal {y} {compare(result, y)}")
      if result != y:
        agrees = False
        break
    made.append(Step(f"{second} : {' , '.join(runs)} ;", (first, second), agrees))
  return made
