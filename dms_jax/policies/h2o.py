"""The Heavy-Hitter Oracle: recent tokens and those with most attention (arXiv 2306.14048)."""

from __future__ import annotations

import numpy as np
from flax import struct

from dms_jax.policies.base import register
from dms_jax.policies.budget import Budgeted, check_budget


@register
@struct.dataclass
class H2O(Budgeted):
  """Forgets the token outside the window whose attention, summed over all queries so far, is least.

  `window` None makes the window half the budget, as in the paper; with `cr`, `window` must be given. A token's sum
  starts with its own query (algorithm 1). Attention is averaged over the query heads of a KV head; the paper has one
  query head a KV head.

  Prompts: each query of a chunk credits every token it attends to, then the chunk is cut to the budget (the released
  code reads the whole prompt densely and cuts once). Tokens that `exact_prefill` would have forgotten within the chunk
  still take part in the chunk's softmax.
  """

  window: int | None = struct.field(pytree_node=False, default=None)

  observes = ("mass",)
  prompt_observes = ("mass",)

  def resolved(self, window):
    if self.window is not None:
      return super().resolved(window)
    if self.budget is None and self.cr is not None:
      raise ValueError("H2O: cr= needs window= too; only of a budget in tokens can half be the window")
    check_budget(self.replace(window=0), 1)
    if np.ndim(self.budget):
      raise ValueError("H2O: a budget for each row needs window= too; only of a single budget can half be the window")
    return self.replace(window=(int(self.budget) - 1) // 2).resolved(window)

  def observe(self, stats, seen):
    return {"score": stats["score"] + seen.mass}
