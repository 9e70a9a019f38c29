"""Speed of the attention kernels against dense attention by cuDNN and the memory's limit, on one accelerator.

    python -m experiments.bench_kernels                               # an H100: every case but growth, ten minutes
    python -m experiments.bench_kernels --cases=decode,pages_b32_cr8  # those that are named, or begin so
    python -m experiments.bench_kernels --cases=growth                # against compression, length and batch
    python -m experiments.bench_kernels --tune --cases=decode         # first the fastest sizes, into --table
    python -m experiments.bench_kernels --scale=small --growth        # tiny shapes, anywhere: that everything runs

What is measured, and how: `experiments/kernel_cases.py`. Writes OUTPUT/{bench.json, bench.png, growth.png}; a later run
of other cases adds to them, each row with its date, versions and measured read bandwidth. Prints them as a table; the
last line is one JSON object. A case that fails is reported as such and the others go on.
"""

from __future__ import annotations

import dataclasses
import datetime
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import jax

from experiments import kernel_cases, kernel_tuning, plots, program
from experiments.kernel_cases import CASES, Decode
from pallas_kernels import bench, tuned


@dataclasses.dataclass(frozen=True)
class Config:
  """Settings of a run.

  Fields:
    cases: names, or beginnings of names; none: all but growth.
    implementation: of the kernels; none: "gpu" on a GPU, so that a refusal is seen, else what dispatch chooses.
    seconds: after so many no further case starts.
    flex: measure PyTorch's FlexAttention beside the retrofit, where PyTorch is installed.
    tune: measure candidates for the sizes of each case's kernel first, and write the fastest to `table`; the first
      case of a class of shapes decides for all. What is measured after that has the sizes of the default table.
  """

  cases: tuple[str, ...] = ()
  growth: bool = False
  scale: Literal["full", "small"] = "full"
  implementation: str | None = None
  seconds: float = 540.0
  flex: bool = True
  tune: bool = False
  table: Path = tuned.FILE
  output: Path = Path("runs/bench_kernels")


def selected(config: Config) -> dict[str, Any]:
  """The cases asked for: {name: case, or (axis, value, case) of growth}.

  Raises:
    ValueError: a name that no case has or begins with.
  """
  growth = kernel_cases.growth(config.scale == "small")
  both = CASES | growth
  unknown = [name for name in config.cases if not any(key.startswith(name) for key in both)]
  if unknown:
    raise ValueError(f"--cases: no case is called {', '.join(unknown)}, or begins so; there are {', '.join(both)}")
  wanted = config.cases or tuple(CASES)
  if config.growth:
    wanted += ("growth",)
  chosen = {key: case for key, case in both.items() if any(key.startswith(name) for name in wanted)}
  small = lambda case: case if isinstance(case, tuple) else case.shrunk()
  return {key: small(case) for key, case in chosen.items()} if config.scale == "small" else chosen


class Runner:
  """Runs cases one by one, guarded: a failure or the end of time becomes a row that says so."""

  def __init__(self, seconds: float, about: dict | None = None):
    self.end = time.monotonic() + seconds
    self.about = about or {}
    self.rows: dict[str, dict] = {}

  def __call__(self, name: str, about: dict, f: Callable[[], dict]) -> dict:
    row = {"name": name} | about
    try:
      row |= f() if time.monotonic() < self.end else {"skipped": "out of time"}
    except Exception as error:  # whatever a kernel or its compiler raises, the other cases stand
      row["error"] = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
    self.rows[name] = row | self.about
    program.log("  ".join(f"{k}={v:.4g}" if isinstance(v, float) else f"{k}={v}" for k, v in row.items()))
    return row


def judged(row: dict, bars: tuple[tuple[str, float], ...]) -> dict:
  """`row` with its bars and whether they are reached; a bar whose ratio was not measured is neither."""
  bars = [(name, least) for name, least in bars if name in row]
  if not bars:
    return row
  reached = all(row[name] <= x if name == "dense_slowdown" else row[name] >= x for name, x in bars)
  sign = lambda name: "<=" if name == "dense_slowdown" else ">="
  return row | {"bar": ", ".join(f"{name} {sign(name)} {x:g}" for name, x in bars), "reached": reached}


