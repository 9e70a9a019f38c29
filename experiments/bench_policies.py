"""Times policies with a budget: decode steps against dense ones, two ways to read prompts.

    python -m experiments.bench_policies                        # one GPU, eight minutes
    python -m experiments.bench_policies --cases=step           # decode steps alone, five minutes
    python -m experiments.bench_policies --cases=step_h2o,step_tova --preset=llama-3.2-1b
    python -m experiments.bench_policies --scale=small          # tiny shapes on any machine, to test the program

`step_NAME` and `step_NAME_paged`: a decode step of `step_rows` rows after `step_tokens` tokens, of which a head holds
one in `cr`, in a contiguous and in a paged cache. The bar: no slower than the dense cache of the same rows
(`experiments/bench/policy_steps.py`). `prefill_NAME`: a policy that watches attention reads random prompts in chunks,
observing a chunk's queries together, and with `exact_prefill=True` token by token. The bar: chunks are 20 times as
fast. Weights are random; they do not affect the time. Writes OUTPUT/policies.json and prints a table; the last line is
one JSON object.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

import dms_jax
from dms_jax import policies
from dms_jax.config import ModelConfig
from dms_jax.execution import fastest_form
from dms_jax.families import PRESETS
from dms_jax.model import Model
from dms_jax.policies import REGISTRY, Policy
from experiments.bench import cases, synthetic
from experiments.bench.cases import Bar
from experiments.bench.generate_cases import TINY
from experiments.bench.policy_steps import KINDS, Steps, budgeted
from experiments.common import program
from experiments.reports import tables

FASTER = Bar("ratio", 20)
AS_FAST_AS_DENSE = Bar("dense_ratio", 1)
COLUMNS = ("name", "case", "ms", "dense_ms", "dense_ratio", "exact_ms", "ratio", "CR", "cache_bytes", "bar", "reached")


@dataclasses.dataclass(frozen=True)
class Config:
  """Settings of a run.

  Attributes:
    cases: names or prefixes of names; none: all.
    preset: name of the model's shape in `dms_jax.families.PRESETS`.
    policies: policies that read prompts.
    rows, tokens, budget: prompts read together, tokens of each, and tokens that a head may hold meanwhile.
    step_policies: policies whose decode steps are timed; none: all that take a budget and need no gates.
    step_rows, step_tokens: rows of a timed decode step, and tokens that each has read.
    cr: of decode steps: tokens read for each one that a head holds.
    rounds: times that each case is timed; the best counts.
    seconds: of the run, after which no case starts.
  """

  cases: tuple[str, ...] = ()
  preset: str = dataclasses.field(default="smollm2-135m", metadata={"choices": PRESETS})
  policies: tuple[str, ...] = dataclasses.field(default=("h2o", "tova"), metadata={"choices": REGISTRY})
  step_policies: tuple[str, ...] = dataclasses.field(default=(), metadata={"choices": REGISTRY})
  step_rows: int = 32
  step_tokens: int = 8192
  cr: float = 8.0
  rows: int = 8
  tokens: int = 4096
  budget: int = 512
  chunk: int = 512
  dtype: Literal["bfloat16", "float32"] = "bfloat16"
  rounds: int = 3
  seconds: float = 570.0
  scale: Literal["full", "small"] = "full"
  output: Path = Path("runs/bench_policies")

  def __post_init__(self):
    if self.preset not in PRESETS:
      raise ValueError(f"--preset={self.preset!r} is not one of {sorted(PRESETS)}")
    for name in ("rows", "tokens", "budget", "chunk", "rounds", "step_rows", "step_tokens", "cr"):
      if getattr(self, name) < 1:
        raise ValueError(f"--{name}={getattr(self, name)} must be 1 or more")

  def shrunk(self) -> Config:
    """The same settings, small enough for any machine."""
    return dataclasses.replace(
      self, rows=2, tokens=48, budget=12, chunk=16, rounds=1, step_rows=2, step_tokens=256, dtype="float32"
    )

  @property
  def shape(self) -> ModelConfig:
    return TINY if self.scale == "small" else PRESETS[self.preset]


def pair(name: str, budget: int) -> tuple[Policy, Policy]:
  """(a policy that reads prompts in chunks, the same policy reading one token at a time).

  Raises:
    ValueError: the policy has no budget or only one way to read a prompt.
  """
  cls = policies.get(name)
  fields = {field.name for field in dataclasses.fields(cls)}
  if missing := [field for field in ("budget", "exact_prefill") if field not in fields]:
    raise ValueError(f"--policies: {cls.__name__} has no {missing[0]}, so its prompts are read in one way only")
  return cls(budget=budget), cls(budget=budget, exact_prefill=True)


def reading(model: Model, policy: Policy, ids: np.ndarray, config: Config) -> tuple[float, float]:
  """(seconds to read the prompts, the achieved CR after them); the program is compiled before it is timed."""
  best, achieved = float("inf"), 0.0
  for number in range(1 + config.rounds):
    begin = time.perf_counter()
    out = dms_jax.generate(model, ids, policy=policy, max_new_tokens=0, eos=False, prefill_chunk=config.chunk)
    jax.block_until_ready(out.conversation.cache)
    took, achieved = time.perf_counter() - begin, out.metrics.achieved_cr
    program.log(f"  {policy.__class__.__name__}, exact_prefill={policy.exact_prefill}: {took:.3f} s")
    best = min(best, took) if number else best
  return best, achieved


def measure(name: str, model: Model, ids: np.ndarray, config: Config) -> dict[str, Any]:
  """One policy's milliseconds for both ways of reading, and their ratio."""
  (chunked, cr), (exact, _) = (reading(model, policy, ids, config) for policy in pair(name, config.budget))
  return {"ms": chunked * 1e3, "exact_ms": exact * 1e3, "ratio": exact / chunked, "CR": cr}


