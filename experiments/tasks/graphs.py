"""Rooms joined by one-way doors: random walks find rooms, and the tolls of the ways are added up."""

from __future__ import annotations

import random
from typing import NamedTuple

from experiments.tasks.base import register
from experiments.tasks.reasoning import LARGEST, ReasoningTask, Step, Trace, drawn


class Level(NamedTuple):
  """How many rooms have doors, how many doors each has, how many rooms are sought, and how deep they lie at most."""

  rooms: tuple[int, int]
  doors: tuple[int, int]
  goals: tuple[int, int]
  depth: int


class Problem(NamedTuple):
  """For each room with doors (room, rooms behind its doors), the first being the start; and the rooms sought.

  One way alone leads from the start to each room with doors and to each room sought. Other rooms are dead ends.
  """

  rooms: tuple[tuple[int, tuple[int, ...]], ...]
  goals: tuple[int, ...]


@register
class Graphs(ReasoningTask):
  """Find the rooms sought by random walks from the start; the answer is the sum of the tolls on the ways to them.

  The prompt lists every door: its room, its number, the room behind, and whether that has doors, is dead or a goal. A
  walk copies the doors that it takes. The toll of a door is its number: the first costs 1, the second 2, the third 3. A
  walk ends in a room without doors.
  A room sought is noted with its toll when a walk reaches it for the first time; later it is only `seen`. Each toll is
  unique, so W texts vote.
  """

  PROBLEM = Problem
  LEVELS = (
    Level((1, 3), (2, 3), (1, 1), 2),
    Level((2, 4), (2, 3), (2, 4), 3),
    Level((4, 6), (2, 3), (2, 3), 4),
    Level((5, 7), (3, 3), (3, 4), 4),
    Level((8, 9), (3, 3), (4, 4), 5),
  )
  size = 1

  def sample(self, rng, keep=lambda part: True):
    return drawn(lambda: self._draw(rng), self._form, keep)

  def _draw(self, rng: random.Random) -> Problem:
    level, chance = self.LEVELS[self.level], rng.random
    while True:
      count, wanted = rng.randint(*level.rooms), rng.randint(*level.goals)
      names = rng.sample(range(LARGEST + 1), LARGEST + 1)
      start = names.pop()
      doors: dict[int, list[int]] = {}
      depth, ends = {start: 0}, [start]  # rooms without doors so far
      for _ in range(count):
        open_ends = [room for room in ends if depth[room] < level.depth]
        if not open_ends:
          break
        # The newest rooms are the likeliest, so that some lie deep.
        room = open_ends[-1 - int(chance() ** 2 * len(open_ends))]
        ends.remove(room)
        doors[room] = [names.pop() for _ in range(rng.randint(*level.doors))]
        for behind in doors[room]:
          depth[behind] = depth[room] + 1
        ends += doors[room]
      deep = sorted(ends, key=lambda room: -depth[room])[: 2 * wanted]
      if len(doors) == count and len(deep) >= wanted:
        goals = tuple(rng.sample(deep, wanted))
        lines = list(doors.items())
        rest = lines[1:]
        rng.shuffle(rest)
        return Problem(tuple((room, tuple(behind)) for room, behind in [lines[0], *rest]), goals)

  def parts(self, problem: Problem) -> list[str]:
    return [self._form(problem)]

  def _form(self, problem: Problem) -> str:
    """The canonical form of the doors alone."""
    return self.key(problem._replace(goals=()))

  def key(self, problem: Problem) -> str:
    """The tree of doors, which no problem of training has, and where in it the rooms sought are.

    Shared with training: the way to a room, a few doors.
    """
    rooms, goals = problem
    doors = dict(rooms)

    def shape(room: int) -> str:
      if room not in doors:
        return "!" if room in goals else "."
      return f"({''.join(shape(behind) for behind in doors[room])})"

    return f"graphs {shape(rooms[0][0])}"

  def prompt(self, problem: Problem) -> str:
    doors, goals = dict(problem.rooms), problem.goals
    lines = " ".join(
      f"{room} {door} {behind} {_kind(behind, doors, goals)} ;"
      for room, rooms in problem.rooms
      for door, behind in enumerate(rooms, start=1)
    )
    return f"graphs {lines} find {' '.join(map(str, goals))} start"

  def write(self, problem: Problem, trace: Trace) -> bool:
    doors, start = dict(problem.rooms), problem.rooms[0][0]
    expand = lambda step: _expand(step, start, doors, problem.goals)
    root = Step("", (start, 0))
    notes: dict[int, int] = {}
    while len(notes) < len(problem.goals):
      found = trace.search(root, expand)
      if found is None:
        return False
      room, toll = found.state
      if room in notes:
        trace.write("seen ;")
        continue
      notes[room] = toll
      left = " ".join(str(goal) for goal in problem.goals if goal not in notes) or "none"
      trace.write(f"note {room} {toll} left {left} ;")
    total = 0
    for i, goal in enumerate(problem.goals):
      total += notes[goal]
      trace.write(f"{',' if i else 'list'} {goal} {notes[goal]} = {total}")
    trace.write(f"; answer {total}")
    return True

  def check(self, problem: Problem, text: str) -> bool:
    return self.answer(text) == str(total(problem))


def total(problem: Problem) -> int:
  """The sum of the tolls on the ways to the rooms sought."""
  rooms, goals = problem
  above = {behind: (room, toll) for room, doors in rooms for toll, behind in enumerate(doors, start=1)}
  cost = 0
  for room in goals:
    while room in above:
      room, toll = above[room]
      cost += toll
  return cost


def _kind(room: int, doors: dict[int, tuple[int, ...]], goals: tuple[int, ...]) -> str:
  """The word for what a room is."""
  return "goal" if room in goals else "door" if room in doors else "dead"


def _expand(step: Step, start: int, doors: dict[int, tuple[int, ...]], goals: tuple[int, ...]) -> list[Step]:
  """What lies behind the doors of a room; a step's state is the room and the toll so far."""
  room, toll = step.state
  made = []
  for door, behind in enumerate(doors.get(room, ()), start=1):
    kind = _kind(behind, doors, goals)
    text = f"{room} {door} {behind} {kind} toll {toll + door}"
    if room == start:
      text = f"try {text}"
    if kind == "dead":
      text = f"{text} ;"
    made.append(Step(text, (behind, toll + door), kind == "goal"))
  return made
