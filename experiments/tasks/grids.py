"""Several 4x4 sudokus, solved by guessed rows; the answer adds up cells of all of them."""

from __future__ import annotations

import functools
import itertools
import math
import random
from typing import NamedTuple

from experiments.tasks.base import register
from experiments.tasks.reasoning import LETTERS, ReasoningTask, Step, Trace, drawn

SIZE = 4
DIGITS = range(1, SIZE + 1)
Row = tuple[int, ...]


class Level(NamedTuple):
  """How many grids there are, and how many ways to fill all rows of one so that each agrees with the row's clues."""

  grids: tuple[int, int]
  ways: tuple[int, int]


class Problem(NamedTuple):
  """For each grid its 16 cells, row by row, 0 where empty."""

  grids: tuple[tuple[int, ...], ...]


ROWS: tuple[Row, ...] = tuple(itertools.permutations(DIGITS))


@functools.cache
def clash(above: tuple[Row, ...], row: Row) -> int:
  """The first column, 1..4, in which `row` repeats a digit of its column or box among the rows above; 0 for none."""
  place = len(above)
  for column, digit in enumerate(row):
    if any(each[column] == digit for each in above):
      return column + 1
    if place % 2 and digit in above[-1][column // 2 * 2 : column // 2 * 2 + 2]:
      return column + 1
  return 0


def _solutions() -> list[tuple[int, ...]]:
  """The 288 filled grids."""
  found: list[tuple[Row, ...]] = [()]
  for _ in range(SIZE):
    found = [(*above, row) for above in found for row in ROWS if not clash(above, row)]
  return [tuple(itertools.chain(*rows)) for rows in found]


SOLUTIONS = _solutions()
# HAVING[cell][digit]: the set of filled grids with this digit there, one bit a grid.
HAVING = [[sum(1 << i for i, grid in enumerate(SOLUTIONS) if grid[cell] == digit) for digit in range(SIZE + 1)]
          for cell in range(SIZE * SIZE)]  # fmt: skip
EVERY = (1 << len(SOLUTIONS)) - 1
WAYS = (24, 6, 2, 1)  # permutations of four digits that agree with 0..3 clues
SUBSETS = [list(itertools.combinations(range(SIZE), clues)) for clues in range(SIZE)]  # columns of 0..3 clues


@functools.cache
def _shown(least: int, most: int) -> list[tuple[int, ...]]:
  """All numbers of clues a row that leave `least` to `most` ways to fill the rows."""
  return [shown for shown in itertools.product(range(SIZE), repeat=SIZE)
          if least <= math.prod(WAYS[clues] for clues in shown) <= most]  # fmt: skip


def solution(cells: tuple[int, ...]) -> tuple[int, ...] | None:
  """The filled grid that agrees with the clues; None unless there is exactly one."""
  agreeing = EVERY
  for cell, digit in enumerate(cells):
    if digit:
      agreeing &= HAVING[cell][digit]
  return SOLUTIONS[agreeing.bit_length() - 1] if agreeing and not agreeing & (agreeing - 1) else None


@register
class Grids(ReasoningTask):
  """Solve 4x4 sudokus; the answer is the sums, over the grids, of the first and of the second cell of the last row.

  The search fills a grid row by row with random rows that agree with the row's own clues, and starts again when a digit
  repeats in a column or box. It copies a row's clues before it guesses: a row has one name in all grids, so the copy
  needs one lookup, and the guess none. Each grid has one solution, so W texts vote.
  """

  PROBLEM = Problem
  LEVELS = (
    Level((1, 1), (1, 8)),
    Level((2, 4), (1, 4)),
    Level((2, 3), (2, 12)),
    Level((3, 4), (2, 24)),
    Level((4, 4), (16, 64)),
  )
  size = 2

  def sample(self, rng, keep=lambda part: True):
    level = self.LEVELS[self.level]
    count = rng.randint(*level.grids)
    draw = lambda: self._grid(rng, *level.ways)
    return Problem(tuple(drawn(draw, _form, keep) for _ in range(count)))

  def _grid(self, rng: random.Random, least: int, most: int) -> tuple[int, ...]:
    """Clues with one solution, and with `least` to `most` ways to fill the rows."""
    chance, shown = rng.random, _shown(least, most)
    while True:
      full = SOLUTIONS[int(chance() * len(SOLUTIONS))]
      cells = [0] * SIZE**2
      for row, columns in enumerate(shown[int(chance() * len(shown))]):
        for column in SUBSETS[columns][int(chance() * len(SUBSETS[columns]))]:
          cells[SIZE * row + column] = full[SIZE * row + column]
      if solution(tuple(cells)) is not None:
        return tuple(cells)

  def parts(self, problem: Problem) -> list[str]:
    return [_form(cells) for cells in problem.grids]

  def key(self, problem: Problem) -> str:
    """The clues of the grids, no one of which is in training.

    Shared with training: the 288 filled grids, other clues of which are there.
    """
    return f"grids {sorted(problem.grids)}"

  def prompt(self, problem: Problem) -> str:
    words = ["grids"]
    for letter, cells in zip(LETTERS, problem.grids, strict=False):
      words += [_named(letter, cells, row) for row in range(SIZE)]
      words.append(";")
    return " ".join([*words, "start"])

  def write(self, problem: Problem, trace: Trace) -> bool:
    notes = []
    for letter, cells in zip(LETTERS, problem.grids, strict=False):
      root = Step("", ())
      fitting = [_fitting(tuple(cells[SIZE * row : SIZE * (row + 1)])) for row in range(SIZE)]
      shown = [f"{_named(letter, cells, row)} =" for row in range(SIZE)]
      found = trace.search(root, lambda step, shown=shown, fitting=fitting: _expand(step, shown, fitting))
      if found is None:
        return False
      notes.append((letter, *found.state[-1][:2]))
      trace.write("note {} {} {} ;".format(*notes[-1]))
    first = second = 0
    for i, (letter, one, two) in enumerate(notes):
      first, second = first + one, second + two
      trace.write(f"{',' if i else 'list'} {letter} {one} {two} = {first} {second}")
    trace.write(f"; answer {first} {second}")
    return True

  def check(self, problem: Problem, text: str) -> bool:
    sums = [0, 0]
    for cells in problem.grids:
      filled = solution(cells)
      assert filled is not None
      sums = [total + filled[SIZE * (SIZE - 1) + column] for column, total in enumerate(sums)]
    return self.answer(text) == " ".join(map(str, sums))


def _form(cells: tuple[int, ...]) -> str:
  """The canonical form of a grid's clues."""
  return f"grids {cells}"


def _named(letter: str, cells: tuple[int, ...], row: int) -> str:
  """The words of a row: its name and its clues."""
  clues = (str(digit) if digit else "." for digit in cells[SIZE * row : SIZE * (row + 1)])
  return " ".join([f"{letter}{row + 1}", *clues])


@functools.cache
def _fitting(clues: tuple[int, ...]) -> list[Row]:
  """The rows that agree with a row's clues."""
  return [row for row in ROWS if all(not clue or clue == digit for clue, digit in zip(clues, row, strict=True))]


def _expand(step: Step, shown: list[str], fitting: list[list[Row]]) -> list[Step]:
  """The guesses of the next row, after its name and clues `shown`.

  A step's state is the rows so far, or None after a clash.
  """
  rows = step.state
  if rows is None:
    return []
  made = []
  for row in fitting[len(rows)]:
    words = " ".join([shown[len(rows)], *map(str, row)])
    if not rows:
      words = f"try {words}"
    if column := clash(rows, row):
      made.append(Step(f"{words} clash {column} ;", None))
    elif len(rows) + 1 == SIZE:
      made.append(Step(f"{words} ok ;", (*rows, row), True))
    else:
      made.append(Step(f"{words} ok", (*rows, row)))
  return made
