"""Traces of the four families read again from their texts alone: every claim is worked out anew."""

from __future__ import annotations

import itertools

NUMBERS = range(64)


class Words:
  """The words of a trace, taken one after another."""

  def __init__(self, text: str):
    self.words, self.at = text.split(" "), 0

  def next(self) -> str:
    self.at += 1
    return self.words[self.at - 1]

  def peek(self) -> str:
    return self.words[self.at]

  def take(self, *expected) -> None:
    for word in expected:
      found = self.next()
      assert found == str(word), f"{found!r} at {self.at}, not {word!r}: {self.words[max(0, self.at - 30) : self.at]}"

  def number(self) -> int:
    value = int(self.next())
    assert value in NUMBERS
    return value

  def until(self, *ends: str) -> list[str]:
    found = []
    while self.peek() not in ends:
      found.append(self.next())
    return found


def verdict(value: int, goal: int) -> str:
  return {True: "equal", value < goal: "below", value > goal: "above"}[True] if value != goal else "equal"


def separated(words: list[str], separator: str) -> list[list[str]]:
  return [list(run) for same, run in itertools.groupby(words, lambda word: word == separator) if not same]


# Countdown ------------------------------------------------------------------------------------------------------------


def countdown_problem(prompt: str) -> tuple[list[int], list[int]]:
  words = prompt.split(" ")
  assert words[:2] == ["countdown", "numbers"] and words[-1] == "start"
  middle = words.index("targets")
  numbers, targets = [int(w) for w in words[2:middle]], [int(w) for w in words[middle + 1 : -1]]
  assert len(set(numbers)) == len(numbers) and len(set(targets)) == len(targets) and not set(numbers) & set(targets)
  return numbers, targets


def chain_value(chain: list[str], numbers: list[int]) -> int | None:
  """The value of "3 + 4 * 5", from left to right; None if a number is not there or used twice."""
  values, signs = [int(w) for w in chain[::2]], chain[1::2]
  if any(values.count(v) > numbers.count(v) for v in values):
    return None
  total = values[0]
  for sign, value in zip(signs, values[1:], strict=True):
    total = {"+": total + value, "-": total - value, "*": total * value}[sign]
    if not 1 <= total <= 63:
      return None
  return total


def countdown(prompt: str, trace: str) -> list[str]:
  """Checks a trace and returns the notes."""
  numbers, targets = countdown_problem(prompt)
  words, notes = Words(trace), []
  for target in targets:
    while words.peek() == "try":
      words.take("try")
      value = words.number()
      left = list(numbers)
      left.remove(value)
      chain = [str(value)]
      while True:
        sign, number = words.next(), words.number()
        left.remove(number)
        value = {"+": value + number, "-": value - number, "*": value * number}[sign]
        chain += [sign, str(number)]
        words.take("=", value, "goal", target, verdict(value, target))
        if value == target or words.peek() == ";":
          words.take(";")
          break
        words.take("left", *left, ",")
      if value != target:  # the attempt was over: nothing can follow
        assert all(value + n > 63 and value <= n and value * n > 63 for n in left)
    notes.append(" ".join(chain))
    assert value == target == chain_value(chain, numbers)
    words.take("note", target, ":", *chain, ";")
  words.take("answer")
  for i, (target, note) in enumerate(zip(targets, notes, strict=True)):
    words.take(*([","] if i else []), target, ":", *note.split(" "))
  words.take("<eos>")
  assert words.at == len(words.words)
  return notes


def countdown_right(prompt: str, text: str) -> bool:
  numbers, targets = countdown_problem(prompt)
  words = text.split()
  if "answer" not in words:
    return False
  answer = words[words.index("answer") + 1 :]
  answer = answer[: answer.index("<eos>")] if "<eos>" in answer else answer
  parts = " ".join(answer).split(" , ")
  if len(parts) != len(targets):
    return False
  for part, target in zip(parts, targets, strict=True):
    head, _, chain = part.partition(" : ")
    steps = chain.split()
    shaped = all(w in "+ - *".split() if i % 2 else w.isdigit() for i, w in enumerate(steps)) and len(steps) % 2
    if head != str(target) or not shaped or chain_value(steps, numbers) != target:
      return False
  return True


# Grids ----------------------------------------------------------------------------------------------------------------


