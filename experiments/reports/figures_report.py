"""Pictures of a report: scores against costs with Pareto frontiers, and what each head retains."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from experiments.reports import charts, plots, styles
from experiments.reports.results import Panel

MARKERS = {
  "circle": "o", "square": "s", "triangle": "^", "diamond": "D", "wedge": "v", "cross": "P", "hexagon": "h", "bar": "_",
}  # fmt: skip


@plots.picture
def tradeoff(plt, panel: Panel, look: Mapping[str, styles.Style], chance: float | None, title: str) -> Any:
  """The main metric of one task against each of its costs; a line is a method's frontier, hollow points are beaten."""
  axes_of = panel.axes()
  if not axes_of:
    return None
  figure, axes = plt.subplots(
    1, len(axes_of), figsize=(5.6 * len(axes_of), 4.6), layout="constrained", squeeze=False, sharey=True
  )
  for axis, cost in zip(axes[0], axes_of, strict=True):
    for method in [name for name in look if panel.drawn(cost, name)]:
      style, pairs = look[method], panel.pairs(cost, method)
      errors = [point.main.standard_error or 0.0 for point in panel.drawn(cost, method)]
      edge = panel.frontier(cost, method)
      bars = dict(fmt="none", ecolor=style.light, elinewidth=1, capsize=2, alpha=0.6)
      axis.errorbar(*zip(*pairs, strict=True), errors, **bars)
      hollow = [pair for pair in pairs if pair not in edge]
      drawn = dict(color=style.light, marker=MARKERS[style.marker], ms=6)
      axis.plot(*zip(*edge, strict=True), **drawn, lw=2, ls="--" if style.again else "-", label=method)
      if hollow:
        axis.plot(*zip(*hollow, strict=True), **drawn, lw=0, mfc="w")
    if chance is not None:
      axis.axhline(chance, color="k", lw=0.8, ls="--", zorder=0)
      axis.annotate(" chance", (0, chance), xycoords=("axes fraction", "data"), va="bottom", fontsize=8)
    axis.set(xscale="log", xlabel=f"{panel.axis_name(cost)}, log scale")
    shown = charts.log_ticks(*axis.get_xlim())
    axis.set_xticks(shown, [styles.short(tick) for tick in shown])
    axis.minorticks_off()
    axis.grid(alpha=0.25)
    plots.bare(axis)
  if panel.metric in styles.LOWER:
    axes[0][0].set_yscale("log")
    axes[0][0].yaxis.set_major_formatter("{x:g}")
  axes[0][0].set_ylabel(styles.named(panel.metric))
  handles, labels = axes[0][0].get_legend_handles_labels()
  figure.legend(handles, labels, loc="outside lower center", ncols=min(6, len(labels)), frameon=False)
  figure.suptitle(title)
  return figure


@plots.picture
def retention(plt, maps: Sequence[tuple[str, str, np.ndarray, int]], title: str) -> Any:
  """The share of tokens that each head holds at the end of a chain, a map for each setting.

  Args:
    maps: (name, method, shares [L, K], chains) each.
  """
  if not maps:
    return None
  columns = min(2, len(maps))
  lines = -(-len(maps) // columns)
  figure, axes = plt.subplots(
    lines, columns, figsize=(7 * columns, 1.9 * lines + 0.8), layout="constrained", squeeze=False
  )
  for axis in axes.flat[len(maps) :]:
    axis.remove()
  shown = axes.flat[: len(maps)]
  for axis, (name, _, shares, count) in zip(shown, maps, strict=True):
    image = axis.imshow(shares.T, vmin=0, vmax=1, cmap="Blues", aspect="auto", interpolation="nearest")
    axis.set(title=f"{name}: {shares.mean():.0%} held, chains: {count}", xlabel="layer", ylabel="KV head")
    axis.title.set_fontsize(10)
    axis.set_yticks(range(shares.shape[1]))
    axis.xaxis.get_major_locator().set_params(integer=True)
  figure.colorbar(image, ax=list(shown), label="share of tokens held")
  figure.suptitle(title)
  return figure
