"""Measures memory and time of conversion and export, against a plain copy of the same bytes.

    python -m experiments.bench_convert            # random weights of Llama 3.2 1B: 2.5 GB, on 5 GB of disk
    python -m experiments.bench_convert --preset=llama-3.1-8b --layers=4 --shard_bytes=1000000000

Writes random bfloat16 weights of the preset's shape as a sharded Hugging Face directory into OUTPUT, and removes them
at the end. A copy (`cp -r` and `sync`), `experiments.convert_weights` and `experiments.export_torch` each run in a
process of their own. Peak memory is that of the process (VmHWM, mapped files and libraries included; RssAnon, sampled
every 5 ms, without them) less that of a process that only imports the program; so are seconds. The bar is 1.3 times the
largest shard plus one layer. `needed` is what the shapes of a preset need, by what `dms_jax.slices` holds at a time.
Writes OUTPUT/convert.json and prints a table; the last line is one JSON object.
"""

from __future__ import annotations

import dataclasses
import json
import math
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from dms_jax import slices
from dms_jax.config import ModelConfig
from dms_jax.convert.safetensors_file import INDEX
from dms_jax.convert.tensors import hf_names, tensor_bytes
from dms_jax.families import PRESETS
from dms_jax.families.huggingface import config_to_hf
from dms_jax.params import ParamSpec, param_table
from experiments.common import program
from experiments.reports import tables

COLUMNS = ("name", "peak_mb", "anonymous_mb", "bar_mb", "reached", "seconds", "copy_ratio", "cpu_seconds", "gb_per_s")
DTYPE = np.dtype(jnp.bfloat16)
BAR = 1.3  # times the largest shard, plus one layer


@dataclasses.dataclass(frozen=True)
class Config:
  """Settings of a run.

  Attributes:
    preset: name of the model's shape in `dms_jax.families.PRESETS`.
    layers: layers of the model; 0: the preset's.
    shard_bytes: most bytes of a shard of the source, and of the export.
    output: a folder, on the disk to be measured.
  """

  preset: str = "llama-3.2-1b"
  layers: int = 0
  shard_bytes: int = 600_000_000
  output: Path = Path("runs/bench_convert")

  def __post_init__(self):
    if self.preset not in PRESETS:
      raise ValueError(f"--preset={self.preset!r} is not one of {sorted(PRESETS)}")
    for name in ("layers", "shard_bytes"):
      if getattr(self, name) < 0:
        raise ValueError(f"--{name}={getattr(self, name)} must be 0 or more")

  @property
  def model(self) -> ModelConfig:
    preset = PRESETS[self.preset]
    return dataclasses.replace(preset, num_layers=self.layers or preset.num_layers)


