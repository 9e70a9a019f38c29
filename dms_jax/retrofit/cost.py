"""Cost of a training step: model FLOPs from the shapes, and peak rates of known devices."""

from __future__ import annotations

import dataclasses
import math

from dms_jax.config import DMSConfig, LoRAConfig, ModelConfig
from dms_jax.params import param_table
from dms_jax.retrofit.config import RetrofitConfig

# Dense bfloat16 FLOP/s from the vendors' data sheets, by `jax.Device.device_kind`.
PEAK_FLOPS = {
  "NVIDIA H100 80GB HBM3": 989.4e12,
  "NVIDIA H100 PCIe": 756e12,
  "NVIDIA H100 NVL": 835e12,
  "NVIDIA H200": 989.4e12,
  "NVIDIA B200": 2250e12,
  "NVIDIA A100-SXM4-40GB": 312e12,
  "NVIDIA A100-SXM4-80GB": 312e12,
  "NVIDIA A100 80GB PCIe": 312e12,
  "NVIDIA L4": 121e12,
  "NVIDIA L40S": 362e12,
  "TPU v4": 275e12,
  "TPU v5 lite": 197e12,
  "TPU v5": 459e12,
  "TPU v5p": 459e12,
  "TPU v6 lite": 918e12,
  "TPU7x": 2307e12,
}


@dataclasses.dataclass(frozen=True)
class StepFlops:
  """Model FLOPs of one step; recomputation is not counted."""

  student: float  # forward and backward
  teacher: float  # forward
  tokens: int

  @property
  def total(self) -> float:
    return self.student + self.teacher


def step_flops(
  config: ModelConfig, dms: DMSConfig | None, lora: LoRAConfig | None, retrofit: RetrofitConfig
) -> StepFlops:
  """FLOPs of one training step of `batch_size` rows of `seq_len` tokens.

  Per token, with N the number of weights of all projections and of the output head (the embedding look-up is free):

      forward    2 N + A        A = 2 T N_heads H L: q k^T and its product with v, over the causal half of T x T
      backward   4 N + 2 A      all weights trained: gradients of activations and of weights
                 2 N + 2 A      weights frozen: gradients of activations only
      gates, low-rank updates   6 for each of their weights

  A step that trains all weights takes 6 N + 3 A; the teacher's forward pass, 2 N + A, is counted separately.
  Recomputation in the loss's backward pass and by remat is not counted.
  """
  table = param_table(config, dms, lora)
  sizes = {path: math.prod(spec.shape) for path, spec in table.items() if spec.num_inputs}
  base = sum(
    size
    for path, size in sizes.items()
    if table[path].group == "base" and path not in ("embed", "positions", "lm_head")
  )
  base += config.vocab_size * config.d_model
  if config.num_experts:  # a token reads some of them
    of_experts = sum(size for path, size in sizes.items() if table[path].of_experts)
    base -= of_experts * (config.num_experts - config.experts_per_token) // config.num_experts
  added = sum(size for path, size in sizes.items() if table[path].group != "base")
  attention = 2 * retrofit.seq_len * config.num_heads * config.head_dim * config.num_layers
  tokens = retrofit.batch_size * retrofit.seq_len
  backward = 4 if retrofit.trainable == "all" else 2
  student = (2 + backward) * base + 6 * added + 3 * attention
  teacher = 0 if retrofit.loss.kind == "lm" else 2 * base + attention
  return StepFlops(float(student * tokens), float(teacher * tokens), tokens)


def peak_flops(device_kind: str, compute_dtype: str) -> float | None:
  """Peak FLOP/s of a device, for utilisation; None where it is not known."""
  return PEAK_FLOPS.get(device_kind) if compute_dtype == "bfloat16" else None
