"""Settings of a retrofit in PyTorch and its schedules: CR, learning rate, phase 1 of a neuron.

Mirrors dms_jax/retrofit/schedule.py. Source: arXiv 2506.05345, section 4, CR(t) = t/100 + 1, and
appendix C, in whose phase 1 a borrowed neuron fades out.
"""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class RetrofitConfig:
  """Settings of a retrofit; names and defaults are those of `dms_jax.retrofit.RetrofitConfig` and its sections.

  Attributes:
    trainable: "gates" alone, "lora" (gates and low-rank updates) or "all" (gates and every weight).
    kind: "reverse_kl" or "forward_kl", the distillation loss.
    compression_weight: weight of the compression loss.
    tau: temperature of the relaxed decisions.
    steps: optimizer steps, those of phase 1 included.
    initial_cr, final_cr, steps_per_cr: the target CR rises linearly from the first to the second, by 1 in
      `steps_per_cr` steps.
    fade_steps: steps of phase 1, in which the neuron gate's channel fades out and nothing is evicted.
    learning_rate, warmup_steps, decay_steps, final_rate: the peak; steps of linear warm-up, and of linear decay at the
      end (-1: all after the warm-up) to the share `final_rate` of the peak.
    beta1, beta2, weight_decay, clip_norm: of AdamW, with gradients clipped by their global norm.
  """

  trainable: str = "lora"
  kind: str = "reverse_kl"
  compression_weight: float = 1.0
  tau: float = 0.1
  steps: int = 1000
  initial_cr: float = 1.0
  final_cr: float = 8.0
  steps_per_cr: int = 100
  fade_steps: int = 0
  learning_rate: float = 1e-3
  warmup_steps: int = 20
  decay_steps: int = 0
  final_rate: float = 0.0
  beta1: float = 0.9
  beta2: float = 0.95
  weight_decay: float = 0.0
  clip_norm: float = 1.0

  def __post_init__(self):
    if self.trainable not in ("gates", "lora", "all") or self.kind not in ("reverse_kl", "forward_kl"):
      raise ValueError(
        f"trainable={self.trainable!r} is 'gates', 'lora' or 'all'; kind={self.kind!r} is 'reverse_kl' or 'forward_kl'"
      )


def target_cr(config: RetrofitConfig, step: int) -> float:
  """Target CR at `step`, counted from 0: it rises by 1 in `steps_per_cr` steps once the neuron has faded."""
  taken = max(step - config.fade_steps, 0)
  return min(config.initial_cr + taken / config.steps_per_cr, config.final_cr)


def neuron_kept(config: RetrofitConfig, step: int) -> float:
  """Share of the borrowed channel left at `step` of phase 1: 1 - t/n."""
  return 1.0 - step / config.fade_steps


def learning_rate(config: RetrofitConfig, step: int) -> float:
  """Learning rate at `step`: linear warm-up, constant, linear decay over the last `decay_steps`."""
  decay = config.decay_steps if config.decay_steps >= 0 else max(config.steps - config.warmup_steps, 0)
  if step < config.steps - decay:
    return config.learning_rate * min((step + 1) / max(config.warmup_steps, 1), 1.0)
  fallen = min(max((step - (config.steps - decay)) / max(decay, 1), 0.0), 1.0)
  return config.learning_rate * (1.0 - fallen * (1.0 - config.final_rate))