def write_source(path: Path, model: ModelConfig, shard_bytes: int) -> int:
  """Writes random weights as a Hugging Face directory of shards; returns the bytes of the largest."""
  from safetensors.numpy import save_file

  path.mkdir(parents=True)
  (path / "config.json").write_text(json.dumps(config_to_hf(model, DTYPE.name)))
  (path / "generation_config.json").write_text(json.dumps({"eos_token_id": list(model.eos_token_ids)}))
  tensors = {name: spec for key, spec in param_table(model).items() for name, _ in hf_names(key, spec)}
  by_layer = lambda name: (name.count("."), [int(part) for part in name.split(".") if part.isdigit()], name)
  shards: list[list[str]] = [[]]
  held = 0
  for name in sorted(tensors, key=by_layer):  # as transformers writes them: layer after layer
    size = tensor_bytes(tensors[name].hf_shape, DTYPE)
    if held + size > shard_bytes and shards[-1]:
      shards.append([])
      held = 0
    shards[-1].append(name)
    held += size
  random = (0.02 * np.random.default_rng(0).standard_normal(2**22)).astype(DTYPE)
  names = {}
  for number, shard in enumerate(shards):
    file = f"model-{number + 1:05d}-of-{len(shards):05d}.safetensors"
    save_file({name: np.resize(random, tensors[name].hf_shape) for name in shard}, path / file, {"format": "pt"})
    names |= dict.fromkeys(shard, file)
  (path / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": names}))
  return max(file.stat().st_size for file in path.glob("*.safetensors"))


def watched(command: list[str]) -> dict[str, float]:
  """Runs a command; its seconds, those of its CPUs, and its peaks of memory in bytes, `peak` and `anonymous`.

  Raises:
    RuntimeError: it fails.
  """
  begin, before, peaks = time.perf_counter(), cpu_seconds(), {"VmHWM": 0, "RssAnon": 0}
  with tempfile.TemporaryFile("w+") as said:
    process = subprocess.Popen(command, stdout=said, stderr=subprocess.STDOUT)
    status = Path(f"/proc/{process.pid}/status")
    while process.poll() is None:
      for line in status.read_text().splitlines():
        name, _, value = line.partition(":")
        if name in peaks:
          peaks[name] = max(peaks[name], 1024 * int(value.split()[0]))
      time.sleep(0.005)
    if process.returncode:
      said.seek(0)
      lines = said.read().strip().splitlines() or ["failed"]
      raise RuntimeError(f"{' '.join(command)}: {lines[-1]}")
  took = {"seconds": time.perf_counter() - begin, "cpu_seconds": cpu_seconds() - before}
  return took | {"peak": peaks["VmHWM"], "anonymous": peaks["RssAnon"]}


def cpu_seconds() -> float:
  """CPU seconds, user and system, of this process's children that have ended."""
  used = resource.getrusage(resource.RUSAGE_CHILDREN)
  return used.ru_utime + used.ru_stime


def layer_bytes(table: dict[str, ParamSpec]) -> int:
  """Bytes of one layer."""
  return sum(math.prod(spec.shape[1:]) for spec in table.values() if spec.layered) * DTYPE.itemsize


def needed(model: ModelConfig) -> dict[str, float]:
  """Gigabytes by the shapes of a model in bfloat16: all weights, the largest stacked parameter, the bar, the need.

  The bar is for shards of 5 GB. The need of a conversion is twice the largest slice (one is read while one is written)
  and what `slices.write` holds beside it; an export needs less.
  """
  table = param_table(model)
  sizes = [math.prod(spec.shape) * DTYPE.itemsize for spec in table.values()]
  largest = max(math.prod(spec.shape[spec.layered :]) for spec in table.values()) * DTYPE.itemsize
  found = {
    "weights": sum(sizes), "largest_parameter": max(sizes), "layer": layer_bytes(table), "largest_slice": largest,
    "bar": BAR * 5e9 + layer_bytes(table), "need": 2 * largest + slices.FILE_BYTES + slices.IN_FLIGHT_BYTES,
  }  # fmt: skip
  return {name: value / 1e9 for name, value in found.items()}


def measure(config: Config) -> list[dict[str, Any]]:
  """The rows of copy, conversion and export."""
  source, copy, ours, back = (config.output / name for name in ("source", "copy", "checkpoint", "export"))
  for folder in (source, copy, ours, back):
    shutil.rmtree(folder, ignore_errors=True)
  rows: list[dict[str, Any]] = []

  def row(name: str, command: list[str], base: dict[str, float], bar: float, size: int) -> None:
    found = watched(command)
    peak, anonymous = (found[key] - base.get(key, 0) for key in ("peak", "anonymous"))
    rows.append({"name": name} | {key: found[key] - base.get(key, 0) for key in ("seconds", "cpu_seconds")})
    rows[-1]["gb_per_s"] = size / 1e9 / rows[-1]["seconds"]
    if bar:
      rows[-1] |= {"peak_mb": peak / 1e6, "anonymous_mb": anonymous / 1e6, "bar_mb": bar / 1e6, "reached": peak <= bar}
    rows[-1]["copy_ratio"] = rows[-1]["seconds"] / rows[0]["seconds"]
    program.log(f"  {rows[-1]}")

  run = [sys.executable, "-m"]
  imports = lambda name: watched([sys.executable, "-c", f"import experiments.{name}"])
  try:
    shard = write_source(source, config.model, config.shard_bytes)
    subprocess.run(["sync"], check=True)
    size = sum(file.stat().st_size for file in source.iterdir())
    bar = BAR * shard + layer_bytes(param_table(config.model))
    row("copy", ["sh", "-c", 'cp -r "$0" "$1" && sync', str(source), str(copy)], {}, 0, size)
    shutil.rmtree(copy)
    row(
      "convert", [*run, "experiments.convert_weights", f"--source={source}", f"--output={ours}"],
      imports("convert_weights"), bar, size,
    )  # fmt: skip
    shutil.rmtree(source)
    places = [f"--checkpoint={ours}", f"--output={back}", f"--shard_bytes={config.shard_bytes}"]
    row("export", [*run, "experiments.export_torch", *places], imports("export_torch"), bar, size)
  finally:
    for folder in (source, copy, ours, back):
      shutil.rmtree(folder, ignore_errors=True)
  return rows


def main() -> None:
  config = program.read_flags("", Config)
  rows = measure(config)
  print(tables.of_mappings(rows, COLUMNS))
  shapes = {name: needed(PRESETS[name]) for name in dict.fromkeys((config.preset, "llama-3.1-70b"))}
  for name, found in shapes.items():
    print(f"{name}, GB: " + ", ".join(f"{key.replace('_', ' ')} {value:.2f}" for key, value in found.items()))
  saved = program.save_json(config.output / "convert.json", {"rows": rows, "needed": shapes})
  program.finish({"rows": rows, "needed": shapes, "json": str(saved)})


if __name__ == "__main__":
  program.define_flags("", Config)
  program.run(main)
