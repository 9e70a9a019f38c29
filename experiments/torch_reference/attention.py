"""Attention in PyTorch under the soft mask of training and the hard mask of evaluation.

Mirrors dms_jax/masks.py. Source: arXiv 2506.05345, section 3.1 and figure 2b. Added to the score of query i and key j:

    0                                   where 0 <= i - j <= W
    outside[j]                          where i - j > W
    -inf                                where j > i, or where i and j are of different documents

    training:    outside[j] = log(1 - sigmoid(z[j + shift])),  z = (logit + noise) / tau
    evaluation:  outside[j] = -inf if logit[j + shift] > threshold, else 0

Keys that are not decided yet, the last `shift`, get 0. Masks of T x T are for reading: `pallas_kernels/window_bias` has
the kernels, and `experiments/bench/flex_attention.py` says the same in FlexAttention.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from experiments.torch_reference.gates import about_key


def soft_outside(z: Tensor, shift: int) -> Tensor:
  """log(1 - sigmoid(z)) by the key it is about, [B, K, T]; differentiable."""
  return about_key(F.logsigmoid(-z), shift, 0.0)


def hard_outside(evict: Tensor, shift: int) -> Tensor:
  """-inf for keys to be evicted, else 0, float32 [B, K, T]; `evict` is indexed by the token that decided."""
  return torch.zeros_like(evict, dtype=torch.float32).masked_fill(about_key(evict, shift, False), float("-inf"))


def additive_mask(outside: Tensor, window: int, segments: Tensor | None = None) -> Tensor:
  """What is added to the scores, [B, K, T, T] (queries before keys).

  Args:
    outside: [B, K, T], added where a key lies outside the window.
    segments: [B, T], ids of documents that never see each other; padding is a document of its own.
  """
  index = torch.arange(outside.shape[-1], device=outside.device)
  distance = index[:, None] - index  # i - j
  mask = torch.where(distance > window, outside[:, :, None, :], 0.0)
  hidden = distance < 0
  if segments is not None:
    hidden = hidden | (segments[:, None, :, None] != segments[:, None, None, :])
  return mask.masked_fill(hidden, float("-inf"))


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
  """Grouped-query attention: q [B, N, T, H]; k and v [B, K, T, H]; mask [B, K, T, T]. Returns [B, N, T, H]."""
  of_group = lambda y: y.repeat_interleave(q.shape[1] // k.shape[1], dim=1)
  scores = q @ of_group(k).mT * q.shape[-1] ** -0.5 + of_group(mask)
  return scores.softmax(dim=-1) @ of_group(v)
