"""Dynamic Memory Sparsification's own policy: the model's gates decide."""

from __future__ import annotations

import jax.numpy as jnp
from flax import struct

from dms_jax.policies.base import Policy, register


@register
@struct.dataclass
class DMS(Policy):
  """Evicts where a gate's logit exceeds `threshold` (arXiv 2506.05345, 3.1).

  `window` None takes the window the gates were trained with. A higher threshold keeps more, without retraining.
  """

  window: int | None = struct.field(pytree_node=False, default=None)
  threshold: float = 0.0

  uses_gates = True

  def decide(self, logits, layer, position):
    return logits > jnp.asarray(self.threshold, logits.dtype)
