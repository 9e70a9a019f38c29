"""Geometry of a page's charts: data to coordinates, ticks and labels that do not overlap."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence

from experiments.reports import styles

WIDTH, HEIGHT = 440, 310  # of a chart, in units of its view box; a character of a label is about CHARACTER wide
LEFT, TOP, BOTTOM = 44, 26, 44
CHARACTER, LINE = 7.8, 14
# Outlines of markers around (0, 0), about 8 units wide.
MARKS = {
  "circle": "M-4,0A4,4 0 1 0 4,0A4,4 0 1 0 -4,0Z", "square": "M-3.6,-3.6H3.6V3.6H-3.6Z",
  "triangle": "M0,-4.8L4.6,3.6H-4.6Z", "diamond": "M0,-5.2L4.6,0L0,5.2L-4.6,0Z", "wedge": "M0,4.8L4.6,-3.6H-4.6Z",
  "cross": "M-1.6,-4.8H1.6V-1.6H4.8V1.6H1.6V4.8H-1.6V1.6H-4.8V-1.6H-1.6Z",
  "hexagon": "M-2.4,-4.4H2.4L4.8,0L2.4,4.4H-2.4L-4.8,0Z", "bar": "M-5,-2H5V2H-5Z",
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Mark:
  """One result to draw: its cost and value, the value's standard error, and the text shown on pointing at it."""

  cost: float
  value: float
  error: float | None
  about: str


@dataclasses.dataclass(frozen=True)
class Series:
  """The results of one method, and its frontier [(cost, value)]."""

  name: str
  style: styles.Style
  marks: Sequence[Mark]
  frontier: Sequence[tuple[float, float]]


def ticks(low: float, high: float, most: int = 6) -> list[float]:
  """Round numbers, evenly spaced, that cover low .. high: multiples of 1, 2 or 5 times a power of ten."""
  step = 10 ** math.floor(math.log10(max((high - low) / most, 1e-9)))
  step = next(step * factor for factor in (1, 2, 5, 10) if (high - low) / (step * factor) <= most)
  return [round(step * i, 9) for i in range(math.floor(low / step + 1e-6), math.ceil(high / step - 1e-6) + 1)]


def log_ticks(low: float, high: float) -> list[float]:
  """Two to five round numbers within low .. high; the ends themselves if there are no three round ones."""
  powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
  for factors in (1,), (1, 3), (1, 2, 5), (1, 1.5, 2, 3, 5, 7), tuple(1 + i / 10 for i in range(90)):
    found = [factor * 10.0**power for power in powers for factor in factors if low <= factor * 10.0**power <= high]
    if len(found) >= 3:
      return found[:: -(-len(found) // 5)]
  return [low, high]


def spread(wanted: Sequence[float], gap: float, low: float, high: float) -> list[float]:
  """Positions near the `wanted` ones, in the same order, at least `gap` apart and within low .. high if they fit."""
  order = sorted(range(len(wanted)), key=lambda i: wanted[i])
  gap = min(gap, (high - low) / max(len(wanted) - 1, 1))
  placed = [min(max(wanted[i], low), high) for i in order]
  for _ in range(200):
    moved = False
    for i in range(len(placed) - 1):
      if (lack := gap - (placed[i + 1] - placed[i])) > 1e-6:
        placed[i], placed[i + 1], moved = placed[i] - lack / 2, placed[i + 1] + lack / 2, True
    placed = [min(max(at, low + i * gap), high - (len(placed) - 1 - i) * gap) for i, at in enumerate(placed)]
    if not moved:
      break
  found = [0.0] * len(wanted)
  for i, at in zip(order, placed, strict=True):
    found[i] = at
  return found


def tradeoff(
  series: Sequence[Series],
  *,
  x: str,
  y: str,
  show: Callable[[float], str],
  chance: float | None = None,
  percent: bool = False,
  log: bool = False,
) -> dict:
  """A chart of value against cost on a log axis, as coordinates for the page's template.

  Args:
    x, y: names of the axes, with units.
    show: writes a number of the cost axis.
    chance: value of random answers, drawn as a dashed line.
    percent: values lie between 0 and 100, and so does their axis.
    log: the axis of values is logarithmic too; they are above 0.

  Returns:
    The chart's size, axes, ticks, and for each series its frontier's path, marks with error bars, and its label.
  """
  right = WIDTH - 14 - CHARACTER * max(len(each.name) for each in series)
  height = HEIGHT + LINE * max(0, len(series) - 8)  # so that all labels fit beside each other
  bottom = height - BOTTOM
  marks = [mark for each in series for mark in each.marks]
  low, high = min(mark.cost for mark in marks), max(mark.cost for mark in marks)
  low, high = (low / 1.1, high * 1.1) if high < 1.3 * low else (low / 1.06, high * 1.06)
  under = lambda mark: max(mark.value - mark.error, mark.value / 3 if log else -math.inf)  # an error bar's lower end
  bars = [(under(mark), mark.value + mark.error) if mark.error else (mark.value, mark.value) for mark in marks]
  values = [value for bar in bars for value in bar] + ([] if chance is None else [chance])
  span = max(values) - min(values)
  spare = max(0.04 * span, 5 - span / 2) if percent else max(0.04 * span, 0.01 * max(map(abs, values)), 1e-3)
  if log:
    least, most = min(values) / 1.15, max(values) * 1.15
    levels, scale = log_ticks(least, most), math.log
  else:
    least, most = min(values) - spare, max(values) + spare
    levels, scale = ticks(max(least, 0.0), min(most, 100.0)) if percent else ticks(least, most), float
    least, most = levels[0], levels[-1]
  across = lambda cost: LEFT + (right - LEFT) * math.log(cost / low) / math.log(high / low)
  up = lambda value: bottom - (bottom - TOP) * (scale(value) - scale(least)) / (scale(most) - scale(least))
  drawn = []
  ends = [up(each.frontier[-1][1]) for each in series]
  labels = spread(ends, LINE, TOP + 2, bottom - 4)
  for each, end, label in zip(series, ends, labels, strict=True):
    path = "".join(f"{'L' if i else 'M'}{across(c):.1f},{up(v):.1f}" for i, (c, v) in enumerate(each.frontier))
    points = [
      {
        "x": across(mark.cost), "y": up(mark.value), "about": mark.about,
        "error": mark.error and (up(mark.value + mark.error), up(under(mark))),
        "best": (mark.cost, mark.value) in each.frontier,
      }
      for mark in each.marks
    ]  # fmt: skip
    last = across(max(cost for cost, _ in each.frontier))
    drawn.append({
      "name": each.name, "style": each.style, "mark": MARKS[each.style.marker], "path": path, "points": points,
      "label": {"x": right + 10, "y": label, "from": (last + 6, end), "to": (right + 7, label)},
    })  # fmt: skip
  digits = max(0, -math.floor(math.log10(levels[1] - levels[0]) + 1e-9))
  level = (lambda tick: f"{tick:g}") if log else (lambda tick: f"{tick:,.{digits}f}".replace("-", styles.MINUS))
  return {
    "width": WIDTH, "height": height, "left": LEFT, "right": right, "top": TOP, "bottom": bottom, "x": x, "y": y,
    "across": [(across(tick), show(tick)) for tick in log_ticks(low, high)],
    "up": [(up(tick), level(tick)) for tick in levels],
    "chance": None if chance is None else (up(chance), f"chance {chance:g}"), "series": drawn,
  }  # fmt: skip
