"""Speed of the attention kernels, against dense attention by cuDNN and memory bandwidth.

    python -m experiments.bench_kernels                               # an H100: every case but growth, ten minutes
    python -m experiments.bench_kernels --cases=decode,pages_b32_cr8  # cases with these names or prefixes
    python -m experiments.bench_kernels --cases=decode_mass,pages_ring_mass  # with attention mass, two minutes
    python -m experiments.bench_kernels --cases=decode_sinks,decode_softcap,prefill_s,retrofit_s  # sinks and caps
    python -m experiments.bench_kernels --cases=growth                # decode time by compression, length and batch
    python -m experiments.bench_kernels --scale=small --growth        # tiny shapes on any machine, to test the program

`experiments/bench/kernel_cases.py` says what each case measures. Writes OUTPUT/{bench.json, bench.png, growth.png}; a
later run of other cases adds rows to them, each with its date, versions and measured read bandwidth. Prints the rows as
a table; the last line is one JSON object. A case that fails is reported, and the others continue.
`experiments.tune_kernels` finds the fastest block sizes.
"""

from __future__ import annotations

import dataclasses
import datetime
from pathlib import Path
from typing import Any, Literal

import jax

from experiments.bench import cases, kernel_cases
from experiments.bench.kernel_cases import CASES, Decode
from experiments.common import program
from experiments.reports import figures_bench, tables
from pallas_kernels.common import bench


@dataclasses.dataclass(frozen=True)
class Config:
  """Settings of a run.

  Attributes:
    cases: names or prefixes of names; none: all but growth.
    growth: also measure decode time by compression, length and batch.
    implementation: of the kernels. Default: "gpu" on a GPU, so that an unsupported case is an error, else the
      dispatcher's choice.
    seconds: no case starts later than this.
    check: also compare decode with XLA's result; both are compiled once more.
    flex: also measure PyTorch's FlexAttention with the training bias, where PyTorch is installed.
  """

  cases: tuple[str, ...] = ()
  growth: bool = False
  scale: Literal["full", "small"] = "full"
  implementation: str | None = None
  seconds: float = 540.0
  check: bool = True
  flex: bool = True
  output: Path = Path("runs/bench_kernels")


def selected(config: Config) -> dict[str, Any]:
  """The cases asked for: {name: workload, or (axis, value, workload) of growth}.

  Raises:
    ValueError: a name that is no case's name or prefix.
  """
  both = CASES | kernel_cases.growth(config.scale == "small")
  wanted = config.cases or tuple(CASES)
  if config.growth:
    wanted += ("growth",)
  chosen = {name: both[name] for name in cases.chosen(both, wanted)}
  small = lambda case: case if isinstance(case, tuple) else case.shrunk()
  return {name: small(case) for name, case in chosen.items()} if config.scale == "small" else chosen


def measure(work: Any, bandwidth: float, config: Config, override: str | None) -> dict:
  """The figures of one workload."""
  if isinstance(work, tuple):
    return kernel_cases.our_decode(work[2], bandwidth, override)
  if isinstance(work, Decode):
    row = kernel_cases.measure_decode(work, bandwidth, override, config.check)
    return cases.judged(row, (*work.bars, kernel_cases.SAME, kernel_cases.SAME_MASS))
  elif work.kind == "prefill":
    row = kernel_cases.measure_prefill(work, override)
  else:
    row = kernel_cases.measure_retrofit(work, override, config.flex)
  return cases.judged(row, work.bars)


def described(work: Any) -> dict:
  """The fields of a row that describe its workload."""
  if isinstance(work, tuple):
    axis, value, work = work
    return {"axis": axis, "value": value} | described(work)
  kind = "decode" if isinstance(work, Decode) else work.kind
  return {"operation": kind, "case": str(work)} | ({} if kind == "retrofit" else {"CR": work.cr})


COLUMNS = ("name", "case", "us", "CR", "floor_us", "of_floor", "dense_us", "dense_ratio", "slowdown",
           "xla_ratio", "flex_ratio", "flex_blocks_ratio", "difference", "bar", "reached")  # fmt: skip


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
  for name, case in chosen.items():
    run(name, described(case), lambda case=case: measure(case, bandwidth, config, override))
    saved = program.save_json(path, {"environment": environment, "rows": merged()})
  rows = merged()
  pictures = [
    figures_bench.kernels(config.output / "bench.png", rows, environment["device"]),
    figures_bench.growth(config.output / "growth.png", rows, environment["device"]),
  ]
  print(tables.of_mappings(rows, COLUMNS))
  measured = list(run.rows.values())
  program.finish({"read_bandwidth": bandwidth, "rows": measured, "json": str(saved), "png": [x for x in pictures if x]})


if __name__ == "__main__":
  program.define_flags("", Config)
  program.run(main, writes="folder")
