"""Dynamic Memory Sparsification's own policy: the model's gates decide."""

from __future__ import annotations

from flax import struct

from dms_jax.policies.base import Policy, per_row, register


@register
@struct.dataclass
class DMS(Policy):
  """Evicts a token whose gate logit exceeds `threshold` (arXiv 2506.05345, section 3.1).

  `window` None takes the window that the gates were trained with. A higher threshold keeps more, without retraining; it
  may be one number a row [B].
  """

  window: int | None = struct.field(pytree_node=False, default=None)
  threshold: float = 0.0

  uses_gates = True

  def decide(self, logits, layer, position, keys=None):
    return logits > per_row(self.threshold, 2).astype(logits.dtype)
