"""Budgets, in tokens or as a compression ratio, and the policies that hold no more than theirs."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Array, Int

from dms_jax.policies.base import Leaving, Policy, Retired

FOREVER = np.int32(2**30)  # tokens of a text without end


def check_budget(policy: Policy, least: int) -> None:
  """Raises ValueError unless exactly one of the policy's `budget` and `cr` is given, and makes sense."""
  name = type(policy).__name__
  if (policy.budget is None) == (policy.cr is None):
    raise ValueError(f"{name}: give either budget= (tokens) or cr= (tokens seen for each one allowed)")
  if policy.budget is not None and policy.budget < least:
    raise ValueError(f"{name}: budget={policy.budget} tokens must be {least} or more at window={policy.window}")
  if policy.cr is not None and policy.cr < 1:
    raise ValueError(f"{name}: cr={policy.cr} must be 1 or more")


def allowance(policy: Policy, tokens: int | Int[Array, "*shape"]) -> Int[Array, "*shape"]:
  """Tokens that the budget allows a head once `tokens` are seen: `budget`, or a `cr`-th of them, rounded up."""
  tokens = jnp.asarray(tokens, jnp.int32)
  if policy.budget is not None:
    return jnp.broadcast_to(jnp.asarray(policy.budget, jnp.int32), tokens.shape)
  return jnp.ceil(tokens.astype(jnp.float32) / jnp.asarray(policy.cr, jnp.float32)).astype(jnp.int32)


@struct.dataclass
class Budgeted(Policy):
  """Holds at most its budget: a token that leaves the window takes the place of the archived one with the least score.

  `budget` counts all that a head holds while its newest token attends, that token included (papers count between
  steps: theirs is one less). `cr` allows a cr-th of the tokens *seen so far*, rounded up: the achieved CR is `cr` at
  every length at which that is more than the window of W + 1. For a ratio to a stated length, `budget = length / cr`.
  Where scores are equal the later token is forgotten.

  Prompts are read one token at a time, inside one compiled loop: what is kept depends on the attention of every query.
  """

  budget: int | None = None
  cr: float | None = None

  bounded = True
  scored = True

  def resolved(self, window):
    policy = super().resolved(window)
    check_budget(policy, policy.window + 1)
    return policy

  def retire(self, leaving: Leaving) -> Retired:
    full = leaving.archived >= self.capacity(leaving.tokens) - (self.window + 1)
    scores = jnp.where(leaving.live, leaving.scores, jnp.inf)
    keep = ~leaving.evicted & (~full | (leaving.score > jnp.min(scores, axis=-1, initial=jnp.inf)))
    # One place more, never the answer: an archive may have no slots at all.
    least = jnp.argmin(jnp.pad(scores, ((0, 0),) * 3 + ((0, 1),), constant_values=jnp.inf), axis=-1)
    return Retired(keep, jnp.where(full, least.astype(jnp.int32), -1))

  def capacity(self, tokens):
    return jnp.minimum(jnp.asarray(tokens, jnp.int32), jnp.maximum(allowance(self, tokens), self.window + 1))

  def reach(self, slots):
    if self.budget is not None:
      return jnp.where(jnp.maximum(allowance(self, 0), self.window + 1) <= slots, FOREVER, slots)
    if slots < self.window + 1:
      return jnp.int32(slots)
    tokens = slots * jnp.asarray(self.cr, jnp.float32) - 1  # one less, as both this and `allowance` are rounded
    return jnp.maximum(jnp.minimum(tokens, jnp.float32(FOREVER)).astype(jnp.int32), slots)
