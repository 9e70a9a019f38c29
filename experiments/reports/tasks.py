"""What a reader sees of the tasks' results: a table that grows as they come, and a picture."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from experiments.common import program
from experiments.methods.run import ASKED
from experiments.reports import plots

HEADER = (
  f"{'task':<10} {'length':>6} {'metric':<13} {'n':>5} {'original':>15} {'asked':>5} {'retrofit':<24} {'score':>15} "
  f"{'difference':>15} {'CR':>5}"
)
COLORS = (plots.DMS, "#d1752b", "#3a923a", "#8b5fb0", "#b04a4a")


def with_error(metric: str, mean: float, error: float) -> str:
  """ "12.3 +- 0.4": per cent with one decimal, nats with three."""
  digits = 3 if metric == "answer_loglik" else 1
  return f"{mean:.{digits}f} +- {error:.{digits}f}"


def label(row: dict[str, Any]) -> str:
  """A retrofit's name, without the folders that it lies in."""
  return Path(row["retrofit"]).name


def line(row: dict[str, Any]) -> str:
  """One line of the table; the column `asked` says whether the original scores enough to ask about a retrofit."""
  asked = {True: "yes", False: "no", None: ""}[row.get("original_at_least_60")]
  shown = lambda name: f"{with_error(row['metric'], row[name], row[f'{name}_se']):>15}"
  text = (
    f"{row['task']:<10} {row['length'] or '':>6} {row['metric']:<13} {row['samples']:>5} {shown('original')} {asked:>5}"
  )
  if "retrofit" not in row:
    return text
  return f"{text} {label(row):<24} {shown('score')} {shown('difference')} {row['achieved_cr']:>5.2f}"


def save_samples(path: Path, samples: Sequence[dict[str, Any]]) -> str:
  """Writes a JSON line for each sample, whole or not at all; returns the path."""
  path.parent.mkdir(parents=True, exist_ok=True)
  part = path.with_name(f".{path.name}")
  try:
    part.write_text("".join(json.dumps(program.to_plain(sample)) + "\n" for sample in samples), encoding="utf-8")
    part.replace(path)
  finally:
    part.unlink(missing_ok=True)
  return str(path)


def picture(path: Path, rows: Sequence[dict[str, Any]], title: str) -> str | None:
  """Retrieval scores against length, a panel a task, and every other metric as original beside retrofits; whole or not
  at all.

  Returns:
    The path written, or None without matplotlib.
  """
  if (plt := plots.pyplot()) is None:
    return None
  curves = sorted({row["task"] for row in rows if row["length"] is not None})
  bars = [row for row in rows if row["length"] is None]
  nats = [row for row in bars if row["metric"] == "answer_loglik"]
  points = [row for row in bars if row["metric"] != "answer_loglik"]
  panels = [(_curves, [row for row in rows if row["task"] == task], task) for task in curves]
  panels += [(_bars, points, "right answers, per cent; CR above")] if points else []
  panels += [(_bars, nats, "log-likelihood of the right answer, nats a token; CR below")] if nats else []
  columns = min(2, len(panels))
  lines = -(-len(panels) // columns)
  figure, axes = plt.subplots(lines, columns, figsize=(6 * columns, 4.4 * lines), layout="constrained", squeeze=False)
  for axis in axes.flat[len(panels) :]:
    axis.remove()
  for axis, (draw, chosen, name) in zip(axes.flat, panels, strict=False):
    draw(axis, chosen)
    axis.set_title(name)
    axis.grid(alpha=0.25)
    axis.spines[["top", "right"]].set_visible(False)
  figure.suptitle(title, fontsize=10)
  handles, labels = axes[0][0].get_legend_handles_labels()
  figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), frameon=False)
  path.parent.mkdir(parents=True, exist_ok=True)
  part = path.with_name(f".{path.name}")
  try:
    figure.savefig(part, dpi=140)
    part.replace(path)
  finally:
    part.unlink(missing_ok=True)
    plt.close(figure)
  return str(path)


