"""The schedules of the target compression ratio (CR) and of the learning rate."""

from __future__ import annotations

import jax.numpy as jnp

from dms_jax.retrofit.config import RetrofitConfig


def target_cr(config: RetrofitConfig, step):
  """Target CR at `step`, float32: it rises linearly by 1 in `steps_per_cr` steps, after the neuron has faded.

  Source: arXiv 2506.05345, section 4.
  """
  s = config.schedule
  taken = jnp.maximum(jnp.asarray(step, jnp.float32) - s.fade_steps, 0.0)
  return jnp.minimum(s.initial_cr + taken / s.steps_per_cr, s.final_cr)


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
