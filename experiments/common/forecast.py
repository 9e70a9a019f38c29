"""Forecasts of long work on a CPU, from its speed at matrix products and at reading memory.

A forecast is rough; the progress lines of a run replace it. Other devices get none: they are rarely slow, and what
share of their speed a model reaches varies more.
"""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp

from dms_jax.config import DMSConfig, LoRAConfig, ModelConfig
from dms_jax.model import Model
from dms_jax.retrofit import RetrofitConfig
from dms_jax.retrofit.cost import step_flops
from experiments.methods.estimate import duration
from pallas_kernels.common import bench

SHARE = 0.6  # of the speed at matrix products, which a retrofit step of SmolLM2-135M reached on two cores
LONG = 30 * 60  # seconds; a longer retrofit is told what would be quick
QUICK = 6 * 60  # seconds of the quick one
SIDE = 1024  # of the matrices


def on_cpu() -> bool:
  """Whether the default device is a CPU."""
  return jax.default_backend() == "cpu"


@functools.cache
def product_speed(dtype: str) -> float:
  """FLOP/s of a product of large matrices of this type."""
  x = jnp.ones((SIDE, SIDE), jnp.dtype(dtype))
  return 2 * SIDE**3 / bench.clock(jax.jit(jnp.matmul), x, x, seconds=0.05, rounds=2)


@functools.cache
def read_speed() -> float:
  """Bytes a second read from memory."""
  return bench.read_bandwidth(2**26)


def step_seconds(
  config: ModelConfig, dms: DMSConfig | None, lora: LoRAConfig | None, settings: RetrofitConfig
) -> float:
  """Seconds of one training step on this CPU."""
  return step_flops(config, dms, lora, settings).total / (SHARE * product_speed(settings.memory.compute_dtype))


def retrofit_line(
  config: ModelConfig, dms: DMSConfig | None, lora: LoRAConfig | None, settings: RetrofitConfig, steps: int
) -> str:
  """What `steps` training steps take on this CPU, and, if that is long, flags that take minutes; "" elsewhere."""
  if not on_cpu() or steps < 1:
    return ""
  each = step_seconds(config, dms, lora, settings)
  size = f"{settings.batch_size} x {settings.seq_len:,} tokens"
  line = f"{steps:,} steps of {size}: about {duration(each * steps)} on this CPU"
  if each * steps < LONG:
    return line
  small = dataclasses.replace(settings, batch_size=1, microbatches=1, seq_len=min(512, settings.seq_len))
  quick = step_seconds(config, dms, lora, small)
  few = max(10, min(50, int(QUICK / quick)))
  return (
    f"{line}; --retrofit.seq_len={small.seq_len} --retrofit.batch_size=1 --retrofit.schedule.steps={few} takes about "
    f"{duration(quick * few)}"
  )


def reading_seconds(model: Model, tokens: int, rows: int) -> float | None:
  """Seconds to decode `tokens` tokens, `rows` at a time, on this CPU: each step reads all weights; None elsewhere."""
  if not on_cpu():
    return None
  leaves = jax.tree.leaves(model.params)
  step = max(
    sum(x.nbytes for x in leaves) / read_speed(),
    2 * rows * sum(x.size for x in leaves) / (SHARE * product_speed(str(model.dtype))),
  )
  return tokens / rows * step
