"""Dynamic Memory Compression: a token is appended, or merged into the one before (2403.09636)."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Float

from dms_jax.policies.base import Policy, Retired, per_row, register


def weight_of(logits: Float[Array, "..."]) -> Float[Array, "..."]:
  """The importance omega of tokens by their logits; above 0, so that a slot's weights never sum to 0."""
  return jnp.maximum(jax.nn.sigmoid(-logits), 1e-9)


@register
@struct.dataclass
class DMC(Policy):
  """Merges a token whose first gate logit exceeds `threshold` into the newest archived one, as it leaves the window.

  An archived slot holds the mean key and value of its tokens, weighted by their importance omega, the sigmoid of the
  negative second gate logit. It keeps the sum z of these weights. Any other token is appended and starts a slot with
  z = omega. `threshold` may be one number a row [B]. `window` None takes the window that the gates were trained with.

  Differences from the paper, in training (`retrofit.dmc`) as here: a query sees its own key and value, and those of W
  tokens before, apart from their slots; the paper merges the newest token before it attends, so W = 0 is nearest to it.
  Keys are averaged after RoPE; the released code averages them before and turns a slot to the position of its newest
  token. Decision and importance come from projections of the residual stream (`dms.gate`), as in DMS; the paper borrows
  a channel of each key and query. The gates are those of a retrofit with `retrofit.objective=dmc`.

  A head holds as many slots as it appends tokens, which depends on the text. Prompts are read one token at a time, by
  decode steps.

  Attributes:
    threshold: a token whose first gate logit exceeds it is merged.
  """

  window: int | None = struct.field(pytree_node=False, default=None)
  threshold: float = 0.0

  objective = "dmc"
  uses_gates = True
  overwrites = merges = True
  exact_prefill = True
  stats = ("weight",)
  gate_stats = ("weight",)

  def decide(self, logits, layer, position, keys=None):
    merges, _ = jnp.split(logits, 2, axis=-2)
    return (merges > per_row(self.threshold, 2).astype(logits.dtype)) & (position > 0)  # the first has no slot before

  def rate(self, logits):
    _, importance = jnp.split(logits, 2, axis=-2)
    return {"weight": weight_of(importance)}

  def retire(self, leaving):
    # The newest archived token is the last live one: slots are filled in order, and none is given up.
    slots = leaving.live.shape[-1]
    newest = jnp.max(jnp.where(leaving.live, jnp.arange(slots), -1), axis=-1, initial=-1)
    merges = leaving.evicted
    padded = jnp.pad(leaving.archive_stats["weight"], ((0, 0),) * 3 + ((0, 1),), constant_values=1.0)
    total = jnp.take_along_axis(padded, jnp.where(merges, newest, slots)[..., None], axis=-1)[..., 0]
    weight = leaving.stats["weight"]
    keep = jnp.ones_like(leaving.evicted)
    return Retired(keep, jnp.where(merges, newest, -1).astype(jnp.int32), weight / (total + weight))
