"""Figures of methods on tasks, drawn from summary entries."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from experiments.methods.summary import Entry
from experiments.reports import plots, styles
from experiments.reports.tables import short_names
from experiments.tasks.retrieval import RetrievalTask


@plots.picture
def tasks(plt, entries: Sequence[Entry], baseline: str, title: str) -> Any:
  """A panel of score against length for each task with lengths, and bars for all other tasks."""
  short = short_names(list(dict.fromkeys(entry.method for entry in entries)))
  look = {
    method: (short.get(method, method), style.light) for method, style in styles.styles(list(short), baseline).items()
  }
  panels = [
    (_curves, [entry for entry in entries if entry.task == task], task)
    for task in sorted({entry.task for entry in entries if entry.length is not None})
  ]
  fixed = [entry for entry in entries if entry.length is None]
  for own, name in (
    ([entry for entry in fixed if entry.metric != "answer_loglik"], "right answers, per cent; CR above"),
    ([entry for entry in fixed if entry.metric == "answer_loglik"],
     "log-likelihood of the right answer, nats a token; CR below"),
  ):  # fmt: skip
    panels += [(_bars, own, name)] if own else []
  columns = min(2, len(panels))
  lines = -(-len(panels) // columns)
  figure, axes = plt.subplots(lines, columns, figsize=(6 * columns, 4.4 * lines), layout="constrained", squeeze=False)
  for axis in axes.flat[len(panels) :]:
    axis.remove()
  for axis, (draw, own, name) in zip(axes.flat, panels, strict=False):
    draw(axis, own, baseline, look)
    axis.set_title(name)
    axis.grid(alpha=0.25)
    plots.bare(axis)
  figure.suptitle(title, fontsize=10)
  handles, labels = axes[0][0].get_legend_handles_labels()
  figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), frameon=False)
  return figure


def _curves(axis: Any, entries: Sequence[Entry], baseline: str, look: dict[str, tuple[str, str]]) -> None:
  """Score against length, a line for each method, its achieved CR at each point."""
  lengths = sorted({entry.length for entry in entries})
  for place, (method, (name, color)) in enumerate(look.items()):
    own = sorted((entry for entry in entries if entry.method == method), key=lambda entry: entry.length)
    x = [1.04**place * entry.length for entry in own]  # shifted, because equal scores would hide each other
    errors = [entry.standard_error or 0.0 for entry in own]
    axis.errorbar(x, [entry.mean for entry in own], errors, color=color, label=name, marker="o", capsize=4, lw=2)
    for at, entry in zip(x, own, strict=True):
      if method != baseline:
        axis.annotate(
          f"CR {entry.achieved_cr:.1f}", (at, entry.mean), xytext=(8, 6 - 11 * (place - 1)),
          textcoords="offset points", color=color, fontsize=8,
        )  # fmt: skip
  axis.axhline(RetrievalTask.floor, color="k", lw=0.8, ls=":", zorder=0)
  label = f"methods are compared where {baseline} is above"
  axis.annotate(label, (0.01, RetrievalTask.floor), xycoords=("axes fraction", "data"), va="bottom", fontsize=8)
  axis.set_xscale("log", base=2)
  axis.set_xticks(lengths, [f"{n:,}" for n in lengths])
  axis.minorticks_off()
  axis.set(xlim=(min(lengths) / 1.3, max(lengths) * 1.3), ylim=(-4, 112), yticks=range(0, 101, 20))
  axis.set(xlabel="prompt tokens", ylabel="references found, per cent")


def _bars(axis: Any, entries: Sequence[Entry], baseline: str, look: dict[str, tuple[str, str]]) -> None:
  """A bar for each method with its standard error; above it the achieved CR of its cache."""
  groups = list(dict.fromkeys((entry.task, entry.metric) for entry in entries))
  width = 0.8 / len(look)
  for place, group in enumerate(groups):
    found = {entry.method: entry for entry in entries if (entry.task, entry.metric) == group}
    own = [found[method] for method in look if method in found]
    for i, entry in enumerate(own):
      name, color = look[entry.method]
      x, error = place + (i - (len(own) - 1) / 2) * width, entry.standard_error or 0.0
      axis.bar(x, entry.mean, 0.92 * width, yerr=error, capsize=4, color=color, label=None if place else name)
      if entry.method != baseline:
        up = 1 if entry.mean >= 0 else -1
        axis.annotate(
          f"{entry.achieved_cr:.1f}", (x, entry.mean + up * error), xytext=(0, 4 * up), textcoords="offset points",
          ha="center", va="bottom" if up > 0 else "top", color=color, fontsize=8,
        )  # fmt: skip
  ticks = [task if metric == "answer_loglik" else f"{task}\n{metric}" for task, metric in groups]
  axis.set_xticks(range(len(groups)), ticks)
  axis.margins(y=0.12)
