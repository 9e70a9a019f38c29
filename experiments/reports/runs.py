"""Reads the folders that a report is made from, and gives each method in them one meaning."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from dms_jax.json_files import is_number, read_json
from experiments.methods import records
from experiments.methods import trace as traces
from experiments.methods.records import TEXT, Record
from experiments.methods.summary import Entry
from experiments.methods.trace import Trace

CONFIG, RECORDS, TEXTS, SUMMARY = "config.json", "records.jsonl", "text.jsonl", "summary.json"


@dataclasses.dataclass(frozen=True)
class Run:
  """The content of one folder that `experiments.evaluate` wrote.

  Fields:
    config: flags of the run; empty if unknown.
    environment: versions and device; empty if unknown.
    records, texts: of tasks, and of chunks of a text.
    entries: results that have no records.
  """

  folder: Path
  config: dict[str, Any]
  environment: dict[str, Any]
  records: list[Record]
  entries: list[Entry]
  traces: list[Trace]
  texts: list[Record] = dataclasses.field(default_factory=list)

  @property
  def model(self) -> str:
    """The name of the model's checkpoint; "model" if unknown."""
    return Path(str(self.config.get("checkpoint") or "model")).name

  @property
  def methods(self) -> list[str]:
    """The methods that have results, in order."""
    found: list[Record | Entry] = [*self.records, *self.texts, *self.entries]
    return list(dict.fromkeys(each.method for each in found))

  def listed(self, flag: str) -> list[Any]:
    """The values of a flag that takes several; none if it was not given."""
    given = self.config.get(flag) or []
    return list(given) if isinstance(given, list | tuple) else [given]

  def renamed(self, name: Callable[[str], str]) -> Run:
    """The run with `name(method)` in place of each method."""
    own = lambda part: [dataclasses.replace(each, method=name(each.method)) for each in getattr(self, part)]
    return dataclasses.replace(self, **{part: own(part) for part in ("records", "texts", "entries", "traces")})

  def text(self, task: str) -> str:
    """The name of a task for readers: that of its file for a text, if it is known."""
    return Path(str((self.listed("text") or [task])[0])).name if task == TEXT else task.removeprefix(f"{TEXT} ")


def _object(path: Path, what: str) -> dict[str, Any]:
  """The JSON object in a file; empty if the file is missing."""
  if not path.exists():
    return {}
  try:
    return read_json(path)
  except ValueError as error:
    raise ValueError(f"--runs={error}; {what}") from None


def _records(path: Path) -> list[Record]:
  """The records of a file; none if it is missing."""
  if path.exists() and not path.is_file():
    raise ValueError(f"--runs={path}: a folder, where experiments.evaluate writes a file")
  if path.exists() and path.read_bytes()[-1:] not in (b"\n", b""):
    raise ValueError(
      f"--runs={path}: its last line is unfinished; let the run end, or start the same command again to resume it"
    )
  return records.read(path, "runs")


def _entries(path: Path, summary: dict[str, Any]) -> list[Entry]:
  """The entries of a summary; a mean that was no number is NaN."""
  types, found = records.field_types(Entry), []
  rows = summary.get("summary", [])
  if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
    raise ValueError(f"--runs={path}: 'summary' must be a list of entries")
  for number, row in enumerate(rows):
    given = {name: value for name, value in row.items() if name in types}
    given |= {name: math.nan for name in ("mean", "achieved_cr") if name in given and given[name] is None}
    wrong = [name for name, value in given.items() if isinstance(value, bool) or not isinstance(value, types[name])]
    if not wrong and not all(map(is_number, given.get("budget", {}).values())):
      wrong = ["budget"]
    missing = [f.name for f in dataclasses.fields(Entry) if f.name not in given and f.default is f.default_factory]
    if wrong or missing:
      what = f"{wrong[0]!r} is of another type" if wrong else f"{missing[0]!r} is missing"
      raise ValueError(f"--runs={path}: 'summary' holds a row that is no entry, number {number}: {what}")
    found.append(Entry(**given))
  return found


def load(folder: Path) -> Run:
  """Reads a folder of `experiments.evaluate`. Nothing in it changes.

  Raises:
    ValueError: the folder is missing, holds no results, or a file in it is malformed; one line that names the file.
  """
  if not folder.is_dir():
    raise ValueError(f"--runs={folder}: no such folder; it should be one that experiments.evaluate wrote")
  found, texts = _records(folder / RECORDS), _records(folder / TEXTS)
  config = _object(folder / CONFIG, "it should hold the run's flags")
  summary = _object(folder / SUMMARY, "it should hold the run's summary")
  tasks = {record.task for record in [*found, *texts]}
  entries = [entry for entry in _entries(folder / SUMMARY, summary) if entry.task not in tasks]
  if not (found or texts or entries):
    raise ValueError(f"--runs={folder}: no results there: {RECORDS} is missing or empty")
  about = next((given for given in (config, summary) if "config" in given), {"config": config})
  if wrong := [name for name in ("config", "environment") if not isinstance(about.get(name) or {}, dict)]:
    raise ValueError(f"--runs={folder / CONFIG}: {wrong[0]!r} must be a JSON object")
  return Run(
    folder, about["config"] or {}, about.get("environment") or {}, found, entries,
    traces.read("runs", folder / traces.FILE), texts,
  )  # fmt: skip


def is_text(task: str) -> bool:
  """Whether the records of a task are chunks of a text."""
  return task.split(" ")[0] == TEXT


def content(record: Record) -> str:
  """The fingerprint of the prompts or the text that a record is about."""
  return record.settings.rpartition("-")[0]


def told_apart(runs: Sequence[Run]) -> list[Run]:
  """The runs with method names that mean one thing each, without records that an earlier run holds already.

  A method that two runs ran with different checkpoints, on the same task and setting, gets its retrofit or its run's
  folder added to its name. Texts of different content are different tasks.
  """
  place = lambda run, record: (run.model, *record.key, content(record) if is_text(record.task) else "")
  seen: dict[tuple, str] = {}
  clashing: dict[str, set[str]] = {}  # model -> methods
  for run in runs:
    for record in [*run.records, *run.texts]:
      if seen.setdefault(place(run, record), record.settings) != record.settings:
        clashing.setdefault(run.model, set()).add(record.method)
  origins = [run.listed("retrofit") for run in runs]
  distinct = all(len(own) == 1 for own in origins) and len({str(own[0]) for own in origins}) == len(runs)
  taken: set[tuple] = set()
  found = []
  for run, own in zip(runs, origins, strict=True):
    at, clashes = Path(str(own[0])).name if distinct else run.folder.name, clashing.get(run.model, ())
    run = run.renamed(lambda method, at=at, clashes=clashes: f"{method} ({at})" if method in clashes else method)
    fresh = lambda part, run=run: [each for each in getattr(run, part) if place(run, each) not in taken]
    found.append(dataclasses.replace(run, records=fresh("records"), texts=fresh("texts")))
    taken.update(place(run, record) for record in [*run.records, *run.texts])
  return found
