"""One retrofit step in PyTorch: teacher, student, noise, losses, gradients and AdamW.

Mirrors dms_jax/retrofit/step.py. Source: arXiv 2506.05345, section 3.1 (objective), section 4 (schedule) and
appendix C (phase 1 of a borrowed neuron).

    z = (logit + noise) / tau,  noise = the difference of two Gumbels, which is logistic
    loss = KL(student || teacher) + relu((1 - 1/CR) - evicted fraction)

The teacher is the untouched original, dense. `teacher=None` stands for the student's own weights with eviction off.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from experiments.torch_reference import losses, schedule
from experiments.torch_reference.gates import DMSConfig
from experiments.torch_reference.model import ModelConfig, Weights, forward
from experiments.torch_reference.schedule import RetrofitConfig

TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj")  # projections with low-rank updates


@dataclasses.dataclass(frozen=True)
class Batch:
  """`tokens` [B, T]; `segments` [B, T], ids of documents, 0 for padding; `loss_mask` bool [B, T], False on prompts."""

  tokens: Tensor
  segments: Tensor | None = None
  loss_mask: Tensor | None = None


@dataclasses.dataclass
class State:
  """`trained` float32 leaves and `frozen` weights, by name; the optimizer of the first; `step`, steps done."""

  trained: Weights
  frozen: Weights
  optimizer: torch.optim.AdamW
  step: int = 0


def init_retrofit(
  weights: Weights, config: ModelConfig, dms: DMSConfig, rank: int, generator: torch.Generator
) -> Weights:
  """New gates and low-rank updates of `rank` (0: none) for the model `weights`.

  They change nothing yet: updates are 0, and an adapter's logits are -offset.
  """
  new = {}
  for index in range(config.num_layers):
    attention = f"model.layers.{index}.self_attn."
    norm = torch.ones_like(weights[f"model.layers.{index}.input_layernorm.weight"])
    if dms.gate == "adapter":
      new[f"{attention}dms_proj_alpha_norm.weight"] = norm
      new[f"{attention}dms_proj_alpha.weight"] = norm.new_zeros(config.num_kv_heads, len(norm))
    for target in TARGETS if rank else ():
      outputs, inputs = weights[f"{attention}{target}.weight"].shape
      new[f"{attention}{target}.lora_A.weight"] = torch.randn(rank, inputs, generator=generator).to(norm) * inputs**-0.5
      new[f"{attention}{target}.lora_B.weight"] = norm.new_zeros(outputs, rank)
  return new


def is_trained(name: str, trainable: str) -> bool:
  """Whether the weight `name` is trained under `trainable`, "gates", "lora" or "all"."""
  if "dms_proj_alpha" in name:
    return True
  return ".lora_" in name if trainable == "lora" else trainable == "all"


def init_state(weights: Weights, retrofit: RetrofitConfig) -> State:
  """State before the first step; trained weights are copied to float32.

  Raises:
    ValueError: nothing in `weights` is trained under `retrofit.trainable`, as with "gates" and a neuron gate.
  """
  chosen = {name for name in weights if is_trained(name, retrofit.trainable)}
  if not chosen or (retrofit.trainable == "lora" and not any(".lora_" in name for name in chosen)):
    raise ValueError(f"trainable={retrofit.trainable!r}: no such weights; add those of init_retrofit, or train others")
  trained = {name: weights[name].detach().float().clone().requires_grad_() for name in weights if name in chosen}
  betas = retrofit.beta1, retrofit.beta2
  optimizer = torch.optim.AdamW(trained.values(), betas=betas, eps=1e-8, weight_decay=retrofit.weight_decay)
  return State(trained, {name: weights[name].detach() for name in weights if name not in chosen}, optimizer)


def loss_fn(
  student: Weights,
  teacher: Weights | None,
  config: ModelConfig,
  dms: DMSConfig,
  retrofit: RetrofitConfig,
  batch: Batch,
  noise: Tensor,
  cr: float,
  neuron_kept: float | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
  """(loss, its parts) of a batch.

  Args:
    noise: logistic, float32 [L, B, K, T].
    neuron_kept: share of the borrowed channel that is left, in phase 1 alone: then nothing is evicted, and there is no
      compression loss.
  """
  tokens, segments, fading = batch.tokens, batch.segments, neuron_kept is not None
  logits, z = forward(
    student, config, dms, tokens, segments=segments, noise=noise, tau=retrofit.tau, evict=not fading,
    neuron_kept=neuron_kept or 0.0,
  )  # fmt: skip
  with torch.no_grad():
    wanted, _ = forward(teacher or student, config, None if teacher else dms, tokens, segments=segments, evict=False)
  counted = losses.counted_positions(tokens, segments, batch.loss_mask, config.eos_token_ids)
  real = torch.ones_like(tokens, dtype=torch.bool) if segments is None else segments > 0
  kl = losses.divergence(retrofit.kind, logits, wanted, counted)
  fraction = losses.evicted_fraction(z, real)
  compression = torch.zeros_like(kl) if fading else losses.compression_loss(fraction, cr)
  parts = {"kl": kl, "compression_loss": compression, "evicted_fraction": fraction.mean()}
  return kl + retrofit.compression_weight * compression, parts


def train_step(
  state: State,
  teacher: Weights | None,
  config: ModelConfig,
  dms: DMSConfig,
  retrofit: RetrofitConfig,
  batch: Batch,
  noise: Tensor | None = None,
) -> dict[str, float]:
  """One optimizer step on `state`, in place; returns the figures of the log. `noise` is sampled if it is not given."""
  rows, length = batch.tokens.shape
  if noise is None:
    noise = logistic_noise((config.num_layers, rows, config.num_kv_heads, length), batch.tokens.device)
  cr = schedule.target_cr(retrofit, state.step)
  kept = schedule.neuron_kept(retrofit, state.step) if state.step < retrofit.fade_steps else None
  weights = state.frozen | state.trained
  loss, parts = loss_fn(weights, teacher, config, dms, retrofit, batch, noise, cr, kept)
  rate = schedule.learning_rate(retrofit, state.step)
  norm = update(state, torch.autograd.grad(loss, state.trained.values()), rate, retrofit.clip_norm)
  state.step += 1
  figures = {"loss": loss, **parts, "grad_norm": norm}
  return {name: x.item() for name, x in figures.items()} | {"target_cr": cr, "learning_rate": rate}


def update(state: State, grads: tuple[Tensor, ...], rate: float, clip_norm: float) -> Tensor:
  """AdamW at `rate` with gradients clipped by their global norm, which is returned."""
  norm = torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(g) for g in grads]))
  scale = clip_norm / norm.clamp(min=clip_norm)
  for parameter, grad in zip(state.trained.values(), grads, strict=True):
    parameter.grad = grad * scale
  for group in state.optimizer.param_groups:
    group["lr"] = rate
  state.optimizer.step()
  return norm


def logistic_noise(shape: tuple[int, ...], device: torch.device | str = "cpu") -> Tensor:
  """Samples of the difference of two standard Gumbel variables, float32."""
  return torch.logit(torch.rand(shape, device=device), eps=1e-7)
