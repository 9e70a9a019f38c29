"""Cells of a sweep: the chains of a method at one CR and L as arrays; their short form on disk.

A sweep has millions of records. Its analysis needs a few numbers of each, which `Cell` holds; `cells.npz` keeps them
where the records are too large to be kept.
"""

from __future__ import annotations

import dataclasses
import json
import math
import zipfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dms_jax import disk
from dms_jax.json_files import json_value, read_json
from dms_jax.npz import DAMAGE, Arrays
from experiments.common import files
from experiments.methods import records
from experiments.methods.records import Record
from experiments.methods.summary import ACCURACY, subsets

RECORDS, CELLS, TIMES = "records.jsonl", "cells.npz", "times.jsonl"
TEXTS = "texts.jsonl"  # the few records with texts, which stay where the records are too large to be kept
Key = tuple[str, str, float, int]  # task, method, CR (1: unbounded), L
COSTS = ("tokens", "reads", "peak", "held", "shared")


@dataclasses.dataclass(frozen=True)
class Cell:
  """The chains of P problems, W each, under one method and CR with at most L new tokens.

  Fields:
    problems: P numbers or names.
    grades: float32 [P, W], 0 to 100.
    votes: int16 [P, W], the answer's number among the answers to its problem; -1: no answer.
    tokens, reads, peak: float32 [P], of a chain, means over the chains of each problem (`Record`).
    held: float32 [P], tokens that a head holds at the end of a chain, mean over layers, heads and chains.
    shared: float32 [P], those of the prompt among them that its chains hold in common.
    content: fingerprint of the prompts.
  """

  problems: tuple[int | str, ...]
  grades: np.ndarray
  votes: np.ndarray
  tokens: np.ndarray
  reads: np.ndarray
  peak: np.ndarray
  held: np.ndarray
  shared: np.ndarray
  content: str

  @property
  def chains(self) -> int:
    return self.grades.shape[1]

  def scores(self, width: int, vote: bool) -> np.ndarray:
    """The score of each problem over `width` chains, the mean over all subsets of the cell's chains; float64 [P].

    Args:
      vote: the chains vote, as `summary.majority`; otherwise the best of them counts, as `summary.best_of`.
    """
    count = self.chains
    grades = self.grades.astype(float)
    if not 1 <= width <= count:
      raise ValueError(f"--chains={width}: the records have {count} chains of a problem")
    if width == 1:
      return grades.mean(axis=1)
    if not vote:
      weights = [math.comb(i, width - 1) / math.comb(count, width) for i in range(count)]
      return np.sort(grades, axis=1) @ np.array(weights)
    total, number = np.zeros(len(grades)), 0
    for subset in subsets(count, width):
      votes = self.votes[:, list(subset)]
      agree = (votes[:, :, None] == votes[:, None, :]) & (votes >= 0)[:, :, None]
      support = agree.sum(axis=-1)
      winner = np.argmax(support, axis=1)[:, None]  # of the largest the first
      won = np.take_along_axis(grades[:, list(subset)], winner, axis=1)[:, 0]
      total, number = total + np.where(support.max(axis=1) > 0, won, 0.0), number + 1
    return total / number


def key_of(record: Record) -> Key:
  """The cell of a record."""
  return record.task, record.method, float(record.budget.get("cr", 1.0)), record.max_tokens


def _cell(chains: Mapping[int | str, list[Record]]) -> Cell:
  """The cell of complete problems."""
  problems = tuple(sorted(chains, key=lambda name: (isinstance(name, str), name)))
  grades, votes, costs = [], [], []
  for problem in problems:
    own = sorted(chains[problem], key=lambda record: record.chain)
    names: dict[str, int] = {}
    grades.append([record.grades[ACCURACY] for record in own])
    votes.append([-1 if r.answer is None else names.setdefault(r.answer, len(names)) for r in own])
    each = [(r.tokens, r.reads or 0.0, r.peak or r.tokens, r.tokens / r.achieved_cr, r.shared or 0.0) for r in own]
    costs.append(np.mean(each, axis=0))
  tokens, reads, peak, held, shared = np.array(costs, np.float32).T
  content = next(iter(chains.values()))[0].settings.rpartition("-")[0]
  each_chain = np.array(grades, np.float32), np.array(votes, np.int16)
  return Cell(problems, *each_chain, tokens, reads, peak, held, shared, content)


