"""The page of a report: one HTML file without scripts, fonts or pictures from elsewhere."""

from __future__ import annotations

import dataclasses
import itertools
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
import numpy as np

from experiments.common import program
from experiments.methods.records import Record
from experiments.methods.trace import Trace
from experiments.reports import charts, styles
from experiments.reports.results import LOWER_COST, Panel, Point, Results, Setting, time_remark
from experiments.reports.tables import note
from experiments.tasks.base import Task

TEMPLATES = Path(__file__).parent / "templates"
# Upper ends of the shades of a chain's text: shares of heads that hold a token; shade 0 is for tokens no head holds.
# Methods that keep a fourth or an eighth of the tokens need fine steps at the low end.
SHADES = (0.0, 0.1, 0.2, 0.35, 0.6, 1.0)
SCORE = (("mean", "mean"), ("standard_error", "SE"), ("difference", "difference"), ("difference_se", "SE"))
LONGEST = 22  # characters of a method's name in a chart


def short_name(name: str) -> str:
  """A method's name, cut in the middle to LONGEST characters."""
  half = (LONGEST - 1) // 2
  return name if len(name) <= LONGEST else f"{name[:half]}…{name[-half:]}"


# Tables ---------------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Row:
  """A row of a table: its name in the method's style, `detail` in small type after it, and its cells.

  A cell is a text, or (text, True) to stress it. A line parts rows of different `group`s, by default their names.
  """

  name: str
  cells: list[Any]
  style: styles.Style | None = None
  detail: str = ""
  group: Any = None

  @property
  def part(self) -> Any:
    return self.name if self.group is None else self.group


@dataclasses.dataclass(frozen=True)
class Table:
  """A table of the page.

  Fields:
    caption: what it shows.
    columns: names of the columns, with units; the first is that of the rows' names. All others hold numbers, except
      those in `words`.
    groups: (title, columns spanned) of an upper row of the head; empty: there is none.
  """

  caption: str
  columns: list[str]
  rows: list[Row]
  groups: list[tuple[str, int]] = dataclasses.field(default_factory=list)
  words: tuple[str, ...] = ("bound on the cache", "metric")


def _comparable(panels: Sequence[Panel]) -> list[list[Panel]]:
  """Panels that share a table: those with equal choices of W and L, and those with a single choice together."""
  groups: dict[Any, list[Panel]] = {}
  for panel in panels:
    shapes = frozenset((point.setting.chains, point.setting.max_tokens) for point in panel.points)
    groups.setdefault(shapes if len(shapes) > 1 else None, []).append(panel)
  return list(groups.values())


def _problems(panel: Panel) -> str:
  """The number of problems behind a panel's main entries, as a head says it: "n = 100"."""
  counts = {point.main.samples for point in panel.points}
  return f"n = {min(counts):,}" if len(counts) == 1 else f"n = {min(counts):,} to {max(counts):,}"


def _pairs(panels: Sequence[Panel], baseline: str, of: str) -> str:
  """How differences from the baseline are made, in words; `of` names what is paired."""
  budgets = {point.setting.budget for panel in panels for point in panel.points if point.setting.method == baseline}
  return f"from {baseline}{' under the same budget' * (len(budgets) > 1)}, paired {of} by {of}"


