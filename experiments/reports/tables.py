"""Tables in Markdown, with padded cells so that they also read well on a terminal."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dms_jax.masks import causal_reads
from experiments.methods.summary import COSTS, Entry
from experiments.reports import styles
from experiments.tasks.base import Task

NUMBER = re.compile(r"([+-]?(\.?\d|nan|inf).*)?|-")  # a cell of numbers: one, with its unit; nothing; a dash


def markdown(names: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
  """A table with these column names; columns of numbers are aligned to the right, all others to the left."""
  columns = list(zip(names, *rows, strict=True))
  widths = [max(3, *map(len, column)) for column in columns]
  right = [any(cells) and all(map(NUMBER.fullmatch, cells)) for _, *cells in columns]
  pad = lambda cell, width, to_right: cell.rjust(width) if to_right else cell.ljust(width)
  line = lambda cells: "| " + " | ".join(map(pad, cells, widths, right)) + " |"
  rule = "|".join("-" * (width + 1) + (":" if to_right else "-") for width, to_right in zip(widths, right, strict=True))
  return "\n".join([line(names), f"|{rule}|", *map(line, rows)])


def of_mappings(rows: Sequence[Mapping[str, Any]], columns: Sequence[str]) -> str:
  """A table with one row for each mapping, floats with four digits; a missing value is an empty cell.

  If any mapping has an "error" or was "skipped", a last column says so.
  """
  why = [str(row.get("error", row.get("skipped", ""))) for row in rows]
  cells = []
  for row, reason in zip(rows, why, strict=True):
    values = [row.get(column, "") for column in columns]
    values = [f"{value:.4g}" if isinstance(value, float) else str(value) for value in values]
    cells.append([*values, reason] if any(why) else values)
  return markdown([*columns, *(["not measured"] if any(why) else [])], cells)


def short_names(names: Sequence[str]) -> dict[str, str]:
  """Each name without the folders before it, unless two would then read alike."""
  short = {name: Path(name).name for name in names}
  return short if len(set(short.values())) == len(short) else {name: name for name in short}


# Results on tasks and texts -------------------------------------------------------------------------------------------


def with_error(metric: str, mean: float, error: float | None, sign: str = "") -> str:
  """A value and its standard error: "12.3 +- 0.4"; perplexity has three digits, nats three or four."""
  digits = styles.DIGITS.get(metric, 1)
  return f"{mean:{sign}.{digits}f}" + ("" if error is None else f" +- {error:.{digits}f}")


def note(baseline: Entry, task: type[Task]) -> str:
  """A warning if the baseline's score is too low for comparisons: at chance, or below the task's floor."""
  chance = task.chance.get(baseline.metric)
  if chance is not None and baseline.mean - chance <= 2 * (baseline.standard_error or 0.0):
    return f"{baseline.method} at chance ({chance:g})"
  low = task.floor is not None and baseline.mean < task.floor
  return f"{baseline.method} below {task.floor:g}" if low else ""


def scores(entries: Sequence[Entry], baseline: str, tasks: Mapping[str, type[Task]]) -> str:
  """Methods on tasks: each metric's score first, then its difference from the baseline.

  Columns L (most new tokens), KV reads, peak tokens and seconds of a score's chains are shown if anything was written.

  Args:
    tasks: the task classes by name, which have the scores of random answers.
  """
  short, rows = short_names(list(dict.fromkeys(entry.method for entry in entries))), []
  where = lambda entry: (entry.task, entry.length, entry.max_tokens, entry.metric)
  bases = {where(entry): entry for entry in entries if entry.method == baseline}
  whole = lambda number: f"{number:,.0f}" if number else ""
  for entry in entries:
    rows.append([
      entry.task, "" if entry.length is None else f"{entry.length:,}", whole(entry.max_tokens), entry.metric,
      f"{entry.samples:,}", short[entry.method], with_error(entry.metric, entry.mean, entry.standard_error),
      "" if entry.difference is None else with_error(entry.metric, entry.difference, entry.difference_se, "+"),
      f"{entry.achieved_cr:.2f}", whole(entry.reads), whole(entry.peak),
      "" if None in (entry.seconds, entry.peak) else styles.amount(entry.seconds),
      note(bases.get(where(entry), entry), tasks[entry.task]),
    ])  # fmt: skip
  names = ["task", "T", "L", "metric", "n", "method", "score", f"- {baseline}", "CR", *COSTS, "note"]
  shown = [i for i, name in enumerate(names) if name not in ("L", *COSTS) or any(row[i] for row in rows)]
  return markdown([names[i] for i in shown], [[row[i] for i in shown] for row in rows])


def texts(entries: Sequence[Entry]) -> str:
  """Perplexity and divergence of methods on texts, by length: a row for each text, length and method.

  The change of the perplexity is from the one method without a difference, the baseline.
  """
  short, cells = short_names(list(dict.fromkeys(entry.method for entry in entries))), {}
  for entry in entries:
    cells.setdefault((entry.task, entry.length, entry.method), {})[entry.metric] = entry
  rows = []
  bases = {short[method] for (_, _, method), metrics in cells.items() if metrics["perplexity"].difference is None}
  change_from = f"change from {bases.pop()}" if len(bases) == 1 else "perplexity change"
  for (name, length, method), metrics in cells.items():
    perplexity, kl = metrics["perplexity"], metrics.get("kl")
    more = perplexity.difference
    change = "" if more is None else f"{more / (perplexity.mean - more):+.2%}"
    rows.append([
      name.removeprefix("text "), f"{length:,}", short[method], f"{perplexity.mean:.3f}",
      "" if kl is None else with_error("kl", kl.mean, kl.standard_error), change, f"{perplexity.achieved_cr:.2f}",
      "" if perplexity.reads is None else f"{causal_reads(length) / perplexity.reads:.2f}",
    ])  # fmt: skip
  names = ["text", "T", "method", "perplexity", "KL", change_from, "CR at T", "CR of reads"]
  return markdown(names, rows)
