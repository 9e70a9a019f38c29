"""The schedules of the target compression ratio (CR) and of the learning rate."""

from __future__ import annotations

import math

import jax.numpy as jnp
import optax

from dms_jax.retrofit.config import RetrofitConfig


def target_cr(config: RetrofitConfig, step):
  """Target CR at `step`, float32: it rises linearly by 1 in `steps_per_cr` steps, after the neuron has faded.

  Source: arXiv 2506.05345, section 4.
  """
  s = config.schedule
  taken = jnp.maximum(jnp.asarray(step, jnp.float32) - s.fade_steps, 0.0)
  return jnp.minimum(s.initial_cr + taken / s.steps_per_cr, s.final_cr)


def step_of_cr(config: RetrofitConfig, cr: float | int) -> int:
  """The first step whose target is at least `cr`."""
  s = config.schedule
  return s.fade_steps + math.ceil((cr - s.initial_cr) * s.steps_per_cr)


def neuron_kept(config: RetrofitConfig, step):
  """Share of the borrowed channel left at `step` of phase 1, float32: 1 - t/n (arXiv 2506.05345, appendix C)."""
  return 1.0 - jnp.asarray(step, jnp.float32) / config.schedule.fade_steps


def learning_rate(config: RetrofitConfig) -> optax.Schedule:
  """Learning rate by step: linear warm-up, constant, linear decay to 0 over the last `decay_steps`."""
  warmup, decay = config.optimizer.warmup_steps, config.optimizer.decay_steps
  peak = config.optimizer.learning_rate
  parts, ends = [optax.constant_schedule(peak)], []
  if warmup:
    parts, ends = [optax.linear_schedule(peak / warmup, peak, warmup - 1), *parts], [warmup - 1]
  if decay:
    parts, ends = [*parts, optax.linear_schedule(peak, 0.0, decay)], [*ends, config.schedule.steps - decay]
  return optax.join_schedules(parts, ends)
