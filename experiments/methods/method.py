"""Methods: a model under a policy and a budget, made from the flags of `experiments.evaluate`."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from dms_jax import policies
from dms_jax.model import Model, check_policy
from dms_jax.policies import DMS, Policy, Vanilla
from experiments.common import program
from experiments.methods.budgets import Budget, Group, fitted, shaped, takes_budget

HARD = "dms_budget"  # DMS under a budget in tokens, beside plain DMS, which holds what its gates keep


@dataclasses.dataclass(frozen=True)
class Method:
  """A named model under a policy.

  Attributes:
    policy: with its own settings; `given` fills in its budget for each text.
    checkpoint: fingerprint of all that decides its results beside the task: checkpoint, settings, rule of budgets.
  """

  name: str
  model: Model
  policy: Policy = Vanilla()  # noqa: RUF009  (frozen)
  checkpoint: str = ""
  given: Budget = Budget()  # noqa: RUF009  (frozen)

  @property
  def budget(self) -> dict[str, float]:
    """The bound on its cache, under the policy's own names."""
    names = self.policy.numbers if self.policy.uses_gates else ("budget", "cr")
    found = {name: getattr(self.policy, name, None) for name in names}
    found = {name: float(value) for name, value in found.items() if value is not None and math.isfinite(value)}
    return self.given.named() | found

  @property
  def key(self) -> tuple:
    """Tells methods apart: the name and the budget."""
    return self.name, tuple(sorted(self.budget.items()))

  @property
  def label(self) -> str:
    """The name with the budget, for readers."""
    return label(self.name, self.budget)

  def fitted(self, job: Any, most: int) -> tuple[Group, str]:
    """The policy for each text of a `run.Job` with `most` new tokens, and a remark, as `budgets.fitted` gives them."""
    return fitted(self.model, self.policy, self.given, job.totals(most))


def label(name: str, budget: Mapping[str, float]) -> str:
  """A method's name with its budget, for readers: "tova, CR 4"; without a threshold that is 0 or in the name."""
  words = {"cr": "CR {:g}", "budget": "{:g} tokens", "threshold": "threshold {:g}"}
  said = lambda key, value: key == "threshold" and (value == 0 or name.endswith(f" at {value:.12g}"))
  return ", ".join([name, *(words[key].format(value) for key, value in budget.items() if not said(key, value))])


def check_names(methods: Sequence[Method]) -> None:
  """Raises ValueError if two methods have the same name and budget."""
  keys = [method.key for method in methods]
  if twice := sorted({method.label for method in methods if keys.count(method.key) > 1}):
    raise ValueError(
      f"--methods, --retrofit, --thresholds: {twice} would be the name of several methods in the results; list each "
      "once, and a folder of such a name by its full path"
    )


def policy_class(name: str) -> tuple[str, type[Policy]]:
  """The registered name and the policy of a method on the command line, in any case.

  Raises:
    ValueError: there is no such method; the message lists them.
  """
  there, lower = dict(policies.REGISTRY), name.lower()
  if takes_budget(there["dms"]):
    there[HARD] = there["dms"]
  try:
    return lower, program.chosen(name, dict(sorted(there.items())), lower)
  except ValueError as error:
    raise ValueError(f"--methods: {error}") from None


def split_retrofits(retrofits: Sequence[str]) -> list[tuple[str, str]]:
  """(method or "" for all with gates, folder) of each entry of `--retrofit`: FOLDER or METHOD:FOLDER.

  Raises:
    ValueError: an unknown method before the colon.
  """
  found = []
  for entry in retrofits:
    name, colon, folder = entry.partition(":")
    found.append((policy_class(name)[0], folder) if colon and not Path(entry).exists() else ("", entry))
  return found


def budgets_of(name: str, policy: Policy, crs: Sequence[float], tokens: Sequence[int], rule: Any) -> list[Budget]:
  """The budgets that a method runs under.

  A method without a budget runs once: Vanilla, or one whose gates decide, such as DMS, which has the CR that it was
  trained for.

  Raises:
    ValueError: a method needs a budget and has none, or has one by its own flags and one by `--cr` or `--budgets`.
  """
  if not takes_budget(policy) or name == "dms":
    return [Budget()]
  flag = "dms" if name == HARD else name
  own = [f"--{flag}.{key}={value}" for key in ("budget", "cr") if (value := getattr(policy, key, None)) is not None]
  if own and (crs or tokens):
    raise ValueError(f"{own[0]} beside --cr or --budgets: give one of them")
  if own:
    return [Budget()]
  if not (crs or tokens):
    message = f"--methods: {name} needs a budget: give --cr=2,4,8, --budgets=512 (tokens) or --{flag}.budget"
    if name == HARD:
      raise ValueError(message)
    try:
      policy.resolved(window=0)  # such as StreamingLLM with a window
    except ValueError:
      raise ValueError(message) from None
    return [Budget()]
  return [*(Budget(cr=cr, rule=rule) for cr in crs), *(Budget(tokens=number) for number in tokens)]


