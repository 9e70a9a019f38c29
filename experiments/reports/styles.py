"""Colours, markers and names of methods and metrics, the same in every picture and page.

The colours were chosen to differ under normal vision and under simulated protanopia, deuteranopia and tritanopia
(Machado et al. 2009), and have a contrast of at least 3 with their background. Markers and labels tell methods apart
without colour. Beyond the last colour, colours come again with other markers.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence

# Each pair: on white, and on the page's dark background.
NEUTRAL = ("#4d4d4d", "#d8dce2")
PALETTE = (
  ("#0072b2", "#4c9be0"), ("#c2700c", "#ffab5e"), ("#8a00ff", "#b06bff"), ("#008c8c", "#22c7c7"),
  ("#9a66f0", "#e3c9ff"), ("#8a560a", "#c08a3a"),
)  # fmt: skip
MARKERS = ("circle", "square", "triangle", "diamond", "wedge", "cross", "hexagon", "bar")  # names of `charts.MARKS`
UNITS = {"answer_loglik": "nats a token", "kl": "nats a token", "perplexity": ""}
LOWER = ("perplexity", "kl")  # metrics of which less is better
MINUS = "\u2212"
DIGITS = {"answer_loglik": 3, "perplexity": 3, "kl": 4}
LONG = {
  "acc": "right answers", "acc_norm": "right answers by character", "answer_loglik": "log-likelihood of the answer",
  "score": "references found", "kl": "KL from the original",
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Style:
  """How a method is drawn: its number (`m0` is the baseline's class on the page), colours and marker.

  `again`: an earlier method has its colour; its lines are dashed.
  """

  number: int
  light: str
  dark: str
  marker: str

  @property
  def again(self) -> bool:
    return self.number > len(PALETTE)


def styles(methods: Sequence[str], baseline: str) -> dict[str, Style]:
  """A style for each method, in order; the baseline is neutral, and first wherever it stands."""
  others = [method for method in methods if method != baseline]
  found = {baseline: Style(0, *NEUTRAL, MARKERS[0])}
  for i, method in enumerate(others):
    marker = MARKERS[(i + i // len(PALETTE) + 1) % len(MARKERS)]
    found[method] = Style(i + 1, *PALETTE[i % len(PALETTE)], marker)
  return found


def unit(metric: str) -> str:
  """The unit of a metric; "" if it has none."""
  return UNITS.get(metric, "%")


def number(metric: str, value: float | None, sign: str = "") -> str:
  """A value of a metric with the digits of its unit; "" for None, and NaN and infinity as such."""
  if value is None or math.isnan(value):
    return "" if value is None else "NaN"
  return f"{value:{sign}.{DIGITS.get(metric, 1)}f}".replace("-", MINUS).replace("inf", "∞")


def named(metric: str) -> str:
  """A metric with its unit: "accuracy, %"."""
  return ", ".join(filter(None, (LONG.get(metric, metric), unit(metric))))


def told(metric: str, value: float) -> str:
  """A value in words: "accuracy 75.0%", "log-likelihood of the answer -1.257 nats a token"."""
  of = unit(metric)
  return f"{LONG.get(metric, metric)} {number(metric, value)}{of if of in ('', '%') else f' {of}'}"


def limit(budget: Mapping[str, float]) -> str:
  """The bound on a cache: "CR 4", "512 tokens", "threshold 0.5"; "" without one, or with the usual threshold of 0."""
  shown = {"cr": "CR {:g}", "budget": "{:,g} tokens", "threshold": "threshold {:g}"}
  named = {name: value for name, value in budget.items() if value or name != "threshold"}
  return ", ".join(shown.get(name, name + " {:g}").format(value) for name, value in named.items())


def amount(value: float) -> str:
  """A count in full, or a smaller number with three digits: "1,234", "0.0371"."""
  return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def short(value: float | None) -> str:
  """A count in at most four characters and a unit: 950, 9.5 k, 1.2 M; "" for None."""
  if value is None:
    return ""
  for size, suffix in ((1e9, " G"), (1e6, " M"), (1e3, " k")):
    if abs(value) >= 0.9995 * size:
      return f"{value / size:.3g}{suffix}"
  return f"{value:.3g}"
