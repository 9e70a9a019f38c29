"""StreamingLLM: the first tokens, as attention sinks, and the latest (arXiv 2309.17453)."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
from flax import struct

from dms_jax.policies.base import Policy, is_whole, per_row, register
from dms_jax.policies.budget import FOREVER, Budgeted, check_number, check_sinks


@register
@struct.dataclass
class StreamingLLM(Budgeted):
  """Keeps `sinks` first tokens and a window: the newest token and `window` before it (section 3.2).

  `budget` may be given instead of `window`: the tokens that a head holds, sinks included, so W = budget - sinks - 1.
  With `cr` it grows with the text. The paper counts positions in the cache, so a text may be longer than the model's
  context. Here keys are stored after RoPE with their positions in the text, so no text can be longer than the context.

  W is a shape, and one budget becomes one. A budget for each row, or `cr`, is none: then W = 0, and `by_position` finds
  the oldest token that is no sink, which each new token replaces. Both hold the same tokens.

  Attributes:
    window: W, tokens before the newest one that stay visible.
    sinks: first tokens that stay.
    budget: tokens a head instead of window: W = budget - sinks - 1.
    by_position: keep a budget that differs by row, or follows cr, by position.
  """

  window: int | None = struct.field(pytree_node=False, default=None)
  sinks: int = 4
  by_position: bool = struct.field(pytree_node=False, default=False)

  @property
  def overwrites(self):  # type: ignore[override]
    return self.by_position

  replays = overwrites

  @property
  def compacts(self):
    return self.by_position and not self.exact_prefill

  @property
  def stats(self):  # type: ignore[override]
    return Budgeted.stats if self.by_position else ()

  def resolved(self, window):
    if self.by_position:
      policy = Budgeted.resolved(self if self.window is not None else self.replace(window=0), window)
      check_sinks(policy)
      return policy
    if sum(number is not None for number in (self.window, self.budget, self.cr)) != 1:
      raise ValueError("StreamingLLM: give either window= or budget= (tokens, sinks included), or cr=")
    if self.cr is not None or np.ndim(self.budget):
      return self.replace(by_position=True).resolved(window)
    check_number(self, "sinks", 0.0, whole=True)
    if self.window is not None:
      return Policy.resolved(self, window)
    if not is_whole(self.budget) or np.ndim(self.sinks):
      raise ValueError(f"StreamingLLM: budget={self.budget} and sinks={self.sinks} must each be one whole number")
    if self.budget <= self.sinks:
      raise ValueError(f"StreamingLLM: budget={self.budget} tokens must be more than its sinks={self.sinks}")
    return self.replace(window=int(self.budget - self.sinks - 1), budget=None)

  @property
  def remedy(self):
    return "" if self.by_position else "StreamingLLM(budget=N, by_position=True) has a budget for each"

  def decide(self, logits, layer, position, keys=None):
    if self.by_position:
      return jnp.zeros(position.shape, bool)
    return position >= per_row(self.sinks, 2).astype(position.dtype)

  def admit(self, layer, position):
    first = super().admit(layer, position)
    if not self.by_position:
      return first
    sink = position < per_row(self.sinks, 2).astype(position.dtype)
    return {**first, "score": jnp.where(sink, jnp.inf, first["position"])}

  def retire(self, leaving):
    return (Budgeted if self.by_position else Policy).retire(self, leaving)

  def least(self, tokens):
    tokens = jnp.asarray(tokens, jnp.int32)
    least = per_row(self.sinks, max(tokens.ndim - 1, 0)).astype(jnp.int32) + self.window + 1
    return jnp.maximum(super().least(tokens), least) if self.by_position else least

  def reach(self, slots):
    reach = FOREVER if self.cr is None else super().reach(slots)
    return jnp.where(self.least(0) <= slots, reach, slots)
