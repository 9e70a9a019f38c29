"""`experiments.retrofit --benchmark`: the speed of a training step on random weights.

    python -m experiments.retrofit --benchmark --preset=llama-3.2-1b --retrofit.trainable=all --retrofit.seq_len=4096

Prints tokens/s and model FLOPs utilisation (formula: `dms_jax.retrofit.cost`), with and without the teacher's forward
pass; null where the device's peak is not known. Takes about a minute on an H100.

On a mesh (--mesh.data=2, --mesh.tensor=2) it also times a single device with the rows of one `data` shard, and prints
the scaling efficiency: tokens/s a device on the mesh over tokens/s on the single device.

With --against_flex it first times the same step in PyTorch with FlexAttention (experiments/bench/flex_step.py), in the
official trainer's form and in the fastest form known, and prints the ratios.
"""

from __future__ import annotations

import dataclasses
import statistics
import time
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from dms_jax.config import DMSConfig, LoRAConfig, ModelConfig
from dms_jax.families import PRESETS
from dms_jax.model import Model
from dms_jax.params import init_params, param_table
from dms_jax.retrofit import RetrofitConfig
from dms_jax.retrofit.cost import peak_flops, step_flops
from dms_jax.retrofit.distributed import place_state
from dms_jax.retrofit.loop import prepare
from dms_jax.retrofit.step import Batch, train_step
from dms_jax.sharding import make_mesh, param_shardings
from experiments.bench.cases import apart, llama_config
from experiments.common import program

WARMUP = 2
FORMS = ("flex", "flex_blocks")  # forms of PyTorch's attention, names of `flex_attention.forms`
WHOLE = 2**16  # the largest vocabulary for which PyTorch's logits of all rows fit into memory


def preset(name: str) -> ModelConfig:
  """A model's shape by name; an unknown name is a ValueError that lists them."""
  if name not in PRESETS:
    raise ValueError(f"--preset={name!r} is not one of {sorted(PRESETS)}")
  return PRESETS[name]


def check_steps(steps: int) -> None:
  """Raises ValueError unless there is a step to time."""
  if steps < 1:
    raise ValueError(f"--benchmark_steps={steps} must be at least 1")


def benchmark(
  config: ModelConfig, dms: DMSConfig, lora: LoRAConfig, retrofit: RetrofitConfig, steps: int, mesh: Mesh | None = None
) -> dict[str, Any]:
  """Times `steps` training steps after two warm-up steps, each to completion, on a mesh or on one device.

  Returns:
    `step_seconds` (median), `tokens_per_second`, `flops` of a step by part, `utilisation` and `utilisation_student`
    (None where the peak is unknown), `peak_bytes`, the largest memory use of a device (None where devices do not report
    it). For several devices also `one_device`, the same for a single one, and `scaling_efficiency`.
  """
  check_steps(steps)
  alone = make_mesh(devices=jax.local_devices())
  mesh = mesh or alone
  result = _timed(config, dms, lora, retrofit, steps, mesh)
  if mesh.size == 1:
    return result
  rows = retrofit.batch_size // mesh.shape["data"]
  program.log(f"one device, {rows} rows")
  one = _timed(config, dms, lora, dataclasses.replace(retrofit, batch_size=rows), steps, alone)
  efficiency = result["tokens_per_second"] / mesh.size / one["tokens_per_second"]
  return result | {"one_device": one, "scaling_efficiency": efficiency}


def flex_steps(
  config: ModelConfig, dms: DMSConfig, lora: LoRAConfig, retrofit: RetrofitConfig, steps: int, devices: int = 1,
  timeout: float = 420.0,
) -> dict[str, Any]:  # fmt: skip
  """{"flex": ..., "flex_blocks": ...}: the result of `flex_step.measure` for each form, in a process of its own.

  Raises:
    ValueError: the PyTorch step does not have these settings.
  """
  if (retrofit.loss.kind, retrofit.loss.teacher, dms.gate, dms.granularity) != (
    "reverse_kl",
    "original",
    "adapter",
    "head",
  ):
    raise ValueError(
      "--against_flex: the step in PyTorch has adapter gates of each head, reverse_kl and teacher=original"
    )
  if retrofit.trainable == "lora" and lora.targets != LoRAConfig().targets:
    raise ValueError(f"--against_flex: the step in PyTorch updates {LoRAConfig().targets}, not {lora.targets}")
  if devices > 1:
    raise ValueError("--against_flex: the step in PyTorch is one device's; leave the mesh out")
  check_steps(steps)
  what = {
    "shape": llama_config(config), "trainable": retrofit.trainable, "rank": lora.rank,
    "batch": retrofit.batch_size, "together": retrofit.batch_size if config.vocab_size <= WHOLE else 1,
    "tokens": retrofit.seq_len, "window": dms.window, "steps": steps,
  }  # fmt: skip
  found = {}
  for form in FORMS:
    program.log(f"PyTorch with FlexAttention, {form}")
    found[form] = apart("experiments.bench.flex_step", {**what, "form": form}, timeout)
  return found


