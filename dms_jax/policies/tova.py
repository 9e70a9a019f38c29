"""TOVA: the token that the latest query attends to least is dropped (arXiv 2401.06104)."""

from __future__ import annotations

import jax.numpy as jnp
from flax import struct

from dms_jax.policies.base import register
from dms_jax.policies.budget import Budgeted


@register
@struct.dataclass
class TOVA(Budgeted):
  """Drops the token that the newest query attends to least, maybe its own, when the budget is exceeded.

  W = 0, as in the paper: no token is safe by being recent. The paper averages the attention over all heads of a layer,
  which then hold the same tokens (`per_layer`); by default a KV head averages over its own query heads.

  Prompts: the last query of a chunk decides which tokens fill the budget; in the released code the last query of the
  prompt does. With `exact_prefill` every query of the prompt drops a token.

  Attributes:
    per_layer: heads of a layer drop the same token, by their mean attention.
  """

  per_layer: bool = struct.field(pytree_node=False, default=False)

  observes = ("mass",)
  prompt_observes = ("mass",)

  @property
  def joins_heads(self):  # type: ignore[override]
    return self.per_layer

  def query_weights(self, lengths, remaining, width):
    return (jnp.arange(width) == lengths[:, None] - 1).astype(jnp.float32)

  def observe(self, stats, seen):
    mass = seen.mass
    if self.per_layer:
      mass = jnp.broadcast_to(jnp.mean(mass, axis=1, keepdims=True), mass.shape)
    return {**stats, "score": mass}
