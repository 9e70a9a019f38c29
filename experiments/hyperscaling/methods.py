"""Methods of a sweep: dense, a retrofit for each CR, and baselines with the paper's budgets."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from dms_jax import checkpoint, policies, shipped
from dms_jax.json_files import is_number
from dms_jax.model import Model, check_policy
from dms_jax.policies import DMS, Policy, StreamingLLM
from dms_jax.sharding import decoding
from dms_jax.spmd import place
from experiments.common import program
from experiments.methods import method as methods_module
from experiments.methods.budgets import Budget, Group
from experiments.methods.method import Method

DENSE, TRAINED, PROMPT = "vanilla", "dms", "prompt_window"
LEAST = 16  # tokens of the window of PROMPT, whatever the budget leaves
# The order of tables and charts. TriAttention is named by flag, as it needs a calibration of its model.
DEFAULT = (DENSE, TRAINED, "streamingllm", PROMPT, "tova", "h2o", "quest", "rkv")
# Settings of a sweep's policies that differ from their own defaults. The paper names no layer that Quest reads whole
# (arXiv 2506.05345, appendix H.1). The two that Quest's authors keep of 32 would be a third of a reasoner of 6.
SETTINGS: dict[str, dict[str, Any]] = {"quest": {"dense_layers": 0}}


@dataclasses.dataclass(frozen=True)
class Trained(Method):
  """A retrofit under DMS, recorded under the CR that it was trained for, or at which elastic gates are read."""

  cr: float = 1.0

  @property
  def budget(self):
    return {"cr": self.cr} | super().budget


@dataclasses.dataclass(frozen=True)
class PromptWindow(Method):
  """StreamingLLM whose sinks are the whole prompt.

  A request of a prompt of p tokens holds the prompt and the window. All requests share the window, which is a shape:
  the mean of what the paper's budgets, (p + L) / CR, leave beside the prompt, and at least LEAST tokens.
  """

  def fitted(self, job, most):
    prompts = [len(prompt.tokens) for prompt in job.asked]
    left = np.mean([math.ceil((prompt + most) / self.given.cr) - prompt for prompt in prompts])
    held = max(round(float(left)), LEAST)
    policy = check_policy(self.model, StreamingLLM(window=held - 1, sinks=prompts[0]))
    remark = f"L {most}: the budget leaves {left:.0f} tokens beside the prompt, the window holds {held}"
    numbers: dict[str, list[float]] = {"sinks": [*prompts]}
    return Group(policy, list(range(len(prompts))), numbers), remark if left < LEAST else ""


def split(retrofits: Sequence[str]) -> list[tuple[str, float, str]]:
  """(method, CR, folder) of each entry [NAME=]CR:FOLDER of `--retrofit`, by method and rising CR.

  Retrofits of a NAME, such as another window, are the method "dms NAME", beside plain "dms".

  Raises:
    ValueError: an entry is of another form, or a CR of a method comes twice.
  """
  found = []
  for entry in retrofits:
    start, _, folder = entry.partition(":")
    name, equals, number = start.rpartition("=")
    try:
      cr = float(number)
    except ValueError:
      cr = 0.0
    if not (1 < cr < math.inf and folder) or bool(equals) != bool(name):
      raise ValueError(f"--retrofit={entry}: give CR:FOLDER or NAME=CR:FOLDER, such as 8:runs/retrofit/cr8")
    found.append((f"{TRAINED} {name}".strip(), cr, folder))
  about = [each[:2] for each in found]
  if twice := sorted({each for each in about if about.count(each) > 1}):
    raise ValueError(f"--retrofit: two retrofits of CR {twice[0][1]:g} for {twice[0][0]}; give one of them a NAME=")
  names = list(dict.fromkeys(name for name, _, _ in found))
  return sorted(found, key=lambda each: (names.index(each[0]), each[1]))


def check(names: Sequence[str], retrofits: Sequence[str], crs: Sequence[float]) -> None:
  """Checks the methods of a sweep by their names alone, before anything is loaded.

  Raises:
    ValueError: a method is unknown, listed twice, or lacks its retrofits or CRs; or there is none.
  """
  if not names:
    raise ValueError(f"--methods: give at least one, such as {','.join(DEFAULT)}")
  if twice := sorted({name for name in names if list(names).count(name) > 1}):
    raise ValueError(f"--methods: {twice[0]} is listed twice")
  pairs = split(retrofits)
  if (TRAINED in names) != bool(pairs):
    raise ValueError(f"--methods, --retrofit: {TRAINED} and its retrofits, --retrofit=8:FOLDER, go together")
  for name in names:
    if name in (DENSE, TRAINED, PROMPT):
      continue
    if name.lower() not in (*policies.REGISTRY, methods_module.HARD):
      try:
        program.chosen(name, dict.fromkeys(_known()))
      except ValueError as error:
        raise ValueError(f"--methods: {error}") from None
    if methods_module.policy_class(name)[1].uses_gates:
      raise ValueError(f"--methods={name}: a sweep has no gates but those of {TRAINED}; experiments.evaluate runs it")
  bounded = [name for name in names if name not in (DENSE, TRAINED)]
  if bounded and not crs:
    raise ValueError(f"--cr=2,4,8 is needed: the budgets of {bounded[0]}")


def _known() -> list[str]:
  """The methods that a sweep runs, but for retrofits with a NAME."""
  return sorted([PROMPT, TRAINED, *(name for name, cls in policies.REGISTRY.items() if not cls.uses_gates)])


def build(
  names: Sequence[str], path: str, original: Model, retrofits: Sequence[str], crs: Sequence[float], dtype: str,
  read: Callable[[str, type[Policy]], Policy] = lambda name, cls: cls(**SETTINGS.get(name, {})),
) -> list[Method]:  # fmt: skip
  """The methods of a sweep: the dense one, each retrofit, and every other method at each CR.

  Args:
    path: the checkpoint's folder.
    original: its model, without gates.
    read: makes a policy from its flags.

  Raises:
    ValueError: as `check`; or a retrofit was trained for another policy or for other CRs, or flags of DMS set the
      threshold of elastic gates, which the CR of `--retrofit` sets.
  """
  check(names, retrofits, crs)
  base = checkpoint.fingerprint(path)
  origin = program.fingerprint([base, base, dtype])
  found: list[Method] = []
  for name in names:
    if name == TRAINED:
      policy = read(TRAINED, DMS)
      for own, cr, folder in split(retrofits):
        how = dict(dtype=dtype, mesh=original.mesh, rules=decoding)
        model = place(checkpoint.load_retrofitted(path, folder, **how), original.mesh)
        if (objective := methods_module.trained_for(model)) != TRAINED:
          raise ValueError(f"--retrofit={cr:g}:{folder} has gates of {objective}, not of {TRAINED}")
        level = _at(model, policy, cr, folder)
        about: list[Any] = [base, checkpoint.fingerprint(folder), dtype, level, cr]
        found.append(Trained(own, model, level, program.fingerprint(about), cr=cr))
    elif name == PROMPT:
      about = [origin, name, LEAST]
      print_ = program.fingerprint(about)
      found += [PromptWindow(name, original, StreamingLLM(), print_, Budget(cr=float(cr))) for cr in crs]
    else:
      found += methods_module.build([name], original, origin, [], read, crs=() if name == DENSE else crs)
  methods_module.check_names(found)
  return found


def _at(model: Model, policy: DMS, cr: float, folder: str) -> DMS:
  """The policy under which a retrofit's gates are read for a CR: elastic ones at its level, others as they are.

  Raises:
    ValueError: elastic gates were not trained for this CR, or flags set their threshold.
  """
  if not model.dms.elastic:
    return policy
  if policy.cr is not None or policy.threshold != 0:
    raise ValueError(f"--retrofit={cr:g}:{folder} has elastic gates, read at CR {cr:g}: leave --dms.cr and "
                     "--dms.threshold out")  # fmt: skip
  try:
    check_policy(model, level := policy.replace(cr=cr))
  except ValueError as error:
    raise ValueError(f"--retrofit={cr:g}:{folder}: {error}") from None
  return level


def mislabelled(retrofits: Sequence[str]) -> list[str]:
  """A remark for each entry of `--retrofit` whose CR is not the one at which its training ended, as its files note."""
  remarks = []
  for _, cr, folder in split(retrofits):
    values, _, gates, _ = checkpoint.read_config(shipped.find(folder))
    noted = values["metadata"].get("retrofit")
    schedule = noted.get("schedule", {}) if isinstance(noted, dict) else {}
    whole = isinstance(schedule, dict) and schedule.get("steps") == values["metadata"].get("step")  # no snapshot
    ended = schedule.get("final_cr") if whole else None
    if gates is not None and not gates.elastic and is_number(ended) and ended != cr:
      remarks.append(f"--retrofit={cr:g}:{folder} was trained for CR {ended:g}; records and tables say {cr:g}")
  return remarks


def styled(methods: Sequence[str]) -> list[str]:
  """Methods in the order in which they take colours: the third colour is the last to be used again, and is DMS's."""
  others = [method for method in methods if method not in (DENSE, TRAINED)]
  found = [*others[:2], *(method for method in methods if method == TRAINED), *others[2:]]
  return [*(method for method in methods if method == DENSE), *found]