def of_records(found: Iterable[Record]) -> tuple[dict[Key, Cell], list[str]]:
  """The cells of records that are complete, and a remark for each one that is not.

  A cell is complete if every problem of its task has all its chains. Records whose grades have no accuracy, such as the
  questions of likelihood tasks, belong to no cell.

  Raises:
    ValueError: the records of a cell have different numbers of chains, seeds or prompts.
  """
  groups: dict[Key, dict[int | str, list[Record]]] = {}
  asked: dict[str, set[int | str]] = {}
  for record in found:
    if ACCURACY in record.grades and record.max_tokens:
      groups.setdefault(key_of(record), {}).setdefault(record.prompt, []).append(record)
      asked.setdefault(record.task, set()).add(record.prompt)
  cells, remarks = {}, []
  for key, chains in groups.items():
    kinds = {(r.chains, r.seed, r.settings) for own in chains.values() for r in own}
    if len(kinds) > 1:
      raise ValueError(
        f"{in_words(key)}: records of different --chains, --seed, prompts or checkpoints; give each a folder"
      )
    width = next(iter(kinds))[0]
    whole = {problem: own for problem, own in chains.items() if len(own) == width}
    if len(whole) < len(asked[key[0]]):
      remarks.append(_left_out(key, len(whole), len(asked[key[0]])))
    else:
      cells[key] = _cell(whole)
  return cells, remarks


# One sweep ------------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Sweep:
  """The cells of one sweep, which is one model seed.

  Fields:
    times: seconds of a chain in the largest batch that fits `gib` GiB of cache, by cell; empty if not measured.
    config, environment: flags, versions and device; empty if unknown.
    model: fingerprint of the dense model and its dtype; "" if unknown.
    gib: None without times.
    parts: folders of a sweep made in parts.
  """

  folder: Path
  cells: dict[Key, Cell]
  times: dict[Key, float]
  config: dict[str, Any]
  environment: dict[str, Any]
  gib: float | None = None
  parts: tuple[Path, ...] = ()
  model: str = ""

  @property
  def tasks(self) -> list[str]:
    return list(dict.fromkeys(key[0] for key in self.cells))


def read_times(path: Path, flag: str = "output") -> dict[float, dict[Key, dict[str, Any]]]:
  """The lines of a file of times by GiB of cache and by cell; empty if it is missing.

  The memory that was measured last comes last. A later line of a cell replaces an earlier one of the same memory.

  Raises:
    ValueError: a line is malformed; the message names it.
  """
  number = int | float
  fields = {"task": str, "method": str, "cr": number, "max_tokens": int, "seconds": number, "gib": number}
  found: dict[float, dict[Key, dict[str, Any]]] = {}
  for _, line in files.json_records(flag, path, fields) if path.exists() else ():
    own = found[float(line["gib"])] = found.pop(float(line["gib"]), {})
    own[line["task"], line["method"], float(line["cr"]), line["max_tokens"]] = line
  return found


def save(path: Path, cells: Mapping[Key, Cell]) -> None:
  """Writes cells as a compressed .npz file, atomically."""
  about = [{"key": list(key), "problems": list(cell.problems), "content": cell.content} for key, cell in cells.items()]
  arrays = {}
  for number, cell in enumerate(cells.values()):
    whole = bool((cell.grades == np.round(cell.grades)).all())
    arrays[f"{number}.grades"] = cell.grades.astype(np.uint8) if whole else cell.grades
    arrays[f"{number}.votes"] = cell.votes
    arrays |= {f"{number}.{name}": getattr(cell, name) for name in COSTS}
  with disk.whole(path) as part, part.open("wb") as file:
    np.savez_compressed(file, about=json.dumps(about), **arrays)


def load(path: Path, flag: str) -> dict[Key, Cell]:
  """Reads cells that `save` wrote.

  Raises:
    ValueError: the file is damaged or of another kind; names the flag.
  """
  try:
    with zipfile.ZipFile(path) as archive:
      arrays, found = Arrays(archive, path, packed=True), {}
      for number, each in enumerate(json_value(str(arrays["about"]), "about")):
        task, method, cr, most = each["key"]
        own = {name: arrays[f"{number}.{name}"] for name in ("grades", "votes", *COSTS)}
        own["grades"] = own["grades"].astype(np.float32)
        cell = Cell(tuple(each["problems"]), content=each["content"], **own)
        found[task, method, float(cr), int(most)] = _checked(cell)
      return found
  except (*DAMAGE, ValueError, TypeError, OverflowError) as error:
    reason = " ".join(str(error).split())[:100]
    raise ValueError(f"--{flag}={path}: not cells of a sweep, or damaged ({type(error).__name__}: {reason})") from None


