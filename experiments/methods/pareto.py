"""Pareto frontiers of (cost, value) points, and the margin of one frontier over another."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import numpy as np


def frontier(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
  """The points that no other point beats, by rising cost: each has a higher value than every cheaper point.

  Args:
    points: (cost, value) pairs; lower cost and higher value are better.
  """
  best: list[tuple[float, float]] = []
  for cost, value in sorted(points, key=lambda point: (point[0], -point[1])):
    if not best or value > best[-1][1]:
      best.append((cost, value))
  return best


def margin(a: Sequence[tuple[float, float]], b: Sequence[tuple[float, float]], log: bool = False) -> float | None:
  """The mean of A(x) - B(x) over the costs x that both frontiers cover (arXiv 2506.05345, appendix G).

  A and B are the frontiers of `a` and `b`, linear between their points. The mean is the exact integral over the largest
  common interval of costs, over its length.

  Args:
    log: integrate over log x, and interpolate linearly in log x; costs are then above 0. The paper does not say which.

  Returns:
    None if a frontier has no points, or if the common interval is empty or a single cost.

  Raises:
    ValueError: `log` and a cost that is not above 0.
  """
  curves = [np.array(frontier(points), float).reshape(-1, 2) for points in (a, b)]
  if any(not len(curve) for curve in curves):
    return None
  if log:
    if min(curve[0, 0] for curve in curves) <= 0:
      raise ValueError("a margin over log cost needs costs above 0")
    for curve in curves:
      curve[:, 0] = [math.log(cost) for cost in curve[:, 0]]
  low, high = max(curve[0, 0] for curve in curves), min(curve[-1, 0] for curve in curves)
  if low >= high:
    return None
  knots = np.unique(np.concatenate([[low, high], *(curve[:, 0] for curve in curves)]))
  knots = knots[(knots >= low) & (knots <= high)]
  first, second = (np.interp(knots, curve[:, 0], curve[:, 1]) for curve in curves)
  gap = first - second  # linear between knots, so trapezoids are exact
  return float(np.sum(np.diff(knots) * (gap[1:] + gap[:-1]) / 2) / (high - low))


# Many frontiers at once -----------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Frontiers:
  """R frontiers of the same S points, such as in R bootstrap resamples.

  Fields:
    costs: [R, F] by rising cost; inf after the last point of a frontier.
    values: [R, F]; the last point's value is repeated after it.
    counts: [R] points of each frontier, 1 to F.
  """

  costs: np.ndarray
  values: np.ndarray
  counts: np.ndarray

  def ends(self) -> tuple[np.ndarray, np.ndarray]:
    """The least and the largest cost of each frontier, [R] each."""
    return self.costs[:, 0], np.take_along_axis(self.costs, self.counts[:, None] - 1, axis=1)[:, 0]

  def at(self, costs: np.ndarray) -> np.ndarray:
    """Each frontier at costs [R, Q], linear between its points and constant beyond its ends; [R, Q]."""
    after = np.sum(self.costs[:, None, :] <= costs[:, :, None], axis=-1)  # points at or below each cost
    left = np.clip(after - 1, 0, None)
    right = np.minimum(after, self.counts[:, None] - 1)
    take = lambda array, index: np.take_along_axis(array, index, axis=1)
    x0, x1, y0, y1 = (take(array, side) for array in (self.costs, self.values) for side in (left, right))
    share = np.divide(costs - x0, x1 - x0, out=np.zeros_like(costs), where=x1 > x0)
    return y0 + share * (y1 - y0)


def frontiers(costs: np.ndarray, values: np.ndarray) -> Frontiers:
  """`frontier` of each row of points: costs and values, [R, S] each, S 1 or more."""
  order = np.lexsort((-values, costs), axis=-1)
  costs, values = (np.take_along_axis(array, order, axis=1) for array in (costs, values))
  best = np.maximum.accumulate(values, axis=1)
  on = np.concatenate([np.ones_like(values[:, :1], bool), values[:, 1:] > best[:, :-1]], axis=1)
  counts = on.sum(axis=1)
  first = np.argsort(~on, axis=1, kind="stable")[:, : counts.max()]
  costs, values = (np.take_along_axis(array, first, axis=1) for array in (costs, values))
  beyond = np.arange(costs.shape[1]) >= counts[:, None]
  last = np.take_along_axis(values, counts[:, None] - 1, axis=1)
  return Frontiers(np.where(beyond, np.inf, costs), np.where(beyond, last, values), counts)


def common(a: Frontiers, b: Frontiers) -> tuple[np.ndarray, np.ndarray]:
  """The ends of the largest interval of costs that each pair of frontiers covers, [R] each; empty unless low < high."""
  (a_low, a_high), (b_low, b_high) = a.ends(), b.ends()
  return np.maximum(a_low, b_low), np.minimum(a_high, b_high)


def margins(a: Frontiers, b: Frontiers, low: np.ndarray, high: np.ndarray, log: bool = False) -> np.ndarray:
  """The mean of each pair's A(x) - B(x) over the costs low .. high, [R]; NaN where low is not below high.

  Over `common`, each is `margin` of the pair. Before its first point a frontier is taken to be as high as there, and
  after its last point as high as there: more budget buys no less.

  Args:
    low, high: broadcast against [R].
    log: as for `margin`.

  Raises:
    ValueError: `log` and a cost that is not above 0.
  """
  rows = len(a.counts)
  low, high = (np.broadcast_to(np.asarray(end, float), rows) for end in (low, high))
  if log:
    if min(a.costs.min(), b.costs.min(), low.min()) <= 0:
      raise ValueError("a margin over log cost needs costs above 0")
    a, b = (dataclasses.replace(each, costs=np.log(each.costs)) for each in (a, b))
    low, high = np.log(low), np.log(high)
  inside = lambda costs: np.clip(costs, low[:, None], np.maximum(low, high)[:, None])
  ends = np.stack([low, np.maximum(low, high)], axis=1)
  knots = np.sort(np.concatenate([ends, inside(a.costs), inside(b.costs)], axis=1), axis=1)
  gap = a.at(knots) - b.at(knots)  # linear between knots, so trapezoids are exact
  area = np.sum(np.diff(knots, axis=1) * (gap[:, 1:] + gap[:, :-1]) / 2, axis=1)
  return np.divide(area, high - low, out=np.full(rows, np.nan), where=low < high)