def _retrofits(rows: Sequence[dict[str, Any]]) -> list[str]:
  return list(dict.fromkeys(label(row) for row in rows if "retrofit" in row))


def _error(value: float) -> float:
  return 0.0 if math.isnan(value) else value


def _curves(axis, rows: Sequence[dict[str, Any]]) -> None:
  """Score against length, one line a model; what a retrofit's cache is worth at its points."""
  ordered = sorted(rows, key=lambda row: row["length"])
  first = list({row["length"]: row for row in ordered}.values())
  style = dict(marker="o", capsize=4, lw=2)
  axis.errorbar(
    [row["length"] for row in first], [row["original"] for row in first], [_error(row["original_se"]) for row in first],
    color=plots.DENSE, label="original, dense", **style,
  )  # fmt: skip
  for place, name in enumerate(_retrofits(rows), 1):
    color = COLORS[(place - 1) % len(COLORS)]
    own = [row for row in ordered if "retrofit" in row and label(row) == name]
    beside = 1.04**place  # equal scores would hide each other
    axis.errorbar(
      [beside * row["length"] for row in own], [row["score"] for row in own], [_error(row["score_se"]) for row in own],
      color=color, label=name, **style,
    )  # fmt: skip
    for row in own:
      axis.annotate(
        f"CR {row['achieved_cr']:.1f}", (beside * row["length"], row["score"]), xytext=(8, 6 - 11 * (place - 1)),
        textcoords="offset points", color=color, fontsize=8,
      )  # fmt: skip
  lengths = [row["length"] for row in first]
  axis.axhline(ASKED, color="k", lw=0.8, ls=":", zorder=0)
  axis.annotate(
    "asked of a retrofit where the original is above",
    (0.01, ASKED),
    xycoords=("axes fraction", "data"),
    va="bottom",
    fontsize=8,
  )
  axis.set_xscale("log", base=2)
  axis.set_xticks(lengths, [f"{n:,}" for n in lengths])
  axis.minorticks_off()
  axis.set(xlim=(min(lengths) / 1.3, max(lengths) * 1.3), ylim=(-4, 112), yticks=range(0, 101, 20))
  axis.set(xlabel="prompt tokens", ylabel="references found, per cent")


def _bars(axis, rows: Sequence[dict[str, Any]]) -> None:
  """Original beside every retrofit, with standard errors; above a retrofit's bar what its cache is worth."""
  groups = list(dict.fromkeys((row["task"], row["metric"]) for row in rows))
  names = _retrofits(rows)
  width = 0.8 / (1 + len(names))
  for place, (task, metric) in enumerate(groups):
    own = [row for row in rows if (row["task"], row["metric"]) == (task, metric)]
    bars = [("original, dense", plots.DENSE, own[0]["original"], own[0]["original_se"], None)]
    bars += [
      (label(row), COLORS[names.index(label(row)) % len(COLORS)], row["score"], row["score_se"], row["achieved_cr"])
      for row in own
      if "retrofit" in row
    ]
    for i, (name, color, mean, error, cr) in enumerate(bars):
      x = place + (i - (len(bars) - 1) / 2) * width
      axis.bar(x, mean, 0.92 * width, yerr=_error(error), capsize=4, color=color, label=None if place else name)
      if cr is not None:
        up = 1 if mean >= 0 else -1
        axis.annotate(
          f"{cr:.1f}", (x, mean + up * _error(error)), xytext=(0, 4 * up), textcoords="offset points", ha="center",
          va="bottom" if up > 0 else "top", color=color, fontsize=8,
        )  # fmt: skip
  ticks = [task if metric == "answer_loglik" else f"{task}\n{metric}" for task, metric in groups]
  axis.set_xticks(range(len(groups)), ticks)
  axis.margins(y=0.12)
