"""Scores and costs of each setting, Pareto frontiers, and margins with bootstrap intervals.

A *setting* is a method with its CR, W chains and at most L new tokens. Its score and costs are means over problems of
means over model seeds. A margin is the mean vertical distance of two frontiers over the largest interval of costs that
both cover (arXiv 2506.05345, appendix G). Its interval is the percentile bootstrap over problems: every resample draws
the problems of a family with replacement, the same for all settings and seeds, and takes its own frontiers, over the
costs that the frontiers of all problems share. (With an interval of costs of its own, a resample in which a saturated
frontier happens to end early would be a mean over other costs.) Families are resampled apart. The seeds are not
resampled.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence
from functools import cached_property
from typing import Any

import numpy as np

from experiments.hyperscaling.cells import Sweep, order
from experiments.hyperscaling.methods import DEFAULT, DENSE, TRAINED
from experiments.methods import pareto
from experiments.methods.summary import COSTS, Entry, standard_error
from experiments.reports.results import Panel, Point, Setting

SCALES = ("linear", "log")


@dataclasses.dataclass(frozen=True)
class Family:
  """All settings of a task that every seed has.

  Fields:
    vote: chains vote by their answers; otherwise the best of them counts.
    settings: S settings; `budget` holds the CR, and is empty without one.
    scores: float64 [S, P], by setting and problem, 0 to 100: means over seeds.
    costs: float64 [S, P] by axis, of the W chains of a problem together.
    achieved: [S], tokens seen over tokens held at the end of a chain.
    seeds: number of models.
  """

  task: str
  vote: bool
  settings: list[Setting]
  scores: np.ndarray
  costs: dict[str, np.ndarray]
  achieved: np.ndarray
  seeds: int

  @property
  def methods(self) -> list[str]:
    return list(dict.fromkeys(setting.method for setting in self.settings))

  @cached_property
  def place(self) -> dict[Setting, int]:
    """The row of each setting."""
    return {setting: row for row, setting in enumerate(self.settings)}

  def rows(self, method: str) -> list[int]:
    """The rows of a method's settings."""
    return [row for row, setting in enumerate(self.settings) if setting.method == method]


def family(sweeps: Sequence[Sweep], task: str, widths: Sequence[int], vote: bool) -> tuple[Family, list[str]]:
  """A task's settings, and a remark if seeds lack some of them.

  Raises:
    ValueError: seeds answered different problems, or there are fewer chains than the largest of `widths`.
  """
  own = [{key: cell for key, cell in sweep.cells.items() if key[0] == task} for sweep in sweeps]
  keys = [key for key in own[0] if all(key in cells for cells in own)]
  every = set(itertools.chain.from_iterable(own))
  lacking = len(every - set(keys))
  remarks = [f"{task}: {lacking} cells are left out, as some seeds lack them"] if lacking else []
  if not keys:
    raise ValueError(f"--sets: the seeds share no complete cell of {task}")
  asked = {(cells[key].problems, cells[key].content) for cells in own for key in keys}
  if len(asked) > 1:
    raise ValueError(
      f"--sets: the problems of {task} differ between sweeps or methods (--seed, --limit, --temperature)"
    )
  rank = {method: place for place, method in enumerate(order(list({key[1] for key in keys}), DEFAULT))}
  keys.sort(key=lambda key: (rank[key[1]], *key[2:]))
  timed = all(key in sweep.times for sweep in sweeps for key in keys)
  settings, scores, costs, achieved = [], [], {axis: [] for axis in COSTS}, []
  mean = lambda values: np.mean(np.array(values, float), axis=0)
  for key in keys:
    cells = [each[key] for each in own]
    ratio = float(np.sum([cell.tokens for cell in cells]) / np.sum([cell.held for cell in cells]))
    each_chain = {axis: mean([getattr(cell, axis) for cell in cells]) for axis in ("reads", "peak")}
    if timed:
      each_chain["seconds"] = np.full_like(each_chain["reads"], mean([sweep.times[key] for sweep in sweeps]))
    for width in sorted(set(widths)):
      settings.append(Setting(key[1], (("cr", key[2]),) if key[2] > 1 else (), width, key[3]))
      scores.append(mean([cell.scores(width, vote) for cell in cells]))
      achieved.append(ratio)
      for axis, values in each_chain.items():
        costs[axis].append(width * values)
  found = {axis: np.array(values) for axis, values in costs.items() if values}
  return Family(task, vote, settings, np.array(scores), found, np.array(achieved), len(sweeps)), remarks


# Margins --------------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Margin:
  """The margin of one method over another on one axis and scale.

  Fields:
    task: the family; "" for the mean over `families`.
    margin: points of 100; None where the frontiers share no interval.
    low, high: of the 95 % interval; None without a margin.
    costs: the interval of costs that the frontiers share; None for a mean over families.
    seeds: the margin of each seed alone; empty for one seed.
    families: tasks that have a margin.
  """

  task: str
  method: str
  over: str
  axis: str
  scale: str
  margin: float | None
  low: float | None = None
  high: float | None = None
  costs: tuple[float, float] | None = None
  seeds: tuple[float | None, ...] = ()
  families: tuple[str, ...] = ()


def resampled(problems: int, resamples: int, seed: int) -> np.ndarray:
  """Weights of problems, float64 [1 + R, P]; row 0 weighs all alike, the others as often as a resample drew them."""
  draws = np.random.default_rng(seed).multinomial(problems, np.full(problems, 1 / problems), size=resamples)
  return np.concatenate([np.ones((1, problems)), draws]) / problems


