"""Summary of results: an entry for each method, task, length and metric, with standard errors."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import numpy as np

from experiments.methods.records import Record


@dataclasses.dataclass(frozen=True)
class Entry:
  """A method's result for one metric of one task.

  Fields:
    samples: number of prompts; the value of a prompt with several chains is their mean.
    mean, standard_error: over samples; the error is None for fewer than two samples or if none is estimated.
    difference, difference_se: method - baseline, paired sample by sample; None for the baseline itself.
    tokens, reads, peak: means over chains (see `Record`).
    achieved_cr: 1 / the mean over samples of tokens held over tokens seen.
  """

  method: str
  task: str
  length: int | None
  metric: str
  samples: int
  mean: float
  standard_error: float | None = None
  difference: float | None = None
  difference_se: float | None = None
  achieved_cr: float = 1.0
  tokens: float | None = None
  reads: float | None = None
  peak: float | None = None
  chains: int = 1
  max_tokens: int = 0


def standard_error(values: np.ndarray) -> float | None:
  """The standard error of the mean of independent samples; None for fewer than two."""
  return float(values.std(ddof=1) / math.sqrt(len(values))) if len(values) > 1 else None


def _values(chains: Sequence[Record], metric: str) -> dict[int | str, float]:
  """{prompt: mean of one metric over its chains}."""
  each: dict[int | str, list[float]] = {}
  for record in chains:
    each.setdefault(record.prompt, []).append(record.grades[metric])
  return {prompt: float(np.mean(values)) for prompt, values in each.items()}


def _mean(values: Sequence[float | None]) -> float | None:
  return None if None in values else float(np.mean(values))


def summarise(records: Sequence[Record], baseline: str) -> list[Entry]:
  """Entries of all records; differences from `baseline` are over the prompts that both methods answered.

  Tasks, lengths, metrics and methods keep the order in which they first come.
  """
  groups: dict[tuple, dict[str, list[Record]]] = {}
  for record in records:
    where = record.task, record.length, record.chains, record.max_tokens
    groups.setdefault(where, {}).setdefault(record.method, []).append(record)
  entries = []
  for (task, length, width, most), methods in groups.items():
    metrics = dict.fromkeys(metric for chains in methods.values() for metric in chains[0].grades)
    for metric in metrics:
      base = _values(methods.get(baseline, []), metric)
      for method, chains in methods.items():
        values = _values(chains, metric)
        own = np.array(list(values.values()))
        entry = Entry(
          method, task, length, metric, len(own), float(own.mean()), standard_error(own), chains=width, max_tokens=most,
          achieved_cr=float(1 / np.mean([1 / record.achieved_cr for record in chains])),
          **{name: _mean([getattr(record, name) for record in chains]) for name in ("tokens", "reads", "peak")},
        )  # fmt: skip
        paired = np.array([values[prompt] - base[prompt] for prompt in values if prompt in base])
        if method != baseline and len(paired):
          entry = dataclasses.replace(entry, difference=float(paired.mean()), difference_se=standard_error(paired))
        entries.append(entry)
  return entries
