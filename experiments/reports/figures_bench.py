"""Figures of the benchmarks, made from their rows; a figure without rows is left out."""

from __future__ import annotations

from typing import Any

import numpy as np

from experiments.reports import plots


@plots.picture
def kernels(plt, rows: list[dict], device: str) -> Any:
  """A bar for each kernel and case: ours, dense attention, FlexAttention if measured; the dashed line is the floor."""
  rows = [row for row in rows if "us" in row and "axis" not in row]
  if not rows:
    return None
  figure, axis = plt.subplots(figsize=(9, 1.2 + 0.55 * len(rows)), layout="constrained")
  kinds = (
    ("us", "ours", plots.DMS),
    ("dense_us", "dense, cuDNN" if "NVIDIA" in device else "dense, XLA", plots.DENSE),
    ("flex_us", "FlexAttention as the official trainer calls it", "#c2571a"),
    ("flex_blocks_us", "FlexAttention with a block mask", "#e8a87c"),
  )
  for place, (key, label, color) in enumerate(kinds):
    points = [(i + 0.22 * (place - 1), row[key]) for i, row in enumerate(rows) if key in row]
    if points:
      bars = axis.barh(*zip(*points, strict=True), height=0.2, color=color, label=label)
      axis.bar_label(bars, fmt=lambda us: f"{us:,.0f}" if us >= 100 else f"{us:.3g}", fontsize=7, padding=2)
  floors = [(i, row["floor_us"]) for i, row in enumerate(rows) if "floor_us" in row]
  for number, (i, floor) in enumerate(floors):
    axis.vlines(floor, i - 0.42, i + 0.42, color="k", lw=1.2, ls="--", label="floor" if number == 0 else None)
  names = [f"{row['name']}\n{row.get('case', '')}" for row in rows]
  axis.set_yticks(range(len(rows)), names, fontsize=7)
  axis.invert_yaxis()
  axis.set(xscale="log", xlabel="microseconds", title=f"Attention kernels, bfloat16, {device}")
  axis.margins(x=0.1, y=0.02)
  axis.grid(axis="x", alpha=0.25)
  axis.set_axisbelow(True)
  plots.bare(axis)
  axis.legend(frameon=False, fontsize=8)
  return figure


@plots.picture
def growth(plt, rows: list[dict], device: str) -> Any:
  """Decode time against CR, length and batch, with the floor."""
  rows = [row for row in rows if "axis" in row and "us" in row]
  if not rows:
    return None
  figure, axes = plt.subplots(1, 3, figsize=(12, 4), layout="constrained")
  labels = {"CR": "compression ratio", "length": "slots a head, CR 8", "batch": "batch, CR 8"}
  for axis, (name, label) in zip(axes, labels.items(), strict=True):
    points = sorted((r["value"], r["us"], r["floor_us"]) for r in rows if r["axis"] == name)
    axis.set(xlabel=label, ylabel="microseconds")
    axis.grid(alpha=0.25, which="both")
    if not points:
      continue
    x, us, floor = zip(*points, strict=True)
    axis.loglog(x, us, "o-", color=plots.DMS, label="decode kernel", base=2)
    axis.loglog(x, floor, "--", color=plots.DENSE, label="floor: live bytes / read bandwidth", base=2)
    axis.set_xticks(x, [f"{value:g}" for value in x], rotation=45 if max(x) > 999 else 0)
    axis.minorticks_off()
    axis.yaxis.set_major_formatter("{x:g}")
  first = next(axis for axis in axes if axis.lines)
  first.legend(frameon=False)
  figure.suptitle(f"Decode attention of one layer, bfloat16, {device}")
  return figure


@plots.picture
def engines(plt, results: list[dict], title: str) -> Any:
  """Bars: prefill and decode speed by engine and dtype."""
  figure, axes = plt.subplots(1, 2, figsize=(9, 4), layout="constrained")
  names = [f"{r['engine']}\n{r['dtype']}" for r in results]
  colors = [{"dense": plots.DENSE, "DMS": plots.DMS}.get(r["engine"], "#b8b8b8") for r in results]
  for axis, what in zip(axes, ("prefill", "decode"), strict=True):
    bars = axis.bar(names, [r[f"{what}_tokens_per_s"] for r in results], color=colors)
    axis.bar_label(bars, fmt="%.0f" if what == "prefill" else "%.1f")
    axis.set_title(f"{what}, tokens/s")
    axis.tick_params(axis="x", labelsize=7)
    plots.bare(axis)
  figure.suptitle(title)
  return figure


@plots.picture
def decode_steps(plt, rows: list[dict], title: str) -> Any:
  """Decode steps with their rooflines, and every ratio that has a bar."""
  steps = [row for row in rows if row["name"].startswith("step_") and "ms" in row]
  judged = [(row, bar.split()) for row in rows if "bar" in row for bar in row["bar"].split(", ")]
  judged = [(row, *words) for row, words in judged if words[0] != "of_roofline"]
  if not (steps or judged):
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
    plots.bare(axis)
  figure.suptitle(title)
  return figure


