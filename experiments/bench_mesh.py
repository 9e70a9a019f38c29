"""Decode steps of a model on a mesh of devices, against one device.

    python -m experiments.bench_mesh                               # two GPUs, all cases
    python -m experiments.bench_mesh --cases=data_smollm2,tensor   # cases with these names or prefixes
    XLA_FLAGS=--xla_force_host_platform_device_count=2 python -m experiments.bench_mesh --scale=small  # on any machine

    data_smollm2   `data` = devices, DMS: devices times as many rows. The bar: 0.95 times devices times the tokens/s
    data_8b        the same, Llama-3.1-8B's shape
    tensor_8b_dms  `tensor` = devices, DMS: the same rows. The bar for two devices: 0.65 of the time of a step
    tensor_8b      the same with a dense cache
    share_8b_dms   one device alone with its share of `tensor`, 1 / devices of heads, MLP and vocabulary: the time of a
                   step whose collectives would take none
    share_8b       the same with a dense cache

Weights are random, and caches are created in the state after `tokens` tokens (`experiments.bench.synthetic`): under DMS
a head of the 8B shape holds exp(0.8 N(0, 1)) times a mean that makes CR 8, a head of SmolLM2 what its CR 8 retrofit
keeps, so devices of `tensor` hold different numbers of tokens. A step is timed in compiled decode blocks, on one device
and then on the mesh. Layers are a list, as in generation on a GPU: a scan would copy weights in every step. All
programs are compiled first, `workers` at a time. Writes OUTPUT/mesh.json and prints a table; the last line is one JSON
object.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

from dms_jax.families import PRESETS
from dms_jax.sharding import make_mesh
from experiments.bench import cases
from experiments.bench.cases import Bar
from experiments.bench.generate_cases import SMALL, smollm2
from experiments.bench.generate_points import Bench, Energy, Kind, Point, Programs, Shape
from experiments.common import program
from experiments.reports import tables
from pallas_kernels.common import bench

EFFICIENCY = 0.95  # of `data`
SHARE = 0.65  # of the time of a step, on two devices of `tensor`
COLUMNS = (
  "name", "case", "mesh", "one_ms", "ms", "one_tokens_per_s", "tokens_per_s", "speedup", "time_ratio",
  "one_of_roofline", "of_roofline", "bar", "reached",
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Config:
  """Settings of a run.

  Attributes:
    cases: names or prefixes of names; none: all.
    rows: of one device; with `data` each device has as many.
    tokens: that each row has read.
    devices: of the mesh.
    seconds: no case starts later than this.
    workers: programs compiled in parallel.
  """

  cases: tuple[str, ...] = ()
  rows: int = 32
  tokens: int = 8192
  devices: int = 2
  seconds: float = 300.0
  workers: int = 8
  scale: Literal["full", "small"] = "full"
  output: Path = Path("runs/bench_mesh")

  def __post_init__(self):
    for name, least in (("rows", 1), ("tokens", 1), ("devices", 2), ("workers", 1)):
      if getattr(self, name) < least:
        raise ValueError(f"--{name}={getattr(self, name)} must be {least} or more")
    cases.chosen(CASES, self.cases)


@dataclasses.dataclass(frozen=True)
class Case:
  """One comparison: a model's shape and kind of cache, and the axis of the mesh that takes all devices."""

  shape: Callable[[], Shape]
  kind: Kind
  axis: Literal["data", "tensor", "share"]

  def bar(self, devices: int) -> Bar | None:
    if self.axis == "data":
      return Bar("speedup", EFFICIENCY * devices)
    return Bar("time_ratio", SHARE, most=True) if self.axis == "tensor" and devices == 2 else None


def llama() -> Shape:
  return Shape(PRESETS["llama-3.1-8b"], window=256)


CASES = {
  "data_smollm2": Case(smollm2, "dms", "data"),
  "data_8b": Case(llama, "dms", "data"),
  "tensor_8b_dms": Case(llama, "dms", "tensor"),
  "tensor_8b": Case(llama, "dense", "tensor"),
  "share_8b_dms": Case(llama, "dms", "share"),
  "share_8b": Case(llama, "dense", "share"),
}


