"""Results of several runs side by side: a point for each setting of a method on each task."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import numpy as np

from experiments.methods import pareto
from experiments.methods.records import Record
from experiments.methods.summary import COSTS, Entry, mean_cost, summarise, total_cost
from experiments.methods.trace import Trace
from experiments.reports import styles
from experiments.reports.runs import Run, content, is_text, told_apart
from experiments.reports.tables import short_names
from experiments.tasks import TASKS

BASELINES = ("vanilla", "original")  # names of the dense method, in order of preference
MAIN = ("accuracy", "score", "acc_norm", "acc")  # a task's main metric is the first of these that it has
# Costs of a prompt, summed over its chains. Questions, which write nothing, have "held" alone.
AXES = dict(zip(COSTS, ("KV reads a problem", "peak tokens a problem", "chain-seconds a problem"), strict=True))
AXIS_NAMES = {**AXES, "held": "tokens held at the end"}
LOWER_COST = {"reads": "KV reads", "peak": "peak tokens", "seconds": "time", "held": "tokens held"}


@dataclasses.dataclass(frozen=True)
class Setting:
  """A method with its budget, W chains a prompt and at most L new tokens a chain."""

  method: str
  budget: tuple[tuple[str, float], ...]
  chains: int
  max_tokens: int

  @classmethod
  def of(cls, about: Record | Trace | Entry) -> Setting:
    """The setting of a record, a trace or an entry."""
    return cls(about.method, tuple(sorted(about.budget.items())), about.chains, about.max_tokens)

  @property
  def who(self) -> tuple:
    """The method and its budget."""
    return self.method, self.budget

  @property
  def limit(self) -> str:
    """The bound on its cache, for readers."""
    return styles.limit(dict(self.budget))

  def detail(self, swept: bool = False) -> str:
    """All but the method, without what is self-evident; in a sweep over W that is said even if it is 1."""
    parts = [self.limit, f"W {self.chains}" if swept or self.chains > 1 else ""]
    parts += [f"L {self.max_tokens:,}" if self.max_tokens else ""]
    return ", ".join(part.replace(" ", "\u00a0") for part in parts if part)

  def __str__(self) -> str:
    return ", ".join(filter(None, [self.method, self.detail()]))


@dataclasses.dataclass(frozen=True)
class Point:
  """The result of one setting on one task.

  Fields:
    entries: by metric, over the setting's W chains.
    metric: the one that charts and the first table show.
    costs: of a prompt on each axis, for W chains.
  """

  setting: Setting
  entries: dict[str, Entry]
  metric: str
  costs: dict[str, float]

  @property
  def main(self) -> Entry:
    return self.entries[self.metric]


@dataclasses.dataclass(frozen=True)
class Panel:
  """All settings on one task, or on one text under its name, at one length, with one model.

  `metric` is the task's main metric; over several chains points show their vote, or the best of them.
  """

  model: str
  task: str
  length: int | None
  metric: str
  points: list[Point]

  @property
  def name(self) -> str:
    return self.task if self.length is None else f"{self.task}, T {self.length:,}"

  def axis_name(self, axis: str) -> str:
    """A cost axis for readers; a text's costs are those of a chunk."""
    return AXIS_NAMES[axis].replace("problem", "chunk") if self.metric in styles.LOWER else AXIS_NAMES[axis]

  def axes(self) -> list[str]:
    """The cost axes on which a point can be drawn."""
    return [axis for axis in AXIS_NAMES if any(axis in p.costs and math.isfinite(p.main.mean) for p in self.points)]

  def drawn(self, axis: str, method: str) -> list[Point]:
    """A method's points on one axis: those of known cost whose score is a finite number."""
    own = [point for point in self.points if point.setting.method == method and axis in point.costs]
    return [point for point in own if math.isfinite(point.main.mean)]

  def pairs(self, axis: str, method: str) -> list[tuple[float, float]]:
    """(cost, value) of a method's points on one axis."""
    return [(point.costs[axis], point.main.mean) for point in self.drawn(axis, method)]

  def frontier(self, axis: str, method: str) -> list[tuple[float, float]]:
    """The (cost, value) pairs of a method that none of its cheaper ones beats, by rising cost."""
    sign = -1 if self.metric in styles.LOWER else 1
    return [
      (cost, sign * value) for cost, value in pareto.frontier([(c, sign * v) for c, v in self.pairs(axis, method)])
    ]

  def divergence(self) -> Panel | None:
    """This text's panel of the KL from the original; None where no method but the original itself has one.

    A KL of 0, the original's own, has no place on a logarithmic axis.
    """
    points = [
      dataclasses.replace(point, metric="kl")
      for point in self.points
      if "kl" in point.entries and point.entries["kl"].mean > 0
    ]
    return dataclasses.replace(self, metric="kl", points=points) if points else None

  def margin(self, axis: str, method: str, baseline: str, log: bool = False) -> float | None:
    """The mean of the method's frontier minus the baseline's over the costs that both cover; None without any."""
    return pareto.margin(self.pairs(axis, method), self.pairs(axis, baseline), log)


