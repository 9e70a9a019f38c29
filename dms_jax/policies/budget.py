"""Budgets, in tokens or as a compression ratio (CR), and the base of policies that keep to one."""

from __future__ import annotations

import math

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


def check_number(policy: Policy, name: str, least: float, most: float = math.inf, whole: bool = False) -> None:
  """Checks that the field `name` of a policy, one number or one a row, is between `least` and `most`.

  Whole numbers are added to tokens in int32, so they stay below `FOREVER`.

  Raises:
    ValueError: it is not.
  """
  number, most = np.asarray(getattr(policy, name)), int(FOREVER) - 1 if whole else most
  if not bool(np.all((number >= least) & (number <= most))) or (whole and bool(np.any(number % 1 != 0))):
    kind = "a whole number, " if whole else ""
    limits = f"{least} or more" if most == math.inf else f"from {int(least) if whole else least} to {most}"
    raise ValueError(f"{type(policy).__name__}: {name}={getattr(policy, name)} must be {kind}{limits}")


def check_sinks(policy: Policy, share: float | Float[Array, "B"] = 1.0) -> None:
  """Checks that a policy's `sinks` are 0 or more, and find places in its `budget`; with `cr` the places grow.

  Args:
    share: of the budget that sinks may take.

  Raises:
    ValueError: they do not.
  """
  check_number(policy, "sinks", 0.0, whole=True)
  if policy.budget is None:
    return
  budget = np.asarray(policy.budget)
  of_share = np.floor(budget.astype(np.float32) * np.asarray(share, np.float32)).astype(np.int64)
  places = np.minimum(budget - (policy.window + 1), of_share)
  if (np.asarray(policy.sinks) > places).any():
    part = "" if np.all(np.asarray(share) == 1) else f" at a share of {share}"
    raise ValueError(
      f"{type(policy).__name__}: sinks={policy.sinks} must be {np.min(places)} or fewer: a budget of {policy.budget} "
      f"tokens has no more places{part} beside the window's {policy.window + 1}"
    )


def allowance(policy: Policy, tokens: int | Int[Array, "*shape"]) -> Int[Array, "..."]:
  """Tokens that the budget allows a head once `tokens` are seen: `budget`, or `tokens / cr` rounded up.

  Both numbers may be [B]; the first axis of `tokens`, if it has any, is then B.
  """
  tokens = jnp.asarray(tokens, jnp.int32)
  number = per_row(policy.budget if policy.budget is not None else policy.cr, max(tokens.ndim - 1, 0))
  if policy.budget is not None:
    return jnp.broadcast_to(number.astype(jnp.int32), jnp.broadcast_shapes(tokens.shape, number.shape))
  return jnp.ceil(tokens.astype(jnp.float32) / number.astype(jnp.float32)).astype(jnp.int32)


def largest(
  scores: Float[Array, "B K X"], live: Bool[Array, "B K X"], count: Int[Array, "B"],
  position: Float[Array, "B K X"] | None = None,
) -> Bool[Array, "B K X"]:  # fmt: skip
  """Marks the `count` live tokens of each head with the largest scores; of equal scores the earlier token's wins.

  Args:
    position: of the tokens in the text; None if they are in text order.
  """
  scores = jnp.maximum(scores, jnp.finfo(scores.dtype).min)  # a live score of -inf still comes before free slots
  key = jnp.where(live, -scores, jnp.inf)
  order = jnp.argsort(key, axis=-1, stable=True) if position is None else jnp.lexsort((position, key), axis=-1)
  rank = jnp.argsort(order, axis=-1)  # the inverse permutation
  return live & (rank < jnp.maximum(count, 0)[:, None, None])


@struct.dataclass
class Limited(Policy):
  """The base of policies that keep to a budget of tokens a head, in tokens or as a CR.

  Attributes:
    budget: tokens a head, the window's W + 1 included; never below W + 1.
    cr: sets the budget to the tokens seen so far / `cr`, rounded up.
    exact_prefill: read a prompt one token at a time, by decode steps, instead of in chunks.
  """

  budget: int | None = None
  cr: float | None = None
  exact_prefill: bool = struct.field(pytree_node=False, default=False)

  @property
  def compacts(self):
    return not self.exact_prefill

  def resolved(self, window):
    policy = super().resolved(window)
    check_budget(policy, policy.window + 1)
    return policy

  def least(self, tokens: int | Int[Array, "..."]) -> Int[Array, "..."]:
    """Tokens that a head holds after a cut, once `tokens` are seen: the budget, or W + 1 if that is more."""
    return jnp.maximum(allowance(self, tokens), self.window + 1)

  def spare(self, tokens: int | Int[Array, "..."]) -> int | Int[Array, "..."]:
    """Tokens beyond the budget that a head may hold before it is cut."""
    return 0

  def capacity(self, tokens):
    tokens = jnp.asarray(tokens, jnp.int32)
    return jnp.minimum(tokens, self.least(tokens) + self.spare(tokens))

  def reach(self, slots):
    kept = slots - self.spare(0)  # tokens that the budget may allow
    if self.budget is not None:
      return jnp.where(self.least(0) <= kept, FOREVER, slots)
    # One token less, as both this and `allowance` are rounded.
    tokens = jnp.asarray(kept, jnp.float32) * jnp.asarray(self.cr, jnp.float32) - 1
    tokens = jnp.minimum(tokens, jnp.float32(FOREVER)).astype(jnp.int32)
    return jnp.where(kept > self.window, jnp.maximum(tokens, slots), slots)


@struct.dataclass
class Budgeted(Limited):
  """Holds at most a budget of tokens a head: the token outside the window with the least score is forgotten.

  `budget` counts every token a head holds while its newest token attends, that token included (papers count between
  steps: their number is one less). With `cr` the achieved CR is `cr` at every length for which `tokens / cr` exceeds
  W + 1. For a ratio at a stated length, set `budget` to `length / cr`.

  Of equal scores the later token is forgotten, in chunks of a prompt as in decode steps, in whatever slots they are.

  Prompts are read in chunks. A chunk of T tokens attends to the tokens held and to itself, so a head holds up to
  `budget + T` tokens meanwhile. The chunk's queries are observed together. Then the tokens outside the window are cut
  to the budget. `exact_prefill` reads one token at a time instead, by decode steps, which never hold more than the
  budget.
  """

  bounded = True
  overwrites = True
  stats = ("score", "position")  # archives are not in text order, so that ties need the positions

  def retire(self, leaving: Leaving) -> Retired:
    full = leaving.archived >= self.capacity(leaving.tokens) - (self.window + 1)
    scores = jnp.where(leaving.live, leaving.archive_stats["score"], jnp.inf)
    least = jnp.min(scores, axis=-1, initial=jnp.inf)
    keep = ~leaving.evicted & (~full | (leaving.stats["score"] > least))
    tied = leaving.live & (scores == least[..., None])
    # `argmax` needs a slot and an archive may have none, so one is added that is never the answer.
    pad = lambda x: jnp.pad(x, ((0, 0),) * 3 + ((0, 1),))
    latest = jnp.argmax(jnp.where(pad(tied), pad(leaving.archive_stats["position"]), -1), axis=-1)
    return Retired(keep, jnp.where(full, latest.astype(jnp.int32), -1))

  def compact(self, candidates: Candidates) -> Bool[Array, "B K X"]:
    count, stats = self.capacity(candidates.tokens) - (self.window + 1), candidates.stats
    return largest(stats["score"], candidates.live, count, stats["position"])
