"""The one module that imports matplotlib, and the figures of caches, training and ablations.

matplotlib is optional: without it a figure is skipped, and the log says so.
"""

from __future__ import annotations

import functools
import json
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

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
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}")
    try:
      figure.savefig(part, dpi=120, format="png")
      os.replace(part, path)
    finally:
      part.unlink(missing_ok=True)
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


@picture
def training(plt, log: Path) -> Any:
  """A training's log: loss, target and achieved compression, gates, and the gate rate of every layer and head.

  Without a target only the loss is drawn.

  Args:
    log: the lines of log.jsonl, a JSON object for each step; lines with `gate_rates` [L][K] give the lower row. Nothing
      is drawn before the first step.
  """
  lines = [json.loads(line) for line in log.read_text().splitlines()]
  if not lines:
    return None
  steps, heads = [line["step"] for line in lines], [line for line in lines if "gate_rates" in line]
  column = lambda name: [math.nan if line.get(name) is None else line[name] for line in lines]
  ramps = "target_cr" in lines[-1]
  top = ["loss", "cr", "gates"] if ramps else ["loss"]
  layout = [top, ["heads", "heads", "layers"]] if heads else [top]
  figure, axes = plt.subplot_mosaic(layout, figsize=(15 if ramps else 7, 4.2 * len(layout)), layout="constrained")
  name, label = ("kl", "KL, nats per token") if "kl" in lines[-1] else ("nll", "next token, nats")
  axes["loss"].plot(steps, column(name), lw=0.6, color=DMS)
  axes["loss"].set(title="distillation loss" if name == "kl" else "language-model loss", ylabel=label)
  if max(column(name), default=0) > 0:
    axes["loss"].set_yscale("log")
  if ramps:
    axes["cr"].plot(steps, column("target_cr"), "k--", label="target (share of decisions)")
    axes["cr"].plot(steps, column("achieved_cr"), lw=0.6, color=DMS, label="achieved at the row length")
    axes["cr"].set(title="compression", ylabel="CR")
    axes["gates"].plot(steps, column("gate_rate"), lw=0.6, color=DMS, label="decisions that evict")
    axes["gates"].plot(steps, column("compression_loss"), lw=0.6, color=DENSE, label="compression loss")
    axes["gates"].set(title="gates", ylim=(0, 1))
  for axis in (axes[part] for part in top):
    axis.set_xlabel("step")
    axis.grid(alpha=0.3)
    if axis.get_legend_handles_labels()[0]:
      axis.legend()
  if heads:
    shade = dict(vmin=0.0, vmax=1.0, cmap="viridis", aspect="auto", interpolation="nearest", origin="lower")
    last = list(zip(*heads[-1]["gate_rates"], strict=True))  # [K][L]
    image = axes["heads"].imshow(last, **shade)
    axes["heads"].set(
      title=f"decisions that evict, step {heads[-1]['step']}", xlabel="layer", ylabel="KV head", yticks=range(len(last))
    )
    means = [[sum(layer) / len(layer) for layer in line["gate_rates"]] for line in heads]  # [checkpoints][L]
    axes["layers"].imshow(list(zip(*means, strict=True)), **shade)
    shown = range(0, len(heads), max(1, len(heads) // 6))
    axes["layers"].set_xticks(shown, [str(heads[i]["step"] + 1) for i in shown])
    axes["layers"].set(title="the same over training, mean over heads", xlabel="steps", ylabel="layer")
    for axis in (axes["heads"].xaxis, axes["layers"].yaxis):
      axis.get_major_locator().set_params(integer=True)
    figure.colorbar(image, ax=[axes["heads"], axes["layers"]], label="share of tokens")
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
  divergence = "KL(original || retrofit), nats per token"
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
  both.set(xlabel="achieved CR", ylabel="KL, nats per token")
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
