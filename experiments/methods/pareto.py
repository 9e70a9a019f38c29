"""Pareto frontiers of (cost, value) points, and the margin of one frontier over another."""

from __future__ import annotations

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
