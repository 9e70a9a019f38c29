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
from pathlib import Path
from typing import Any, Literal

import jax

from experiments.bench import cases, kernel_cases, kernel_tuning
from experiments.bench.kernel_cases import CASES, Decode
from experiments.common import program
from experiments.reports import figures_bench, tables
from pallas_kernels.common import bench, tuned


@dataclasses.dataclass(frozen=True)
class Config:
  """Settings of a run.

  Fields:
    cases: names, or beginnings of names; none: all but growth.
    implementation: of the kernels; none: "gpu" on a GPU, so that a refusal is seen, else what dispatch chooses.
    seconds: after so many no further case starts.
    check: compare decode with XLA's result too, which compiles both once more.
    flex: measure PyTorch's FlexAttention beside the retrofit, where PyTorch is installed.
    tune: measure candidates for the sizes of each case's kernel first, and write the fastest to `table`; the first
      case of a class of shapes decides for all. What is measured after that has the sizes of the default table.
  """

  cases: tuple[str, ...] = ()
  growth: bool = False
  scale: Literal["full", "small"] = "full"
  implementation: str | None = None
  seconds: float = 540.0
  check: bool = True
  flex: bool = True
  tune: bool = False
  table: Path = tuned.FILE
  output: Path = Path("runs/bench_kernels")


def selected(config: Config) -> dict[str, Any]:
  """The cases asked for: {name: case, or (axis, value, case) of growth}.

  Raises:
    ValueError: a name that no case has or begins with.
  """
  both = CASES | kernel_cases.growth(config.scale == "small")
  wanted = config.cases or tuple(CASES)
  if config.growth:
    wanted += ("growth",)
  chosen = {name: both[name] for name in cases.chosen(both, wanted)}
  small = lambda case: case if isinstance(case, tuple) else case.shrunk()
  return {name: small(case) for name, case in chosen.items()} if config.scale == "small" else chosen


def measure(case: Any, bandwidth: float, config: Config, override: str | None) -> dict:
  """The figures of one case."""
  if isinstance(case, tuple):
    return kernel_cases.our_decode(case[2], bandwidth, override)
  if isinstance(case, Decode):
    row = kernel_cases.measure_decode(case, bandwidth, override, config.check)
    return cases.judged(row, (*case.bars, kernel_cases.SAME))
  elif case.kind == "prefill":
    row = kernel_cases.measure_prefill(case, override)
  else:
    row = kernel_cases.measure_retrofit(case, override, config.flex)
  return cases.judged(row, case.bars)


def described(case: Any) -> dict:
  """What a row says of its case."""
  if isinstance(case, tuple):
    axis, value, case = case
    return {"axis": axis, "value": value} | described(case)
  kind = "decode" if isinstance(case, Decode) else case.kind
  return {"operation": kind, "case": str(case)} | ({} if kind == "retrofit" else {"CR": case.cr})


COLUMNS = ("name", "case", "us", "CR", "floor_us", "of_floor", "dense_us", "dense_ratio", "flex_ratio",
           "flex_blocks_ratio", "difference", "bar", "reached")  # fmt: skip


def main() -> None:
  config = program.read_flags("", Config)
  chosen = selected(config)
  path = config.output / "bench.json"
  environment = program.environment()
  bandwidth = bench.read_bandwidth(2**22 if config.scale == "small" else 2**30)
  program.log(f"read bandwidth {bandwidth / 1e12:.3f} TB/s")
  override = config.implementation or ("gpu" if jax.default_backend() == "gpu" else None)
  about = {
    "date": datetime.date.today().isoformat(),
    "read_bandwidth": bandwidth,
    "device": environment["device"],
    "jax": environment["jax"],
    "scale": config.scale,
  }
  cases.check_same(path, about)
  run = cases.Runner(config.seconds, about)
  merged = lambda: cases.merged(path, run.rows, [*CASES, *kernel_cases.growth(False)])
  tuned_classes: set[tuple[str, str]] = set()
  for name, case in chosen.items():
    if config.tune and not isinstance(case, tuple):
      kernel_tuning.tune(name, case, config.table, run.end, about, tuned_classes)
    run(name, described(case), lambda case=case: measure(case, bandwidth, config, override))
    saved = program.save_json(path, {"environment": environment, "rows": merged()})
  rows = merged()
  drawn = [
    figures_bench.kernels(config.output / "bench.png", rows, environment["device"]),
    figures_bench.growth(config.output / "growth.png", rows, environment["device"]),
  ]
  print(tables.of_mappings(rows, COLUMNS))
  measured = list(run.rows.values())
  program.finish({"read_bandwidth": bandwidth, "rows": measured, "json": str(saved), "png": [x for x in drawn if x]})


if __name__ == "__main__":
  program.define_flags("", Config)
  program.run(main)