def measurements(config: Config, sized: Config) -> dict[str, tuple[str, Callable[[Model], dict[str, Any]], Bar]]:
  """{name: (description, figures of a model, bar)} of the cases asked for.

  Raises:
    ValueError: a case or a policy that there is not.
  """
  found, measured = {}, budgeted()
  if unknown := [name for name in config.step_policies if name not in measured]:
    raise ValueError(f"--step_policies={','.join(unknown)}: not one of {', '.join(measured)}, which take a budget")
  quick = {"steps": 4, "seconds": 0.02} if config.scale == "small" else {}
  made: list[Steps] = []  # of the first case, for all

  def steps(model: Model) -> Steps:
    if not made:
      made.append(Steps(model, sized.step_rows, sized.step_tokens, max(int(sized.step_tokens / sized.cr), 1), **quick))
    return made[0]

  about = f"B{sized.step_rows} T{sized.step_tokens} CR {sized.cr:g}"
  for name in config.step_policies or measured:
    for kind in KINDS:
      run = lambda model, name=name, kind=kind: steps(model).against_dense(name, kind)
      found[f"step_{name}" if kind == KINDS[0] else f"step_{name}_{kind}"] = about, run, AS_FAST_AS_DENSE
  about = f"B{sized.rows} T{sized.tokens} budget {sized.budget}, chunks of {sized.chunk}"
  ids = np.random.default_rng(0).integers(0, config.shape.vocab_size, (sized.rows, sized.tokens)).astype(np.int32)
  for name in config.policies:
    pair(name, config.budget)
    found[f"prefill_{name}"] = about, lambda model, name=name: measure(name, model, ids, sized), FASTER
  return {name: found[name] for name in cases.chosen(found, config.cases)}


def main() -> None:
  config = program.read_flags("", Config)
  sized = config.shrunk() if config.scale == "small" else config
  chosen = measurements(config, sized)
  model = fastest_form(synthetic.random_model(config.shape, window=None, dtype=jnp.dtype(sized.dtype)))
  environment = program.environment()
  about = {"device": environment["device"], "jax": environment["jax"], "scale": config.scale}
  run = cases.Runner(config.seconds, about)
  for name, (case, figures, bar) in chosen.items():
    bars = (bar,) if config.scale == "full" else ()
    run(name, {"case": case}, lambda figures=figures, bars=bars: cases.judged(figures(model), bars))
  rows = list(run.rows.values())
  print(tables.of_mappings(rows, COLUMNS))
  saved = program.save_json(config.output / "policies.json", {"environment": environment, "rows": rows})
  program.finish({"rows": rows, "json": str(saved)})


if __name__ == "__main__":
  program.define_flags("", Config)
  program.run(main, writes="folder")