def grids_problem(prompt: str) -> list[tuple[str, list[list[int]]]]:
  """For each grid: its letter, its four rows with 0 for an empty cell."""
  words, found = Words(prompt), []
  words.take("grids")
  while words.peek() != "start":
    letter, rows = words.peek()[0], []
    for i in range(4):
      words.take(f"{letter}{i + 1}")
      rows.append([0 if (w := words.next()) == "." else int(w) for _ in range(4)])
    found.append((letter, rows))
    words.take(";")
  assert [letter for letter, *_ in found] == list("abcd")[: len(found)]
  return found


def good(rows: list[tuple[int, ...]]) -> bool:
  """Whether the first rows of a grid repeat no digit in a row, a column or a box."""
  columns = list(zip(*rows, strict=True))
  boxes = [[rows[r][c] for r in (up, up + 1) if r < len(rows) for c in (side, side + 1)]
           for up in (0, 2) for side in (0, 2)]  # fmt: skip
  return all(len(set(group)) == len(group) for group in (*rows, *columns, *boxes))


def solve(clues: list[list[int]]) -> list[list[tuple[int, ...]]]:
  """All solutions of a grid."""
  found: list[list[tuple[int, ...]]] = [[]]
  for row in clues:
    rows = [p for p in itertools.permutations((1, 2, 3, 4)) if all(c in (0, d) for c, d in zip(row, p, strict=True))]
    found = [[*above, each] for above in found for each in rows if good([*above, each])]
  return found


def grids_answer(prompt: str) -> str:
  first = second = 0
  for _, clues in grids_problem(prompt):
    (filled,) = solve(clues)
    first, second = first + filled[3][0], second + filled[3][1]
  return f"{first} {second}"


def first_clash(rows: list[tuple[int, ...]]) -> int:
  """The first column whose cell of the last row makes the rows bad, cell by cell."""
  *above, last = rows
  for column in range(4):
    others = [row[column] for row in above]
    if len(above) % 2:
      box = (0, 1) if column < 2 else (2, 3)
      others += [above[-1][c] for c in box]
    if last[column] in others:
      return column + 1
  raise AssertionError("no clash")


def grids(prompt: str, trace: str) -> list[str]:
  """Checks a trace and returns the notes."""
  words, notes = Words(trace), []
  for letter, clues in grids_problem(prompt):
    solutions = solve(clues)
    assert len(solutions) == 1
    rows: list[tuple[int, ...]] = []
    while words.peek() == "try":
      words.take("try")
      rows = []
      while True:
        place = len(rows)
        words.take(f"{letter}{place + 1}", *(str(digit or ".") for digit in clues[place]), "=")
        row = tuple(words.number() for _ in range(4))
        assert sorted(row) == [1, 2, 3, 4]
        assert all(c in (0, d) for c, d in zip(clues[len(rows)], row, strict=True))
        rows.append(row)
        if not good(rows):
          words.take("clash", first_clash(rows), ";")
          break
        words.take("ok")
        if len(rows) == 4:
          words.take(";")
          break
    assert rows == solutions[0]
    notes.append(f"{letter} {rows[3][0]} {rows[3][1]}")
    words.take("note", *notes[-1].split(" "), ";")
  sums = [0, 0]
  for i, note in enumerate(notes):
    sums = [total + int(digit) for total, digit in zip(sums, note.split(" ")[1:], strict=True)]
    words.take("," if i else "list", *note.split(" "), "=", *sums)
  words.take(";", "answer", *sums, "<eos>")
  assert words.at == len(words.words) and f"{sums[0]} {sums[1]}" == grids_answer(prompt)
  return notes


# Programs -------------------------------------------------------------------------------------------------------------

MEANINGS = {
  "inc": "x + 1", "dec": "x - 1", "up": "x + 10", "down": "x - 10", "double": "x + x", "triple": "x + x + x",
  "half": "x >> 1", "third": "(x - x % 3) / 3", "flip": "63 - x", "square": "x ** 2",
}  # fmt: skip
TABLES = {name: [int(eval(meaning, {"x": x})) % 64 for x in NUMBERS] for name, meaning in MEANINGS.items()}


def programs_problem(prompt: str) -> tuple[list[str], dict[str, list[tuple[int, int]]]]:
  words = Words(prompt)
  words.take("programs", "ops")
  operations, found = words.until(";"), {}
  words.take(";")
  while words.peek() != "start":
    letter = words.next()
    found[letter] = [(int(x), int(y)) for x, _, y in separated(words.until(";"), ",")]
    words.take(";")
  assert list(found) == list("abcd")[: len(found)]
  return operations, found


