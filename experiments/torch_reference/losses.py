"""The losses of a retrofit in PyTorch: compression and distillation.

Mirrors dms_jax/retrofit/losses.py. Source: arXiv 2506.05345, section 3.1.

    L = L_distillation + L_compression
    L_compression = mean over rows of relu((1 - 1/CR) - mean over layers, heads and real positions of hard(z))

`hard(z)` is 1 where z > 0, else 0, and has the gradient of sigmoid(z), of z = (logit + noise) / tau, so with 1/tau. The
official trainer computes reverse KL, KL(student || teacher), which is the default here too.
"""

from __future__ import annotations

import torch
from torch import Tensor


def hard_decisions(z: Tensor) -> Tensor:
  """1 where z > 0, else 0, with the gradient of sigmoid(z): a straight-through estimator."""
  soft = z.sigmoid()
  return ((z > 0).to(z.dtype) - soft).detach() + soft


def evicted_fraction(z: Tensor, real: Tensor) -> Tensor:
  """Share of each row's hard decisions that evict, [B], from z [L, B, K, T]; `real` bool [B, T] excludes padding."""
  count = real.sum(dim=1).clamp(min=1) * (z.shape[0] * z.shape[2])
  return hard_decisions(z).masked_fill(~real[:, None], 0.0).sum(dim=(0, 2, 3)) / count


def compression_loss(fraction: Tensor, cr: float) -> Tensor:
  """Mean over rows of relu((1 - 1/CR) - evicted fraction): a row that evicts more costs nothing."""
  return torch.relu((1.0 - 1.0 / cr) - fraction).mean()


def divergence(kind: str, student: Tensor, teacher: Tensor, counted: Tensor) -> Tensor:
  """Mean divergence in nats over the positions `counted`, bool [B, T], from logits [B, T, V].

  Args:
    kind: "reverse_kl", KL(student || teacher), or "forward_kl", KL(teacher || student).
  """
  log_s, log_t = student.float().log_softmax(dim=-1), teacher.detach().float().log_softmax(dim=-1)
  p, q = (log_s, log_t) if kind == "reverse_kl" else (log_t, log_s)
  each = (p.exp() * (p - q)).sum(dim=-1)
  return each.masked_fill(~counted, 0.0).sum() / counted.sum().clamp(min=1)


def counted_positions(
  tokens: Tensor, segments: Tensor | None, loss_mask: Tensor | None, eos: tuple[int, ...]
) -> Tensor:
  """The positions whose divergence counts, bool [B, T]; mirrors `text_loss` in dms_jax/retrofit/batch.py.

  Padding (segment 0) and ends of text do not count: what follows an end of text does not depend on the text before.
  Under `loss_mask`, bool [B, T], False on prompts, the next token has to be in the mask and of the same document.
  """
  counted = ~torch.isin(tokens, torch.tensor(eos, dtype=tokens.dtype, device=tokens.device))
  if segments is not None:
    counted = counted & (segments > 0)
  if loss_mask is not None:
    following = loss_mask.roll(-1, dims=1)
    if segments is not None:
      following = following & (segments.roll(-1, dims=1) == segments)
    counted = counted & following
    counted[:, -1] = False
  return counted
