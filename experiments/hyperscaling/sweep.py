"""The records of a sweep: what is there, what is missing, and the work of making it."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dms_jax.json_files import read_json
from dms_jax.tokenizer import Tokenizer
from experiments.common import files, program
from experiments.hyperscaling import cells, timing
from experiments.methods import records, run, trace
from experiments.methods.estimate import Estimate, duration
from experiments.methods.method import Method
from experiments.methods.records import Record
from experiments.methods.run import Job

SPEED = "speed.json"


@dataclasses.dataclass(frozen=True)
class Limits:
  """How a sweep runs, which changes no record.

  Fields:
    width: most rows that write together; fewer where `memory` is too small for as many empty rows.
    memory: bytes of the cache; None: unlimited.
    traces: prompts of each task whose first chain is traced and keeps its text.
    traced_cr: the CR whose methods are traced, beside those without one.
  """

  width: int
  memory: int | None
  traces: int
  traced_cr: float


def short(record: Record, traces: int, most: int) -> Record:
  """A record without its text, unless its chain may be traced: texts would be nearly all of a sweep's bytes."""
  kept = record.chain == 0 and record.max_tokens == most and record.prompt in range(traces)
  return record if kept else dataclasses.replace(record, text=None)


class Sweeping:
  """The folder of one sweep. Its records are those of `experiments.evaluate`; the same command resumes a killed run."""

  def __init__(
    self, folder: Path, jobs: Sequence[Job], methods: Sequence[Method], tokenizer: Tokenizer, limits: Limits
  ):
    """Reads the records that exist.

    Raises:
      ValueError: they were made with other settings, or with another number of chains.
    """
    self.folder, self.jobs, self.methods, self.tokenizer, self.limits = folder, jobs, methods, tokenizer, limits
    found = records.read(folder / cells.RECORDS)
    expected = {(*m.key, job.task.name, job.length): run.settings_of(job, m) for m in methods for job in jobs}
    records.check_settings(folder / cells.RECORDS, found, expected)
    # The sweep of which cells alone stayed; None where records are, or nothing is yet.
    alone = (folder / cells.CELLS).exists() and not (folder / cells.RECORDS).exists()
    self.short = cells.read(folder, "output")[0] if alone else None
    self.there: dict[tuple, list[Record]] = {}
    for record in found:
      self.there.setdefault(record.cell, []).append(record)
    for job in jobs:
      for method in methods:
        if other := [r for r in self.of(job, method) if (r.chains, r.seed) != (job.chains, job.seed)]:
          raise ValueError(
            f"--output={folder} holds records of {other[0].chains} chains at seed {other[0].seed}; give the same "
            "--chains and --seed, or another folder"
          )

  def of(self, job: Job, method: Method) -> list[Record]:
    """The records of a method on a job."""
    return self.there.setdefault((*method.key, job.task.name, job.length), [])

  def plan(self) -> int:
    """Checks every method on every job, logs what there is to do, and returns the work in tokens."""
    work = chains = there = 0
    by_method: dict[str, int] = {}
    for job in self.jobs:
      for method in self.methods:
        if remark := run.check(job, method):
          program.log(f"{method.label} on {job.name}: {remark}")
        left = run.missing(job, method, self.of(job, method))
        own = sum(job.work(method, prompt, most) for prompt, _, most in left)
        by_method[method.name] = by_method.get(method.name, 0) + own
        work, chains = work + own, chains + len(left)
        there += len(job.keys) - len(left)
    speed = self.speed
    time = f", about {duration(work / speed)} at the speed of the last run" if work and speed else ""
    of_each = ", ".join(f"{name} {own:,}" for name, own in by_method.items() if own)
    program.log(
      f"{len(self.methods)} methods and CRs x {len(self.jobs)} tasks: {chains:,} records to make "
      f"({there:,} are there), up to {work:,} tokens{time}{of_each and f' ({of_each})'}; results in {self.folder}"
    )
    return work

  @property
  def speed(self) -> float | None:
    """Tokens a second of the last run in this folder; None before the first."""
    try:
      return float(read_json(self.folder / SPEED)["tokens_per_s"])
    except (ValueError, KeyError, TypeError, OverflowError):
      return None

  def run(self) -> dict[str, Any]:
    """Makes all missing records and traces; returns the numbers of records and tokens made, and the speed."""
    work = self.plan()
    estimate, made, limits = Estimate(work), 0, self.limits
    for job in self.jobs:
      last = max(job.max_tokens)
      for method in self.methods:
        done = self.of(job, method)
        begin = lambda width, job=job, method=method, done=done: run.run(
          job, [method], self.tokenizer, width=width, memory=limits.memory, done=done, tick=estimate.tick
        )
        for found in timing.narrowing(begin, max(limits.width, job.chains), job.chains):
          found = [short(record, limits.traces, last) for record in found]
          records.append(self.folder / cells.RECORDS, found)
          done += found
          made += len(found)
          estimate.add(sum(job.work(method, record.prompt, record.max_tokens) for record in found))
        if estimate.speed:
          program.save_json(self.folder / SPEED, {"tokens_per_s": estimate.speed})
        if limits.traces and method.budget.get("cr") in (None, limits.traced_cr):
          trace.add(self.folder / trace.FILE, job, method, self.tokenizer, done, limits.traces)
    return {"records_made": made, "tokens_made": estimate.done, "tokens_per_s": estimate.speed or self.speed}

  def time(self, gib: float, count: int) -> None:
    """Times `count` cells of every method, and interpolates the others; see `timing`. What was timed before stays.

    Args:
      gib: GiB of cache that all batches share.
      count: cells of each method that are timed, over all tasks, CRs and L; 0: all.

    Raises:
      ValueError: the folder holds the short form of a sweep of other prompts or chains, or that lacks a cell.
    """
    path, memory = self.folder / cells.TIMES, int(gib * 2**30)
    files.cut_half_line(path, b'{"task": ')
    there = cells.read_times(path).get(gib, {})
    if self.short is not None:
      found = self.short.cells
    else:
      found = cells.of_records(record for own in self.there.values() for record in own)[0]
    by_method: dict[str, dict[cells.Key, tuple[Job, Method, int]]] = {}
    for job, method, most in ((j, m, L) for j in self.jobs for m in self.methods for L in j.max_tokens):
      key = job.task.name, method.name, method.budget.get("cr", 1.0), most
      if self.short is not None:
        cell, prompts = found.get(key), run.settings_of(job, method).rpartition("-")[0]
        if cell is None or (cell.content, cell.chains) != (prompts, job.chains):
          raise ValueError(
            f"--output={self.folder} holds cells without records, and not {cells.in_words(key)} of these prompts and "
            "--chains: give the flags of that sweep, or another folder"
          )
      if key in found:
        rows = timing.rows_that_fit(job, method, most, found[key], memory)
        by_method.setdefault(method.name, {})[key] = job, method, rows
    chosen = {
      key for own in by_method.values()
      for key in ([list(own)[n] for n in timing.spread([rows for *_, rows in own.values()], count)] if count else own)
    }  # fmt: skip
    measured = {key: line for key, line in there.items() if line.get("timed_seconds")}
    if wanted := [(key, own[key]) for own in by_method.values() for key in own if key in chosen - measured.keys()]:
      every = sum(map(len, by_method.values()))
      program.log(f"{len(wanted)} cells to time in {gib:g} GiB of cache, of {every}; the others are interpolated")
    estimate = Estimate(len(wanted))

    def write(key: cells.Key, about: dict[str, Any], job: Job) -> None:
      about["seconds"] = about["step_seconds"] / about["rows"] * timing.new_tokens(job, found[key])
      about["full"] = about["rows"] < len(job.asked) * job.chains
      named = dict(zip(("task", "method", "cr", "max_tokens"), key, strict=True))
      files.append_text(path, json.dumps({**named, "gib": gib, **about}) + "\n")

    for key, (job, method, rows) in wanted:
      what = f"timing {method.label}, L {key[3]}, on {job.name}"
      measured[key] = timing.step_seconds(
        job, method, key[3], rows, self.tokenizer, memory, lambda tokens, what=what: estimate.tick(what)
      )
      write(key, measured[key], job)
      estimate.add(1)
    for name, own in by_method.items():
      timed = [(line["rows"], line["step_seconds"]) for key, line in measured.items() if key[1] == name]
      for key, (job, _, rows) in own.items():
        about = {"rows": rows, "step_seconds": timing.interpolated(rows, timed)}
        if key not in measured and (there.get(key, {}).get("step_seconds") != about["step_seconds"]):
          write(key, about, job)