def overview(panels: Sequence[Panel], look: Mapping[str, styles.Style], kind: str, baseline: str) -> list[Table]:
  """Every setting on every task: main metrics ("scores"), or their differences from the baseline ("differences").

  A row is a method under a budget, and in sweeps also W and L. Tasks with other sweeps have a table of their own.
  """
  scores, order, tables = kind == "scores", list(look), []
  for group in _comparable(panels):
    swept = len({(p.setting.chains, p.setting.max_tokens) for p in group[0].points}) > 1
    name = lambda each, swept=swept: each if swept else dataclasses.replace(each, chains=1, max_tokens=0)
    found = [{name(point.setting): point for point in panel.points} for panel in group]
    settings = list(dict.fromkeys(setting for points in found for setting in points))
    settings.sort(key=lambda each: (each.max_tokens, each.chains, order.index(each.method)))  # budgets keep their order
    rows = []
    for setting in settings:
      cells: list[Any] = []
      for panel, points in zip(group, found, strict=True):
        entry = points[setting].main if setting in points else None
        mean, error = (None, None) if entry is None else (entry.mean, entry.standard_error)
        if not scores and entry is not None:
          mean, error = entry.difference, entry.difference_se
        clear = not scores and mean is not None and error is not None and abs(mean) > 2 * error
        cells += [(styles.number(panel.metric, mean, "" if scores else "+"), clear), styles.number(panel.metric, error)]
        cells += [f"{entry.achieved_cr:.2f}" if entry else ""] * scores
      if any(text for text, _ in cells[:: 3 if scores else 2]):
        part = (setting.max_tokens, setting.chains) if swept else None
        rows.append(Row(setting.method, cells, look[setting.method], setting.detail(swept), part))
    each = ["score", "SE", "CR"] if scores else ["difference", "SE"]
    groups = [("", 1)] + [(f"{p.name}: {styles.named(p.metric)}, {_problems(p)}", len(each)) for p in group]
    caption = (
      "SE is one standard error over problems. CR is the achieved compression: tokens seen over tokens held."
      if scores
      else f"Differences are {_pairs(group, baseline, 'problem')}. SE is one standard error. Bold: above 2 SE."
    )
    if any(point.setting.chains > 1 for panel in group for point in panel.points):
      caption += " Over W > 1 chains a score is that of their majority vote, for programs that of the best chain."
    if rows:
      tables.append(Table(caption, ["setting", *each * len(group)], rows, groups))
  return tables


def figures(panel: Panel, look: Mapping[str, styles.Style]) -> Table:
  """Every figure of one task: a row for each setting and metric."""
  rows = [
    Row(point.setting.method, [
      point.setting.limit, f"{point.setting.chains}", f"{point.setting.max_tokens:,}", styles.named(metric),
      f"{e.samples:,}", styles.number(metric, e.mean), styles.number(metric, e.standard_error),
      styles.number(metric, e.difference, "+"), styles.number(metric, e.difference_se), f"{e.achieved_cr:.2f}",
      "" if e.tokens is None else f"{e.tokens / e.chains:,.0f}",
      *(styles.amount(point.costs[axis]) if axis in point.costs else "" for axis in panel.axes()),
    ], look[point.setting.method])
    for point in panel.points
    for metric, e in point.entries.items()
  ]  # fmt: skip
  columns = ["method", "bound on the cache", "W, chains", "L, new tokens", "metric", "problems", "score", "SE"]
  columns += ["difference", "SE of difference", "CR", "tokens a chain", *map(panel.axis_name, panel.axes())]
  return Table(f"All figures of {panel.name}", columns, rows)


def margins(panel: Panel, look: Mapping[str, styles.Style], baseline: str) -> Table | None:
  """Each method's margin over the baseline on each cost axis; None if there is none at all."""
  axes = panel.axes()
  rows = []
  for method in dict.fromkeys(point.setting.method for point in panel.points):
    found = [] if method == baseline else [panel.margin(axis, method, baseline) for axis in axes]
    if any(each is not None for each in found):
      cells = [styles.number(panel.metric, each, "+") or "NA" for each in found]
      rows.append(Row(method, cells, look[method]))
  caption = (
    f"Margin over {baseline} at equal cost, {styles.named(panel.metric)}: the mean distance of the two frontiers over "
    "the costs that both cover, linear in the cost. NA: they share no interval."
  )
  return Table(caption, ["method", *(f"at equal {LOWER_COST[axis]}" for axis in axes)], rows) if rows else None


def text_table(panel: Panel, look: Mapping[str, styles.Style], baseline: str) -> Table:
  """Perplexity and divergence of all settings on a text at one length.

  Differences of the divergence are left out where the baseline is the original: they are the divergence.
  """
  points = sorted(panel.points, key=lambda point: list(look).index(point.setting.method))
  value = lambda point, metric, field: getattr(point.entries[metric], field) if metric in point.entries else None
  original = all(value(point, "kl", "mean") == 0 for point in points if point.setting.method == baseline)
  columns = [
    (metric, field, head)
    for metric in ("perplexity", "kl") for field, head in SCORE
    if any(value(point, metric, field) is not None for point in points)
    and not (original and metric == "kl" and field.startswith("difference"))
  ]  # fmt: skip
  rows = []
  for point in points:
    signs = ["+" * (field == "difference") for _, field, _ in columns]
    cells = [styles.number(m, value(point, m, field), sign) for (m, field, _), sign in zip(columns, signs, strict=True)]
    cells.append(f"{point.main.achieved_cr:.2f}")
    method = point.setting.method
    rows.append(Row(method, cells, look[method], point.setting.limit))
  heads = {"perplexity": f"perplexity, {_problems(panel)}", "kl": "KL from the original, nats a token"}
  widths = {metric: sum(each == metric for each, *_ in columns) for metric in heads}
  groups = [("", 1), *((heads[metric], width) for metric, width in widths.items() if width), ("", 1)]
  caption = "Lower is better. SE is one standard error over the n chunks. CR is that at the end of a chunk."
  if any(field == "difference" for _, field, _ in columns):
    caption += f" Differences are {_pairs([panel], baseline, 'chunk')}."
  return Table(caption, ["setting", *(head for *_, head in columns), "CR"], rows, groups)


