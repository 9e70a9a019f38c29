"""The schedule of the target compression and of the learning rate."""

from __future__ import annotations

import math

import jax.numpy as jnp
import optax

from dms_jax.retrofit.config import RetrofitConfig


def target_cr(config: RetrofitConfig, step):
  """CR asked for at `step`, float32: linear in CR, `steps_per_cr` steps a unit (arXiv 2506.05345, section 4).

  It begins to rise when the neuron has faded.
  """
  taken = jnp.maximum(jnp.asarray(step, jnp.float32) - config.fade_steps, 0.0)
  return jnp.minimum(config.initial_cr + taken / config.steps_per_cr, config.final_cr)


def step_of_cr(config: RetrofitConfig, cr: float | int) -> int:
  """The first step whose target is at least `cr`."""
  return config.fade_steps + math.ceil((cr - config.initial_cr) * config.steps_per_cr)


def neuron_kept(config: RetrofitConfig, step):
  """Share of the borrowed channel left at `step` of phase 1, float32: 1 - t/n (arXiv 2506.05345, appendix C)."""
  return 1.0 - jnp.asarray(step, jnp.float32) / config.fade_steps


def learning_rate(config: RetrofitConfig) -> optax.Schedule:
  """Linear warm-up, constant, linear fall to 0 over the last `decay_steps`."""
  warmup, decay = config.warmup_steps, config.decay_steps
  peak = config.learning_rate
  parts, ends = [optax.constant_schedule(peak)], []
  if warmup:
    parts, ends = [optax.linear_schedule(peak / warmup, peak, warmup - 1), *parts], [warmup - 1]
  if decay:
    parts, ends = [*parts, optax.linear_schedule(peak, 0.0, decay)], [*ends, config.steps - decay]
  return optax.join_schedules(parts, ends)
