"""Scores and costs of each setting, Pareto frontiers, and margins with bootstrap intervals.

A *setting* is a method with its CR, W chains and at most L new tokens. Its score and costs are means over problems of
means over model seeds. A margin is the mean vertical distance of two frontiers over an interval of costs, on a linear
or a log axis. There are two intervals (`ENDS`):

* "frontier", the paper's (arXiv 2506.05345, appendix G): the largest that both frontiers cover. A frontier ends where
  no costlier setting scores higher, so a method that saturates early shortens the interval.
* "measured": from the costlier of both methods' cheapest settings to the cheaper of their costliest ones, whether or
  not those are on a frontier. After its last point a frontier is as high as there: more budget buys no less.

The interval of a margin is the percentile bootstrap over problems. Every resample draws the problems of a family with
replacement, the same for all settings and seeds, and repeats the whole computation: scores, costs, frontiers, and ends.
Families are resampled apart. The seeds are not resampled.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence
from functools import cached_property
from typing import Any

import numpy as np

from experiments.hyperscaling.cells import Key, Sweep, order
from experiments.hyperscaling.methods import DEFAULT, DENSE, TRAINED
from experiments.methods import pareto
from experiments.methods.summary import COSTS, Entry, standard_error, together
from experiments.reports.results import Panel, Point, Setting

SCALES = ("linear", "log")
ENDS = ("frontier", "measured")


@dataclasses.dataclass(frozen=True)
class Family:
  """All settings of a task that every seed has.

  Fields:
    vote: chains vote by their answers; otherwise the best of them counts.
    settings: S settings; `budget` holds the CR, and is empty without one.
    scores: float64 [S, P], by setting and problem, 0 to 100: means over seeds.
    costs: float64 [S, P] by axis, of the W chains of a problem together.
    achieved: [S], tokens seen over tokens held at the end of a chain.
    alone: the family of each seed by itself, with the same settings and costs; empty for one seed.
  """

  task: str
  vote: bool
  settings: list[Setting]
  scores: np.ndarray
  costs: dict[str, np.ndarray]
  achieved: np.ndarray
  alone: tuple[Family, ...] = ()

  @property
  def seeds(self) -> int:
    """Number of models."""
    return max(1, len(self.alone))

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
  sizes = {sweep.gib for sweep in sweeps if sweep.times}
  timed = len(sizes) == 1 and all(key in sweep.times for sweep in sweeps for key in keys)
  if not timed and any(sweep.times for sweep in sweeps):
    why = "some cells lack them" if len(sizes) == 1 else "the sweeps' are of different memory"
    remarks.append(f"{task}: times are left out, as {why} (--timed, --kv_budget_gib)")
  alone = tuple(_alone(sweep, keys, task, sorted(set(widths)), vote, timed) for sweep in sweeps)
  if len(alone) == 1:
    return alone[0], remarks
  mean = lambda values: np.mean(np.array(values, float), axis=0)
  costs = {axis: mean([each.costs[axis] for each in alone]) for axis in alone[0].costs}
  held = np.repeat(
    [sum(float(np.sum(cells[key].tokens)) for cells in own) / sum(float(np.sum(cells[key].held)) for cells in own)
     for key in keys], len(set(widths)),
  )  # fmt: skip
  return Family(task, vote, alone[0].settings, mean([each.scores for each in alone]), costs, held, alone), remarks


def _alone(sweep: Sweep, keys: Sequence[Key], task: str, widths: Sequence[int], vote: bool, timed: bool) -> Family:
  """The settings of the cells `keys` in one sweep."""
  settings, scores, achieved = [], [], []
  costs: dict[str, list[np.ndarray]] = {axis: [] for axis in COSTS if timed or axis != "seconds"}
  for key, width in itertools.product(keys, widths):
    cell = sweep.cells[key]
    settings.append(Setting(key[1], (("cr", key[2]),) if key[2] > 1 else (), width, key[3]))
    scores.append(cell.scores(width, vote))
    achieved.append(float(np.sum(cell.tokens) / np.sum(cell.held)))
    costs["reads"].append(width * cell.reads.astype(float))
    costs["peak"].append(together(cell.peak.astype(float), cell.shared.astype(float), width))
    if timed:
      costs["seconds"].append(np.full(len(cell.problems), width * sweep.times[key]))
  found = {axis: np.array(values) for axis, values in costs.items()}
  return Family(task, vote, settings, np.array(scores), found, np.array(achieved))


# Margins --------------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Margin:
  """The margin of one method over another on one axis, scale and interval of costs (`ENDS`).

  Fields:
    task: the family; "" for the mean over `families`.
    margin: points of 100; None where there is no interval of costs.
    low, high: of the 95 % interval; None without a margin.
    costs: the ends of the interval of costs; None for a mean over families.
    seeds: the margin of each seed alone; empty for one seed.
    families, without: tasks that have a margin, and those that have both methods but none; of a mean.
    resolved: share of the resamples that have a margin; the interval is of these.
  """

  task: str
  method: str
  over: str
  axis: str
  scale: str
  ends: str
  margin: float | None
  low: float | None = None
  high: float | None = None
  costs: tuple[float, float] | None = None
  seeds: tuple[float | None, ...] = ()
  families: tuple[str, ...] = ()
  without: tuple[str, ...] = ()
  resolved: float | None = None


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

  def shared(self, method: str, over: str, axis: str, ends: str) -> tuple[np.ndarray, np.ndarray]:
    """The ends of the interval of costs in every resample, [1 + R] each; empty unless the first is the smaller."""
    if ends == "frontier":
      return pareto.common(self.frontiers(method, axis), self.frontiers(over, axis))
    own, other = (self.costs[axis][:, self.rows[name]] for name in (method, over))
    return np.maximum(own.min(axis=1), other.min(axis=1)), np.minimum(own.max(axis=1), other.max(axis=1))

  def margins(self, method: str, over: str, axis: str, scale: str, ends: str) -> tuple[np.ndarray, tuple[float, float]]:
    """[1 + R] margins, each over its own interval of costs, NaN without one; and the family's own interval.

    Chains that end with their first token cost no reads: then there are no margins on a log axis.
    """
    low, high = self.shared(method, over, axis, ends)
    if scale == "log" and min(self.costs[axis][:, self.rows[name]].min() for name in (method, over)) <= 0:
      return np.full(len(low), np.nan), (float(low[0]), float(high[0]))
    made = pareto.margins(self.frontiers(method, axis), self.frontiers(over, axis), low, high, scale == "log")
    return made, (float(low[0]), float(high[0]))


def comparisons(methods: Sequence[str]) -> list[tuple[str, str]]:
  """(method, over): every method over the dense one, then DMS over every other."""
  found = [(method, DENSE) for method in methods if method != DENSE and DENSE in methods]
  return found + [(TRAINED, other) for other in methods if TRAINED in methods and other not in (TRAINED, DENSE)]


def interval(draws: np.ndarray) -> tuple[float | None, float | None, float]:
  """(2.5th, 97.5th percentile of the draws that are numbers, None each without any; the share of such draws)."""
  known = draws[~np.isnan(draws)]
  if not len(known):
    return None, None, 0.0
  low, high = np.percentile(known, [2.5, 97.5])
  return float(low), float(high), len(known) / len(draws)


def margins(families: Sequence[Family], resamples: int) -> list[Margin]:
  """The margins of all comparisons on every axis, scale and interval of costs: of each family, then means over them.

  A mean is over the families that have a margin, in the estimate and in each resample; it names the others.

  Args:
    resamples: R of the bootstrap.
  """
  by_name = {
    found.task: Resampled(found, resampled(found.scores.shape[1], resamples, n)) for n, found in enumerate(families)
  }
  single = {f.task: [Resampled(each, resampled(f.scores.shape[1], 0, 0)) for each in f.alone] for f in families}
  methods = list(dict.fromkeys(method for found in families for method in found.methods))
  axes = [axis for axis in COSTS if any(axis in found.costs for found in families)]
  number = lambda value: None if np.isnan(value) else float(value)
  made = []
  for (method, over), axis, scale, ends in itertools.product(comparisons(methods), axes, SCALES, ENDS):
    draws, seeds, without = {}, {}, []
    for task, each in by_name.items():
      if axis not in each.costs or method not in each.rows or over not in each.rows:
        continue
      values, shared = each.margins(method, over, axis, scale, ends)
      seeds[task] = tuple(number(own.margins(method, over, axis, scale, ends)[0][0]) for own in single[task])
      if np.isnan(values[0]):
        without.append(task)
        made.append(Margin(task, method, over, axis, scale, ends, None, seeds=seeds[task]))
        continue
      draws[task] = values
      low, high, known = interval(values[1:])
      made.append(Margin(task, method, over, axis, scale, ends, float(values[0]), low, high, shared, seeds[task],
                         resolved=known))  # fmt: skip
    if not draws:
      if without:
        made.append(Margin("", method, over, axis, scale, ends, None, without=tuple(without)))
      continue
    mean = np.mean(list(draws.values()), axis=0)
    of_seeds = zip(*(seeds[task] for task in draws), strict=True)
    both = tuple(None if None in own else float(np.mean(own)) for own in of_seeds)
    low, high, known = interval(mean[1:])
    made.append(Margin("", method, over, axis, scale, ends, float(mean[0]), low, high, seeds=both,
                       families=tuple(draws), without=tuple(without), resolved=known))  # fmt: skip
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
