"""The schedules of the target compression ratio (CR) and of the learning rate."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from dms_jax.levels import Levels
from dms_jax.retrofit.config import RetrofitConfig


def target_cr(config: RetrofitConfig, step):
  """Target CR at `step`, float32: it rises linearly by 1 in `steps_per_cr` steps, after the neuron has faded.

  Source: arXiv 2506.05345, section 4.
  """
  s = config.schedule
  taken = jnp.maximum(jnp.asarray(step, jnp.float32) - s.fade_steps, 0.0)
  return jnp.minimum(s.initial_cr + taken / s.steps_per_cr, s.final_cr)


def row_targets(config: RetrofitConfig, levels: Levels, step, key: jax.Array, rows: int) -> Float[Array, "B"]:
  """Target CR of each row of a batch at `step`, float32, drawn from `key` by `schedule.targets`.

  The range ends at the ramp's `target_cr` until that reaches the levels' highest CR; before the lowest, all rows have
  the ramp's. Rows are stratified: one lies in each of B equally likely parts of the range, in random order.
  """
  reached = target_cr(config, step)
  low, high = (jnp.minimum(jnp.float32(end), reached) for end in (levels.low, levels.high))
  order, place = jax.random.split(key)
  strata = jax.random.permutation(order, rows).astype(jnp.float32)
  u = (strata + jax.random.uniform(place, (rows,), jnp.float32)) / rows
  match config.schedule.targets:
    case "uniform":
      drawn = low + (high - low) * u
    case "uniform_kept":
      drawn = 1.0 / (1.0 / low + (1.0 / high - 1.0 / low) * u)
    case _:
      drawn = low * (high / low) ** u
  return jnp.where(low == high, low, jnp.clip(drawn, low, high))


def neuron_kept(config: RetrofitConfig, step):
  """Share of the borrowed channel left at `step` of phase 1, float32: 1 - t/n (arXiv 2506.05345, appendix C)."""
  return 1.0 - jnp.asarray(step, jnp.float32) / config.schedule.fade_steps


def learning_rate(config: RetrofitConfig, step):
  """Learning rate at `step`, float32: linear warm-up, constant, linear decay over the last `decay_steps`."""
  o, steps = config.optimizer, config.schedule.steps
  step = jnp.asarray(step, jnp.float32)
  decay = jnp.where(o.decay_steps < 0, jnp.maximum(steps - o.warmup_steps, 0), o.decay_steps)
  rise = jnp.minimum((step + 1.0) / jnp.maximum(o.warmup_steps, 1), 1.0)
  fallen = jnp.clip((step - (steps - decay)) / jnp.maximum(decay, 1), 0.0, 1.0)
  return o.learning_rate * jnp.where(step >= steps - decay, 1.0 - fallen * (1.0 - o.final_rate), rise)
