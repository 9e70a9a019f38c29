"""How much faster policies that watch attention read a prompt in chunks than one token at a time.

    python -m experiments.bench_policies                   # one GPU, three minutes
    python -m experiments.bench_policies --scale=small     # tiny shapes on any machine, to test the program

Each policy reads the same random prompts twice. In chunks it observes all queries of a chunk together; with
`exact_prefill=True` every token is a step of its own. Weights are random, too, because they do not affect the time.
Writes OUTPUT/policies.json and prints a table; the last line is one JSON object.
"""

from __future__ import annotations

import dataclasses
import time
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
from dms_jax.policies import Policy
from experiments.bench import synthetic
from experiments.bench.cases import Bar, Runner, judged
from experiments.bench.generate_cases import TINY
from experiments.common import program
from experiments.reports import tables

FASTER = Bar("ratio", 20)
COLUMNS = ("name", "case", "ms", "exact_ms", "ratio", "CR", "bar", "reached")


@dataclasses.dataclass(frozen=True)
class Config:
  """`rows` prompts of `tokens` tokens, a `budget` in tokens a head; the best of `rounds` of each reading counts."""

  preset: str = "smollm2-135m"
  policies: tuple[str, ...] = ("h2o", "tova")
  rows: int = 8
  tokens: int = 4096
  budget: int = 512
  chunk: int = 512
  dtype: Literal["bfloat16", "float32"] = "bfloat16"
  rounds: int = 3
  seconds: float = 500.0
  scale: Literal["full", "small"] = "full"
  output: Path = Path("runs/bench_policies")

  def __post_init__(self):
    if self.preset not in PRESETS:
      raise ValueError(f"--preset={self.preset!r} is not one of {sorted(PRESETS)}")
    for name in ("rows", "tokens", "budget", "chunk", "rounds"):
      if getattr(self, name) < 1:
        raise ValueError(f"--{name}={getattr(self, name)} must be 1 or more")

  def shrunk(self) -> Config:
    """The same settings, small enough for any machine."""
    return dataclasses.replace(self, rows=2, tokens=48, budget=12, chunk=16, rounds=1, dtype="float32")

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


def main() -> None:
  config = program.read_flags("", Config)
  for name in config.policies:
    pair(name, config.budget)
  sized = config.shrunk() if config.scale == "small" else config
  model = fastest_form(synthetic.random_model(config.shape, window=None, dtype=jnp.dtype(sized.dtype)))
  ids = np.random.default_rng(0).integers(0, config.shape.vocab_size, (sized.rows, sized.tokens)).astype(np.int32)
  environment = program.environment()
  run = Runner(config.seconds, {"device": environment["device"], "jax": environment["jax"], "scale": config.scale})
  about = {"case": f"B{sized.rows} T{sized.tokens} budget {sized.budget}, chunks of {sized.chunk}"}
  bars = (FASTER,) if config.scale == "full" else ()
  for name in config.policies:
    run(f"prefill_{name}", about, lambda name=name: judged(measure(name, model, ids, sized), bars))
  rows = list(run.rows.values())
  print(tables.of_mappings(rows, COLUMNS))
  saved = program.save_json(config.output / "policies.json", {"environment": environment, "rows": rows})
  program.finish({"rows": rows, "json": str(saved)})


if __name__ == "__main__":
  program.define_flags("", Config)
  program.run(main)