def _checked(cell: Cell) -> Cell:
  """The cell; a ValueError if an array of it does not fit the others."""
  shape = len(cell.problems), cell.grades.shape[-1] if cell.grades.ndim else 0
  if not (cell.grades.shape == cell.votes.shape == shape and cell.grades.size and cell.votes.dtype.kind == "i"):
    raise ValueError(f"grades {cell.grades.shape} and votes {cell.votes.shape} of {len(cell.problems)} problems")
  if wrong := [name for name in COSTS if (x := getattr(cell, name)).shape != shape[:1] or x.dtype.kind != "f"]:
    raise ValueError(f"{wrong[0]} of shape {getattr(cell, wrong[0]).shape} for {len(cell.problems)} problems")
  return cell


def read(folder: Path, flag: str = "sets") -> tuple[Sweep, list[str]]:
  """A finished sweep from its records, or from its cells if it has no records; and remarks.

  A folder with neither is a sweep made in parts, say each on a GPU of its own, if there are sweeps in it; see `join`.

  Raises:
    ValueError: the folder has none of them, or a file is malformed.
  """
  if not any((folder / name).exists() for name in (RECORDS, CELLS)):
    holds = lambda path: any((path / name).exists() for name in (RECORDS, CELLS))
    if parts := sorted(path for path in folder.glob("*/") if holds(path)):
      return join(folder, [_read(part, flag) for part in parts], flag)
  return _read(folder, flag)


def join(folder: Path, parts: Sequence[tuple[Sweep, list[str]]], flag: str = "sets") -> tuple[Sweep, list[str]]:
  """One sweep of parts, which have other methods, CRs or tasks of the same model; and remarks.

  A cell of fewer problems than the largest of its task is left out: its part was not finished.

  Raises:
    ValueError: two parts have different models, disagree on a cell or on a task's prompts, or have times at different
      memories.
  """
  of_model: dict[str, Path] = {}
  for sweep, _ in parts:
    if sweep.model:
      of_model.setdefault(sweep.model, sweep.folder)
  if len(of_model) > 1:
    one, other = list(of_model.values())[:2]
    raise ValueError(f"--{flag}={folder}: {one.name} and {other.name} are of different checkpoints or --dtype; model "
                     "seeds are separate folders of --sets")  # fmt: skip
  cells: dict[Key, Cell] = {}
  times: dict[Key, float] = {}
  remarks = [remark for _, own in parts for remark in own]
  for sweep, _ in parts:
    for key, cell in sweep.cells.items():
      if key in cells and not np.array_equal(cells[key].grades, cell.grades):
        raise ValueError(f"--{flag}={sweep.folder}: {in_words(key)} is in another part too, with other grades")
      cells[key] = cell
    times |= sweep.times
  for task in {key[0] for key in cells}:
    own = {key: cell for key, cell in cells.items() if key[0] == task}
    if len({cell.content for cell in own.values()}) > 1:
      raise ValueError(f"--{flag}={folder}: its parts have different prompts of {task}")
    most = max(len(cell.problems) for cell in own.values())
    for key, cell in own.items():
      if len(cell.problems) < most:
        remarks.append(_left_out(key, len(cell.problems), most))
        del cells[key]
  gibs = {sweep.gib for sweep, _ in parts if sweep.times}
  if len(gibs) > 1:
    raise ValueError(f"--{flag}={folder}: its parts were timed at different --kv_budget_gib: {sorted(gibs)}")
  first, folders = parts[0][0], tuple(sweep.folder for sweep, _ in parts)
  return Sweep(
    folder, cells, times, first.config, first.environment, next(iter(gibs), None), folders, next(iter(of_model), "")
  ), remarks