@plots.picture
def scaling(plt, rows: list[dict], title: str) -> Any:
  """Tokens/s against the bytes of the cache, and against chains of one prompt."""
  found = {row["name"]: row["series"] for row in rows if "series" in row}
  if not found:
    return None
  figure, axes = plt.subplots(1, 2, figsize=(11, 4.5), layout="constrained")
  labels = {"scaling_budget": "GiB of cache", "scaling_chains": "chains of one prompt"}
  for axis, (name, label) in zip(axes, labels.items(), strict=True):
    axis.set(xlabel=label, ylabel="tokens/s")
    axis.grid(alpha=0.25, which="both")
    plots.bare(axis)
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
  return figure


def over_time(samples: dict[str, list], bins: int = 120) -> dict[str, list]:
  """[least, mean, greatest] of the samples in each of `bins` equal parts of the time, and `seconds`, their ends."""
  at = np.asarray(samples["seconds"])
  ends = np.linspace(0, at[-1], bins + 1)[1:]
  part = np.minimum(np.searchsorted(ends, at), bins - 1)
  found = [i for i in range(bins) if (part == i).any()]
  result = {"seconds": [round(float(ends[i]), 1) for i in found]}
  for name in ("pages", "running", "waiting", "memory", "programs"):
    values = np.array([x or 0 for x in samples[name]], float)
    groups = [values[part == i] for i in found]
    result[name] = [[float(g.min()), round(float(g.mean()), 2), float(g.max())] for g in groups]
  return result


@plots.picture
def soak(plt, series: dict[str, list], begin: float, pages: int, title: str) -> Any:
  """Pages in use, rows, memory and compiled programs over time, as mean and range; the warm-up is shaded."""
  figure, axes = plt.subplots(4, 1, figsize=(9, 9), sharex=True, layout="constrained")

  def draw(axis, name: str, color: str, label: str, scale: float = 1.0):
    least, mean, most = np.array(series[name]).T / scale
    axis.fill_between(series["seconds"], least, most, color=color, alpha=0.2, lw=0)
    axis.plot(series["seconds"], mean, color=color, lw=1.6, label=label)

  draw(axes[0], "pages", plots.DMS, "in use: mean and range")
  axes[0].axhline(pages, color=plots.DENSE, lw=0.8, ls="--", label="the pool")
  draw(axes[1], "waiting", plots.DENSE, "waiting, or on the host")
  draw(axes[1], "running", plots.DMS, "in the batch")
  draw(axes[2], "memory", plots.DMS, "of the process", 2**20)
  draw(axes[3], "programs", plots.DMS, "compiled so far")
  for axis, label in zip(axes, ("pages", "rows", "memory, MiB", "programs"), strict=True):
    axis.axvspan(0, begin, color=plots.DENSE, alpha=0.12, lw=0)
    axis.set(ylabel=label, ylim=(0, None), xlim=(0, series["seconds"][-1]))
    axis.grid(alpha=0.25)
    plots.bare(axis)
    axis.legend(loc="lower right", bbox_to_anchor=(1, 1), ncols=2, frameon=False, borderaxespad=0)
  axes[0].text(0, 1.02, "shaded: warm-up", transform=axes[0].transAxes, color=plots.DENSE, fontsize="small")
  axes[3].set_xlabel("seconds")
  figure.suptitle(title)
  return figure


@plots.picture
def pressure(plt, rows: list[dict], title: str) -> Any:
  """Latency, throughput and KL of a Generator against its load, compressing and preempting, and without a limit."""
  modes = [name for name in ("preempt", "compress") if any(row["mode"] == name for row in rows)]
  if not modes:
    return None
  figure, axes = plt.subplots(1, 3, figsize=(12, 4), layout="constrained")
  panels = (("latency_s", "mean latency, s"), ("tokens_per_s", "tokens/s"), ("kl", "KL to unhurried decoding, nats"))
  for axis, (key, label) in zip(axes, panels, strict=True):
    for mode, color in zip(modes, (plots.DENSE, plots.DMS), strict=False):
      points = sorted((100 * row["load"], row[key]) for row in rows if row["mode"] == mode)
      axis.plot(*zip(*points, strict=True), "o-", color=color, label=mode)
    for row in (row for row in rows if row["mode"] == "unhurried" and key != "kl"):
      axis.axhline(row[key], color=plots.DENSE, ls=":", label="no limit")
    axis.set(xlabel="load, % of the pool's pages", ylabel=label)
    axis.set_ylim(0, 1.08 * max(row[key] for row in rows) or None)
    axis.grid(alpha=0.25)
    plots.bare(axis)
  axes[0].legend(frameon=False)
  figure.suptitle(title, fontsize=10)
  return figure
