"""Gain of each choice of `dms_jax.execution`: a decode step or chunk with the choice on and off.

    python -m experiments.bench_execution --shape=smollm2-135m --rows=1,8,32 --output=execution.json
    python -m experiments.bench_execution --shape=llama-3.2-1b --rows=1,8,32,128,248 --output=execution.json
    python -m experiments.bench_execution --kind=by_cr --tricks=joint_updates --window=64 --rows=1,32
    python -m experiments.bench_execution --chunk=64 --dtype=float32 --rows=1 --tokens=512 --window=16

Weights and caches are random (`experiments.bench.synthetic`). Each field of `Execution` that is on for a step is
switched off, one field at a time. The programs take turns, and the best round of each counts.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from dms_jax.cache import Cache
from dms_jax.execution import Execution, override
from dms_jax.families import PRESETS
from experiments.bench import synthetic
from experiments.bench.generate_points import Bench, Energy, Point, Programs, Shape, copied, small
from experiments.common import program
from experiments.reports import tables

BASE = "none"  # the step with nothing switched off
# These fields affect compile time, cuts of some policies, or meshes. `tricks` can name one to switch it off, too.
NOT_TIMED = ("jitted_attention", "layers_apart", "step_layers", "skipped_filters", "small_cuts", "replicated_writes")


@dataclasses.dataclass(frozen=True)
class Config:
  """A step of `rows` rows that hold `tokens` tokens each, compressed by `cr`.

  `tricks`: fields to switch off, "a+b" for two at once; default: each field that is on. `chunk`: if not 0, a chunk of
  `chunk` tokens of one prompt is timed instead of a decode step. `steps`: decode steps of a compiled block. Each
  program is timed in `rounds` rounds of `seconds` each. `workers`: programs compiled at once.

  Attributes:
    shape: name of a model's shape in `dms_jax.families.PRESETS`.
    kind: "by_cr" also has low-rank updates of q, k, v and o by each row's CR, which are not merged.
    window: W of the gates, in tokens.
  """

  shape: str = "smollm2-135m"
  kind: Literal["dms", "by_cr"] = "dms"
  rows: tuple[int, ...] = (1, 8, 32)
  tokens: int = 8192
  cr: float = 8.0
  window: int = 256
  dtype: str = "bfloat16"
  steps: int = 16
  chunk: int = 0
  tricks: tuple[str, ...] = ()
  rounds: int = 5
  seconds: float = 0.1
  workers: int = 16
  output: Path = Path("execution.json")


def switched_off(how: Execution, tricks: tuple[str, ...] = ()) -> dict[str, dict[str, Any]]:
  """{trick: overrides}: BASE without any, then each of `tricks` or each field of `how` that is on, at its off value."""
  names = [f.name for f in dataclasses.fields(how) if getattr(how, f.name) != f.default and f.name not in NOT_TIMED]
  if how.late_gates and how.fused_gate:  # gates after the layers are always fused
    names[names.index("fused_gate")] = "late_gates+fused_gate"
  off = vars(Execution())
  return {BASE: {}} | {name: {field: off[field] for field in name.split("+")} for name in tricks or names}


class Contest:
  """The programs of one step, as chosen and with each trick off.

  Programs of one storage format take turns on one cache: each gets it by donation and returns it.
  """

  def __init__(self, config: Config, rows: int, benches: dict[str, Bench], pool: ThreadPoolExecutor):
    self.config, self.rows, self.benches = config, rows, benches
    self.tricks = switched_off(
      Execution.choose(self.bench().model(config.kind), rows, config.chunk or 1), config.tricks
    )
    self.caches: dict[str, Cache] = {}
    self.programs: dict[str, Future] = {}  # (program, seconds to compile), without programs equal to BASE's
    texts = set()
    for name, fields in self.tricks.items():
      with override(**fields):
        lowered = self._lowered()
      text = lowered.as_text()
      if text not in texts:
        self.programs[name] = pool.submit(_compiled, lowered)
      texts |= {text} if name == BASE else set()

  def bench(self) -> Bench:
    """The bench of a model whose layers have the currently chosen form."""
    c, form = self.config, Execution.choose().layers
    if form not in self.benches:
      shape = Shape(PRESETS[c.shape], c.window, c.cr, dtype=c.dtype, steps=c.steps)
      self.benches[form] = Bench(shape, 1.0, Programs(1), Energy())
    return self.benches[form]

  def _lowered(self) -> Any:
    if self.config.chunk:
      return self.bench().lower_prompt(self.config.kind, self.config.tokens, self.config.chunk)
    return self.bench().lower(Point(self.config.kind, self.rows, self.config.tokens, self.config.tokens))

  def _call(self, name: str) -> Callable[[], Any]:
    """A call that runs a trick's program from the same state; it returns (tokens or logits, whether rows had space)."""
    c, run = self.config, self.programs[name].result()[0]
    with override(**self.tricks[name]):
      model, policy, *rest = self.bench().arguments(c.kind, c.tokens, 1 if c.chunk else self.rows)
      shape = (
        self.bench().prompt_cache(c.kind, c.tokens)
        if c.chunk
        else self.bench().cache_shape(c.kind, self.rows, c.tokens)
      )
    stored = str(shape.kv.dtype)
    if stored not in self.caches:
      self.caches[stored] = synthetic.filled(shape, model, policy, tokens=c.tokens - (c.chunk or c.steps))
    begin = copied((small(self.caches[stored]), synthetic.running_rows(self.rows)))
    part = np.random.default_rng(0).integers(0, model.config.vocab_size, (1, c.chunk)).astype(np.int32)
    length, remaining = np.array([c.chunk], np.int32), np.zeros(1, np.int32)

    def call() -> Any:
      fresh, rows = copied(begin)
      cache = self.caches[stored].replace(**fresh)
      if c.chunk:
        logits = jnp.zeros((1, model.config.vocab_size), jnp.float32)
        self.caches[stored], logits, stalled, _ = run(model, policy, cache, part, length, remaining, logits)
        return logits, ~stalled
      self.caches[stored], _, emitted, _ = run(model, policy, cache, rows, *rest)
      return emitted.tokens, emitted.valid

    return call

  def run(self) -> list[dict[str, Any]]:
    """One row for each trick: ms of a step as chosen, ms with the trick off, and the gain, off / on - 1.

    Raises:
      RuntimeError: a row had no space.
    """
    c, calls, best = self.config, {name: self._call(name) for name in self.programs}, {}
    for name, call in calls.items():
      if not bool(jnp.all(call()[1])):
        raise RuntimeError(f"{self.rows} rows of {c.tokens} tokens: rows without room")
      best[name] = _seconds(call, 1)
    counts = {name: max(1, int(c.seconds / once)) for name, once in best.items()}
    for _ in range(c.rounds):
      for name, call in calls.items():
        best[name] = min(best[name], _seconds(call, counts[name]))
    ms = {name: took * 1e3 / (1 if c.chunk else c.steps) for name, took in best.items()}
    about = {name: getattr(c, name) for name in ("shape", "kind", "tokens", "dtype", "chunk")} | {"rows": self.rows}
    return [
      {
        **about,
        "off": name,
        "ms": ms[BASE],
        "ms_off": ms.get(name, ms[BASE]),
        "gain": ms.get(name, ms[BASE]) / ms[BASE] - 1,
        "same_program": name not in ms,
        "compile_s": self.programs[name].result()[1] if name in ms else None,
      }
      for name in self.tricks
    ]