def runs_of(
  name: str, policy: Policy, model: Model, crs: Sequence[float], tokens: Sequence[int], rule: Any
) -> list[tuple[Policy, Budget]]:
  """The policies and budgets that a method runs under: `budgets_of`, or DMS at a level for each CR.

  The levels are of gates that were trained for a range of ratios; `--thresholds` takes their place.

  Raises:
    ValueError: as `budgets_of`, or the gates were not trained for a CR.
  """
  if not (isinstance(policy, DMS) and name == "dms" and model.dms is not None and model.dms.elastic):
    return [(policy, budget) for budget in budgets_of(name, policy, crs, tokens, rule)]
  by_flags = policy.cr is not None or policy.threshold != 0
  levels = [policy] if by_flags or not crs else [policy.replace(cr=float(cr)) for cr in crs]
  return [(check_policy(model, level).replace(window=policy.window), Budget()) for level in levels]


def trained_for(model: Model) -> str:
  """The policy whose objective trained a model's gates."""
  return getattr(model.dms, "objective", "dms")


def build(
  names: Sequence[str], original: Model, origin: str, retrofits: Sequence[tuple[str, str, Model, str]],
  read: Callable[[str, type[Policy]], Policy], *, crs: Sequence[float] = (), tokens: Sequence[int] = (),
  rule: str = "paper", thresholds: Sequence[float] = (),
) -> list[Method]:  # fmt: skip
  """The methods of `--methods`, each with every budget.

  A method with gates runs each retrofit given to it alone; else each whose gates were trained for it; else the original
  if that has such gates. The others run the original.

  Args:
    original, origin: the original model and its fingerprint.
    retrofits: (method or "" for all, folder, model, fingerprint) of each.
    read: makes a policy from its flags.

  Raises:
    ValueError: an unknown method, one without gates or without a budget, two of one name, or a retrofit that none uses.
  """
  found, used = [], set()
  for given in names:
    name, cls = policy_class(given)
    policy = read("dms" if name == HARD else name, cls)
    models = [("", original, origin)]
    if cls.uses_gates:
      base = "dms" if name == HARD else name
      own = [each for each in retrofits if each[0] in (name, base)]
      own = own or [each for each in retrofits if not each[0] and trained_for(each[2]) == base]
      used |= {each[:2] for each in own}
      models = [(Path(folder).name if len(own) > 1 else "", model, about) for _, folder, model, about in own]
      if not models and original.dms is not None and trained_for(original) == base:
        models = [("", original, origin)]
      if not models:
        others = "; ".join(f"{folder} has gates of {trained_for(model)}" for _, folder, model, _ in retrofits)
        raise ValueError(
          f"--methods: {name} needs gates that were trained for it: give --retrofit=FOLDER{others and f' ({others})'}"
        )
    limits: Sequence[float | None] = (None,)
    if cls.uses_gates and (own_limit := getattr(policy, "threshold", None)) is not None:
      limits = thresholds or (own_limit,)
    for suffix, model, about in models:
      for limit in limits:
        at = policy if limit is None else policy.replace(threshold=limit)
        for level, budget in runs_of(name, at, model, crs, tokens, rule):
          fields = {field.name: field for field in dataclasses.fields(level)}
          more = {k: v for k, v in shaped(name, budget).items() if getattr(level, k) == fields[k].default}
          own_policy = level.replace(**more)
          print_ = program.fingerprint([about, type(own_policy).__name__, own_policy, budget.rule if budget.cr else ""])
          found.append(Method(f"{name} {suffix}".strip(), model, own_policy, print_, budget))
  for to, folder, model, _ in retrofits:
    if (to, folder) not in used:
      dense = to and not policy_class(to)[1].uses_gates
      raise ValueError(
        f"--retrofit={to}{to and ':'}{folder}: "
        + (f"{to} reads no gates" if dense else f"no method of --methods={','.join(names)} uses it")
        + ("; leave it out" if dense else f"; leave it out, or add {to or trained_for(model)}")
      )
  for flag, values, used_by in (
    ("thresholds", thresholds, [m for m in found if m.policy.uses_gates and hasattr(m.policy, "threshold")]),
    ("cr", crs, [m for m in found if m.given.cr is not None or getattr(m.policy, "cr", None) in crs]),
    ("budgets", tokens, [m for m in found if m.given.tokens is not None]),
  ):
    if values and not used_by:
      raise ValueError(
        f"--{flag}={program.spell(tuple(values))}: no method of --methods={','.join(names)} has any use for it"
      )
  check_names(found)
  return found


def idle_flags(given: Mapping[str, Any], methods: Sequence[str], tasks: Sequence[str]) -> list[str]:
  """The flags among `given` that set a policy or task which is none of `methods` and `tasks`, as they were given."""
  chosen = {"dms" if name.lower() == HARD else name.lower() for name in methods or ("dms",)} | set(tasks)
  return [
    f"--{flag}={program.spell(v)}" for flag, v in given.items() if "." in flag and flag.split(".")[0] not in chosen
  ]
