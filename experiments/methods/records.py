"""Records: one JSON line for each chain written or question scored by a method.

Every table, figure and page of results reads records or their summary (`experiments.methods.summary`). A file of
records only grows, so the same command again resumes a killed run: records in the file are not computed again.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import operator
import types
import typing
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from dms_jax.json_files import shown
from experiments.common import files, program

T = typing.TypeVar("T", bound="Chain")
TEXT = "text"  # the task of a text's chunks; "text NAME" if there are several texts
MOST = 1e15  # of a number in a record: quotients of two still fit float32
START = b'{"method": '  # first bytes of every record


@dataclasses.dataclass(frozen=True)
class Chain:
  """What names one chain of one method on one prompt, or one question that it scores.

  Fields:
    method: the method's name.
    task: the task's name; "text" for chunks of a text, with the file's name if there are several.
    length: T, requested tokens of the prompt; None if the task fixes the length.
    budget: the bound on the method's cache, by name: `budget` (tokens a head), `cr`, `threshold`; empty without one.
    chains: W, all chains of the prompt.
    max_tokens: L, most tokens that a chain writes; 0 if given continuations are scored.
    seed: of the prompts and of sampling; None if unknown.
    prompt: the prompt's number or name within its task.
    chain: this chain's number, from 0.
  """

  method: str
  task: str
  length: int | None
  budget: dict[str, float]
  chains: int
  max_tokens: int
  seed: int | None
  prompt: int | str
  chain: int

  @property
  def cell(self) -> tuple:
    """The method, its budget, the task and its length."""
    return self.method, tuple(sorted(self.budget.items())), self.task, self.length

  @property
  def key(self) -> tuple:
    """Identifies the chain; a resumed run skips the keys in its file."""
    return *self.cell, self.chains, self.max_tokens, self.seed, self.prompt, self.chain


@dataclasses.dataclass(frozen=True)
class Record(Chain):
  """The outcome of one chain. Records are equal if all but their `seconds` are.

  Fields:
    settings: fingerprints of the task's prompts and of the checkpoint, which together decide the outcome.
    tokens: tokens seen by the cache: all but the last one written; for a question the mean over its rows.
    reads: KV reads of all decode steps, of a text of all its tokens, mean over layers and heads; None for questions.
    peak: most tokens held at once, mean over layers and heads; None if nothing was decoded.
    shared: tokens of the prompt among them that all chains of the prompt hold in common: those outside the window that
      the prompt leaves, mean over layers and heads; 0 under a policy that rewrites them. None in earlier versions.
    achieved_cr: tokens seen over tokens held at the end of the chain.
    grades: {metric: per cent}, or nats a token: `answer_loglik`; `nll`, `kl`: less is better.
    text: the text written; None if given continuations were scored.
    answer: the canonical answer read from the text, for votes; None if there is none.
    seconds: wall time without compilation. Of a chain: from the step that begins to read its prompt to its end, while
      other chains run beside it, and with its waits. Of a question: that of the batch scored with it, over the batch's
      questions; some methods are scored through their cache, others by a mask. None if unknown: where a batch was
      compiled, for chunks of a text, and in records of earlier versions.
  """

  settings: str
  tokens: float
  reads: float | None
  peak: float | None
  achieved_cr: float
  grades: dict[str, float]
  text: str | None = None
  answer: str | None = None
  seconds: float | None = dataclasses.field(default=None, compare=False)
  shared: float | None = None


def field_types(cls: type) -> dict[str, Any]:
  """{name: type} of a dataclass's fields as they are read from JSON, for `isinstance`: a float may be written 1."""
  plain = lambda hint: int | float if hint is float else typing.get_origin(hint) or hint
  parts = lambda hint: typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
  hints = typing.get_type_hints(cls)
  return {name: functools.reduce(operator.or_, map(plain, parts(hint))) for name, hint in hints.items()}


TYPES = field_types(Record)


def append(path: Path, records: Iterable[Record]) -> None:
  """Appends a line for each record; creates the file and its folder if they are missing."""
  files.append_text(path, "".join(json.dumps(program.to_plain(record)) + "\n" for record in records))


def _numbers(where: str, values: Mapping[str, Any], field: str, empty: float | None = None) -> dict[str, float]:
  """A field of numbers by name. Raises ValueError if one is not finite or huge; null is `empty`, if that is a number.

  With an `empty`, numbers that are not finite stay.
  """
  found = {name: empty if value is None else value for name, value in values[field].items()}
  for name, value in found.items():
    stays = empty is not None and isinstance(value, float) and not math.isfinite(value)
    if not (isinstance(value, int | float) and abs(value) <= MOST) and not stays:
      raise ValueError(f"{where}: {name!r} of {field!r} must be a number, not {json.dumps(value)[:50]}")
  return found


def build(cls: type[T], where: str, values: Mapping[str, Any]) -> T:
  """A record or trace from the values of a line of types `field_types(cls)`.

  Raises:
    ValueError: a field is missing or unknown; names the line.
  """
  for field in dataclasses.fields(cls):
    if field.name not in values and field.default is dataclasses.MISSING:
      raise ValueError(f"{where}: a record needs {field.name!r}")
  if unknown := sorted(set(values) - {field.name for field in dataclasses.fields(cls)}):
    raise ValueError(f"{where}: a record has no field {unknown[0]!r}")
  return cls(**values)


def read(path: Path, flag: str = "output") -> list[Record]:
  """The records of a file, in order; none if it is missing. A last line that was cut short is removed from the file.

  Args:
    flag: the flag that named the file, for errors.

  Raises:
    ValueError: a line is not a record, or repeats a record; the message names the line.
  """
  if not path.exists():
    return []
  files.cut_half_line(path, START)
  found: dict[tuple, Record] = {}
  for where, values in files.json_records(flag, path, TYPES):
    record = build(Record, where, {**values, "grades": _numbers(where, values, "grades", math.nan)})
    _numbers(where, values, "budget")
    for name in ("tokens", "reads", "peak", "shared", "seconds"):
      if (value := values.get(name)) is not None and not 0 <= value <= MOST:
        raise ValueError(f"{where}: {name!r} must be a number of 0 to {MOST:g}, not {shown(value)}")
    if not 1 / MOST <= record.achieved_cr <= MOST:
      raise ValueError(f"{where}: 'achieved_cr' must be a number above 0, to {MOST:g}")
    if record.key in found:
      raise ValueError(f"{where}: {record.method} on {record.task}, prompt {record.prompt}, is there already")
    found[record.key] = record
  return list(found.values())


def check_settings(path: Path, records: Sequence[Record], settings: Mapping[tuple, str]) -> None:
  """Raises ValueError if a record's settings differ from `settings`, {`Record.cell`: settings}."""
  for record in records:
    if settings.get(record.cell, record.settings) != record.settings:
      raise ValueError(
        f"--output: {path} holds records of {record.method} on {record.task} made with other settings, data or "
        "checkpoints; name another folder, or give the flags they were made with"
      )
