"""Pictures of what `experiments.bench_generate --cases` measured."""

from __future__ import annotations

from pathlib import Path

from experiments.reports import plots


def bars(path: Path, rows: list[dict], title: str) -> str | None:
  """Decode steps beside their rooflines, and every ratio that has a bar beside it; None without rows or matplotlib."""
  steps = [row for row in rows if row["name"].startswith("step_") and "ms" in row]
  judged = [(row, bar.split()) for row in rows if "bar" in row for bar in row["bar"].split(", ")]
  judged = [(row, *words) for row, words in judged if words[0] != "of_roofline"]
  if not (steps or judged) or (plt := plots.pyplot()) is None:
    return None
  figure, axes = plt.subplots(1, 2, figsize=(13, 5), layout="constrained", width_ratios=(3, 2))
  left, right = axes
  kinds = (("ms", "DMS", plots.DMS), ("dense_ms", "dense", plots.DENSE))
  for place, (key, name, color) in enumerate(kinds):
    points = [(i + 0.4 * (place - 0.5), row[key]) for i, row in enumerate(steps) if key in row]
    if points:
      drawn = left.bar(*zip(*points, strict=True), width=0.38, color=color, label=name)
      left.bar_label(drawn, fmt="%.3g", fontsize=7, padding=1)
  for i, row in enumerate(steps):
    label = "roofline of DMS: weights and live keys and values" if i == 0 else None
    left.hlines(row["roofline_ms"], i - 0.4, i, color="k", lw=1.5, label=label)
    left.annotate(
      f"{row['of_roofline']:.0%}", (i - 0.2, row["roofline_ms"]), ha="center", va="top", fontsize=7, color="w"
    )
  left.set_xticks(range(len(steps)), [row["case"].replace(" ", "\n") for row in steps], fontsize=7)
  left.set(ylabel="ms a decode step", title="decode step", yscale="log" if steps else "linear")
  if steps:
    left.legend(frameon=False, fontsize=8, loc="upper left")
    left.margins(y=0.2)
  for i, (row, name, sign, least) in enumerate(judged):
    value, least = row[name], float(least)
    reached = value <= least if sign == "<=" else value >= least
    right.barh(i, value / least, color=plots.DMS if reached else "#c2571a")
    right.annotate(f" {value:.3g}, bar {sign} {least:g}", (value / least, i), va="center", fontsize=7)
  right.axvline(1, color="k", lw=1, ls="--")
  right.set_yticks(range(len(judged)), [f"{row['name']}\n{name}" for row, name, *_ in judged], fontsize=7)
  right.invert_yaxis()
  right.margins(x=0.35)
  right.set(xlabel="of the bar", title="against their bars")
  for axis in axes:
    axis.spines[["top", "right"]].set_visible(False)
  figure.suptitle(title)
  figure.savefig(path, dpi=120)
  plt.close(figure)
  return str(path)


def scaling(path: Path, rows: list[dict], title: str) -> str | None:
  """Tokens/s against the bytes of the cache, and against chains of one prompt; None without rows or matplotlib."""
  found = {row["name"]: row["series"] for row in rows if "series" in row}
  if not found or (plt := plots.pyplot()) is None:
    return None
  figure, axes = plt.subplots(1, 2, figsize=(11, 4.5), layout="constrained")
  labels = {"scaling_budget": "GiB of cache", "scaling_chains": "chains of one prompt"}
  for axis, (name, label) in zip(axes, labels.items(), strict=True):
    axis.set(xlabel=label, ylabel="tokens/s")
    axis.grid(alpha=0.25, which="both")
    axis.spines[["top", "right"]].set_visible(False)
    for kind, series in sorted(found.get(name, {}).items()):
      series = sorted(series)
      x, y, many, used = zip(*series, strict=True)
      color = plots.DMS if kind == "dms" else plots.DENSE
      axis.loglog(x, y, "o-", color=color, label={"dms": "DMS", "dense": "dense"}[kind], base=2)
      for at in zip(x, y, many, used, strict=True):
        text = f"{at[2]:g} rows" if name == "scaling_budget" else f"{at[3]:.2g} GiB"
        axis.annotate(text, at[:2], fontsize=7, xytext=(3, -9), textcoords="offset points")
    axis.xaxis.set_major_formatter("{x:g}")
    axis.yaxis.set_major_formatter("{x:g}")
    if axis.lines:
      axis.legend(frameon=False)
  figure.suptitle(title)
  figure.savefig(path, dpi=120)
  plt.close(figure)
  return str(path)
