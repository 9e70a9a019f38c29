"""The cases of `bench_generate --cases`: names, measurements and bars.

The model has Llama-3.2-1B's shape, random weights and random evictions (`experiments.bench.synthetic`). A head holds
exp(0.8 N(0, 1)) times a mean, and at least the window; the mean makes the achieved CR 8 at each length. In a model of
SmolLM2's shape each head holds as many tokens as in the CR 8 retrofit on a text. `generate_points` measures.

    memory        device memory of a cache against the dense one's, as the runtime reports it
    step          a decode step at each batch and length: its roofline, and the dense cache where that fits; in
                  SmolLM2's shape also with low-rank updates by each row's CR, against updates merged for one CR
    concurrency   rows and tokens/s under one budget of bytes
    energy        joules a token by NVML: equal rows, and as many as the budget holds
    first_token   time from a prompt on the host to its first token there, read in chunks
    scaling       tokens/s against the bytes of a cache, and of chains that share a prompt
    generator     a `Generator` of many rows of a small model: the host's part of a step and of a request, tokens/s
    transformers  transformers' `generate` with a static cache and torch.compile, in a separate process
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import jax

from dms_jax.config import ModelConfig
from dms_jax.families import PRESETS
from experiments.bench import generator_points, synthetic
from experiments.bench.cases import Bar, apart, llama_config
from experiments.bench.generate_points import (
  KINDS,
  RANK,
  Bench,
  Energy,
  Kind,
  Point,
  Programs,
  Shape,
  bytes_in_use,
  report,
)

GATES = Path(__file__).parents[1] / "results/ablate/compression/ablation.json"  # what heads hold, for SmolLM2
RETROFIT = "smollm2-135m-cr8"
REASONER = ModelConfig(
  num_layers=6, d_model=320, d_ff=896, num_heads=6, num_kv_heads=2, head_dim=64, vocab_size=128,
  max_position_embeddings=4096,
)  # fmt: skip
IN_ROOFLINE = (Bar("of_roofline", 0.75),)


@dataclasses.dataclass(frozen=True)
class Setup:
  """The shapes and sizes that the cases measure.

  Fields:
    dense_tokens: most tokens, over all rows, of a dense cache; larger ones are left out.
    budget: bytes of a cache, in the cases with a fixed budget.
    width: rows of the comparisons with transformers and at equal rows.
    prompts: (tokens, bar for DMS's time to the first token over dense's) of each prompt.
    memory_rows: rows of the memory cases; many, because an allocator rounds each array up by as much as 128 MiB.
    quantised: (shape, rows, tokens) of the comparison of an 8-bit archive with a dense cache in 16 bits.
    retrofitted: (rows, tokens) of SmolLM2's shape.
    served: (shape, widths, new tokens of a chain) of the generators.
  """

  shape: Shape
  contexts: tuple[int, ...] = (8192, 32768)
  batches: tuple[int, ...] = (1, 8, 32, 128)
  dense_tokens: int = 2**20
  budget: int = 2**33
  width: int = 32
  prompts: tuple[tuple[int, float], ...] = ((4096, 1.05), (32768, 0.65))
  chunk: int = 4096
  memory_rows: int = 64
  quantised: tuple[Shape, int, int] = (Shape(PRESETS["llama-3.2-3b"], window=64), 4, 65536)
  new_tokens: int = 48
  retrofitted: tuple[int, int] = (32, 8192)
  energy_seconds: float = 2.0
  served: tuple[Shape, tuple[int, ...], int] = (Shape(REASONER, window=16, page=16), (256, 1024, 2048), 960)

  @property
  def context(self) -> int:
    """The length of all cases that have one."""
    return self.contexts[0]


FULL = Setup(Shape(PRESETS["llama-3.2-1b"], window=256))
TINY = ModelConfig(num_layers=2, d_model=32, d_ff=48, num_heads=4, num_kv_heads=2, head_dim=16, vocab_size=97)
SMALL = Setup(
  Shape(TINY, window=4, cr=4, dtype="float32", page=4, steps=2), contexts=(64, 96), batches=(1, 2), dense_tokens=128,
  budget=2**17, width=2, prompts=((24, 1e3), (48, 1e3)), chunk=16, memory_rows=2,
  quantised=(Shape(TINY, window=1, cr=8, dtype="float32", page=4), 2, 96), new_tokens=4, retrofitted=(2, 96),
  energy_seconds=0.05, served=(Shape(TINY, window=4, cr=4, dtype="float32", page=4), (4,), 40),
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Measurement:
  """One case: `run()` returns its figures, `about` describes it, `start()` begins to compile its programs."""

  about: dict[str, Any]
  run: Callable[[], dict[str, Any]]
  bars: tuple[Bar, ...] = ()
  start: Callable[[], None] = lambda: None


class Suite:
  """The cases of a setup.

  Args:
    bandwidth: measured read bandwidth of the device, bytes a second.
    seconds: length of each timing.
    workers: programs compiled in parallel.
    transformers: the result of `static_transformers.measure`.
  """

  def __init__(self, setup: Setup, bandwidth: float, *, seconds: float, workers: int, transformers: dict | None = None):
    self.setup, self.transformers, self.energy = setup, transformers or {"skipped": "was not run"}, Energy()
    self._make = lambda shape: Bench(shape, bandwidth, self.programs, self.energy, seconds)
    self.programs = Programs(workers)
    self.bench = self._make(setup.shape)
    self._retrofitted: Bench | None = None

  def retrofitted(self) -> Bench:
    """SmolLM2's shape with the tokens that its gates keep; in a tiny setup, the setup's own shape."""
    if self._retrofitted is None:
      shape = self.setup.shape
      self._retrofitted = self._make(shape if shape.config is TINY else smollm2())
    return self._retrofitted

  def _start(self, points: Callable[[], Iterable[Point]] | Iterable[Point]) -> Callable[[], None]:
    """`Measurement.start` of a case that needs these points of the setup's shape."""

    def start() -> None:
      for point in points() if callable(points) else points:
        self.bench.start(point)

    return start

  def cases(self) -> dict[str, Measurement]:
    """All cases by name, in the order in which they run."""
    return {
      **self._memory(), **self._steps(), **self._concurrency(), **self._energy(), **self._first_tokens(),
      **self._scaling(), **self._generator(), **self._transformers(),
    }  # fmt: skip

  # Points ---------------------------------------------------------------------------------------------------------

  def _point(self, kind: Kind, batch: int, tokens: int, chains: bool = False) -> Point:
    """A point with a cache for the longest text, so that one program serves all lengths."""
    longest = max(self.setup.contexts)
    if kind == "dense":
      longest = max((c for c in self.setup.contexts if c * batch <= self.setup.dense_tokens), default=tokens)
    return Point(kind, batch, tokens, longest, chains)

  def _pair(self, batch: int, tokens: int) -> dict[Kind, Point]:
    """A point with DMS, and one with a dense cache where that fits."""
    kinds = KINDS if batch * tokens <= self.setup.dense_tokens else ("dms",)
    return {kind: self._point(kind, batch, tokens) for kind in kinds}

  def _budgeted(self) -> dict[Kind, Point]:
    """Points with as many rows as the budget holds; of a dense cache only keys and values count."""
    context, config = self.setup.context, self.setup.shape.config
    size = 2 if self.setup.shape.dtype == "bfloat16" else 4
    row = config.num_layers * config.num_kv_heads * context * 2 * config.head_dim * size
    rows = self.bench.rows_in(self.setup.budget, context)
    return {
      "dms": Point("dms", rows, context, context),
      "dense": self._point("dense", max(self.setup.budget // row, 1), context),
    }

  # Cases ------------------------------------------------------------------------------------------------------------

  def _memory(self) -> dict[str, Measurement]:
    setup = self.setup

    def run(bench: Bench, rows: int, tokens: int, archive: str | None) -> dict[str, Any]:
      taken = {}
      for kind in KINDS:
        model, policy = bench.model(kind), bench.shape.policy(kind, tokens)
        before = bytes_in_use()
        shape = bench.cache_shape(kind, rows, tokens, archive=archive if kind == "dms" else None)
        cache = jax.block_until_ready(synthetic.filled(shape, model, policy, tokens=tokens))
        taken[kind] = bytes_in_use() - before
        cr = tokens / float(cache.live().mean())
        del cache
      row = {
        "CR": cr,
        "bytes": taken["dms"],
        "dense_bytes": taken["dense"],
        "bytes_ratio": taken["dense"] / taken["dms"],
      }
      return row if archive else row | {"over_ideal": taken["dms"] / (taken["dense"] / cr)}

    rows, tokens = setup.memory_rows, setup.context
    shape, wide_rows, long = setup.quantised
    about = {"case": f"B{rows} T{tokens}"}
    wide = {"case": f"H{shape.config.head_dim} W{shape.window} B{wide_rows} T{long}", "archive": "int8"}
    return {
      f"memory_{label(tokens)}": Measurement(
        about, lambda: run(self.bench, rows, tokens, None), (Bar("over_ideal", 1.15, most=True),)
      ),
      f"memory_{label(tokens)}_int8": Measurement(
        about | {"archive": "int8"}, lambda: run(self.bench, rows, tokens, "int8")
      ),
      f"memory_{label(long)}_int8": Measurement(
        wide, lambda: run(self._make(shape), wide_rows, long, "int8"), (Bar("bytes_ratio", 15),)
      ),
    }

  def _steps(self) -> dict[str, Measurement]:
    found = {}
    for tokens in self.setup.contexts:
      for batch in self.setup.batches:
        pair = self._pair(batch, tokens)
        found[f"step_b{batch}_{label(tokens)}"] = Measurement(
          {"case": f"B{batch} T{tokens}"},
          lambda pair=pair: report({k: self.bench.point(p) for k, p in pair.items()}),
          IN_ROOFLINE,
          self._start(pair.values()),
        )
    batch, tokens = self.setup.retrofitted
    pair = {kind: Point(kind, batch, tokens, tokens) for kind in KINDS}
    found[f"step_smollm2_b{batch}_{label(tokens)}"] = Measurement(
      {"case": f"SmolLM2 B{batch} T{tokens}"},
      lambda: report({kind: self.retrofitted().point(point) for kind, point in pair.items()}),
      IN_ROOFLINE,
      lambda: [self.retrofitted().start(point) for point in pair.values()] and None,
    )
    return found | self._by_cr()

  def _by_cr(self) -> dict[str, Measurement]:
    """Steps with updates of q, k, v and o by each row's CR, merged for one CR, and with the dense cache."""
    width, tokens = self.setup.retrofitted

    def run(points: dict[Kind, Point]) -> dict[str, Any]:
      found = {kind: self.retrofitted().point(point) for kind, point in points.items()}
      ours, merged, dense = (found[kind] for kind in ("by_cr", "dms", "dense"))
      return ours | {
        "merged_ms": merged["ms"], "over_merged": ours["ms"] / merged["ms"], "dense_ms": dense["ms"],
        "dense_ratio": dense["ms"] / ours["ms"], "merged_dense_ratio": dense["ms"] / merged["ms"],
      }  # fmt: skip

    every = {
      batch: {kind: Point(kind, batch, tokens, tokens) for kind in (*KINDS, "by_cr")}
      for batch in dict.fromkeys((1, width))
    }
    return {
      f"step_smollm2_by_cr_b{batch}_{label(tokens)}": Measurement(
        {"case": f"SmolLM2 rank {RANK} by CR B{batch} T{tokens}"},
        lambda points=points: run(points),
        (),
        lambda points=points: [self.retrofitted().start(point) for point in points.values()] and None,
      )
      for batch, points in every.items()
    }

  def _concurrency(self) -> dict[str, Measurement]:
    def run() -> dict[str, Any]:
      points = self._budgeted()
      ours, dense = (self.bench.point(points[kind]) for kind in ("dms", "dense"))
      rows, dense_rows = points["dms"].batch, points["dense"].batch
      return {
        **ours, "rows": rows, "dense_rows": dense_rows, "rows_ratio": rows / dense_rows, "dense_ms": dense["ms"],
        "dense_tokens_per_s": dense["tokens_per_s"],
        "throughput_ratio": ours["tokens_per_s"] / dense["tokens_per_s"],
      }  # fmt: skip

    bars = Bar("rows_ratio", 7.5), Bar("throughput_ratio", 6)
    about = {"case": f"{self.setup.budget / 2**30:.3g} GiB T{self.setup.context}"}
    return {"concurrency": Measurement(about, run, bars, self._start(lambda: self._budgeted().values()))}

  def _energy(self) -> dict[str, Measurement]:
    def run(points: dict[Kind, Point]) -> dict[str, Any]:
      if self.energy() is None:
        return {"skipped": f"no energy is counted: {self.energy.why}"}
      joules = {k: self.bench.point(p, self.setup.energy_seconds)["joules_per_token"] for k, p in points.items()}
      return {
        "joules_per_token": joules["dms"],
        "dense_joules_per_token": joules["dense"],
        "energy_ratio": joules["dense"] / joules["dms"],
        "rows": points["dms"].batch,
        "dense_rows": points["dense"].batch,
      }

    equal = self._pair(self.setup.width, self.setup.context)
    return {
      "energy_equal": Measurement({"case": f"B{self.setup.width} T{self.setup.context}"}, lambda: run(equal), (),
                           self._start(equal.values())),
      "energy_budget": Measurement({"case": f"{self.setup.budget / 2**30:.3g} GiB T{self.setup.context}"},
                            lambda: run(self._budgeted()), (Bar("energy_ratio", 3),),
                            self._start(lambda: self._budgeted().values())),
    }  # fmt: skip

  def _first_tokens(self) -> dict[str, Measurement]:
    def run(tokens: int) -> dict[str, Any]:
      ours, dense = (self.bench.first_token(kind, tokens, chunk) for kind in ("dms", "dense"))
      return {"ms": ours["s"] * 1e3, "dense_ms": dense["s"] * 1e3, "CR": ours["CR"], "slowdown": ours["s"] / dense["s"]}

    chunk = self.setup.chunk
    return {
      f"first_token_{label(tokens)}": Measurement(
        {"case": f"B1 T{tokens} chunks of {chunk}"},
        lambda tokens=tokens: run(tokens),
        (Bar("slowdown", most, True),),
        lambda tokens=tokens: [self.bench.start_prompt(kind, tokens, chunk) for kind in KINDS] and None,
      )
      for tokens, most in self.setup.prompts
    }

  def _scaling(self) -> dict[str, Measurement]:
    context = self.setup.context
    points = {
      kind: [self._point(kind, b, context) for b in self.setup.batches if b * context <= self.setup.dense_tokens]
      for kind in KINDS
    }
    chains = [self._point("dms", batch, context, chains=True) for batch in self.setup.batches]

    def line(points: list[Point], value: Callable[[Point, dict], float]) -> list[list[float]]:
      found = [(point, self.bench.point(point)) for point in points]
      return [[value(point, at), at["tokens_per_s"], point.batch, at["used_bytes"] / 2**30] for point, at in found]

    def by_budget() -> dict[str, Any]:
      taken = lambda point, at: point.batch * synthetic.nbytes(self.bench.cache_shape(point.kind, 1, context)) / 2**30
      more = {"dms": [self._budgeted()["dms"]], "dense": []}
      return {"series": {kind: line(points[kind] + more[kind], taken) for kind in KINDS}}

    every = lambda: [*points["dms"], *points["dense"], self._budgeted()["dms"]]
    columns = ["tokens/s", "rows", "GiB used"]
    of_budget = {"case": f"T{context}", "columns": ["GiB", *columns]}
    of_chains = {"case": f"T{context}, chains of one prompt", "columns": ["chains", *columns]}
    by_chains = lambda: {"series": {"dms": line(chains, lambda point, _: point.batch)}}
    return {
      "scaling_budget": Measurement(of_budget, by_budget, (), self._start(every)),
      "scaling_chains": Measurement(of_chains, by_chains, (), self._start(chains)),
    }

  def _generator(self) -> dict[str, Measurement]:
    shape, widths, tokens = self.setup.served
    return {
      f"generator_{width}": Measurement(
        {"case": f"B{width}, {tokens} new tokens"}, lambda width=width: generator_points.measure(shape, width, tokens)
      )
      for width in widths
    }

  def _transformers(self) -> dict[str, Measurement]:
    width, context = self.setup.width, self.setup.context
    pair = self._pair(width, context)

    def run() -> dict[str, Any]:
      if "skipped" in self.transformers:
        return self.transformers
      theirs = {
        f"transformers_{name}" if name in ("step_s", "tokens_per_s", "first_token_s") else name: value
        for name, value in self.transformers.items()
      }
      points = {kind: self.bench.point(point) for kind, point in pair.items()}
      ratio = lambda kind: points[kind]["tokens_per_s"] / self.transformers["tokens_per_s"]
      return report(points) | theirs | {"transformers_ratio": ratio("dms"), "dense_transformers_ratio": ratio("dense")}

    about = {"case": f"B{width} T{context}"}
    return {"transformers": Measurement(about, run, (Bar("transformers_ratio", 3),), self._start(pair.values()))}


def smollm2() -> Shape:
  """SmolLM2-135M's shape; each head holds as many tokens as in the CR 8 retrofit on a text."""
  runs = json.loads(GATES.read_text(encoding="utf-8"))["runs"]
  found = next(run for run in runs if run["run"].endswith(RETROFIT))
  held = tuple(map(tuple, found["held_per_head"]))
  return Shape(PRESETS["smollm2-135m"], window=64, held=held, held_at=found["length"])


def label(tokens: int) -> str:
  """A length as part of a case's name: "8k"."""
  return f"{tokens // 1024}k" if tokens % 1024 == 0 else str(tokens)


def names(setup: Setup) -> list[str]:
  """The names of all cases; touches no device."""
  return list(Suite(setup, 1.0, seconds=1.0, workers=1).cases())


def run_transformers(setup: Setup, timeout: float = 240.0) -> dict[str, Any]:
  """Times transformers in a separate process; returns the result of `static_transformers.measure`."""
  what = {"config": llama_config(setup.shape.config), "batch": setup.width, "tokens": setup.context - setup.new_tokens,
          "new_tokens": setup.new_tokens, "dtype": setup.shape.dtype}  # fmt: skip
  return apart("experiments.bench.static_transformers", what, timeout)
