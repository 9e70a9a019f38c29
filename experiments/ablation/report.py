"""The report of an ablation: rows, a table and plots of its finished trials."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from dms_jax.json_files import read_json
from experiments.ablation import sweeps
from experiments.ablation.trials import TRAINED, TYPES, Trial
from experiments.common import program
from experiments.reports import plots, tables


def rows(wanted: list[Trial], results: dict[str, dict]) -> list[dict[str, Any]]:
  """One mapping for each finished trial: its distinguishing settings, folder, cost and scores."""
  names = sweeps.varying([one.whole for one in wanted]) or list(wanted[0].said)
  found = []
  for one in wanted:
    if one.name not in results:
      continue
    about = {"run": one.name, "settings": {flag: program.spell(one.whole[flag]) for flag in names}}
    about |= {"folder": str(one.folder)}
    if one.eval.trained:
      cost = read_json(one.folder / TRAINED)
      about |= {"tokens": cost["tokens"], "minutes": cost["minutes"], "trained_on": cost["environment"]["device"]}
    found.append(about | {key: value for key, value in results[one.name].items() if key != "settings"})
  return found


def as_table(found: list[dict[str, Any]]) -> str:
  """The rows as a table."""
  trained = any("tokens" in row for row in found)
  read = any("reads_cr" in row for row in found)
  names = [*found[0]["settings"], "T", "achieved CR", *(["reads"] if read else []), "perplexity", "change", "KL"]
  cells = []
  for row in found:
    text = [*row["settings"].values(), f"{row['length']:,}", f"{row['achieved_cr']:.2f}"]
    if read:
      text.append(f"{row['reads_cr']:.2f}x less" if "reads_cr" in row else "-")
    text += [f"{row['perplexity']:.3f}", f"{row['perplexity_change']:+.2%}", f"{row['kl']:.4f}"]
    if trained:
      text += [f"{row['tokens'] / 1e6:,.2f} M", f"{row['minutes']:.1f}"] if "tokens" in row else ["-", "-"]
    cells.append(text)
  return tables.markdown([*names, *(["tokens trained", "minutes"] if trained else [])], cells)


def points(found: list[dict[str, Any]], x: str) -> list[dict[str, Any]]:
  """The rows in the order of the axis `x`, each with its position `x` and its `line`, the other differing settings."""
  if x == "run":
    short = lambda word: word.rpartition("=")[0].rpartition(".")[2] + "=" + word.rpartition("=")[2]
    return [row | {"x": "\n".join(map(short, row["run"].split())), "line": ""} for row in found]
  place = lambda row: row["tokens"] if x == "tokens" else row["settings"][x]
  if x == "tokens" or TYPES[x] in (int, float):
    found = sorted(found, key=lambda row: float(place(row)))
  at: dict[Any, list[dict]] = {}
  for row in found:
    at.setdefault(place(row), []).append(row["settings"])
  follows = lambda name: all(len({each[name] for each in same}) == 1 for same in at.values())  # from the place alone
  others = [name for name in found[0]["settings"] if name != x and not follows(name)]
  short = {} if x == "tokens" else sweeps.brief(at)
  show = lambda row: short.get(place(row), place(row))
  return [row | {"x": show(row), "line": ", ".join(f"{n}={row['settings'][n]}" for n in others)} for row in found]


def axis(found: list[dict[str, Any]]) -> str:
  """The setting with most values; numeric settings come first."""
  values = {name: {row["settings"][name] for row in found} for name in found[0]["settings"]}
  numeric = lambda name: TYPES[name] in (int, float) and len(values[name]) > 1
  return max(values, key=lambda name: (numeric(name), len(values[name])))


def draw(found: list[dict[str, Any]], x: str, title: str, root: Path) -> list[str]:
  """Draws the plots; returns their paths."""
  pictures = []
  if len(found) > 1:
    pictures.append(plots.ablation(root / "ablation.png", points(found, x), x, title))
  if by_position := [row for row in found if "held_by_position" in row]:
    words = {id(row): " ".join(row["settings"].values()) for row in by_position}
    short = sweeps.brief(words.values())
    name = lambda row: f", {short[words[id(row)]]}" if len(found) > 1 else ""
    runs = [
      {"name": name(row), "positions": np.asarray(row["positions"]), "held": np.asarray(row["held_by_position"])}
      for row in by_position
    ]
    pictures.append(plots.compression(root / "compression.png", runs, title))
  return [picture for picture in pictures if picture]
