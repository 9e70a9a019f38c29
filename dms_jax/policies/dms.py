"""Dynamic Memory Sparsification's own policy: the gates decide, within a budget if one is given."""

from __future__ import annotations

from flax import struct

from dms_jax.policies.base import Policy, per_row, register
from dms_jax.policies.budget import Budgeted


@register
@struct.dataclass
class DMS(Budgeted):
  """Evicts a token whose gate logit exceeds `threshold`, once it has left the window (arXiv 2506.05345).

  `window` None takes the window that the gates were trained with. A higher threshold keeps more, without retraining; it
  may be one number a row [B].

  `budget` (tokens a head, the window's W + 1 included) or `cr` (tokens seen for each one allowed) adds a hard limit,
  which the paper does not have. The score is then the negative logit: where the archive is full, the token with the
  highest logit goes. `threshold=inf` leaves the choice to the budget alone: no token is evicted before the archive is
  full. Logits do not depend on attention, so in a prompt read in chunks each query sees exactly what it would see if
  the prompt were read one token at a time. With a limit, W must be at least the gates' lag (1 for `shift` 1), because a
  token needs its logit when it leaves the window.
  """

  window: int | None = struct.field(pytree_node=False, default=None)
  threshold: float = 0.0

  uses_gates = True

  @property
  def bounded(self):  # type: ignore[override]
    return self.budget is not None or self.cr is not None

  @property
  def overwrites(self):  # type: ignore[override]
    return self.bounded

  @property
  def replays(self):  # type: ignore[override]
    return self.bounded

  @property
  def stats(self):  # type: ignore[override]
    return Budgeted.stats if self.bounded else ()

  @property
  def gate_stats(self):  # type: ignore[override]
    return ("score",) if self.bounded else ()

  @property
  def compacts(self):
    return self.bounded and not self.exact_prefill

  def resolved(self, window):
    return super().resolved(window) if self.bounded else Policy.resolved(self, window)

  def decide(self, logits, layer, position, keys=None):
    return logits > per_row(self.threshold, 2).astype(logits.dtype)

  def rate(self, logits):
    return {"score": -logits}

  def retire(self, leaving):
    return super().retire(leaving) if self.bounded else Policy.retire(self, leaving)

  def capacity(self, tokens):
    return super().capacity(tokens) if self.bounded else Policy.capacity(self, tokens)

  def reach(self, slots):
    return super().reach(slots) if self.bounded else Policy.reach(self, slots)