# Charts ---------------------------------------------------------------------------------------------------------------


def _mark(panel: Panel, point: Point, axis: str) -> charts.Mark:
  entry, cost = point.main, point.costs[axis]
  error = entry.standard_error
  about = f"{point.setting}: {styles.number(panel.metric, entry.mean)}"
  about += "" if error is None else f" ± {styles.number(panel.metric, error)}"
  about += f" ({styles.named(panel.metric)}), {styles.amount(cost)} {panel.axis_name(axis)}"
  return charts.Mark(cost, entry.mean, error, about)


def tradeoff(panel: Panel, axis: str, look: Mapping[str, styles.Style], chance: float | None) -> dict[str, Any]:
  """The chart of a task's main metric against one cost."""
  series = []
  for method in [name for name in look if panel.drawn(axis, name)]:
    marks = [_mark(panel, point, axis) for point in panel.drawn(axis, method)]
    series.append(charts.Series(short_name(method), look[method], marks, panel.frontier(axis, method)))
  cost, name, lower = panel.axis_name(axis), styles.named(panel.metric), panel.metric in styles.LOWER
  x, y, percent = f"{cost}, log scale", name + ", log scale" * lower, styles.unit(panel.metric) == "%"
  drawn = charts.tradeoff(series, x=x, y=y, show=styles.short, chance=chance, percent=percent, log=lower)
  best = [(each.name, styles.number(panel.metric, each.frontier[-1][1])) for each in series]
  told = "; ".join(f"{who} {'down' if lower else 'up'} to {value}" for who, value in best)
  alt = f"{panel.name}: {name} against {cost}. {told}. The figures are in the tables."
  return {**drawn, "alt": alt}


def heat_map(name: str, style: styles.Style, shares: np.ndarray, chains: int) -> dict[str, Any]:
  """A map of the share of tokens that each head holds; columns are layers.

  Args:
    shares: [L, K], 0 to 1.
    chains: chains that the shares are means of.
  """
  layers, heads = shares.shape
  cell = max(6.0, min(36.0, 400 / layers))
  means = shares.mean(axis=1)
  alt = (
    f"{name}: heads hold {shares.mean():.0%} of the tokens on average; layer {means.argmin()} the least, "
    f"{means.min():.0%}, layer {means.argmax()} the most, {means.max():.0%}."
  )
  cells = [
    {"x": 26 + cell * layer, "y": cell * head, "share": float(shares[layer, head]),
     "about": f"layer {layer}, KV head {head}: {shares[layer, head]:.0%} of the tokens"}
    for layer, head in itertools.product(range(layers), range(heads))
  ]  # fmt: skip
  step = max(1, round(layers / 6))
  rows = [Row(f"{layer}", [f"{100 * share:.1f}" for share in shares[layer]]) for layer in range(layers)]
  table = Table(
    f"{name}: share of tokens held at the end, %", ["layer", *(f"KV head {head}" for head in range(heads))], rows,
  )  # fmt: skip
  return {
    "name": name, "style": style, "alt": alt, "cell": cell, "cells": cells, "table": table, "chains": chains,
    "mean": f"{shares.mean():.0%}", "width": 30 + cell * layers, "height": cell * heads + 18,
    "layers": [(26 + cell * (layer + 0.5), layer) for layer in range(0, layers, step)],
    "heads": [(cell * (head + 0.5), head) for head in range(0, heads, max(1, round(heads / 4)))],
  }  # fmt: skip


# Chains ---------------------------------------------------------------------------------------------------------------


def level(share: float) -> int:
  """The shade of a token by the share of heads that hold it, an index into SHADES."""
  return next(shade for shade, most in enumerate(SHADES) if share <= most)


