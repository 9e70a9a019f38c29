"""Tables of a sweep: margins beside the paper's, scores with standard errors, and equal L and W."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from experiments.hyperscaling import published
from experiments.hyperscaling.analysis import Margin
from experiments.hyperscaling.methods import DENSE
from experiments.reports import styles
from experiments.reports.page import Row, Table
from experiments.reports.results import LOWER_COST, Panel, Point, Setting
from experiments.reports.tables import markdown

Look = Mapping[str, styles.Style]
NONE = "NA"
ENDS = {
  "frontier": "over the costs that both frontiers cover",
  "measured": "over the costs at which both methods were measured",
}


def signed(value: float | None) -> str:
  """Points with one digit and, but for 0.0, a sign; "NA" for None."""
  return NONE if value is None else styles.number("accuracy", round(value, 1) or 0.0, "+" if round(value, 1) else "")


def said(each: Margin | None) -> str:
  """A margin and its interval: "+12.3 [+10.1, +14.0]"; "NA" without one.

  "(83%)" behind it is the share of the resamples that have a margin, where it is below 99.5 %.
  """
  if each is None or each.margin is None:
    return NONE
  interval = "" if each.low is None else f" [{signed(each.low)}, {signed(each.high)}]"
  rare = each.resolved is not None and round(100 * each.resolved) < 100
  return signed(each.margin) + interval + (f" ({each.resolved:.0%})" if rare else "")


LEGEND = (
  f"Bold: the 95% interval excludes 0. {NONE}: there are no such costs. A share behind an interval is that of the "
  "resamples that have a margin, where some have none; below 95% nothing is bold."
)


def over_families(mean: Margin) -> str:
  """Over how many families a mean is, and which have no margin: "4", "3, not grids", "none"."""
  if not mean.families:
    return "none"
  return f"{len(mean.families)}" + (f", not {', '.join(mean.without)}" if mean.without else "")


def _clear(each: Margin | None) -> bool:
  """Whether the interval excludes 0, and hardly a resample lacks a margin."""
  known = each is not None and each.low is not None and (each.resolved is None or each.resolved >= 0.95)
  return known and (each.low > 0 or each.high < 0)


def _cell(each: Margin | None) -> tuple[str, bool]:
  return said(each), _clear(each)


def margins(made: Sequence[Margin], axis: str, scale: str, ends: str, look: Look) -> Table | None:
  """The margins on one axis: a row for each comparison, its mean with the interval, and each family; None without."""
  own = {(m.method, m.over, m.task): m for m in made if (m.axis, m.scale, m.ends) == (axis, scale, ends)}
  tasks = list(dict.fromkeys(task for _, _, task in own if task))
  rows = []
  for method, over in dict.fromkeys((method, over) for method, over, _ in own):
    mean = own.get((method, over, ""))
    each = [own.get((method, over, task)) for task in tasks]
    found = [(NONE if m is None else signed(m.margin), _clear(m)) for m in each]
    families = "" if mean is None else over_families(mean)
    rows.append(Row(method, [_cell(mean), families, *found], look[method], f"over {over}"))
  caption = f"At equal {LOWER_COST[axis]}, {scale} axis, {ENDS[ends]}: points of 100."
  columns = ["comparison", "mean and 95% interval", "over families", *tasks]
  return Table(caption, columns, rows, words=("over families",)) if rows else None


def ways(made: Sequence[Margin], axis: str, look: Look) -> Table | None:
  """The mean margins on one axis by all definitions: each axis of costs over each interval of costs; None without."""
  how = list(dict.fromkeys((m.scale, m.ends) for m in made))
  own = {(m.method, m.over, m.scale, m.ends): m for m in made if (m.axis, m.task) == (axis, "")}
  rows = []
  for method, over in dict.fromkeys((method, over) for method, over, *_ in own):
    found = [_cell(own.get((method, over, *each))) for each in how]
    rows.append(Row(method, found, look[method], f"over {over}"))
  caption = (
    f"Mean margins at equal {LOWER_COST[axis]} by definition. Both: {ENDS['frontier']}. All: {ENDS['measured']}, where "
    "a frontier goes on level. The paper does not say whether its axis is linear."
  )
  names = {"frontier": "both", "measured": "all"}
  columns = ["comparison", *(f"{scale}, {names[ends]}" for scale, ends in how)]
  return Table(caption, columns, rows) if rows else None


def beside(made: Sequence[Margin], look: Look) -> Table | None:
  """The comparisons that the paper has too, beside its own margins; None without any."""
  rows = []
  for (method, over, axis), _ in published.MARGINS.items():
    about = ("", method, over, axis, "linear", "frontier")
    own = [m for m in made if (m.task, m.method, m.over, m.axis, m.scale, m.ends) == about]
    if own:
      paper = published.means(method, over, axis)
      there = [value for value in paper if value is not None]
      mean = signed(sum(there) / len(there))
      cells = [LOWER_COST[axis], said(own[0]), over_families(own[0]), mean, *map(signed, paper)]
      rows.append(Row(method, cells, look[method], f"over {over}"))
  caption = (
    "Beside the paper's margins (arXiv 2506.05345, tables 7 to 9), means over R1-distilled models of 1.5B, 7B and "
    f"32B; its time is that of throughput. Linear axis, {ENDS['frontier']}."
  )
  columns = ["comparison", "equal", "here, mean", "families", "paper, mean", *published.TASKS]
  return Table(caption, columns, rows, words=("equal", "families")) if rows else None


def of_seeds(made: Sequence[Margin], look: Look) -> Table | None:
  """The mean margins of each model seed alone, linear axis; None for one seed."""
  own = [m for m in made if (m.task, m.scale, m.ends) == ("", "linear", "frontier") and len(m.seeds) > 1]
  if not own:
    return None
  rows = [
    Row(m.method, [LOWER_COST[m.axis], signed(m.margin), *map(signed, m.seeds)], look[m.method], f"over {m.over}")
    for m in own
  ]
  names = [f"seed {number + 1}" for number in range(len(own[0].seeds))]
  caption = (
    f"Mean margins of each model seed alone, linear axis, {ENDS['frontier']} of that seed. Seeds are averaged before "
    "frontiers are taken."
  )
  return Table(caption, ["comparison", "equal", "together", *names], rows, words=("equal",))


def _who(setting: Setting) -> tuple[str, tuple]:
  return setting.method, setting.budget


def _grid(panel: Panel) -> tuple[list[tuple], list[int], list[int], dict[Setting, Point]]:
  """Methods with their CRs, all W, all L, and the points by setting."""
  points = {point.setting: point for point in panel.points}
  who = list(dict.fromkeys(map(_who, points)))
  widths, lengths = (sorted({getattr(each, name) for each in points}) for name in ("chains", "max_tokens"))
  return who, widths, lengths, points


def scores(panel: Panel, look: Look) -> Table:
  """The score of every method and CR at each L, for one chain and for the most; with standard errors and the CR."""
  who, widths, lengths, points = _grid(panel)
  ends = sorted({widths[0], widths[-1]})
  rows = []
  for method, budget in who:
    cells = []
    for width in ends:
      for most in lengths:
        point = points.get(Setting(method, budget, width, most))
        error = point and point.main.standard_error
        shown = "NA" if point is None else styles.number("accuracy", point.main.mean)
        cells.append(shown if error is None else f"{shown} ± {styles.number('accuracy', error)}")
    last = points.get(Setting(method, budget, ends[0], lengths[-1]))
    cells.insert(0, "NA" if last is None else f"{last.main.achieved_cr:.2f}")
    rows.append(Row(method, cells, look[method], styles.limit(dict(budget))))
  groups = [("", 2), *((f"W {width}: accuracy, %, ± standard error", len(lengths)) for width in ends)]
  columns = ["method", "CR", *[f"L {most:,}" for _ in ends for most in lengths]]
  return Table(
    "CR: tokens seen over tokens held when a chain ends, mean over chains, at the largest L.", columns, rows, groups,
  )  # fmt: skip


def equal(panel: Panel, method: str, cr: float) -> Table | None:
  """A method at one CR minus the dense cache, at every equal L and W; None if it has no such CR."""
  _, widths, lengths, points = _grid(panel)
  own = {s: p for s, p in points.items() if s.method == method and dict(s.budget).get("cr") == cr}
  if not own:
    return None
  rows = []
  for most in lengths:
    cells = []
    for width in widths:
      point = own.get(Setting(method, (("cr", cr),), width, most))
      entry = point and point.main
      if entry is None or entry.difference is None:
        cells.append("")
        continue
      error = entry.difference_se
      text = signed(entry.difference) + ("" if error is None else f" ± {styles.number('accuracy', error)}")
      cells.append((text, error is not None and abs(entry.difference) > 2 * error))
    rows.append(Row(f"L {most:,}", cells))
  caption = (
    f"{method} at CR {cr:g} minus {DENSE} at equal L and W, points of 100, ± one standard error of the paired "
    "difference. Bold: more than two of them from 0."
  )
  return Table(caption, ["new tokens", *(f"W {width}" for width in widths)], rows)


def plain(table: Table) -> str:
  """A table in Markdown, for a terminal."""
  text = lambda cell: cell if isinstance(cell, str) else f"{cell[0]}{'*' * bool(cell[1])}"
  rows = [[" ".join(filter(None, (row.name, row.detail))), *map(text, row.cells)] for row in table.rows]
  return markdown(table.columns, rows)


def headline(panels: Sequence[Panel]) -> str:
  """Scores and costs at the smallest and the largest W, for a terminal."""
  lines = []
  for panel in panels:
    who, widths, lengths, points = _grid(panel)
    rows = []
    for method, budget in who:
      for width in sorted({widths[0], widths[-1]}):
        for most in lengths:
          if point := points.get(Setting(method, budget, width, most)):
            costs = [f"{point.costs[axis]:,.0f}" for axis in ("reads", "peak")]
            se = point.main.standard_error
            shown = f"{point.main.mean:.1f}" + ("" if se is None else f" +- {se:.1f}")
            rows.append([
              " ".join(filter(None, (method, styles.limit(dict(budget))))), f"{width}", f"{most:,}", shown, *costs,
              f"{point.main.achieved_cr:.2f}",
            ])  # fmt: skip
    lines.append(f"{panel.name}, {panel.points[0].main.samples} problems")
    lines.append(markdown(["method", "W", "L", "accuracy, %", "KV reads", "peak tokens", "CR"], rows))
  return "\n\n".join(lines)