def measure(case: Any, bandwidth: float, config: Config, forced: str | None) -> dict:
  """The figures of one case."""
  if isinstance(case, tuple):
    return kernel_cases.our_decode(case[2], bandwidth, forced)
  if isinstance(case, Decode):
    row = kernel_cases.measure_decode(case, bandwidth, forced)
  elif case.kind == "prefill":
    row = kernel_cases.measure_prefill(case, forced)
  else:
    row = kernel_cases.measure_retrofit(case, forced, config.flex)
  return judged(row, case.bars)


def described(case: Any) -> dict:
  """What a row says of its case."""
  if isinstance(case, tuple):
    axis, value, case = case
    return {"axis": axis, "value": value} | described(case)
  kind = "decode" if isinstance(case, Decode) else case.kind
  return {"operation": kind, "case": str(case)} | ({} if kind == "retrofit" else {"CR": case.cr})


def table(rows: list[dict]) -> str:
  """The rows as Markdown."""
  columns = (
    "name",
    "case",
    "CR",
    "us",
    "floor_us",
    "of_floor",
    "dense_us",
    "dense_ratio",
    "flex_ratio",
    "bar",
    "reached",
  )
  lines = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
  for row in rows:
    cells = [row.get(c, row.get("error", row.get("skipped", "")) if c == "us" else "") for c in columns]
    lines.append("| " + " | ".join(f"{c:.4g}" if isinstance(c, float) else str(c) for c in cells) + " |")
  return "\n".join(lines)


def picture(path: Path, rows: list[dict], device: str) -> str | None:
  """A bar a kernel and case: ours, dense attention, FlexAttention where measured, and the floor as a line across."""
  rows = [row for row in rows if "us" in row and "axis" not in row]
  if not rows or (plt := plots.pyplot()) is None:
    return None
  figure, axis = plt.subplots(figsize=(9, 1.2 + 0.55 * len(rows)), layout="constrained")
  kinds = (("us", "ours", plots.DMS), ("dense_us", "dense, cuDNN" if "NVIDIA" in device else "dense, XLA", plots.DENSE),
           ("flex_us", "FlexAttention", "#c2571a"))  # fmt: skip
  for place, (key, label, color) in enumerate(kinds):
    points = [(i + 0.27 * (place - 1), row[key]) for i, row in enumerate(rows) if key in row]
    if points:
      bars = axis.barh(*zip(*points, strict=True), height=0.25, color=color, label=label)
      axis.bar_label(bars, fmt=lambda us: f"{us:,.0f}" if us >= 100 else f"{us:.3g}", fontsize=7, padding=2)
  floors = [(i, row["floor_us"]) for i, row in enumerate(rows) if "floor_us" in row]
  for number, (i, floor) in enumerate(floors):
    axis.vlines(floor, i - 0.42, i + 0.42, color="k", lw=1.2, ls="--", label="floor" if number == 0 else None)
  names = [f"{row['name']}\n{row.get('case', '')}" for row in rows]
  axis.set_yticks(range(len(rows)), names, fontsize=7)
  axis.invert_yaxis()
  axis.set(xscale="log", xlabel="microseconds", title=f"Attention kernels, bfloat16, {device}")
  axis.margins(x=0.1, y=0.02)
  axis.grid(axis="x", alpha=0.25)
  axis.set_axisbelow(True)
  axis.spines[["top", "right"]].set_visible(False)
  axis.legend(frameon=False, fontsize=8)
  figure.savefig(path, dpi=120)
  plt.close(figure)
  return str(path)