def noted(tokens: Sequence[str], notes: tuple[str, str] | None) -> list[bool]:
  """Which tokens belong to notes: from the first word of `notes` to the next of its second; tokens are words."""
  inside, found = False, []
  for token in tokens:
    inside = inside or (notes is not None and token.strip() == notes[0])
    found.append(inside)
    inside = inside and token.strip() != notes[1]
  return found


def spans(tokens: Sequence[str], held: Sequence[float], marked: Sequence[bool]) -> list[tuple[int, str, bool]]:
  """Neighbouring tokens of one shade, marked or not, as one (level, text, marked)."""
  runs = itertools.groupby(zip(tokens, held, marked, strict=True), key=lambda each: (level(each[1]), each[2]))
  return [(shade, "".join(token for token, *_ in own), mark) for (shade, mark), own in runs]


def traced_chain(
  trace: Trace, style: styles.Style, record: Record | None, notes: tuple[str, str] | None = None
) -> dict[str, Any]:
  """A traced chain for the template: the prompt's and the written tokens in shades, with its notes marked."""
  held, read = np.array(trace.held), trace.read
  marked = [False] * read + noted(trace.tokens[read:], notes)
  return {
    "title": str(Setting.of(trace)), "style": style, "grades": _grades(record),
    "prompt": spans(trace.tokens[:read], trace.held[:read], marked[:read]),
    "written": spans(trace.tokens[read:], trace.held[read:], marked[read:]),
    "summary": f"{len(held):,} tokens, {trace.read:,} of them the prompt. A head holds {held.mean():.0%} of them at "
    "the end; " + (f"{np.mean(held == 0):.0%} are held by no head." if held.min() == 0 else "some head holds each."),
    "dense": bool((held == 1).all()),
  }  # fmt: skip


def _grades(record: Record | None) -> str:
  """A chain's grades and its time, for readers; "" for a chain without a record."""
  if record is None:
    return ""
  told = [styles.told(name, value) for name, value in record.grades.items()]
  return ", ".join([*told, *([] if record.seconds is None else [f"{styles.amount(record.seconds)} s"])])


def chains(results: Results, most: int, tasks: Mapping[str, type[Task]]) -> list[dict[str, Any]]:
  """Chains to show, grouped by prompt, at most `most` prompts of a task: traced ones, or plain texts without traces."""
  look = styles.styles(results.methods, results.baseline)
  by_key = {}
  for run in results.runs:
    for record in run.records:
      about = (record.task, record.length, str(record.prompt), record.chain)
      by_key[run.model, *about, Setting.of(record)] = record
  groups: dict[tuple, list[dict]] = {}
  for model, each in results.traces:
    where = model, each.task, each.length, str(each.prompt), each.chain
    record = by_key.get((*where, Setting.of(each)))
    groups.setdefault(where, []).append(
      traced_chain(each, look[each.method], record, getattr(tasks.get(each.task), "notes", None))
    )
  if not results.traces:
    largest: dict[tuple, tuple] = {}  # of a task's sweep, the setting with most new tokens, then most chains
    for *where, setting in by_key:
      largest[where[1], where[2]] = max(largest.get((where[1], where[2]), (0, 0)), (setting.max_tokens, setting.chains))
    for (*where, setting), record in by_key.items():
      shape = setting.max_tokens, setting.chains
      if record.text is not None and record.chain == 0 and shape == largest[where[1], where[2]]:
        plain = {"title": str(setting), "style": look[setting.method], "grades": _grades(record), "prompt": []}
        plain |= {"written": [(None, record.text, False)], "summary": f"{record.tokens:,.0f} tokens", "dense": False}
        groups.setdefault(tuple(where), []).append(plain)
  taken: dict[tuple, int] = {}
  shown = []
  for (model, task, length, prompt, chain), own in groups.items():
    taken[model, task, length] = taken.get((model, task, length), 0) + 1
    if taken[model, task, length] <= most:
      name = task if length is None else f"{task}, T {length:,}"
      own.sort(key=lambda each: each["dense"])
      shown.append({"title": f"{name}: problem {prompt}" + f", chain {chain}" * (chain > 0), "chains": own})
  return shown


# The page -------------------------------------------------------------------------------------------------------------


def notes(panels: Sequence[Panel], baseline: str, tasks: Mapping[str, type[Task]]) -> dict[str, str]:
  """A sentence for each task on which the baseline is at chance or below the task's floor, by the panel's name."""
  found = {}
  for panel in panels:
    base = next((p.main for p in panel.points if p.setting.method == baseline), None)
    if base is not None and panel.task in tasks and (why := note(base, tasks[panel.task])):
      found[panel.name] = f"{panel.name}: {why}, so differences between methods say little here."
  return found


