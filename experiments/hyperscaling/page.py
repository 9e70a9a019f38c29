"""The page of a sweep: margins, frontiers, tables, and what each head retains. It extends the page of reports."""

from __future__ import annotations

import base64
import dataclasses
import itertools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from experiments.common import files
from experiments.hyperscaling import analysis, tables
from experiments.hyperscaling.analysis import Family, Margin
from experiments.hyperscaling.cells import RECORDS, TEXTS, Sweep, has_text
from experiments.hyperscaling.methods import DENSE, TRAINED, styled
from experiments.methods import pareto, records, trace
from experiments.methods.records import Record
from experiments.reports import page, styles
from experiments.reports.results import AXES, LOWER_COST, Panel, Results
from experiments.reports.runs import Run
from experiments.tasks import TASKS

CROWD = 150  # points of a panel beyond which a chart shows only those on a frontier


def uncrowded(panel: Panel, axes: Sequence[str] = ()) -> Panel:
  """The panel, or of a large one the points that are on their method's frontier on one of these axes; none: on any."""
  if len(panel.points) <= CROWD:
    return panel
  shown = set()
  for axis in axes or panel.axes():
    for method in dict.fromkeys(point.setting.method for point in panel.points):
      edge = set(pareto.frontier(panel.pairs(axis, method)))
      own = [point for point in panel.points if point.setting.method == method]
      shown |= {point.setting for point in own if (point.costs[axis], point.main.mean) in edge}
  return dataclasses.replace(panel, points=[point for point in panel.points if point.setting in shown])


def finding(made: Sequence[Margin]) -> str:
  """What the sweep found, in a sentence or two; "" without a margin of DMS over the dense cache."""
  said = []
  for axis in AXES:
    about = ("", TRAINED, DENSE, axis, "linear", "frontier")
    mean = next((m for m in made if (m.task, m.method, m.over, m.axis, m.scale, m.ends) == about), None)
    if mean is not None and mean.margin is not None:
      few = f" (over {tables.over_families(mean)})" if mean.without else ""
      said.append(f"{tables.said(mean)} points at equal {LOWER_COST[axis]}{few}")
  return f"{TRAINED} over {DENSE}, mean over families with 95% intervals: {'; '.join(said)}." if said else ""


def with_texts(folder: Path) -> list[Record]:
  """The records of a sweep that have texts, which are few; none if neither records nor texts are there."""
  path = next((folder / name for name in (RECORDS, TEXTS) if (folder / name).exists()), None)
  lines = files.text_lines("sets", path) if path else ()
  return [records.build(Record, where, json.loads(line)) for where, line in lines if has_text(line)]


def results(sweeps: Sequence[Sweep], methods: Sequence[str]) -> Results:
  """The sweeps as `experiments.reports` shows them: traced chains, their records, and runs; without panels."""
  runs, traces = [], []
  for sweep in sweeps:
    folders = sweep.parts or (sweep.folder,)
    own = [each for folder in folders for each in trace.read("sets", folder / trace.FILE)]
    own = [each for each in own if each.method in methods]
    wanted = {trace.chain_of(each) for each in own}
    kept = [r for folder in folders for r in with_texts(folder) if trace.chain_of(r) in wanted] if own else []
    runs.append(Run(sweep.folder, sweep.config, sweep.environment, kept, [], [], own))
    if not traces:  # chains of one seed are enough
      traces = [(runs[-1].model, each) for each in own]
  return Results(runs, [], [], traces, list(methods), DENSE, [])


def render(
  sweeps: Sequence[Sweep], families: Sequence[Family], panels: Sequence[Panel], made: Sequence[Margin], *,
  compare_cr: float, resamples: int, title: str, prompts: int, picture: Path | None = None,
) -> str:  # fmt: skip
  """The page as HTML.

  Args:
    panels: of `families`.
    made: their margins.
    compare_cr: the CR that is compared at equal L and W.
    title: of the page; "": a default.
    prompts: of each task, whose traced chains are shown.
    picture: a PNG of the margins; None for none.
  """
  methods = list(dict.fromkeys(method for found in families for method in found.methods))
  look = styles.styles(styled(methods), DENSE)
  axes = [axis for axis in AXES if any(axis in found.costs for found in families)]
  of = lambda scale, ends: [*filter(None, (tables.margins(made, axis, scale, ends, look) for axis in axes))]
  others = [how for how in itertools.product(analysis.SCALES, analysis.ENDS) if how != ("linear", "frontier")]
  frontiers = []
  for found, panel in zip(families, panels, strict=True):
    how = "W chains vote" if found.vote else "right if any of W chains is"
    note = f"{found.scores.shape[1]} problems, {found.seeds} model{'s' * (found.seeds > 1)}; {how}"
    chance = TASKS[found.task].chance.get("accuracy") if found.task in TASKS else None
    charts = [page.tradeoff(uncrowded(panel, [axis]), axis, look, chance) for axis in panel.axes()]
    frontiers.append({"name": panel.name, "note": note, "charts": charts})
  equals = [(panel.name, tables.equal(panel, TRAINED, compare_cr)) for panel in panels]
  about = (
    "A margin is the mean vertical distance of two Pareto frontiers over the largest interval of costs that both cover "
    f"(arXiv 2506.05345, appendix G). Intervals: {resamples:,} bootstrap resamples of each family's problems, each "
    "with frontiers and costs of its own. Scores and costs are means over "
    f"{len(sweeps)} model seed{'s' * (len(sweeps) > 1)}. Where frontiers are saturated, the costs that both cover jump "
    "from resample to resample: an interval is then wide, and may leave out its margin. Margins over all costs at "
    f"which both methods were measured, and on a log axis, stand below. {tables.LEGEND}"
  )
  seeds, problems = len(sweeps), sum(found.scores.shape[1] for found in families)
  kinds = "1 family" if len(families) == 1 else f"{len(families)} families"
  lead = f"{len(methods)} methods on {problems:,} problems of {kinds}, {seeds} model seed{'s' * (seeds > 1)}."
  more: dict[str, Any] = {
    "lead": lead,
    "finding": finding(made),
    "about": about,
    "frontiers": frontiers,
    "timed": "seconds" in axes,
    "margin_tables": [*of("linear", "frontier"), *filter(None, [tables.beside(made, look)])],
    "other_tables": [
      *filter(None, (tables.ways(made, axis, look) for axis in axes)),
      *filter(None, [tables.of_seeds(made, look)]),
      *(t for how in others for t in of(*how)),
    ],
    "picture": picture and base64.b64encode(picture.read_bytes()).decode(),
    "equals": [(name, t) for name, t in equals if t],
    "score_tables": [(p.name, tables.scores(p, look)) for p in panels],
  }
  return page.render(
    results(sweeps, styled(methods)), TASKS, title or "Hyper-scaling: accuracy at equal cost", prompts,
    template="hyperscale.html", **more,
  )  # fmt: skip
