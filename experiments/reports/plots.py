"""The one module that imports matplotlib, and the figures of caches, training and ablations.

matplotlib is optional: without it a figure is skipped, and the log says so.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from dms_jax import disk
from dms_jax.json_files import is_number, parse_json
from experiments.common import program
from experiments.reports import styles

METHODS = tuple(light for light, _ in styles.PALETTE)  # colours of compared methods, in order
DENSE, DMS = styles.NEUTRAL[0], METHODS[0]


def pyplot() -> Any:
  """matplotlib.pyplot drawing to files, or None where it is not installed."""
  try:
    import matplotlib
  except ImportError:
    program.log("no picture: matplotlib is not installed (pip install 'dms_jax[plot]')")
    return None
  matplotlib.use("Agg")
  import matplotlib.pyplot as plt

  return plt


def picture(build: Callable[..., Any]) -> Callable[..., str | None]:
  """Turns `build(plt, ...)`, which returns a figure or None, into `draw(path, ...)`, which writes it as a PNG.

  `draw` makes the folder, writes the file atomically, and returns its path. It returns None without matplotlib or if
  there is nothing to draw.
  """

  @functools.wraps(build)
  def draw(path: Path, *args, **settings) -> str | None:
    if (plt := pyplot()) is None or (figure := build(plt, *args, **settings)) is None:
      return None
    try:
      with disk.whole(Path(path)) as part:
        figure.savefig(part, dpi=120, format="png")
    finally:
      plt.close(figure)
    return str(path)

  return draw


def bare(axis: Any) -> None:
  """Removes the upper and right border of an axis."""
  axis.spines[["top", "right"]].set_visible(False)


@picture
def live_tokens(plt, dense: dict, dms: dict, *, read: int, title: str) -> Any:
  """Live tokens of a cache against position: a line for each run, and a thin line for each head of DMS.

  Args:
    dense, dms: `position` [P] and `live` [P, L, K].
    read: tokens of the prompt; later tokens are generated.
  """
  figure, axis = plt.subplots(figsize=(9, 5.2), layout="constrained")
  layers, heads = dms["live"].shape[1:]
  each = dms["live"].reshape(len(dms["position"]), -1)
  lines = axis.plot(dms["position"], each, color=DMS, alpha=0.22, lw=0.6)
  lines[0].set_label(f"DMS, one line a head ({layers} layers x {heads} KV heads)")
  for run, name, color in ((dense, "dense", DENSE), (dms, "DMS, mean over heads", DMS)):
    mean = run["live"].mean(axis=(1, 2))
    axis.plot(run["position"], mean, color=color, lw=2.4, label=name)
    axis.annotate(
      f"{mean[-1]:,.0f}", (run["position"][-1], mean[-1]), xytext=(5, 0), textcoords="offset points",
      color=color, va="center", fontweight="bold",
    )  # fmt: skip
  axis.axvline(read, color="k", lw=0.8, ls=":")
  axis.annotate(
    "writes from here ", (read, 0.985), xycoords=("data", "axes fraction"), ha="right", va="top", fontsize=9
  )
  end = int(dms["position"][-1])
  axis.set(xlim=(0, end), ylim=(0, 1.04 * float(dense["live"].max())))
  axis.set(title=f"Tokens the KV cache holds\n{title}", xlabel="tokens read and written", ylabel="live tokens a head")
  axis.grid(alpha=0.25)
  bare(axis)
  legend = axis.legend(loc="upper left", frameon=False)
  for handle in legend.get_lines():
    handle.set_alpha(1.0)
  return figure


# What a retrofit's log may hold, by picture: {column: (name, colour)}. Objectives log some of it.
TRAINING = {
  "loss": {
    "kl": ("KL, nats a token", DMS), "nll": ("next token, nats", METHODS[1]),
    "mse": ("squared error of gate logits", METHODS[3]),
  },
  "compression": {"target_cr": ("target CR (share of decisions)", "k"), "achieved_cr": ("CR at the row length", DMS)},
  "gates": {
    "gate_rate": ("decisions that evict", DMS), "compression_loss": ("compression loss", DENSE),
    "capacity_loss": ("capacity loss", DENSE), "retention": ("retention a token", METHODS[3]),
    "explained": ("explained share of the scores' variance", DMS),
  },
}  # fmt: skip


@picture
def training(plt, log: Path) -> Any:
  """A retrofit's log: losses, target and achieved compression, gates, and the gate rate of every layer and head.

  What an objective does not log is not drawn.

  Args:
    log: the lines of log.jsonl, a JSON object for each step; lines with `gate_rates` [L][K] give the lower row. Nothing
      is drawn before the first step.
  """
  written = log.read_text(encoding="utf-8").splitlines()
  lines = [parse_json(line, f"{log}:{number}") for number, line in enumerate(written, 1)]
  if wrong := [number for number, line in enumerate(lines, 1) if not is_number(line.get("step"), int)]:
    raise ValueError(f"{log}:{wrong[0]}: no line of a log: it needs a whole number 'step'")
  steps, heads = [line["step"] for line in lines], [line for line in lines if "gate_rates" in line]
  column = lambda name: [math.nan if line.get(name) is None else line[name] for line in lines]
  panels = {
    title: {label: (values, color) for name, (label, color) in columns.items()
            if any(map(math.isfinite, values := column(name)))}
    for title, columns in TRAINING.items()
  }  # fmt: skip
  panels = {title: drawn for title, drawn in panels.items() if drawn}
  if not panels:
    return None
  rows = 2 if heads else 1
  figure = plt.figure(figsize=(5 * max(len(panels), 2 * (rows > 1)), 4.2 * rows), layout="constrained")
  parts = figure.subfigures(rows, 1, squeeze=False)[:, 0]
  for axis, (title, drawn) in zip(parts[0].subplots(1, len(panels), squeeze=False)[0], panels.items(), strict=True):
    for label, (values, color) in drawn.items():
      axis.plot(steps, values, color, lw=0.6, ls="--" if color == "k" else "-", label=label)
    known = [value for values, _ in drawn.values() for value in values if math.isfinite(value)]
    if title == "loss" and min(known) > 0:
      axis.set_yscale("log")
    if title == "gates" and 0 <= min(known) and max(known) <= 1:
      axis.set_ylim(0, 1)
    axis.set(title=title, xlabel="step")
    axis.grid(alpha=0.3)
    axis.legend()
  if heads:
    shade = dict(vmin=0.0, vmax=1.0, cmap="viridis", aspect="auto", interpolation="nearest", origin="lower")
    by_head, by_layer = parts[1].subplots(1, 2, width_ratios=(2, 1))
    last = list(zip(*heads[-1]["gate_rates"], strict=True))  # [K][L]
    image = by_head.imshow(last, **shade)
    by_head.set(
      title=f"decisions that evict, step {heads[-1]['step']}", xlabel="layer", ylabel="KV head", yticks=range(len(last))
    )
    means = [[sum(layer) / len(layer) for layer in line["gate_rates"]] for line in heads]  # [checkpoints][L]
    by_layer.imshow(list(zip(*means, strict=True)), **shade)
    shown = range(0, len(heads), max(1, len(heads) // 6))
    by_layer.set_xticks(shown, [str(heads[i]["step"] + 1) for i in shown])
    by_layer.set(title="the same over training, mean over heads", xlabel="steps", ylabel="layer")
    for axis in (by_head.xaxis, by_layer.yaxis):
      axis.get_major_locator().set_params(integer=True)
    parts[1].colorbar(image, ax=[by_head, by_layer], label="share of tokens")
  return figure


@picture
def ablation(plt, rows: list[dict], x: str, title: str) -> Any:
  """Quality of many runs: KL, perplexity and compression along one setting, and KL against compression.

  Args:
    rows: in the order of the axis, each with its position `x`, its `line`, and the figures `kl`, `perplexity_change`
      and `achieved_cr`.
    x: the quantity on the axis; "tokens" is logarithmic, any other has evenly spaced positions.
  """
  lines: dict[str, list[dict]] = {}
  for row in rows:
    lines.setdefault(row["line"], []).append(row)
  ticks = list(dict.fromkeys(row["x"] for row in rows))
  place = lambda row: row["x"] / 1e6 if x == "tokens" else ticks.index(row["x"])
  figure, axes = plt.subplots(2, 2, figsize=(12, 8.6), layout="constrained")
  kl, change, cr, both = axes.flat
  for index, (name, group) in enumerate(lines.items()):
    at, achieved = [place(row) for row in group], [row["achieved_cr"] for row in group]
    style = dict(color=f"C{index % 10}", marker="osD^vP*X"[index // 10 % 8], lw=0 if x == "run" else 1.4, ms=6)
    kl.plot(at, [row["kl"] for row in group], **style)
    change.plot(at, [100 * row["perplexity_change"] for row in group], **style)
    cr.plot(at, achieved, **style)
    both.plot(achieved, [row["kl"] for row in group], label=name or None, **style)
  place_of = lambda row: (row["achieved_cr"], row["kl"])
  least, most = ([f(values) for values in zip(*map(place_of, rows), strict=True)] for f in (min, max))
  spans = [b - a for a, b in zip(least, most, strict=True)]
  named: list[tuple[float, float]] = []
  for row in rows:
    here = place_of(row)
    text = f"{row['x'] / 1e6:.3g} M" if x == "tokens" else row["x"].replace("\n", " ")
    wide = max(0.06, 0.015 * len(text))
    if any(abs(here[0] - x0) < wide * spans[0] and abs(here[1] - y0) < 0.05 * spans[1] for x0, y0 in named):
      continue  # its label would cover another
    named.append(here)
    inwards = 1 if here[0] - least[0] < spans[0] / 2 else -1
    both.annotate(
      text, here, xytext=(5 * inwards, 5), textcoords="offset points", ha="left" if inwards > 0 else "right", fontsize=8
    )
  divergence = "KL from the original, nats a token"
  for axis, label in ((kl, divergence), (change, "perplexity change, %"), (cr, "achieved CR")):
    axis.set_ylabel(label)
    if x == "tokens":
      axis.set(xscale="log", xlabel="millions of tokens trained on")
      continue
    long = sum(max(map(len, tick.split("\n"))) for tick in ticks) > 60
    axis.set_xticks(range(len(ticks)), ticks, rotation=25 if long else 0, ha="right" if long else "center")
    axis.set_xlabel("" if x == "run" else x)
  for axis, name in ((kl, "divergence"), (change, "perplexity"), (cr, "achieved compression"), (both, "trade-off")):
    axis.set_title(name)
    axis.grid(alpha=0.3)
  both.set(xlabel="achieved CR", ylabel=divergence)
  both.margins(0.12)
  figure.suptitle(title)
  if len(lines) > 1:
    figure.legend(loc="outside lower center", ncols=min(5, len(lines)), frameon=False)
  return figure


@picture
def compression(plt, runs: list[dict], title: str) -> Any:
  """Compression of retrofits, a row for each run: left by layer and head at the end of a chunk, right along the text.

  Args:
    runs: each with `name`, `positions` [P] and `held` [P, L, K], the share of tokens held.
  """
  figure, axes = plt.subplots(len(runs), 2, figsize=(14, 4.8 * len(runs)), layout="constrained", squeeze=False)
  for (heads, along), run in zip(axes, runs, strict=True):
    positions, held = run["positions"], run["held"]
    layers = held.shape[1]
    image = heads.imshow(
      held[-1].T, vmin=0.0, vmax=1.0, cmap="viridis", aspect="auto", interpolation="nearest", origin="lower"
    )
    heads.set(title=f"tokens held at T {positions[-1]:,}{run['name']}", xlabel="layer", ylabel="KV head")
    heads.set_yticks(range(held.shape[2]))
    heads.xaxis.get_major_locator().set_params(integer=True)
    figure.colorbar(image, ax=heads, label="share of tokens held")
    shades = plt.get_cmap("viridis")
    for layer in range(layers):
      color = shades(layer / max(layers - 1, 1))
      label = {0: "layer 0", layers - 1: f"layer {layers - 1}"}.get(layer)
      along.plot(positions, 1 / held[:, layer].mean(axis=1), color=color, lw=0.8, alpha=0.8, label=label)
    mean = 1 / held.mean(axis=(1, 2))
    along.plot(positions, mean, color="k", lw=2.4, label=f"all layers: {mean[-1]:.2f} at the end")
    along.set(
      title=f"achieved CR along the text{run['name']}", xlabel="tokens read", ylabel="achieved CR", yscale="log"
    )
    along.yaxis.set_major_formatter("{x:g}")
    along.yaxis.set_minor_formatter("{x:g}")
    along.grid(alpha=0.3, which="both")
    along.legend(frameon=False)
  figure.suptitle(title)
  return figure


@picture
def levels(plt, rows: list[dict], retrofit: str) -> Any:
  """KL against achieved CR: one curve a text for gates read at several levels, a mark for each retrofit of one CR.

  Args:
    rows: each with `method`, `text`, `achieved_cr`, `mean` and `standard_error` of its KL, in nats a token; a row of
      `retrofit` also with its `budget`, {"cr": the CR asked for}.
    retrofit: the method whose rows are the curves.
  """
  figure, axis = plt.subplots(figsize=(8, 5.4), layout="constrained")
  texts = list(dict.fromkeys(row["text"] for row in rows))
  marks = dict(zip(dict.fromkeys(row["method"] for row in rows if row["method"] != retrofit), "sD^vP", strict=False))
  for text, color in zip(texts, METHODS, strict=False):
    curve = sorted((r["achieved_cr"], r["mean"], r["standard_error"]) for r in rows
                   if (r["method"], r["text"]) == (retrofit, text))  # fmt: skip
    axis.errorbar(*zip(*curve, strict=True), color=color, marker="o", ms=4, lw=1.6, capsize=2, label=text)
    for method, marker in marks.items():
      for row in (r for r in rows if (r["method"], r["text"]) == (method, text)):
        axis.errorbar(
          row["achieved_cr"], row["mean"], row["standard_error"], color=color, marker=marker, ms=8, mfc="w", capsize=2
        )
  axis.set(title=f"{retrofit}: one retrofit read at several CRs", xlabel="achieved CR", ylabel="KL, nats a token")
  axis.set(xscale="log", yscale="log")
  asked = sorted({row["budget"]["cr"] for row in rows if row["method"] == retrofit})
  axis.set_xticks(asked, [f"{cr:g}" for cr in asked])
  axis.set_xticks([], minor=True)
  axis.set_yticks(shown := [0.01, 0.02, 0.05, 0.1], [f"{kl:g}" for kl in shown])
  axis.set_yticks([], minor=True)
  axis.grid(alpha=0.25)
  bare(axis)
  handles, _ = axis.get_legend_handles_labels()
  handles += [plt.Line2D([], [], color=DENSE, marker=marker, ms=8, mfc="w", lw=0, label=method)
              for method, marker in marks.items()]  # fmt: skip
  axis.legend(handles=handles, frameon=False)
  return figure