@dataclasses.dataclass(frozen=True)
class Results:
  """What a report shows.

  Fields:
    panels, texts: of tasks, and of texts.
    traces: (model, trace) each.
    warnings: sentences about scores that are no numbers.
  """

  runs: list[Run]
  panels: list[Panel]
  texts: list[Panel]
  traces: list[tuple[str, Trace]]
  methods: list[str]
  baseline: str
  warnings: list[str] = dataclasses.field(default_factory=list)


# Settings and their results -------------------------------------------------------------------------------------------


def _baseline(settings: Sequence[Setting], own: Setting, baseline: str) -> Setting | None:
  """The baseline's setting to compare with: the same budget if it has that one, else its only one, of equal W and L."""
  same = [
    each
    for each in settings
    if (each.method, each.chains, each.max_tokens) == (baseline, own.chains, own.max_tokens)
  ]  # fmt: skip
  equal = [each for each in same if each.budget == own.budget]
  return equal[0] if equal else same[0] if len(same) == 1 else None


def _costs(chains: Sequence[Record], width: int) -> dict[str, float]:
  """The cost of `width` chains of a prompt on each axis; an axis that a record lacks is left out.

  Questions whose choices are only scored have "held", tokens held at the end; chunks of a text have "reads", too. The
  time of scoring is not the method's.
  """
  if any(record.peak is None for record in chains):
    held = {"held": float(np.mean([record.tokens / record.achieved_cr for record in chains]))}
    return held if (reads := mean_cost(chains, "reads")) is None else {**held, "reads": reads}
  return {axis: cost for axis in COSTS if (cost := total_cost(chains, axis, width))}


def main_metric(metrics: Sequence[str], best_of_all: bool = False) -> str:
  """The metric that charts and the first table show.

  Args:
    best_of_all: the best of several chains counts, not their majority (`WritingTask.best_of_all`).
  """
  over_chains = ("pass@", "majority@") if best_of_all else ("majority@", "pass@")
  aggregates = [metric for start in over_chains for metric in metrics if metric.startswith(start)]
  return next(iter([*aggregates, *(metric for metric in MAIN if metric in metrics), *metrics]))


def _points(chains: Sequence[Record], baseline: str, widths: Sequence[int], best_of_all: bool) -> list[Point]:
  """A point for each setting, in order, with differences from the baseline's setting.

  Records of W chains also give points for fewer chains: a single one, and those in `widths`.
  """
  groups: dict[Setting, list[Record]] = {}
  for record in chains:
    groups.setdefault(Setting.of(record), []).append(record)
  points: dict[Setting, Point] = {}
  for setting, own in sorted(groups.items(), key=lambda item: -item[0].chains):  # more chains, better estimates
    base = _baseline(list(groups), setting, baseline)
    pair = dict.fromkeys(each for each in (base, setting) if each is not None)
    # Each setting stands as a method of its own, so that the summary pairs settings.
    renamed = [dataclasses.replace(record, method=str(each)) for each in pair for record in groups[each]]
    by_width: dict[int, dict[str, Entry]] = {}
    for entry in summarise(renamed, str(base), widths):
      if entry.method == str(setting):
        by_width.setdefault(entry.chains, {})[entry.metric] = dataclasses.replace(entry, method=setting.method)
    for width, entries in by_width.items():
      metric = main_metric(list(entries), best_of_all)
      at = dataclasses.replace(setting, chains=width)
      points.setdefault(at, Point(at, entries, metric, _costs(own, width)))
  order = list(groups)
  place = lambda point: min(i for i, each in enumerate(order) if (each.method, each.budget) == point.setting.who)
  return sorted(points.values(), key=lambda point: (place(point), point.setting.chains, point.setting.max_tokens))


def _points_of_entries(entries: Sequence[Entry], baseline: str) -> list[Point]:
  """Points of entries that have no records; differences are those of means, with errors only as far as they are known.

  Their summary may have had another baseline.
  """
  by_setting: dict[Setting, dict[str, Entry]] = {}
  for entry in entries:
    by_setting.setdefault(Setting.of(entry), {})[entry.metric] = entry
  points = []
  for setting, own in by_setting.items():
    base = _baseline(list(by_setting), setting, baseline)
    bases = {} if base in (None, setting) else by_setting[base]
    for metric, entry in own.items():
      other = bases.get(metric)
      paired = other is not None and other.samples == entry.samples
      difference = entry.mean - other.mean if paired else None
      known = paired and entry.difference is not None and math.isclose(entry.difference, difference, rel_tol=1e-6)
      error = entry.difference_se if known else None
      own[metric] = dataclasses.replace(entry, difference=difference, difference_se=error)
    points.append(Point(setting, own, main_metric(list(own)), {}))
  return points


