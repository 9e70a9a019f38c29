"""Dynamic Memory Sparsification's own policy: the gates decide, within a budget if one is given."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Array, Float

from dms_jax.levels import Levels
from dms_jax.policies.base import Policy, per_row, register
from dms_jax.policies.budget import Budgeted


@register
@struct.dataclass
class DMS(Budgeted):
  """Evicts a token whose gate logit exceeds `threshold`, once it has left the window (arXiv 2506.05345).

  `window` None takes the window that the gates were trained with. A higher threshold keeps more, without retraining; it
  may be one number a row [B].

  `cr` sets the threshold for gates that were trained for a range of compression ratios (`DMSConfig.elastic`): the share
  1 - 1/cr of the tokens is evicted, more of them in some texts, heads and layers and fewer in others. It is one number
  or one a row [B], default the ratio whose threshold is 0. Gates for one ratio have no such dial.

  `budget` (tokens a head, the window's W + 1 included) adds a hard limit, which the paper does not have; with `hard`
  `cr` is one too, of any gates: tokens seen for each one allowed. The score is then the negative logit: where the
  archive is full, the token with the highest logit goes. `threshold=inf` leaves the choice to the limit alone: no token
  is evicted before the archive is full. Logits do not depend on attention, so in a prompt read in chunks each query
  sees exactly what it would see if the prompt were read one token at a time. With a limit, W must be at least the
  gates' lag (1 for `shift` 1), because a token needs its logit when it leaves the window.

  `scored` stores the logit of each token held, 4 bytes for each slot, so that a row can give tokens up later in the
  order of their logits (`Generator(on_pressure="compress")`). Without it, and without a limit, no logit is stored.
  """

  window: int | None = struct.field(pytree_node=False, default=None)
  threshold: float = 0.0
  hard: bool = struct.field(pytree_node=False, default=False)
  scored: bool = struct.field(pytree_node=False, default=False)
  levels: Levels | None = struct.field(pytree_node=False, default=None, metadata={"flag": False})

  uses_gates = True

  @property
  def by_level(self) -> bool:
    """Whether `cr` sets the threshold."""
    return self.cr is not None and not self.hard

  @property
  def limit(self) -> float | Float[Array, "*rows"]:
    """The threshold in force."""
    return self.levels.threshold(self.cr) if self.by_level else self.threshold

  @property
  def numbers(self):
    return ("budget", "cr") if self.by_level else super().numbers

  @property
  def bounded(self):  # type: ignore[override]
    return self.budget is not None or (self.cr is not None and self.hard)

  @property
  def overwrites(self):  # type: ignore[override]
    return self.bounded

  @property
  def replays(self):  # type: ignore[override]
    return self.bounded

  @property
  def stats(self):  # type: ignore[override]
    return Budgeted.stats if self.bounded else self.gate_stats

  @property
  def gate_stats(self):  # type: ignore[override]
    return ("score",) if self.bounded or self.scored else ()

  @property
  def compacts(self):
    return self.bounded and not self.exact_prefill

  def for_gates(self, dms):
    policy = self.replace(levels=dms.levels)
    plain = not self.hard and self.cr is None and np.ndim(self.threshold) == 0 and self.threshold == 0
    return policy.replace(cr=dms.elastic_pivot) if dms.elastic and plain else policy

  def resolved(self, window):
    if self.by_level:
      self._check_level()
    elif self.hard and self.cr is None:
      raise ValueError("DMS: hard=True makes a limit of cr=: give it too")
    resolve = Budgeted.resolved if self.bounded else Policy.resolved
    limits = self.replace(cr=None) if self.by_level else self
    return resolve(limits, window).replace(cr=self.cr)

  def lowered(self, threshold: Float[Array, "*rows"]) -> DMS:
    """This policy with `threshold`, unless its own is lower; for elastic gates at the nearest level that they have."""
    if self.by_level:
      return self.replace(cr=jnp.maximum(self.cr, self.levels.cr(threshold)))
    return self.replace(threshold=jnp.minimum(self.threshold, threshold))

  def _check_level(self) -> None:
    """A ValueError unless the gates were trained for every `cr`, and no threshold is given beside it."""
    if self.levels is None:
      raise ValueError(
        f"DMS: cr={self.cr} needs gates trained for a range of ratios (dms.elastic), and these were trained for one: "
        f"give threshold=, budget= (tokens), or hard=True for a limit of tokens seen / cr"
      )
    if np.any(np.asarray(self.threshold) != 0):
      raise ValueError(f"DMS: cr={self.cr} sets the threshold: leave threshold={self.threshold} out")
    cr, low, high = np.asarray(self.cr), self.levels.low, self.levels.high
    if cr.dtype.kind not in "iuf" or cr.ndim > 1 or not cr.size:
      raise ValueError(f"DMS: cr={self.cr} must be a number, or an array of one a row")
    if not ((cr >= np.float32(low)) & (cr <= np.float32(high))).all():
      raise ValueError(f"DMS: cr={self.cr} must lie between {low:g} and {high:g}, for which these gates were trained")

  def decide(self, logits, layer, position, keys=None):
    return logits > per_row(self.limit, 2).astype(logits.dtype)

  def rate(self, logits):
    return {"score": -logits}

  def retire(self, leaving):
    return super().retire(leaving) if self.bounded else Policy.retire(self, leaving)

  def capacity(self, tokens):
    return super().capacity(tokens) if self.bounded else Policy.capacity(self, tokens)

  def reach(self, slots):
    return super().reach(slots) if self.bounded else Policy.reach(self, slots)
