"""Budgets: a compression ratio or a number of tokens, turned into a policy's numbers for each text."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np

from dms_jax.model import Model, check_policy
from dms_jax.policies import DMS, Policy
from dms_jax.policies.base import capacity_of, row_numbers, with_numbers
from dms_jax.policies.periodic import Periodic

RULES = ("paper", "seen")


@dataclasses.dataclass(frozen=True)
class Budget:
  """The bound on a cache: `cr`, or `tokens` a head; without either, the policy's own numbers.

  `rule` turns a CR into tokens. "paper": (tokens of the prompt + most new tokens) / CR, rounded up, a fixed number for
  each text (arXiv 2506.05345, appendix H.1). "seen": at any time the tokens seen so far / CR.
  """

  cr: float | None = None
  tokens: int | None = None
  rule: Literal["paper", "seen"] = "paper"

  @property
  def given(self) -> bool:
    return self.cr is not None or self.tokens is not None

  @property
  def follows_length(self) -> bool:
    """Whether the budget depends on the most new tokens; a shorter text then starts no longer one."""
    return self.cr is not None and self.rule == "paper"

  def named(self) -> dict[str, float]:
    """The bound as `Record.budget`."""
    if self.cr is not None:
      return {"cr": float(self.cr)}
    return {} if self.tokens is None else {"budget": float(self.tokens)}


def takes_budget(policy: type[Policy] | Policy) -> bool:
  """Whether a policy has a budget."""
  return any(field.name == "budget" for field in dataclasses.fields(policy))


def shaped(name: str, budget: Budget) -> dict[str, Any]:
  """Settings of a policy that follow from the budget: pages of Quest, as appendix H.1 sets them."""
  if name != "quest" or budget.cr is None:
    return {}
  return {"page": max(16, math.ceil(2 * budget.cr)), "each_head": budget.rule == "paper"}


@dataclasses.dataclass(frozen=True)
class Group:
  """Texts with one compiled policy: `rows` are their numbers among all texts.

  `policy` is resolved, with scalars; `numbers` holds one number for each row, by name.
  """

  policy: Policy
  rows: list[int]
  numbers: dict[str, list[float]]

  def of_row(self, place: int) -> dict[str, float]:
    """The numbers of the row at `place` in `rows`."""
    return {name: values[place] for name, values in self.numbers.items()}

  def at(self, places: Sequence[int]) -> Group:
    """The texts at some places in `rows`."""
    numbers = {name: [values[place] for place in places] for name, values in self.numbers.items()}
    return Group(self.policy, [self.rows[place] for place in places], numbers)

  def batched(self) -> Policy:
    """The policy with one number for each of `rows`."""
    return with_numbers(self.policy, self.numbers)


def _least(model: Model, policy: Policy, most: int) -> int:
  """The smallest budget in tokens that `policy` takes; its own error if it refuses even `most`."""

  def fits(tokens: int) -> bool:
    try:
      check_policy(model, policy.replace(budget=tokens))
    except ValueError:
      return False
    return True

  if not fits(most):
    check_policy(model, policy.replace(budget=most))
  low, high = 0, most
  while high - low > 1:
    middle = (low + high) // 2
    low, high = (low, middle) if fits(middle) else (middle, high)
  return high


def fitted(model: Model, policy: Policy, budget: Budget, totals: Sequence[int]) -> tuple[Group, str]:
  """The policy for each text.

  A budget bounds all that a head holds, so a policy that cuts it every `buffer` tokens cuts to the budget less the
  buffer, which is at most a quarter of the smallest budget. (Under the rule "seen" the buffer comes on top.) A CR's
  budget below the least that the policy takes, such as its window and sinks, is raised to it; one in tokens is refused.

  Args:
    totals: tokens of each text, the most new ones included.

  Returns:
    All texts as a group, and a remark about raised budgets or a smaller buffer; "" for none.

  Raises:
    ValueError: the policy cannot keep to such a budget.
  """
  name, everything = type(policy).__name__, list(range(len(totals)))
  if not budget.given:
    policy = check_policy(model, policy)
    return Group(policy, everything, {name: [v] * len(totals) for name, v in row_numbers(policy).items()}), ""
  if budget.cr is not None and budget.rule == "seen":
    if not any(field.name == "cr" for field in dataclasses.fields(policy)):
      raise ValueError(f"--budget_rule=seen: {name} has no budget that grows with the text; take --budget_rule=paper")
    hard = {"hard": True} if isinstance(policy, DMS) else {}
    policy = check_policy(model, policy.replace(cr=float(budget.cr), **hard))
    return Group(policy, everything, {"cr": [float(budget.cr)] * len(totals)}), ""
  # A budget beyond the longest text keeps everything, as does one of its length, which makes smaller arrays of a shape.
  longest, context = max(totals), model.config.max_position_embeddings
  wanted = [min(budget.tokens, longest) if budget.cr is None else math.ceil(total / budget.cr) for total in totals]
  remarks, buffer = [], 0
  if isinstance(policy, Periodic):
    buffer = min(int(np.max(policy.buffer)), max(min(wanted) // 4, 1))
    if buffer < np.max(policy.buffer):
      remarks.append(f"cut every {buffer} tokens instead of {policy.buffer}, a quarter of the smallest budget")
    policy = policy.replace(buffer=buffer)
  if budget.tokens is not None:
    try:
      check_policy(model, policy.replace(budget=min(budget.tokens, context) - buffer))
    except ValueError as error:
      less = f", less a buffer of {buffer} tokens" if buffer else ""
      raise ValueError(f"--budgets={budget.tokens}{less}: {error}") from None
  least = _least(model, policy, context)
  tokens = [max(number - buffer, least) for number in wanted]
  if raised := 0 if budget.cr is None else sum(number - buffer < least for number in wanted):
    remarks.append(f"{raised} of {len(wanted)} budgets raised to {least + buffer} tokens, the least that {name} takes")
  one = len(set(tokens)) == 1  # a budget of all texts may be a shape, such as StreamingLLM's window
  shared = check_policy(model, policy.replace(budget=tokens[0] if one else np.array(tokens)))
  if not one:
    shared = shared.replace(budget=tokens[0])
  return Group(shared, everything, _numbers(shared, tokens)), "; ".join(remarks)


def _numbers(policy: Policy, tokens: Sequence[int]) -> dict[str, list[float]]:
  """The numbers of a resolved policy for rows with budgets of these many tokens."""
  found = {name: [value] * len(tokens) for name, value in row_numbers(policy).items()}
  return found | ({"budget": list(tokens)} if "budget" in found else {})


def most_tokens(policy: Policy, numbers: dict[str, list[float]], longest: int) -> int:
  """The most slots that a head of any row may need for texts of up to `longest` tokens."""
  return int(np.max(capacity_of(with_numbers(policy, numbers) if numbers else policy, longest)))
