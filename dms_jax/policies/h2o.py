"""The Heavy-Hitter Oracle: recent tokens and those with most attention (arXiv 2306.14048)."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
from flax import struct

from dms_jax.policies.base import register
from dms_jax.policies.budget import Budgeted, check_budget


@register
@struct.dataclass
class H2O(Budgeted):
  """Forgets the token outside the window whose attention, summed over all queries so far, is least.

  `window` None protects the newest half of the budget, as in the paper: the newest token and (budget - 1) / 2 before
  it, rounded down. For one budget in tokens they become the window. With a budget for each row, or with `cr`, their
  number is no shape: then W = 0, and `halves` protects them by their positions. So it is in a `Generator`, whose
  requests may have budgets of their own. A token's sum starts with its own query (algorithm 1). Attention is averaged
  over the query heads of a KV head; the paper has one query head a KV head.

  Prompts: each query of a chunk adds its attention to every token it sees, then the head is cut to the budget (the
  released code reads the whole prompt densely and cuts once). Tokens that `exact_prefill` would have forgotten within
  the chunk still take part in the chunk's softmax.

  Attributes:
    window: most recent tokens that stay; none: half of the budget.
    halves: protect half of a budget that differs by row, or follows cr, by position.
  """

  window: int | None = struct.field(pytree_node=False, default=None)
  halves: bool = struct.field(pytree_node=False, default=False)

  observes = ("mass",)
  prompt_observes = ("mass",)

  def resolved(self, window):
    if self.window is not None:
      return super().resolved(window)
    check_budget(self.replace(window=0), 1)
    if self.halves or self.budget is None or np.ndim(self.budget):
      return self.replace(window=0, halves=True).resolved(window)
    return self.replace(window=(int(self.budget) - 1) // 2).resolved(window)

  def by_row(self):
    return self.replace(halves=True) if self.window is None else self

  def observe(self, stats, seen):
    return {**stats, "score": stats["score"] + seen.mass}

  def retire(self, leaving):
    if not self.halves:
      return super().retire(leaving)
    tokens = leaving.tokens
    own, others = self._protected(leaving.stats, tokens), self._protected(leaving.archive_stats, tokens[..., None])
    return super().retire(leaving.replace(stats=own, archive_stats=others))

  def compact(self, candidates):
    if not self.halves:
      return super().compact(candidates)
    stats = self._protected(candidates.stats, candidates.tokens[:, None, None])
    return super().compact(candidates.replace(stats=stats))

  def _protected(self, stats, tokens):
    """The scores, infinite for the newest half of the budget once `tokens`, shaped [B, ...] like them, are seen."""
    first = (tokens - 1 - (self.capacity(tokens) - 1) // 2).astype(jnp.float32)
    return {**stats, "score": jnp.where(stats["position"] >= first, jnp.inf, stats["score"])}
