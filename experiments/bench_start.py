"""Time to the first answer: cold, with nothing compiled, and warm, with compiled programs on disk.

    python -m experiments.bench_start --checkpoint=checkpoints/smollm2-135m-instruct --retrofit=smollm2-135m-cr4
    python -m experiments.bench_start --preset=llama-3.2-1b    # random weights of a model's shape

A process of its own takes the steps of a first session: it imports dms_jax, loads the model and answers, then answers
again with one thing changed, such as the prompt, a threshold or the policy; last it serves requests. It runs twice with
one new folder of compiled programs: cold, then warm. Every step has its wall time and its CPU time (all threads),
seconds both, and the number of programs that were compiled or read from disk. On a busy machine the CPU time is the
figure to compare.
"""

from __future__ import annotations

import dataclasses
import tempfile
from pathlib import Path
from typing import Any, Literal

from dms_jax.families import PRESETS
from experiments.bench import cases
from experiments.common import files, program
from experiments.reports import tables

COLUMNS = ("step", "cold_s", "cold_cpu_s", "compiled", "warm_s", "warm_cpu_s", "read")


@dataclasses.dataclass(frozen=True)
class Config:
  """The model, and how much it writes.

  Attributes:
    checkpoint: the model, or give --preset.
    preset: shape of a model with random weights and adapter gates, instead of a checkpoint.
    steps: all, or the import, the model and the first answer alone.
    output: file of the results, JSON; none: they are printed alone.
    minutes: most minutes of each of the two processes.
  """

  checkpoint: str | None = None
  preset: str | None = dataclasses.field(default=None, metadata={"choices": PRESETS})
  retrofit: str | None = None
  dtype: Literal["float32", "bfloat16"] | None = None
  max_new_tokens: int = 32
  steps: Literal["all", "first"] = "all"
  output: str | None = None
  minutes: float = 60.0

  def __post_init__(self):
    if self.max_new_tokens < 1:
      raise ValueError(f"--max_new_tokens={self.max_new_tokens} must be 1 or more")
    if (self.checkpoint is None) == (self.preset is None):
      raise ValueError("give --checkpoint=FOLDER, or --preset=NAME for random weights")
    if self.preset is not None and self.retrofit is not None:
      raise ValueError(f"--retrofit={self.retrofit}: random weights have gates of their own; leave it out")


def main() -> None:
  config = program.read_flags("", Config)
  files.check_retrofit("retrofit", config.retrofit)
  names = ("checkpoint", "preset", "retrofit", "dtype", "max_new_tokens", "steps")
  what = {name: getattr(config, name) for name in names}
  runs: list[list[dict[str, Any]]] = []
  with tempfile.TemporaryDirectory() as folder:
    for name in ("cold", "warm"):
      program.log(f"{name}: a new process ...")
      found = cases.apart("experiments.bench.start", what | {"folder": folder}, 60 * config.minutes)
      if isinstance(found, dict):
        raise ValueError(f"the {name} process failed: {found['skipped']}")
      runs.append(found)
  rows = [
    {
      "step": cold["step"], "cold_s": cold["s"], "cold_cpu_s": cold["cpu_s"], "compiled": cold["programs"],
      "warm_s": warm["s"], "warm_cpu_s": warm["cpu_s"], "read": warm["programs"],
    }
    for cold, warm in zip(*runs, strict=True)
  ]  # fmt: skip
  print(tables.of_mappings(rows, COLUMNS))
  first = {name: sum(row[name] for row in rows[:3]) for name in COLUMNS if name.endswith("_s")}
  if config.output is not None:
    program.save_json(Path(config.output), {"environment": program.environment(), "rows": rows, "first_answer": first})
  program.finish({"rows": rows, "first_answer": first})


if __name__ == "__main__":
  program.define_flags("", Config)
  program.run(main, writes="file")