def _timed(
  config: ModelConfig, dms: DMSConfig, lora: LoRAConfig, retrofit: RetrofitConfig, steps: int, mesh: Mesh
) -> dict[str, Any]:
  dtype, parameters = jnp.dtype(retrofit.memory.compute_dtype), param_table(config)
  init = partial(init_params, parameters, dtype=dtype)
  params = jax.jit(init, out_shardings=param_shardings(mesh, parameters))(jax.random.key(0))
  student, teacher, trained = prepare(Model(params, config), dms, lora, retrofit)
  state = place_state(retrofit, student, trained, mesh)
  del params, trained
  rng, seconds, key = np.random.default_rng(0), [], jax.random.key(0)
  for step in program.progress(range(WARMUP + steps), desc="steps"):
    tokens = rng.integers(0, config.vocab_size, (retrofit.batch_size, retrofit.seq_len)).astype(np.int32)
    start = time.perf_counter()
    batch = Batch(jax.make_array_from_callback(tokens.shape, NamedSharding(mesh, P("data")), tokens.__getitem__))
    with jax.set_mesh(mesh):
      state, metrics = train_step(state, student, teacher, batch, key, retrofit)
    jax.block_until_ready((state, metrics))
    seconds.append(time.perf_counter() - start)
    if step == 0:
      program.log(f"compiled in {seconds[0]:.1f} s")
  kind, devices = mesh.devices.flat[0].device_kind, mesh.local_devices
  flops, peak = step_flops(config, dms, student.lora, retrofit), peak_flops(kind, retrofit.memory.compute_dtype)
  median = statistics.median(seconds[WARMUP:])
  share = lambda work: None if peak is None else work / median / (peak * mesh.size)
  peaks = [(device.memory_stats() or {}).get("peak_bytes_in_use") for device in devices]
  return {
    "devices": mesh.size, "mesh": dict(mesh.shape),
    "step_seconds": median, "step_seconds_all": seconds[WARMUP:], "compile_seconds": seconds[0],
    "tokens_per_second": flops.tokens / median,
    "flops": {"student": flops.student, "teacher": flops.teacher}, "peak_flops": peak,
    "utilisation": share(flops.total), "utilisation_student": share(flops.student),
    "peak_bytes": None if None in peaks else max(peaks), "loss": float(metrics["loss"]),
  }  # fmt: skip


def table(name: str, retrofit: RetrofitConfig, result: dict[str, Any]) -> str:
  """The result as a table for the terminal."""
  share = lambda x: "not known" if x is None else f"{100 * x:.1f} %"
  memory = "not known" if result["peak_bytes"] is None else f"{result['peak_bytes'] / 2**30:.1f} GiB"
  rows = [
    ("model", f"{name}, {retrofit.trainable} trained"),
    ("rows x tokens", f"{retrofit.batch_size} x {retrofit.seq_len}"),
    ("step", f"{result['step_seconds'] * 1e3:.1f} ms"),
    ("tokens/s", f"{result['tokens_per_second']:,.0f}"),
    ("FLOPs a step, student", f"{result['flops']['student']:.3e}"),
    ("FLOPs a step, teacher", f"{result['flops']['teacher']:.3e}"),
    ("utilisation", share(result["utilisation"])),
    ("of the student alone", share(result["utilisation_student"])),
    ("peak memory a device", memory),
  ]
  if "one_device" in result:
    rows += [
      ("devices", f"{result['devices']} ({', '.join(f'{n} {size}' for n, size in result['mesh'].items())})"),
      ("tokens/s, one device", f"{result['one_device']['tokens_per_second']:,.0f}"),
      ("scaling efficiency", share(result["scaling_efficiency"])),
    ]
  for form in FORMS:
    if row := result.get(form):
      speed = row.get("tokens_per_second")
      ratio = "" if speed is None else f"{speed:,.0f}; ours {result['tokens_per_second'] / speed:.1f}x"
      rows.append((f"tokens/s, {form}", ratio or row["skipped"]))
  return "\n".join(f"{label:<24}{value}" for label, value in rows)
