"""Results of several runs side by side: a point for each setting of a method on each task."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from experiments.methods import pareto, records
from experiments.methods import trace as traces
from experiments.methods.records import Record
from experiments.methods.summary import Entry, summarise
from experiments.methods.trace import Trace
from experiments.reports import styles
from experiments.reports.tables import short_names
from experiments.tasks import TASKS

CONFIG, RECORDS, SUMMARY = "config.json", "records.jsonl", "summary.json"
BASELINES = ("vanilla", "original")  # names of the dense method, in order of preference
MAIN = ("accuracy", "score", "acc_norm", "acc")  # a task's main metric is the first of these that it has
# Costs of a prompt: fields of a record, summed over the prompt's chains. No record has `seconds` yet.
AXES = {"reads": "KV reads a problem", "peak": "peak tokens a problem", "seconds": "seconds a problem"}
AXIS_NAMES = {**AXES, "held": "tokens held at the end"}
LOWER_COST = {"reads": "KV reads", "peak": "peak tokens", "seconds": "time", "held": "tokens held"}


@dataclasses.dataclass(frozen=True)
class Run:
  """The content of one folder that `experiments.evaluate` wrote.

  Fields:
    config: flags of the run; empty if unknown.
    environment: versions and device; empty if unknown.
    entries: results that have no records, such as a text's perplexity.
  """

  folder: Path
  config: dict[str, Any]
  environment: dict[str, Any]
  records: list[Record]
  entries: list[Entry]
  traces: list[Trace]

  @property
  def model(self) -> str:
    """The name of the model's checkpoint; "model" if unknown."""
    return Path(str(self.config.get("checkpoint") or "model")).name


@dataclasses.dataclass(frozen=True)
class Setting:
  """A method with its budget, W chains a prompt and at most L new tokens a chain."""

  method: str
  budget: tuple[tuple[str, float], ...]
  chains: int
  max_tokens: int

  @classmethod
  def of(cls, about: Record | Trace) -> Setting:
    """The setting of a record or trace."""
    return cls(about.method, tuple(sorted(about.budget.items())), about.chains, about.max_tokens)

  @property
  def who(self) -> tuple:
    """The method and its budget."""
    return self.method, self.budget

  @property
  def limit(self) -> str:
    """The bound on its cache, for readers."""
    return styles.limit(dict(self.budget))

  @property
  def detail(self) -> str:
    """All but the method, without what is self-evident."""
    return self._detail(self.chains > 1)

  @property
  def full_detail(self) -> str:
    """`detail` with W even if it is 1, for sweeps over W."""
    return self._detail(True)

  def _detail(self, chains: bool) -> str:
    parts = [self.limit, f"W {self.chains}" if chains else ""]
    parts += [f"L {self.max_tokens:,}" if self.max_tokens else ""]
    return ", ".join(part.replace(" ", "\u00a0") for part in parts if part)

  def __str__(self) -> str:
    return ", ".join(filter(None, [self.method, self.detail]))


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
  """All settings on one task, at one length, with one model.

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

  def axes(self) -> list[str]:
    """The cost axes that every point has."""
    return [axis for axis in (*AXES, "held") if all(axis in point.costs for point in self.points)]

  def pairs(self, axis: str, method: str) -> list[tuple[float, float]]:
    """(cost, value) of a method's points on one axis."""
    own = [point for point in self.points if point.setting.method == method]
    return [(point.costs[axis], point.main.mean) for point in own]

  def margin(self, axis: str, method: str, baseline: str, log: bool = False) -> float | None:
    """The mean of the method's frontier minus the baseline's over the costs that both cover; None without any."""
    return pareto.margin(self.pairs(axis, method), self.pairs(axis, baseline), log)


@dataclasses.dataclass(frozen=True)
class Results:
  """What a report shows; `texts` are (model, entries of texts), `traces` (model, trace)."""

  runs: list[Run]
  panels: list[Panel]
  texts: list[tuple[str, list[Entry]]]
  traces: list[tuple[str, Trace]]
  methods: list[str]
  baseline: str


# Reading --------------------------------------------------------------------------------------------------------------


def _object(path: Path, what: str) -> dict[str, Any]:
  """The JSON object in a file; empty if the file is missing."""
  if not path.exists():
    return {}
  try:
    found = json.loads(path.read_text(encoding="utf-8"))
  except (OSError, ValueError) as error:
    raise ValueError(f"--runs={path}: not valid JSON ({error}); {what}") from None
  if not isinstance(found, dict):
    raise ValueError(f"--runs={path}: expected a JSON object, found {type(found).__name__}; {what}")
  return found


def load(folder: Path) -> Run:
  """Reads a folder of `experiments.evaluate`. Nothing in it changes.

  Raises:
    ValueError: the folder is missing, holds no results, or a file in it is malformed; one line that names the file.
  """
  if not folder.is_dir():
    raise ValueError(f"--runs={folder}: no such folder; it should be one that experiments.evaluate wrote")
  path = folder / RECORDS
  if path.exists() and path.read_bytes()[-1:] not in (b"\n", b""):
    raise ValueError(
      f"--runs={path}: its last line is unfinished; let the run end, or start the same command again to resume it"
    )
  config, summary = _object(folder / CONFIG, "it should hold the run's flags"), {}
  summary = _object(folder / SUMMARY, "it should hold the run's summary")
  found = records.read(path, "runs")
  for record in found:
    if wrong := [metric for metric, value in record.grades.items() if math.isnan(value)]:
      raise ValueError(
        f"--runs={path}: {record.method} on {record.task}, prompt {record.prompt}: {wrong[0]} is not a number; the "
        "model computed NaN there, so its results mean nothing: run it apart, with --dtype=float32"
      )
  tasks, rows, fields = {record.task for record in found}, summary.get("summary", []), set(Entry.__dataclass_fields__)
  try:
    entries = [Entry(**{key: value for key, value in row.items() if key in fields}) for row in rows]
  except (TypeError, AttributeError) as error:
    raise ValueError(f"--runs={folder / SUMMARY}: 'summary' holds a row that is no entry ({error})") from None
  entries = [entry for entry in entries if entry.task not in tasks]
  if not found and not entries:
    raise ValueError(f"--runs={folder}: no results there: {RECORDS} is missing or empty")
  about = next((given for given in (config, summary) if "config" in given), {"config": config})
  if wrong := [name for name in ("config", "environment") if not isinstance(about.get(name) or {}, dict)]:
    raise ValueError(f"--runs={folder / CONFIG}: {wrong[0]!r} must be a JSON object")
  return Run(
    folder, about["config"] or {}, about.get("environment") or {}, found, entries,
    traces.read("runs", folder / traces.FILE),
  )  # fmt: skip


