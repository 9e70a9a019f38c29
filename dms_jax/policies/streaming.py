"""StreamingLLM: the first tokens, as attention sinks, and the latest (arXiv 2309.17453)."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
from flax import struct

from dms_jax.policies.base import Policy, is_whole, per_row, register
from dms_jax.policies.budget import FOREVER, check_number


@register
@struct.dataclass
class StreamingLLM(Policy):
  """Keeps `sinks` first tokens and a window: the newest token and `window` before it (section 3.2).

  `budget` may be given instead of `window`: the tokens that a head holds, sinks included, so W = budget - sinks - 1.
  Both are shapes. The paper counts positions in the cache, so a text may be longer than the model's context. Here
  keys are stored after RoPE with their positions in the text, so a text cannot be longer than the context.

  Attributes:
    window: W, tokens before the newest one that stay visible.
    sinks: first tokens that stay.
    budget: tokens a head instead of window: W = budget - sinks - 1.
  """

  window: int | None = struct.field(pytree_node=False, default=None)
  sinks: int = 4
  budget: int | None = struct.field(pytree_node=False, default=None)

  bounded = True

  def resolved(self, window):
    if (self.window is None) == (self.budget is None):
      raise ValueError("StreamingLLM: give either window= or budget= (tokens, sinks included)")
    check_number(self, "sinks", 0.0, whole=True)
    if self.window is not None:
      return super().resolved(window)
    if not is_whole(self.budget) or np.ndim(self.sinks):
      raise ValueError(f"StreamingLLM: budget={self.budget} and sinks={self.sinks} must each be one whole number")
    if self.budget <= self.sinks:
      raise ValueError(f"StreamingLLM: budget={self.budget} tokens must be more than its sinks={self.sinks}")
    return self.replace(window=int(self.budget - self.sinks - 1), budget=None)

  def decide(self, logits, layer, position, keys=None):
    return position >= per_row(self.sinks, 2).astype(position.dtype)

  def capacity(self, tokens):
    return jnp.minimum(jnp.asarray(tokens, jnp.int32), jnp.asarray(self.sinks, jnp.int32) + self.window + 1)

  def reach(self, slots):
    return jnp.where(jnp.asarray(self.sinks, jnp.int32) + self.window + 1 <= slots, FOREVER, slots)
