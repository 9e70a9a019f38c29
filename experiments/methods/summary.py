"""Summary of results: an entry for each method, budget, task and metric, with standard errors."""

from __future__ import annotations

import dataclasses
import itertools
import math
import random
from collections.abc import Callable, Iterable, Mapping, Sequence

import numpy as np

from experiments.methods import pareto
from experiments.methods.method import label
from experiments.methods.records import Record

ACCURACY = "accuracy"  # the metric of answers that are right, 100, or wrong, 0
COSTS = ("reads", "peak", "seconds")  # fields of a record: what a chain costs
SUBSETS = 500  # subsets of chains that vote; of more, so many are sampled


@dataclasses.dataclass(frozen=True)
class Entry:
  """A method's result for one metric of one task.

  Fields:
    metric: a name of `Record.grades`, whose value for a prompt is the mean over its chains: pass@1 for "accuracy". Over
      W chains: "pass@W", that any of them is right, and "majority@W", that most of them vote for a right answer.
    samples: number of prompts.
    mean, standard_error: over samples; the error is None for fewer than two samples or if none is estimated.
    difference, difference_se: method - baseline, paired sample by sample; None for the baseline itself.
    tokens, reads, peak, seconds: `chains` times the mean over all chains (see `Record`); None if a chain has none. That
      of seconds is over the chains that have them. Peak tokens count what chains share once (`together`).
    achieved_cr: 1 / the mean over all chains of tokens held over tokens seen.
    chains: W chains that the metric takes; 1 for a mean over any number.
    budget: as in `Record`.
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
  seconds: float | None = None
  chains: int = 1
  max_tokens: int = 0
  budget: Mapping[str, float] = dataclasses.field(default_factory=dict)

  @property
  def label(self) -> str:
    """The method with its budget, for readers."""
    return label(self.method, self.budget)


def standard_error(values: np.ndarray) -> float | None:
  """The standard error of the mean of independent samples; None for fewer than two, NaN if one is not finite."""
  return float(values.std(ddof=1) / math.sqrt(len(values))) if len(values) > 1 else None


# Several chains -------------------------------------------------------------------------------------------------------


def best_of(grades: Sequence[float], width: int) -> float:
  """The mean, over all subsets of `width` chains, of the best grade in each.

  For grades of 0 and 100 this is the unbiased estimate of pass@k, 100 (1 - C(n - c, k) / C(n, k)) with c of n chains
  right (arXiv 2107.03374, equation 1).
  """
  ordered, count = sorted(grades), len(grades)
  weights = [math.comb(i, width - 1) / math.comb(count, width) for i in range(count)]
  return float(np.dot(weights, ordered))


def vote(answers: Sequence[str | None]) -> int | None:
  """The index of the first chain with the most frequent answer; among equally frequent ones the first wins.

  A chain without an answer does not vote. None if none has one.
  """
  counts: dict[str, int] = {}
  for answer in answers:
    if answer is not None:
      counts[answer] = counts.get(answer, 0) + 1
  return answers.index(max(counts, key=counts.__getitem__)) if counts else None


def subsets(count: int, width: int) -> Iterable[Sequence[int]]:
  """All subsets of `width` of `count` chains; of more than `SUBSETS` that many are sampled, always the same."""
  if math.comb(count, width) <= SUBSETS:
    return itertools.combinations(range(count), width)
  rng = random.Random(f"{count} {width}")
  return [sorted(rng.sample(range(count), width)) for _ in range(SUBSETS)]


def majority(grades: Sequence[float], answers: Sequence[str | None], width: int) -> float:
  """The grade of the answer that `width` chains vote for, mean over `subsets` of chains. No answer gives 0."""
  found = []
  for subset in subsets(len(grades), width):
    winner = vote([answers[i] for i in subset])
    found.append(0.0 if winner is None else grades[subset[winner]])
  return float(np.mean(found))


def _measures(chains: Sequence[Record], widths: Sequence[int]) -> dict[str, tuple[str, int, Callable]]:
  """{name: (metric, W, value of a prompt's chains)} of all that these records have."""
  found: dict[str, tuple[str, int, Callable]] = {}
  for metric in dict.fromkeys(metric for record in chains for metric in record.grades):
    grades = lambda own, metric=metric: [record.grades[metric] for record in own]
    found[metric] = (metric, 1, lambda own, grades=grades: float(np.mean(grades(own))))
    for width in widths if metric == ACCURACY else ():
      best = lambda own, width=width, grades=grades: best_of(grades(own), width)
      found[f"pass@{width}"] = (metric, width, best)
      if any(record.answer is not None for record in chains):
        most = lambda own, width=width, grades=grades: majority(grades(own), [r.answer for r in own], width)
        found[f"majority@{width}"] = (metric, width, most)
  return found


# Entries --------------------------------------------------------------------------------------------------------------


def mean_cost(chains: Sequence[Record], cost: str) -> float | None:
  """The mean of a cost of these chains; None if it is unknown for one. Of times, those that are known are taken."""
  values = [getattr(record, cost) for record in chains]
  if cost == "seconds":
    values = [value for value in values if value is not None]
  return None if None in values or not values else float(np.mean(values))


def together(peak, shared, width: int):
  """Peak tokens of `width` chains of a prompt: each one's own, and once what they share (`Record.shared`).

  It is as if all chains held their most at the same time.
  """
  return width * peak - (width - 1) * shared


def total_cost(chains: Sequence[Record], cost: str, width: int) -> float | None:
  """The cost of `width` chains of a prompt together, as these chains' mean has it; None if it is unknown for one."""
  if (mean := mean_cost(chains, cost)) is None:
    return None
  return together(mean, mean_cost(chains, "shared") or 0.0, width) if cost == "peak" else width * mean


def _by_prompt(chains: Sequence[Record]) -> dict[int | str, list[Record]]:
  """The chains of each prompt, in order."""
  found: dict[int | str, list[Record]] = {}
  for record in sorted(chains, key=lambda record: record.chain):
    found.setdefault(record.prompt, []).append(record)
  return found


@np.errstate(invalid="ignore", over="ignore")  # a grade that is NaN or infinite makes NaN or infinite entries
def summarise(records: Sequence[Record], baseline: str, widths: Sequence[int] = ()) -> list[Entry]:
  """Entries of all records; differences from `baseline` are over the prompts that both methods answered.

  Tasks, lengths, metrics and methods keep the order in which they first come. An unfinished prompt counts for each W up
  to its chains. `nll` becomes perplexity, with errors to first order, a difference's for a fixed baseline.

  Args:
    widths: numbers W of chains to summarise, besides all chains that the records have.
  """
  groups: dict[tuple, dict[tuple, list[Record]]] = {}
  for record in records:
    where = record.task, record.length, record.chains, record.max_tokens
    groups.setdefault(where, {}).setdefault(record.cell[:2], []).append(record)
  entries = []
  for (_, _, width, most), methods in groups.items():
    asked = sorted({w for w in (*widths, width) if 1 < w <= width})
    measures = {name: each for chains in methods.values() for name, each in _measures(chains, asked).items()}
    prompts = {method: _by_prompt(chains) for method, chains in methods.items()}
    bases = {budget: (name, budget) for name, budget in methods if name == baseline}
    first = next(iter(bases.values()), None)
    for name, (metric, count, value) in measures.items():
      values = {}
      for method, own in prompts.items():
        graded = {prompt: [r for r in chains if metric in r.grades] for prompt, chains in own.items()}
        values[method] = {prompt: value(chains) for prompt, chains in graded.items() if len(chains) >= count}
      for method, chains in methods.items():
        if values[method]:
          base = bases.get(method[1], first)  # of the same budget, if the baseline has it
          entries.append(_entry(chains, name, count, most, values[method], method == base, values.get(base, {})))
  return entries


def _entry(chains, metric, count, most, values, is_base, base) -> Entry:
  """One entry from its values by prompt, {prompt: value}, and those of the baseline."""
  first, own = chains[0], np.array(list(values.values()))
  paired = np.array([values[prompt] - base[prompt] for prompt in values if prompt in base])
  mean, error = float(own.mean()), standard_error(own)
  difference = difference_se = None
  if not is_base and len(paired):
    difference, difference_se = float(paired.mean()), standard_error(paired)
  if metric == "nll":
    metric, mean = "perplexity", float(np.exp(mean))
    error = None if error is None else error * mean
    if difference is not None:  # of exponentials of means; its error by the delta method, paired
      both = np.array([(values[prompt], base[prompt]) for prompt in values if prompt in base])
      own_mean, base_mean = np.exp(both.mean(axis=0))
      difference = float(own_mean - base_mean)
      difference_se = standard_error(both @ np.array([own_mean, -base_mean]))
  costs = {name: total_cost(chains, name, count) for name in ("tokens", *COSTS)}
  return Entry(
    first.method, first.task, first.length, metric, len(own), mean, error, difference, difference_se, chains=count,
    max_tokens=most, achieved_cr=float(1 / np.mean([1 / record.achieved_cr for record in chains])), budget=first.budget,
    **costs,
  )  # fmt: skip


# Pareto ---------------------------------------------------------------------------------------------------------------


def curves(entries: Sequence[Entry], cost: str, best_of_all: bool = False) -> dict[str, list[tuple[float, float]]]:
  """{method: (cost, value) of its points}: each budget, W and L is a point.

  Args:
    entries: of one task and length.
    cost: one of COSTS, of all W chains together.
    best_of_all: W chains count as their best one, pass@W, instead of their majority.
  """
  found: dict[str, list[tuple[float, float]]] = {}
  for entry in entries:
    wanted = {ACCURACY, f"{'pass' if best_of_all else 'majority'}@{entry.chains}"}
    value = getattr(entry, cost)
    if value is not None and math.isfinite(entry.mean) and (entry.metric in wanted or entry.metric == "score"):
      found.setdefault(entry.method, []).append((value, entry.mean))
  return found


def margins(entries: Sequence[Entry], baseline: str, best_of_all: bool = False) -> list[dict]:
  """The margin of each method's Pareto frontier over the baseline's (arXiv 2506.05345, appendix G), by each cost.

  Args:
    entries: of one task and length.
  """
  found = []
  for cost in COSTS:
    points = curves(entries, cost, best_of_all)
    for method, own in points.items():
      if method != baseline and baseline in points:
        margin = pareto.margin(own, points[baseline])
        found.append({"method": method, "cost": cost, "margin": margin, "points": pareto.frontier(own)})
  return found
