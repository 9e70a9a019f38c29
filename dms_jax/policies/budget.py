"""Budgets, in tokens or as a compression ratio (CR), and the base of policies that keep to one."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Array, Bool, Float, Int

from dms_jax.policies.base import Candidates, Leaving, Policy, Retired, per_row

FOREVER = np.int32(2**30)  # tokens, for a text of any length


def check_budget(policy: Policy, least: int) -> None:
  """Checks that exactly one of a policy's `budget` and `cr` is given, and that it is in range.

  Args:
    least: the smallest budget, tokens a head.

  Raises:
    ValueError: both or neither is given, or it is no finite scalar or [B], or out of range.
  """
  name = type(policy).__name__
  if (policy.budget is None) == (policy.cr is None):
    raise ValueError(f"{name}: give either budget= (tokens) or cr= (tokens seen for each one allowed)")
  number = np.asarray(policy.cr if policy.budget is None else policy.budget)
  given = f"{name}: budget={policy.budget} tokens" if policy.cr is None else f"{name}: cr={policy.cr}"
  if number.dtype.kind not in "iuf" or number.ndim > 1 or not number.size or not np.isfinite(number).all():
    raise ValueError(f"{given} must be a finite number, or an array of one a row")
  if policy.cr is not None and np.min(number) < 1:
    raise ValueError(f"{given} must be 1 or more")
  if policy.budget is not None and np.min(number) < least:
    raise ValueError(f"{given} must be {least} or more at window={policy.window}")
  if policy.budget is not None and ((number % 1 != 0).any() or np.max(number) > FOREVER):
    raise ValueError(f"{given} must be whole, and {FOREVER} at most")


def allowance(policy: Policy, tokens: int | Int[Array, "*shape"]) -> Int[Array, "..."]:
  """Tokens that the budget allows a head once `tokens` are seen: `budget`, or `tokens / cr` rounded up.

  Both numbers may be [B]; the first axis of `tokens`, if it has any, is then B.
  """
  tokens = jnp.asarray(tokens, jnp.int32)
  number = per_row(policy.budget if policy.budget is not None else policy.cr, max(tokens.ndim - 1, 0))
  if policy.budget is not None:
    return jnp.broadcast_to(number.astype(jnp.int32), jnp.broadcast_shapes(tokens.shape, number.shape))
  return jnp.ceil(tokens.astype(jnp.float32) / number.astype(jnp.float32)).astype(jnp.int32)


def largest(scores: Float[Array, "B K X"], live: Bool[Array, "B K X"], count: Int[Array, "B"]) -> Bool[Array, "B K X"]:
  """Marks the `count` live tokens of each head with the largest scores; of equal scores the earlier token's wins."""
  scores = jnp.maximum(scores, jnp.finfo(scores.dtype).min)  # a live score of -inf still comes before free slots
  order = jnp.argsort(jnp.where(live, -scores, jnp.inf), axis=-1, stable=True)
  rank = jnp.argsort(order, axis=-1)  # the inverse permutation
  return live & (rank < jnp.maximum(count, 0)[:, None, None])


@struct.dataclass
class Budgeted(Policy):
  """Holds at most a budget of tokens a head: the token outside the window with the least score is forgotten.

  `budget` counts every token a head holds while its newest token attends, that token included (papers count between
  steps: their number is one less). `cr` sets it to the tokens *seen so far* / `cr`, rounded up: the achieved CR is `cr`
  at every length for which `tokens / cr` exceeds W + 1. For a ratio at a stated length, set `budget` to `length / cr`.
  Of equal scores, a cut keeps the earlier token; a decode step forgets the leaving token, else that in the first slot.

  Prompts are read in chunks. A chunk of T tokens attends to the tokens held and to itself, so a head holds up to
  `budget + T` tokens meanwhile. The chunk's queries are observed together. Then the tokens outside the window are cut
  to the budget. `exact_prefill` reads one token at a time instead, by decode steps, which never hold more than the
  budget.
  """

  budget: int | None = None
  cr: float | None = None
  exact_prefill: bool = struct.field(pytree_node=False, default=False)

  bounded = True
  overwrites = True
  stats = ("score",)

  @property
  def compacts(self):
    return not self.exact_prefill

  def resolved(self, window):
    policy = super().resolved(window)
    check_budget(policy, policy.window + 1)
    return policy

  def retire(self, leaving: Leaving) -> Retired:
    full = leaving.archived >= self.capacity(leaving.tokens) - (self.window + 1)
    scores = jnp.where(leaving.live, leaving.archive_stats["score"], jnp.inf)
    keep = ~leaving.evicted & (~full | (leaving.stats["score"] > jnp.min(scores, axis=-1, initial=jnp.inf)))
    # `argmin` needs a slot and an archive may have none, so one is added that is never the answer.
    least = jnp.argmin(jnp.pad(scores, ((0, 0),) * 3 + ((0, 1),), constant_values=jnp.inf), axis=-1)
    return Retired(keep, jnp.where(full, least.astype(jnp.int32), -1))

  def compact(self, candidates: Candidates) -> Bool[Array, "B K X"]:
    count = self.capacity(candidates.tokens) - (self.window + 1)
    return largest(candidates.stats["score"], candidates.live, count)

  def capacity(self, tokens):
    return jnp.minimum(jnp.asarray(tokens, jnp.int32), jnp.maximum(allowance(self, tokens), self.window + 1))

  def reach(self, slots):
    if self.budget is not None:
      return jnp.where(jnp.maximum(allowance(self, 0), self.window + 1) <= slots, FOREVER, slots)
    if slots < self.window + 1:
      return jnp.int32(slots)
    tokens = slots * jnp.asarray(self.cr, jnp.float32) - 1  # one less, as both this and `allowance` are rounded
    return jnp.maximum(jnp.minimum(tokens, jnp.float32(FOREVER)).astype(jnp.int32), slots)