def _check_prompts(model: str, task: str, chains: Sequence[Record]) -> None:
  """Raises ValueError if settings of equal W and L answered different prompts, whose pairing would mean nothing."""
  asked: dict[tuple, str] = {}
  for record in chains:
    about = content(record)
    if asked.setdefault((record.chains, record.max_tokens), about) != about:
      raise ValueError(
        f"--runs: the runs of {model} on {task} have different prompts, settings or data (--limit, --seed, "
        "--temperature, ...), so they cannot be compared; report them apart"
      )


def _not_numbers(runs: Sequence[Run]) -> list[str]:
  """A sentence for each metric of each method on a task that some record or entry has no finite number for."""
  graded: dict[tuple, list[float]] = {}
  name = lambda about: ", ".join(filter(None, [about.method, styles.limit(about.budget)]))
  for run in runs:
    for record in [*run.records, *run.texts]:
      for metric, value in record.grades.items():
        graded.setdefault((name(record), record.task, metric), []).append(value)
    for entry in run.entries:
      graded.setdefault((name(entry), entry.task, entry.metric), []).append(entry.mean)
  wrong = {about: sum(not math.isfinite(value) for value in values) for about, values in graded.items()}
  return [
    f"{method} on {task}: {metric} is no finite number in {count:,} of {len(graded[method, task, metric]):,} records"
    for (method, task, metric), count in wrong.items()
    if count
  ]


def collect(runs: Sequence[Run], baseline: str = "") -> Results:
  """The results of all runs.

  Args:
    baseline: the method that others are compared with; "": the dense one if there is one, else the first.

  Raises:
    ValueError: no method has the baseline's name, or the runs cannot be compared.
  """
  runs = told_apart(runs)
  names = list(dict.fromkeys(method for run in runs for method in run.methods))
  if baseline and baseline not in names:
    raise ValueError(f"--baseline={baseline}: no run has this method; there are {', '.join(names)}")
  short = short_names(names)
  base = short[baseline or next((name for name in BASELINES if name in names), names[0])]
  runs = [run.renamed(lambda method: short.get(method, method)) for run in runs]
  tasks: dict[tuple, list[Record]] = {}
  texts: dict[tuple, list[Record]] = {}
  unrecorded: dict[tuple, list[Entry]] = {}
  called: dict[str, str] = {}  # a text's content -> its name
  for run in runs:
    for record in run.records:
      tasks.setdefault((run.model, record.task, record.length), []).append(record)
    for record in run.texts:
      name = run.text(record.task)
      name = name if name not in called.values() else f"{name} ({run.folder.name})"
      called.setdefault(content(record), name)
      texts.setdefault((run.model, content(record), record.length), []).append(record)
    for entry in run.entries:
      where = is_text(entry.task), run.model, run.text(entry.task), entry.length
      if entry not in unrecorded.setdefault(where, []):
        unrecorded[where].append(entry)
  widths = sorted({width for run in runs for width in run.listed("chains") if isinstance(width, int)})
  panels = []
  for (model, task, length), chains in tasks.items():
    _check_prompts(model, task, chains)
    points = _points(chains, base, widths, getattr(TASKS.get(task), "best_of_all", False))
    single = next((point for point in points if point.setting.chains == 1), points[0])
    panels.append(Panel(model, task, length, single.metric, points))
  shown = []
  for (model, about, length), chunks in texts.items():
    points = _points(chunks, base, (), False)
    shown.append(Panel(model, called[about], length, points[0].metric, points))
  for (of_text, model, name, length), own in unrecorded.items():
    points = _points_of_entries(own, base)
    (shown if of_text else panels).append(Panel(model, name, length, points[0].metric, points))
  return Results(
    runs, panels, shown, [(run.model, each) for run in runs for each in run.traces],
    sorted(dict.fromkeys(short.values()), key=lambda name: name != base), base, _not_numbers(runs),
  )  # fmt: skip


def time_remark(runs: Sequence[Run]) -> str:
  """What keeps the times of runs from being compared; "" if nothing does."""
  wrote = [run for run in runs if any(record.peak is not None for record in run.records)]
  machine = lambda run: f"{run.environment.get('device', 'device unknown')}, width {run.config.get('width', 'unknown')}"
  where = {run.folder.name: machine(run) for run in wrote}
  found = []
  if len(set(where.values())) > 1:
    about = "; ".join(f"{name}: {machine}" for name, machine in where.items())
    found.append(f"The runs wrote on different devices or with different --width, so their times differ too ({about}).")
  timed = lambda run: all(record.seconds is not None for record in run.records if record.peak is not None)
  if without := ", ".join(run.folder.name for run in wrote if not timed(run)):
    found.append(
      f"Some records of {without} have no times. Means are over those that do; settings without any are left out."
    )
  return " ".join(found)