def share(shape: Shape, devices: int) -> Shape:
  """The shape of what one of `devices` devices of `tensor` computes."""
  divided = ("num_heads", "num_kv_heads", "d_ff", "vocab_size")
  sizes = {name: getattr(shape.config, name) // devices for name in divided}
  return dataclasses.replace(shape, config=dataclasses.replace(shape.config, eos_token_ids=(), **sizes))


class Pair:
  """A case on one device and on the mesh. Pairs of one shape share the bench of one device, and so its weights."""

  def __init__(self, case: Case, alone: Bench, config: Config):
    heads = alone.shape.config.num_kv_heads
    if case.axis != "data" and heads % config.devices:  # "tensor" would split rows instead
      raise ValueError(f"--devices={config.devices} does not divide the {heads} KV heads of this shape")
    self.alone = alone
    self.mesh = (
      alone.of(share(alone.shape, config.devices)) if case.axis == "share"
      else alone.on(make_mesh(**{case.axis: config.devices}))
    )  # fmt: skip
    point = Point(case.kind, config.rows, config.tokens, config.tokens)
    rows = config.rows * (config.devices if case.axis == "data" else 1)
    self.points = point, dataclasses.replace(point, batch=rows)

  def start(self) -> None:
    """Begins to compile both programs."""
    for bench_, point in zip((self.alone, self.mesh), self.points, strict=True):
      bench_.start(point)

  def run(self) -> dict[str, Any]:
    """Figures of the mesh; those of one device begin with "one_". `speedup` is of tokens/s, `time_ratio` of a step."""
    one, many = (bench_.point(point) for bench_, point in zip((self.alone, self.mesh), self.points, strict=True))
    names = "ms", "tokens_per_s", "of_roofline", "cache_bytes"
    return {
      **{name: many[name] for name in (*names, "CR")}, **{f"one_{name}": one[name] for name in names},
      "speedup": many["tokens_per_s"] / one["tokens_per_s"], "time_ratio": many["ms"] / one["ms"],
    }  # fmt: skip


def main() -> None:
  config = program.read_flags("", Config)
  chosen = {name: CASES[name] for name in cases.chosen(CASES, config.cases)}
  small, begin = config.scale == "small", time.monotonic()
  sized = dataclasses.replace(config, rows=2, tokens=64) if small else config
  if any(case.axis != "share" for case in chosen.values()):
    make_mesh(config.devices)  # refuses where there are fewer
  environment, bandwidth = program.environment(), bench.read_bandwidth(2**22 if small else 2**30)
  about = {"device": environment["device"], "jax": environment["jax"]}
  about |= {"scale": config.scale, "read_bandwidth": bandwidth}
  path = config.output / "mesh.json"
  cases.check_same(path, about)
  programs, benches, pairs = Programs(config.workers), {}, {}
  for name, case in chosen.items():
    if (shape := SMALL.shape if small else case.shape()) not in benches:
      benches[shape] = Bench(shape, bandwidth, programs, Energy(), 0.02 if small else 0.5)
    pairs[name] = Pair(case, benches[shape], sized)
    pairs[name].start()
    program.log(f"{name}: traced after {time.monotonic() - begin:.0f} s")
  programs.wait(config.seconds / 2)
  program.log(f"compiled after {time.monotonic() - begin:.0f} s")
  run = cases.Runner(config.seconds - (time.monotonic() - begin), about)
  for name, case in chosen.items():
    bar = None if small else case.bar(config.devices)
    row = {"case": f"{case.kind} B{sized.rows} T{sized.tokens}", "mesh": f"{case.axis} {config.devices}"}
    run(name, row, lambda name=name, bar=bar: cases.judged(pairs[name].run(), (bar,) if bar else ()))
    rows = cases.merged(path, run.rows, CASES)
    program.save_json(path, {"environment": environment, "rows": rows})
  print(tables.of_mappings(rows, COLUMNS))
  measured = [{name: x for name, x in row.items() if name not in about} for row in run.rows.values()]
  program.finish({**about, "rows": measured, "json": str(path)}, config)


if __name__ == "__main__":
  program.define_flags("", Config)
  program.run(main, writes="folder")
