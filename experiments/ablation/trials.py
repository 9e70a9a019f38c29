"""The trials of an ablation: every combination of a sweep, checked before the first run."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any, Literal

from dms_jax import policies
from dms_jax.config import DMSConfig, LoRAConfig
from dms_jax.retrofit import DataConfig, RetrofitConfig
from dms_jax.retrofit.config import check
from experiments import retrofit
from experiments.ablation import sweeps
from experiments.common import program

TRAINED = "trained.json"  # file in a trial's folder: the cost of its finished retrofit


@dataclasses.dataclass(frozen=True)
class EvalConfig:
  """How a retrofit is scored; none of these fields changes its training.

  The first `max_tokens` (0: all) of `text` are read in chunks of `length` tokens; every position except a chunk's first
  is scored. `retrofit` names an existing retrofit, and then nothing is trained. `checkpoint` is "final", or "cr2",
  "cr3", ... for the retrofit saved when the target reached that CR. `threshold` and `window` (none: the retrofit's) set
  the eviction. At `positions` evenly spaced positions of a chunk, compression is also reported by layer and head.

  With a `policy` other than "dms", the original model decodes the text under that baseline, and nothing is trained. Its
  settings are flags by its name, --h2o.window=8; `budget` stands for that of any policy that has one.

  Attributes:
    text: file of the text that is scored.
    checkpoint: "final", or "cr2", "cr3", ... as saved when the target reached that CR.
    length: T, tokens of a chunk of the text.
    max_tokens: first tokens of the text that are read; 0: all.
    positions: of a chunk, at which compression is also reported by layer and head.
    policy: another than dms decodes by the original model, and nothing is trained.
    budget: of such a policy, in tokens a head, window and sinks included; none: as its own flags say.
  """

  text: str = ""
  retrofit: str = ""
  checkpoint: str = "final"
  length: int = 4096
  threshold: float = 0.0
  window: int | None = None
  max_tokens: int = 0
  batch: int = 1
  dtype: Literal["bfloat16", "float32"] = "bfloat16"
  positions: int = 0
  policy: str = "dms"  # a name of the registry
  budget: int | None = None

  def __post_init__(self):
    for name, least in (("length", 2), ("max_tokens", 0), ("batch", 1), ("positions", 0), ("window", 0), ("budget", 1)):
      value = getattr(self, name)
      if value is not None and value < least:
        raise ValueError(f"eval.{name}={value} must be {least} or more")
    if self.positions > self.length:
      raise ValueError(f"eval.positions={self.positions} must be at most eval.length={self.length}")
    try:
      policies.get(self.policy)
    except ValueError as error:
      raise ValueError(f"eval.policy: {error}") from None
    if self.budget is not None and f"{self.policy}.budget" not in self.settings:
      having = ", ".join(name for name, cls in BASELINES.items() if "budget" in fields_of(cls))
      raise ValueError(f"eval.policy={self.policy!r} has no budget for eval.budget={self.budget}; these have: {having}")
    if self.policy != "dms" and (self.threshold or self.window is not None or self.positions):
      raise ValueError(f"eval.policy={self.policy!r} has no gates: eval.threshold, window and positions are theirs")

  @property
  def trained(self) -> bool:
    """Whether the trial trains the retrofit that it scores."""
    return self.policy == "dms" and not self.retrofit

  @property
  def settings(self) -> dict[str, Any]:
    """{flag: default} of the baseline's own settings; none for the gates, whose flags --dms.* are a retrofit's."""
    fields = {} if self.policy == "dms" else fields_of(BASELINES[self.policy])
    return {f"{self.policy}.{name}": default for name, default in fields.items()}

  def baseline(self, whole: dict[str, Any]) -> policies.Policy | None:
    """The baseline policy to decode under, from all settings by flag; None for the gates' evictions.

    Raises:
      ValueError: a setting is refused, such as a budget that is too small.
    """
    if self.policy == "dms":
      return None
    given = {} if self.budget is None else {f"{self.policy}.budget": self.budget}
    return program.read_flags(self.policy, BASELINES[self.policy], whole | given).resolved(None)


BASELINES = {name: cls for name, cls in policies.REGISTRY.items() if name != "dms"}
SECTIONS = {**retrofit.SECTIONS, "eval": (EvalConfig, {}), **{name: (cls, {}) for name, cls in BASELINES.items()}}
TYPES = {flag: kind for name, (cls, _) in SECTIONS.items() for flag, kind in program.flag_types(name, cls).items()}


def fields_of(cls: type) -> dict[str, Any]:
  """{name: default} of a policy's settings that are flags."""
  return {name: getattr(cls(), name) for name in program.flag_types("", cls)}


@dataclasses.dataclass(frozen=True)
class Trial:
  """One combination: the swept values, all settings by flag and as configs, and the paths of its results."""

  said: dict[str, Any]
  whole: dict[str, Any]
  dms: DMSConfig
  lora: LoRAConfig
  retrofit: RetrofitConfig
  data: DataConfig
  eval: EvalConfig
  baseline: policies.Policy | None
  folder: Path
  result: Path

  @property
  def name(self) -> str:
    return " ".join(f"{flag}={program.spell(value)}" for flag, value in self.said.items()) or "as the flags say"

  @property
  def retrofit_path(self) -> Path:
    """The checkpoint to score."""
    return Path(self.eval.retrofit) if self.eval.retrofit else self.folder / self.eval.checkpoint


def trial(said: dict[str, Any], whole: dict[str, Any], base: str, root: Path) -> Trial:
  """A checked combination.

  Args:
    said: the swept values by flag.
    whole: all settings by flag.
    base: path of the checkpoint.
    root: folder of the ablation.

  Raises:
    ValueError: a value is refused, or the settings are inconsistent; the message names the combination.
  """
  where = "--sweep: " + (" ".join(f"{flag}={program.spell(value)}" for flag, value in said.items()) or "no field")
  try:
    kinds = ("lora", "retrofit", "data", "eval")
    configs = {name: program.read_flags(name, SECTIONS[name][0], whole) for name in kinds}
    configs["dms"] = retrofit.gates_of(configs["retrofit"], whole)
    evaluation, settings = configs["eval"], configs["retrofit"]
    if idle := [flag for flag in said if flag.partition(".")[0] in BASELINES.keys() - {evaluation.policy}]:
      raise ValueError(f"eval.policy={evaluation.policy}, so {idle} change nothing")
    configs["baseline"] = evaluation.baseline(whole)
    trained = {flag: value for flag, value in said.items() if flag.partition(".")[0] in retrofit.SECTIONS}
    if not evaluation.trained and trained:
      ready = (
        f"eval.retrofit={evaluation.retrofit}" if evaluation.policy == "dms" else f"eval.policy={evaluation.policy}"
      )
      raise ValueError(f"{ready} trains nothing, so {sorted(trained)} change nothing")
    if not evaluation.trained and evaluation.checkpoint != "final":
      raise ValueError("eval.checkpoint is one of a run's: here nothing is trained")
    if evaluation.trained:
      check(configs["dms"], configs["lora"], settings)
      if settings.trainable != "lora" and (given := [flag for flag in said if flag.startswith("lora.")]):
        raise ValueError(f"retrofit.trainable={settings.trainable!r} has no low-rank updates for {given} to change")
      last, crs = settings.schedule.steps, range(2, int(settings.schedule.final_cr) + 1)
      crs = crs if settings.saving.snapshots else ()
      saved = ["final", *(f"cr{cr}" for cr in crs if settings.schedule.step_of_cr(cr) <= last)]
      if evaluation.checkpoint not in saved:
        raise ValueError(f"eval.checkpoint={evaluation.checkpoint!r} is none of {saved}, which a run saves")
  except ValueError as error:
    raise ValueError(f"{where}: {error}") from None
  # Of a baseline's settings those that are not its defaults, so that a new setting changes no earlier fingerprint.
  scored = {flag: value for flag, value in whole.items() if flag.startswith("eval.")}
  scored |= {flag: whole[flag] for flag, default in evaluation.settings.items() if whole[flag] != default}
  if not evaluation.trained:
    about = {"retrofit": evaluation.retrofit} if evaluation.policy == "dms" else {"policy": evaluation.policy}
    folder = root / f"{program.label(about)}-{program.fingerprint([base, about])}"
  else:
    training = {flag: value for flag, value in whole.items() if flag.partition(".")[0] in retrofit.SECTIONS}
    resolved = {"checkpoint": base, **training}
    folder = root / f"{program.label(trained)}-{program.fingerprint(resolved)}"
    # Another sweep may reach the same settings with other swept fields.
    folder = next(iter(sorted(root.glob(f"*-{folder.name.rpartition('-')[2]}"))), folder)
  label = program.label(
    {flag: value for flag, value in said.items() if flag in scored and flag not in ("eval.retrofit", "eval.policy")}
  )
  return Trial(
    said, whole, **configs, folder=folder, result=folder / "quality" / f"{label}-{program.fingerprint(scored)}.json"
  )


def trials(base: str, groups: list[str], root: Path) -> list[Trial]:
  """Every combination of `groups`, each once, in order, for the checkpoint at `base`.

  Raises:
    ValueError: there is nothing to sweep, a value is refused, or a swept field is set on the command line.
  """
  given = {flag: value for flag, value in program.flag_values().items() if flag in TYPES}
  said = [each for group in groups for each in sweeps.product(group, TYPES)]
  if twice := sorted({flag for each in said for flag in each if program.FLAGS[flag].present}):
    raise ValueError(f"{', '.join('--' + flag for flag in twice)}: given as a flag and swept; leave one of them out")
  runs = sweeps.unique((each, given | each) for each in said or [{}])
  return [trial(each, whole, base, root) for each, whole in runs]