def programs(prompt: str, trace: str) -> list[str]:
  """Checks a trace and returns the notes."""
  operations, parts = programs_problem(prompt)
  words, notes = Words(trace), []
  for letter, examples in parts.items():
    agrees = False
    while not agrees:
      words.take("try", letter)
      first, second = words.next(), words.next()
      assert first in operations and second in operations
      words.take(":")
      for i, (x, y) in enumerate(examples):
        between = TABLES[first][x]
        result = TABLES[second][between]
        words.take(*([","] if i else []), x, between, result, "goal", y, verdict(result, y))
        if result != y:
          break
      agrees = result == y
      words.take(";")
    notes.append(f"{letter} {first} {second}")
    words.take("note", *notes[-1].split(" "), ";")
  words.take("answer")
  for i, note in enumerate(notes):
    words.take(*([","] if i else []), *note.split(" "))
  words.take("<eos>")
  assert words.at == len(words.words)
  return notes


def programs_right(prompt: str, text: str) -> bool:
  operations, parts = programs_problem(prompt)
  before, _, answer = f" {text} ".partition(" answer ")
  answer = f" {answer}".partition(" <eos>")[0].strip()
  found = [part.split(" ") for part in answer.split(" , ")]
  if before == f" {text} " or len(found) != len(parts):
    return False
  for (letter, examples), part in zip(parts.items(), found, strict=True):
    if len(part) != 3 or part[0] != letter or any(name not in operations for name in part[1:]):
      return False
    if any(TABLES[part[2]][TABLES[part[1]][x]] != y for x, y in examples):
      return False
  return True


# Graphs ---------------------------------------------------------------------------------------------------------------


def graphs_problem(prompt: str) -> tuple[int, dict[int, list[int]], list[int]]:
  """The start, the rooms behind the doors of each room, the rooms sought."""
  words, doors, kinds = Words(prompt), {}, {}
  words.take("graphs")
  while words.peek() != "find":
    room, door, behind = (words.number() for _ in range(3))
    doors.setdefault(room, []).append(behind)
    assert door == len(doors[room]) and behind not in kinds
    kinds[behind] = words.next()
    words.take(";")
  words.take("find")
  goals = [int(w) for w in words.until("start")]
  assert kinds == {room: "goal" if room in goals else "door" if room in doors else "dead" for room in kinds}
  return next(iter(doors)), doors, goals


def ways(room: int, goal: int, doors: dict[int, list[int]]) -> list[int]:
  """The toll of every way from a room to another."""
  if room == goal:
    return [0]
  return [i + toll for i, behind in enumerate(doors.get(room, []), 1) for toll in ways(behind, goal, doors)]


def graphs_answer(prompt: str) -> str:
  start, doors, goals = graphs_problem(prompt)
  tolls = [ways(start, goal, doors) for goal in goals]
  assert all(len(each) == 1 for each in tolls)
  return str(sum(each[0] for each in tolls))


def graphs(prompt: str, trace: str) -> list[str]:
  """Checks a trace and returns the notes."""
  start, doors, goals = graphs_problem(prompt)
  words, notes = Words(trace), {}
  while words.peek() == "try":
    words.take("try")
    room, toll = start, 0
    while room in doors:
      door = int(words.words[words.at + 1])
      behind, toll = doors[room][door - 1], toll + door
      words.take(room, door, behind, "goal" if behind in goals else "door" if behind in doors else "dead", "toll", toll)
      room = behind
    if room not in goals:
      words.take(";")
    elif room in notes:
      words.take("seen", ";")
    else:
      notes[room] = toll
      left = [goal for goal in goals if goal not in notes] or ["none"]
      words.take("note", room, toll, "left", *left, ";")
      assert (words.peek() == "try") == (left != ["none"])
  total = 0
  for i, goal in enumerate(goals):
    total += notes[goal]
    words.take("," if i else "list", goal, notes[goal], "=", total)
  words.take(";", "answer", total, "<eos>")
  assert words.at == len(words.words) and str(total) == graphs_answer(prompt)
  return [f"{room} {toll}" for room, toll in notes.items()]