def check_seeds(sweeps: Sequence[Sweep], flag: str = "sets") -> None:
  """Raises ValueError if two sweeps are of one model, whose chains would count twice."""
  of_model: dict[str, Path] = {}
  for sweep in sweeps:
    other = of_model.setdefault(sweep.model, sweep.folder) if sweep.model else sweep.folder
    if other != sweep.folder:
      raise ValueError(f"--{flag}: {other} and {sweep.folder} are sweeps of one model, and sets are model seeds; put "
                       "parts of a sweep into one folder, and give that")  # fmt: skip


def only(sweep: Sweep, tasks: Sequence[str] = (), methods: Sequence[str] = ()) -> Sweep:
  """The cells of some tasks and methods alone; of all where none is named.

  Raises:
    ValueError: the sweep has none of a task or method.
  """
  found = sweep.cells
  for flag, place, names in (("tasks", 0, tasks), ("methods", 1, methods)):
    known = list(dict.fromkeys(key[place] for key in sweep.cells))
    if missing := [name for name in names if name not in known]:
      raise ValueError(f"--{flag}: {sweep.folder} has no {missing[0]!r}; there are {', '.join(known)}")
    found = {key: cell for key, cell in found.items() if not names or key[place] in names}
  return dataclasses.replace(sweep, cells=found)


def save_short(folder: Path, found: Mapping[Key, Cell]) -> None:
  """Writes the short form of a folder's records: their cells, and the lines that have texts as a file of their own."""
  save(folder / CELLS, found)
  with disk.whole(folder / TEXTS) as part, part.open("w", encoding="utf-8") as file:
    file.writelines(f"{line}\n" for _, line in files.text_lines("output", folder / RECORDS) if has_text(line))


def has_text(line: str) -> bool:
  """Whether a line of records has a text; few lines of a sweep do, so that most need not be parsed."""
  return '"text": null' not in line


def in_words(key: Key) -> str:
  """A cell in words."""
  return f"{key[1]}, CR {key[2]:g}, L {key[3]} on {key[0]}"


def _left_out(key: Key, complete: int, problems: int) -> str:
  return f"{in_words(key)} is left out: {complete} of {problems} problems are complete"


def _read(folder: Path, flag: str) -> tuple[Sweep, list[str]]:
  """The sweep of one folder."""
  about: dict[str, Any] = {}
  if (folder / "config.json").exists():
    try:
      about = read_json(folder / "config.json")
    except ValueError as error:
      raise ValueError(f"--{flag}={error}") from None
    if wrong := [name for name in ("config", "environment") if not isinstance(about.get(name) or {}, dict)]:
      raise ValueError(f"--{flag}={folder / 'config.json'}: {wrong[0]!r} must be a JSON object")
    if not isinstance(about.get("model", ""), str):
      raise ValueError(f"--{flag}={folder / 'config.json'}: 'model' must be a string")
  if (folder / RECORDS).exists():
    found = records.read(folder / RECORDS, flag)
    try:
      cells, remarks = of_records(found)
    except ValueError as error:
      raise ValueError(f"--{flag}={folder}: {error}") from None
  elif (folder / CELLS).exists():
    cells, remarks = load(folder / CELLS, flag), []
  else:
    raise ValueError(f"--{flag}={folder}: neither {RECORDS} nor {CELLS} there; give folders of experiments.hyperscale")
  config, measured = about.get("config") or {}, read_times(folder / TIMES, flag)
  gib = config.get("kv_budget_gib") if config.get("kv_budget_gib") in measured else next(reversed(measured), None)
  times = {key: float(line["seconds"]) for key, line in measured.get(gib, {}).items()}
  if times and (small := sum(not line.get("full", True) for line in measured[gib].values())):
    remarks = [*remarks, f"{folder}: {small} of {len(times)} times are of all chains at once, which leave memory free"]
  if derived := sum("step_seconds" in line and "timed_seconds" not in line for line in measured.get(gib, {}).values()):
    remarks = [*remarks, f"{folder}: {derived} of {len(times)} times are interpolated over the rows of a batch"]
  return Sweep(folder, cells, times, config, about.get("environment") or {}, gib, model=about.get("model", "")), remarks


def order(names: Sequence[str], known: Sequence[str]) -> list[str]:
  """Names in the order of `known` and then of the alphabet; "dms NAME" comes after "dms"."""
  place = lambda name: (known.index(first) if (first := name.split()[0]) in known else len(known), name)
  return sorted(names, key=place)