def _compiled(lowered: Any) -> tuple[Any, float]:
  begin = time.perf_counter()
  return lowered.compile(), time.perf_counter() - begin


def _seconds(call: Callable[[], Any], count: int) -> float:
  """Mean seconds of a call over `count` calls queued back to back."""
  begin = time.perf_counter()
  for _ in range(count):
    out = call()
  jax.block_until_ready(out)
  return (time.perf_counter() - begin) / count


def measure(config: Config) -> list[dict[str, Any]]:
  """The rows of all contests; every program is compiled before any is timed."""
  benches: dict[str, Bench] = {}
  with ThreadPoolExecutor(config.workers) as pool:
    contests = [Contest(config, rows, benches, pool) for rows in ((1,) if config.chunk else config.rows)]
  found = []
  while contests:  # drop each finished contest with its caches
    found += contests.pop(0).run()
  return found


def main() -> None:
  config = program.read_flags("", Config)
  rows = measure(config)
  print(tables.of_mappings(rows, ("shape", "rows", "tokens", "off", "ms", "ms_off", "gain", "same_program")))
  program.save_json(config.output, {"environment": program.environment(), "rows": rows})
  program.finish({"rows": rows, "json": str(config.output)}, config)


if __name__ == "__main__":
  program.define_flags("", Config)
  program.run(main, writes="file")