def _sections(results: Results, tasks: Mapping[str, type[Task]]) -> list[dict[str, Any]]:
  """For each model its tables, charts and notes."""
  look, baseline = styles.styles(results.methods, results.baseline), results.baseline
  found = []
  for model in dict.fromkeys(panel.model for panel in results.panels):
    panels = [panel for panel in results.panels if panel.model == model]
    remarks = notes(panels, baseline, tasks)
    tradeoffs = []
    for panel in panels:
      chance = tasks[panel.task].chance.get(panel.metric) if panel.task in tasks else None
      tradeoffs.append({
        "panel": panel, "charts": [tradeoff(panel, axis, look, chance) for axis in panel.axes()],
        "margins": margins(panel, look, baseline), "note": remarks.get(panel.name), "figures": figures(panel, look),
      })  # fmt: skip
    scores, differences = (overview(panels, look, kind, baseline) for kind in ("scores", "differences"))
    found.append({
      "model": model, "scores": scores, "differences": differences, "notes": list(remarks.values()),
      "tradeoffs": tradeoffs,
    })  # fmt: skip
  return found


def _texts(results: Results, look: Mapping[str, styles.Style]) -> list[dict[str, Any]]:
  """For each text its table and its charts of the KL."""
  found = []
  for panel in results.texts:
    shown = panel.divergence()
    drawn = [] if shown is None else [tradeoff(shown, axis, look, None) for axis in shown.axes()]
    found.append({"panel": panel, "table": text_table(panel, look, results.baseline), "charts": drawn})
  return found


def retention(results: Results) -> list[tuple[str, str, np.ndarray, int]]:
  """(name, method, shares [L, K], chains) of each traced setting: means over its chains. Dense ones are left out."""
  groups: dict[tuple, list[np.ndarray]] = {}
  many = len({model for model, _ in results.traces}) > 1
  for model, each in results.traces:
    setting = Setting.of(each)
    about = filter(None, [model if many else "", setting.method, setting.limit])
    groups.setdefault((", ".join(about), setting.method), []).append(np.array(each.retention))
  for (name, _), own in groups.items():
    if len({shares.shape for shares in own}) > 1:
      raise ValueError(f"--runs: traces of {name} have different numbers of layers or heads; report the models apart")
  found = [(name, method, np.mean(own, axis=0), len(own)) for (name, method), own in groups.items()]
  return [each for each in found if (each[2] < 1).any()]


def uneven(shares: np.ndarray) -> bool:
  """Whether heads hold different shares of the tokens, [L, K]; under a budget they all hold the same."""
  return bool(np.ptp(shares) > 0.005)


def render(
  results: Results, tasks: Mapping[str, type[Task]], title: str = "", prompts: int = 2, *,
  template: str = "report.html", **more: Any,
) -> str:  # fmt: skip
  """The page as HTML.

  Args:
    tasks: the task classes by name, which have the scores of random answers.
    title: of the page; default the models' names.
    prompts: of each task, whose chains are shown.
    template: report.html, or a template that extends it; `more` is what its blocks need.
  """
  look = styles.styles(results.methods, results.baseline)
  environment = jinja2.Environment(
    loader=jinja2.FileSystemLoader(TEMPLATES), autoescape=True, trim_blocks=True, lstrip_blocks=True,
    undefined=jinja2.StrictUndefined,
  )  # fmt: skip
  models = list(dict.fromkeys(run.model for run in results.runs))
  held = retention(results)
  maps = [heat_map(name, look[method], shares, count) for name, method, shares, count in held if uneven(shares)]
  even = [(look[method], f"{name}: {each.mean():.0%}") for name, method, each, _ in held if not uneven(each)]
  runs = [
    {"run": run, "config": json.dumps(program.to_plain(run.config), indent=2, ensure_ascii=False)}
    for run in results.runs
  ]
  text = environment.get_template(template).render(
    title=title or f"{', '.join(models)}: methods, tasks, budgets", models=models, results=results, look=look,
    marks=charts.MARKS, sections=_sections(results, tasks), maps=maps, even=even,
    chains=chains(results, prompts, tasks), texts=_texts(results, look), shades=SHADES, runs=runs,
    count=sum(len(run.records) + len(run.texts) for run in results.runs), time_remark=time_remark(results.runs), **more,
  )  # fmt: skip
  return f"{text.strip()}\n"
