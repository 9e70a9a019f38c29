"""The Heavy-Hitter Oracle: recent tokens, and those that have gathered most attention (arXiv 2306.14048)."""

from __future__ import annotations

from flax import struct

from dms_jax.policies.base import register
from dms_jax.policies.budget import Budgeted


@register
@struct.dataclass
class H2O(Budgeted):
  """Drops, of the tokens outside the window, the one whose attention summed over all queries so far is least.

  `window` None is half the budget, as in the paper; with `cr` it must be given. A token's sum begins with the query of
  its own step (algorithm 1; the released code reads a prompt densely first). Every KV head goes by the queries of its
  group: the paper has one query head for each.
  """

  window: int | None = struct.field(pytree_node=False, default=None)

  observes = True

  def resolved(self, window):
    if self.window is not None:
      return super().resolved(window)
    if self.budget is None and self.cr is not None:
      raise ValueError("H2O: cr= needs window= too; only of a budget in tokens can half be the window")
    return self.replace(window=max(int(self.budget or 0) - 1, 0) // 2).resolved(window)

  def observe(self, scores, mass):
    return scores + mass