def _widths(run: Run) -> list[int]:
  """The numbers W of chains that a run was asked for."""
  given = run.config.get("chains") or []
  return [int(width) for width in (given if isinstance(given, list) else [given])]


def _told_apart(runs: Sequence[Run]) -> list[Run]:
  """The runs with method names that mean one thing each, without records that an earlier run holds already.

  A method that two runs ran with different checkpoints, on the same task and setting, gets its retrofit or its run's
  folder added to its name.
  """
  seen: dict[tuple, str] = {}
  clashing = set()
  for run in runs:
    for record in run.records:
      if seen.setdefault((run.model, *record.key), record.settings) != record.settings:
        clashing.add((run.model, record.method))
  retrofits = [str(run.config.get("retrofit") or "") for run in runs]
  distinct = len(set(retrofits)) == len(runs) and all(retrofits)
  taken: set[tuple] = set()
  found = []
  for run in runs:
    retrofit = run.config.get("retrofit")
    of_retrofit = distinct and (isinstance(retrofit, str) or len(retrofit) == 1)
    origin = Path(retrofit if isinstance(retrofit, str) else retrofit[0]).name if of_retrofit else run.folder.name
    name = lambda method, run=run, origin=origin: f"{method} ({origin})" if (run.model, method) in clashing else method
    renamed = [dataclasses.replace(record, method=name(record.method)) for record in run.records]
    fresh = [record for record in renamed if (run.model, *record.key) not in taken]
    taken |= {(run.model, *record.key) for record in fresh}
    own = [dataclasses.replace(each, method=name(each.method)) for each in run.traces]
    found.append(dataclasses.replace(run, records=fresh, traces=own))
  return found


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

  Questions whose choices are only scored read nothing while decoding. They have "held", tokens held at the end.
  """
  found = {}
  for axis in AXES:
    values = [getattr(record, axis, None) for record in chains]
    if None not in values and np.mean(values) > 0:
      found[axis] = float(width * np.mean(values))
  if "peak" not in found:
    found["held"] = float(np.mean([record.tokens / record.achieved_cr for record in chains]))
  return found


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


def _check_prompts(model: str, task: str, chains: Sequence[Record]) -> None:
  """Raises ValueError if settings of equal W and L answered different prompts, whose pairing would mean nothing."""
  asked: dict[tuple, str] = {}
  for record in chains:
    content = record.settings.rpartition("-")[0]
    if asked.setdefault((record.chains, record.max_tokens), content) != content:
      raise ValueError(
        f"--runs: the runs of {model} on {task} have different prompts, settings or data (--limit, --seed, "
        "--temperature, ...), so they cannot be compared; report them apart"
      )


def collect(runs: Sequence[Run], baseline: str = "") -> Results:
  """The results of all runs.

  Args:
    baseline: the method that others are compared with; "": the dense one if there is one, else the first.

  Raises:
    ValueError: no method has the baseline's name, or the runs cannot be compared.
  """
  runs = _told_apart(runs)
  names = dict.fromkeys(record.method for run in runs for record in run.records)
  names |= dict.fromkeys(entry.method for run in runs for entry in run.entries)
  if baseline and baseline not in names:
    raise ValueError(f"--baseline={baseline}: no run has this method; there are {', '.join(names)}")
  baseline = baseline or next((name for name in BASELINES if name in names), next(iter(names)))
  short = short_names(list(names))
  renamed = lambda found: [dataclasses.replace(each, method=short.get(each.method, each.method)) for each in found]
  runs = [
    dataclasses.replace(run, **{name: renamed(getattr(run, name)) for name in ("records", "entries", "traces")})
    for run in runs
  ]
  groups: dict[tuple, list[Record]] = {}
  texts: dict[str, list[Entry]] = {}
  for run in runs:
    for record in run.records:
      groups.setdefault((run.model, record.task, record.length), []).append(record)
    for entry in run.entries:
      if entry not in texts.setdefault(run.model, []):
        texts[run.model].append(entry)
  widths = sorted({width for run in runs for width in _widths(run)})
  panels = []
  for (model, task, length), chains in groups.items():
    _check_prompts(model, task, chains)
    best_of_all = getattr(TASKS.get(task), "best_of_all", False)
    points = _points(chains, short[baseline], widths, best_of_all)
    single = next((point for point in points if point.setting.chains == 1), points[0])
    panels.append(Panel(model, task, length, single.metric, points))
  found = [(run.model, each) for run in runs for each in run.traces]
  methods = sorted(short.values(), key=lambda name: name != short[baseline])
  return Results(runs, panels, list(texts.items()), found, methods, short[baseline])
