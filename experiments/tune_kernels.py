"""Finds the fastest block sizes of the attention kernels on one GPU, and writes them to a table.

    python -m experiments.tune_kernels                 # an H100: every class of shapes, half an hour
    python -m experiments.tune_kernels --cases=decode  # cases with these names or prefixes

The table at `--table` has an entry for each kind of device, operation and class of shapes. The default is the table
that the kernels read, so a later `experiments.bench_kernels` measures the new sizes. Entries of other devices and
classes are kept. The last line printed is one JSON object.
"""

from __future__ import annotations

import dataclasses
import datetime
import time
from pathlib import Path

from experiments.bench import cases, kernel_tuning
from experiments.bench.kernel_cases import CASES
from experiments.common import outputs, program
from pallas_kernels.common import tuned


@dataclasses.dataclass(frozen=True)
class Config:
  """`cases`: names or prefixes of names; the first case of a class of shapes decides for the class. No candidate starts
  later than `seconds`."""

  cases: tuple[str, ...] = ()
  seconds: float = 1800.0
  table: Path = tuned.FILE


def main() -> None:
  config = program.read_flags("", Config)
  environment, end = program.environment(), time.monotonic() + config.seconds
  about = {"date": datetime.date.today().isoformat(), "device": environment["device"], "jax": environment["jax"]}
  classes: set[tuple[str, str]] = set()
  with outputs.locked("table", config.table, "file", goes_on=False):
    for name in cases.chosen(CASES, config.cases):
      kernel_tuning.tune(name, CASES[name], config.table, end, about, classes)
  program.finish({"classes": sorted(map(" ".join, classes)), "table": str(config.table)})


if __name__ == "__main__":
  program.define_flags("", Config)
  program.run(main)
