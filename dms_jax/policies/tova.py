"""Token Omission Via Attention: what the latest query attends to least is dropped (arXiv 2401.06104)."""

from __future__ import annotations

import jax.numpy as jnp
from flax import struct

from dms_jax.policies.base import register
from dms_jax.policies.budget import Budgeted


@register
@struct.dataclass
class TOVA(Budgeted):
  """Drops the token with the least attention from the newest query, itself included, when the budget is exceeded.

  W = 0, as in the paper: no token is safe by being recent. The paper averages the attention over all heads of a layer,
  whose heads so hold the same tokens (`per_layer`); by default each KV head goes by its own query heads.
  """

  per_layer: bool = struct.field(pytree_node=False, default=False)

  observes = True

  def observe(self, scores, mass):
    return jnp.broadcast_to(jnp.mean(mass, axis=1, keepdims=True), mass.shape) if self.per_layer else mass