class Resampled:
  """The frontiers of a family's methods in every resample; row 0 is the family itself."""

  def __init__(self, found: Family, weights: np.ndarray):
    # Rounded, because equal scores or costs that differ in their last bit are other frontiers.
    self.scores = np.round(weights @ found.scores.T, 9)
    self.costs = {axis: (weights @ values.T).astype(np.float32).astype(float) for axis, values in found.costs.items()}
    self.rows = {method: found.rows(method) for method in found.methods}
    self.made: dict[tuple[str, str], pareto.Frontiers] = {}

  def frontiers(self, method: str, axis: str) -> pareto.Frontiers:
    """The frontiers of a method on one axis."""
    if (method, axis) not in self.made:
      rows = self.rows[method]
      self.made[method, axis] = pareto.frontiers(self.costs[axis][:, rows], self.scores[:, rows])
    return self.made[method, axis]

  def margins(self, method: str, over: str, axis: str, scale: str) -> tuple[np.ndarray, tuple[float, float]]:
    """[1 + R] margins over the costs that the family's own frontiers share, NaN if they share none; those costs."""
    a, b = self.frontiers(method, axis), self.frontiers(over, axis)
    low, high = (float(end[0]) for end in pareto.common(a, b))
    return pareto.margins(a, b, low, high, scale == "log"), (low, high)


def comparisons(methods: Sequence[str]) -> list[tuple[str, str]]:
  """(method, over): every method over the dense one, then DMS over every other."""
  found = [(method, DENSE) for method in methods if method != DENSE and DENSE in methods]
  return found + [(TRAINED, other) for other in methods if TRAINED in methods and other not in (TRAINED, DENSE)]


def interval(draws: np.ndarray) -> tuple[float | None, float | None]:
  """The 2.5th and the 97.5th percentile of the draws; None each without any."""
  if not len(draws):
    return None, None
  low, high = np.percentile(draws, [2.5, 97.5])
  return float(low), float(high)


def margins(families: Sequence[Family], alone: Sequence[Sequence[Family]], resamples: int) -> list[Margin]:
  """The margins of all comparisons on every axis and scale: of each family, then means over families.

  Args:
    alone: the families of each seed by itself; empty for one seed.
    resamples: R of the bootstrap.
  """
  by_name = {
    found.task: Resampled(found, resampled(found.scores.shape[1], resamples, n)) for n, found in enumerate(families)
  }
  single = [{f.task: Resampled(f, resampled(f.scores.shape[1], 0, 0)) for f in own} for own in alone]
  methods = list(dict.fromkeys(method for found in families for method in found.methods))
  axes = [axis for axis in COSTS if any(axis in found.costs for found in families)]
  number = lambda value: None if np.isnan(value) else float(value)
  made = []
  for (method, over), axis, scale in itertools.product(comparisons(methods), axes, SCALES):
    draws, seeds = {}, {}
    for task, each in by_name.items():
      if axis not in each.costs or method not in each.rows or over not in each.rows:
        continue
      values, shared = each.margins(method, over, axis, scale)
      seeds[task] = tuple(number(own[task].margins(method, over, axis, scale)[0][0]) for own in single)
      if np.isnan(values[0]):
        made.append(Margin(task, method, over, axis, scale, None, seeds=seeds[task]))
      else:
        draws[task] = values
        low, high = interval(values[1:])
        made.append(Margin(task, method, over, axis, scale, float(values[0]), low, high, shared, seeds[task]))
    if draws:
      mean = np.mean(list(draws.values()), axis=0)
      of_seeds = [[seeds[task][n] for task in draws] for n in range(len(single))]
      both = tuple(None if None in own else float(np.mean(own)) for own in of_seeds)
      low, high = interval(mean[1:])
      made.append(Margin("", method, over, axis, scale, float(mean[0]), low, high, seeds=both, families=tuple(draws)))
  return made


# Scores ---------------------------------------------------------------------------------------------------------------


def panel(found: Family, model: str) -> Panel:
  """A family as a panel of `experiments.reports`: a point for each setting, with differences from the dense one."""
  points = []
  for row, setting in enumerate(found.settings):
    own = found.scores[row]
    base = found.place.get(Setting(DENSE, (), setting.chains, setting.max_tokens))
    paired = own - found.scores[base] if base is not None and setting.method != DENSE else None
    entry = Entry(
      setting.method, found.task, None, "accuracy", len(own), float(own.mean()), standard_error(own),
      None if paired is None else float(paired.mean()), None if paired is None else standard_error(paired),
      achieved_cr=float(found.achieved[row]), chains=setting.chains, max_tokens=setting.max_tokens,
      budget=dict(setting.budget),
    )  # fmt: skip
    costs = {axis: float(values[row].mean()) for axis, values in found.costs.items()}
    points.append(Point(setting, {"accuracy": entry}, "accuracy", costs))
  return Panel(model, found.task, None, "accuracy", points)


def to_json(panels: Sequence[Panel], made: Sequence[Margin]) -> dict[str, Any]:
  """The summary of an analysis: points and margins."""
  points = [
    {"task": each.task, "method": p.setting.method, "cr": dict(p.setting.budget).get("cr", 1.0), "W": p.setting.chains,
     "L": p.setting.max_tokens, "score": p.main.mean, "standard_error": p.main.standard_error,
     "difference": p.main.difference, "difference_se": p.main.difference_se, "achieved_cr": p.main.achieved_cr,
     "problems": p.main.samples, **p.costs}
    for each in panels
    for p in each.points
  ]  # fmt: skip
  return {"points": points, "margins": list(made)}