def growth_picture(path: Path, rows: list[dict], device: str) -> str | None:
  """Decode time against CR, length and batch, with the floor."""
  rows = [row for row in rows if "axis" in row and "us" in row]
  if not rows or (plt := plots.pyplot()) is None:
    return None
  figure, axes = plt.subplots(1, 3, figsize=(12, 4), layout="constrained")
  labels = {"CR": "compression ratio", "length": "slots a head, CR 8", "batch": "batch, CR 8"}
  for axis, (name, label) in zip(axes, labels.items(), strict=True):
    points = sorted((r["value"], r["us"], r["floor_us"]) for r in rows if r["axis"] == name)
    axis.set(xlabel=label, ylabel="microseconds")
    axis.grid(alpha=0.25, which="both")
    if not points:
      continue
    x, us, floor = zip(*points, strict=True)
    axis.loglog(x, us, "o-", color=plots.DMS, label="decode kernel", base=2)
    axis.loglog(x, floor, "--", color=plots.DENSE, label="floor: live bytes / read bandwidth", base=2)
    axis.set_xticks(x, [f"{value:g}" for value in x], rotation=45 if max(x) > 999 else 0)
    axis.minorticks_off()
    axis.yaxis.set_major_formatter("{x:g}")
  first = next(axis for axis in axes if axis.lines)
  first.legend(frameon=False)
  figure.suptitle(f"Decode attention of one layer, bfloat16, {device}")
  figure.savefig(path, dpi=120)
  plt.close(figure)
  return str(path)


def merged(path: Path, rows: dict[str, dict]) -> list[dict]:
  """Rows of an earlier run of OUTPUT, then `rows`, which replace those of the same name unless they failed."""
  old = {row["name"]: row for row in json.loads(path.read_text())["rows"]} if path.exists() else {}
  for name, row in rows.items():
    if "us" in row or "us" not in old.get(name, {}):
      old[name] = row
  order = [*CASES, *kernel_cases.growth(False)]
  place = {name: i for i, name in enumerate(order)}
  return sorted(old.values(), key=lambda row: place.get(row["name"], len(order)))


def check_same(path: Path, about: dict) -> None:
  """Raises ValueError where the file at `path` holds rows of another device or scale: they would be taken for these."""
  for row in json.loads(path.read_text())["rows"] if path.exists() else ():
    for name in ("device", "scale"):
      if row.get(name) != about[name]:
        raise ValueError(
          f"--output={path.parent}: row {row['name']} there is of {name} {row.get(name)!r}, this run of "
          f"{about[name]!r}; choose another folder"
        )


def main() -> None:
  config = program.read_flags("", Config)
  cases = selected(config)
  path = config.output / "bench.json"
  environment = program.environment()
  bandwidth = bench.read_bandwidth(2**22 if config.scale == "small" else 2**30)
  program.log(f"read bandwidth {bandwidth / 1e12:.3f} TB/s")
  forced = config.implementation or ("gpu" if jax.default_backend() == "gpu" else None)
  about = {
    "date": datetime.date.today().isoformat(), "read_bandwidth": bandwidth, "device": environment["device"],
    "jax": environment["jax"], "scale": config.scale,
  }  # fmt: skip
  check_same(path, about)
  run = Runner(config.seconds, about)
  tuned_classes: set[tuple[str, str]] = set()
  for name, case in cases.items():
    if config.tune and not isinstance(case, tuple):
      kernel_tuning.tune(name, case, config.table, run.end, about, tuned_classes)
    run(name, described(case), lambda case=case: measure(case, bandwidth, config, forced))
    saved = program.save_json(path, {"environment": environment, "rows": merged(path, run.rows)})
  rows = merged(path, run.rows)
  drawn = [
    picture(config.output / "bench.png", rows, environment["device"]),
    growth_picture(config.output / "growth.png", rows, environment["device"]),
  ]
  print(table(rows))
  measured = list(run.rows.values())
  program.finish({"read_bandwidth": bandwidth, "rows": measured, "json": str(saved), "png": [x for x in drawn if x]})


if __name__ == "__main__":
  program.define_flags("", Config)
  program.run(main)
