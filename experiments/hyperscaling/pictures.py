"""Pictures of a sweep: the margins of every comparison with their intervals. Frontiers are those of reports."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from experiments.hyperscaling.analysis import Margin
from experiments.hyperscaling.methods import DENSE
from experiments.hyperscaling.tables import ENDS
from experiments.reports import plots
from experiments.reports.results import LOWER_COST


@plots.picture
def margins(plt, made: Sequence[Margin], scale: str, ends: str, title: str) -> Any:
  """A panel for each axis: the margin of every comparison, a mean over families, and those of the families as dots.

  A mean that lacks families says over how many it is.
  """
  shown = [each for each in made if (each.scale, each.ends) == (scale, ends) and each.margin is not None]
  axes_of = list(dict.fromkeys(each.axis for each in shown))
  if not axes_of:
    return None
  pairs = list(dict.fromkeys((each.method, each.over) for each in shown))
  tasks = list(dict.fromkeys(each.task for each in shown if each.task))
  figure, axes = plt.subplots(
    1, len(axes_of), figsize=(5.4 * len(axes_of), 1.6 + 0.42 * len(pairs)), layout="constrained", squeeze=False,
    sharey=True,
  )  # fmt: skip
  for axis, cost in zip(axes[0], axes_of, strict=True):
    for each in [each for each in shown if each.axis == cost]:
      row = -pairs.index((each.method, each.over))
      if each.task:
        color = plots.METHODS[tasks.index(each.task) % len(plots.METHODS)]
        at = row - 0.22 + 0.1 * (tasks.index(each.task) - (len(tasks) - 1) / 2)
        axis.plot(each.margin, at, "o", ms=4, color=color, label=each.task)
      else:
        axis.plot(each.margin, row, "D", ms=6, color=plots.DENSE, label="mean")
        if each.without:
          many = len(each.families) + len(each.without)
          axis.annotate(f"{len(each.families)} of {many}", (each.margin, row), (0, 6), textcoords="offset points",
                        fontsize=7, ha="center")  # fmt: skip
      if each.low is not None:
        y = at if each.task else row
        axis.plot([each.low, each.high], [y, y], color=color if each.task else plots.DENSE, lw=1 if each.task else 2)
    axis.axvline(0, color="k", lw=0.8)
    if 0 < (dense := sum(over == DENSE for _, over in pairs)) < len(pairs):
      axis.axhline(-dense + 0.45, color="k", lw=0.5, ls=":")
    axis.set(xlabel=f"margin at equal {LOWER_COST[cost]}, points of 100", ylim=(-len(pairs) + 0.4, 0.5))
    axis.set_yticks([-n for n in range(len(pairs))], [f"{method} over {over}" for method, over in pairs])
    axis.grid(alpha=0.25, axis="x")
    plots.bare(axis)
  handles = dict(zip(*reversed(axes[0][0].get_legend_handles_labels()), strict=True))
  figure.legend(handles.values(), handles, loc="outside lower center", ncols=min(6, len(handles)), frameon=False)
  figure.suptitle(f"{title}: {scale} axis, {ENDS[ends]}, 95% intervals", fontsize="medium")
  return figure
