"""Prefill and decode speed of a checkpoint, dense and with DMS, against transformers.

    python -m experiments.bench_generate --checkpoint=checkpoints/smollm2-135m-instruct \\
      --retrofit=smollm2-135m-cr4 --against_transformers

Each engine reads one row of `--prompt_tokens` tokens and writes `--new_tokens` greedily, after a warm-up that compiles.
Engines take turns for `--repeats` rounds, and medians are reported. Prefill is the time to the first token, decode the
time of the others. `--divergence_width=8` also continues eight prompts one at a time and all at once, and reports where
each first differs: another width sums in another order, which can flip a near tie. Writes OUTPUT/{bench.json,
bench.png}; the last line is one JSON object. Five minutes on two cores.

    python -m experiments.bench_generate --cases=all                    # one GPU, five to six minutes
    python -m experiments.bench_generate --cases=step_b32,concurrency   # cases with these names or prefixes
    python -m experiments.bench_generate --cases=all --scale=small      # tiny shapes on any machine, as a test

`--cases` instead measures named cases of decoding on one accelerator, without a checkpoint, against memory bandwidth,
the dense cache and transformers; `experiments/bench/generate_cases.py` lists them. Writes OUTPUT/{cases.json,
cases.png, scaling.png}; a later run of other cases adds to them, each row with its date, versions and measured read
bandwidth. A case that fails is reported, and the others continue.
"""

from __future__ import annotations

import dataclasses
import datetime
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np

import dms_jax
from dms_jax import checkpoint
from dms_jax.convert import export
from dms_jax.execution import fastest_form
from dms_jax.model import Model
from dms_jax.tokenizer import Tokenizer
from experiments.bench import cases as cases_of
from experiments.bench import generate_cases
from experiments.common import files, program
from experiments.reports import figures_bench, tables
from pallas_kernels.common import bench


@dataclasses.dataclass(frozen=True)
class Config:
  """The first `prompt_tokens` tokens of `text` are read; default the library's own source.

  `cases` (names, prefixes of names, or "all") are measured at `scale` instead of a checkpoint. No case starts later
  than `seconds`. `workers` programs are compiled in parallel.

  Attributes:
    dtypes: types of weights and cache, each measured.
    against_transformers: also measure transformers, in PyTorch.
  """

  checkpoint: str | None = None
  retrofit: str | None = None
  dtypes: tuple[str, ...] = ("float32", "bfloat16")
  text: str | None = None
  prompt_tokens: int = 512
  new_tokens: int = 128
  prefill_chunk: int = 256
  decode_block: int = 32
  repeats: int = 5
  against_transformers: bool = False
  divergence_width: int | None = None
  cases: tuple[str, ...] = ()
  scale: Literal["full", "small"] = "full"
  seconds: float = 330.0
  workers: int = 4
  output: str = "runs/bench_generate"

  def __post_init__(self):
    if bool(self.cases) == (self.checkpoint is not None):
      raise ValueError("give either --checkpoint, whose speed is measured, or --cases")
    if unknown := set(self.dtypes) - {"float32", "bfloat16"}:
      raise ValueError(f"--dtypes={','.join(self.dtypes)}: {sorted(unknown)} must be float32 or bfloat16")
    for name, least in (
      ("prompt_tokens", 1),
      ("new_tokens", 2),
      ("repeats", 1),
      ("divergence_width", 2),
      ("workers", 1),
    ):
      if (getattr(self, name) or least) < least:
        raise ValueError(f"--{name}={getattr(self, name)} must be {least} or more")


# run(n) generates n tokens; `about` describes the run
Engine = tuple[str, Callable[[int], dict]]


def jax_engine(name: str, model: Model, policy: dms_jax.Policy, prompt: list[int], config: Config) -> Engine:
  """Our own `generate`, with a fixed number of slots, so that both kinds of run share their compiled programs."""
  capacity = -(-(len(prompt) + config.new_tokens) // 128) * 128

  def run(new_tokens: int) -> dict:
    out = dms_jax.generate(
      model, [prompt], policy=policy, max_new_tokens=new_tokens, eos=False, cache="contiguous", capacity=capacity,
      prefill_chunk=config.prefill_chunk, decode_block=config.decode_block,
    )  # fmt: skip
    assert len(out.tokens[0]) == new_tokens
    return {"achieved_cr": out.metrics.achieved_cr, "tokens": out.tokens[0]}

  return name, run


def transformers_engine(folder: Path, dtype: str, prompt: list[int]) -> Engine:
  """transformers' `generate` on an exported checkpoint, on as many threads as there are cores.

  Raises:
    ValueError: torch or transformers is not installed.
  """
  try:
    import torch
    from transformers import AutoModelForCausalLM
  except ImportError as error:
    raise ValueError(f"--against_transformers needs torch and transformers ({error}): pip install them") from None
  torch.set_num_threads(os.cpu_count())
  device = "cuda" if jax.default_backend() == "gpu" and torch.cuda.is_available() else "cpu"
  model = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype)).to(device).eval()
  ids = torch.tensor([prompt], device=device)

  def run(new_tokens: int) -> dict:
    with torch.inference_mode():
      out = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=new_tokens, min_new_tokens=new_tokens,
        do_sample=False, use_cache=True, pad_token_id=0,
      )  # fmt: skip
    return {"tokens": out[0, len(prompt) :].tolist()}

  return "transformers", run


def measure(engines: list[Engine], config: Config) -> list[dict]:
  """Prefill and decode tokens/s of each engine; they take turns, so that a slow moment of the machine affects all."""
  seconds = {name: ([], []) for name, _ in engines}
  about = {}
  for _, run in engines:
    run(config.new_tokens)
    run(1)
  for _ in program.progress(config.repeats, desc="rounds"):
    for name, run in engines:
      for times, new_tokens in zip(seconds[name], (1, config.new_tokens), strict=True):
        start = time.perf_counter()
        about[name] = run(new_tokens)
        times.append(time.perf_counter() - start)
  results = []
  for name, _ in engines:
    first = statistics.median(seconds[name][0])
    rest = statistics.median(whole - first for whole in seconds[name][1])
    results.append(
      {
        "engine": name,
        "prefill_tokens_per_s": config.prompt_tokens / first,
        "decode_tokens_per_s": (config.new_tokens - 1) / rest,
        "first_token_s": first,
        **about[name],
      }
    )
  return results


def first_difference(a: Sequence[int], b: Sequence[int]) -> int | None:
  """Index of the first token in which two rows differ, or the shorter row's length; None for equal rows."""
  place = next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
  return None if place == len(a) == len(b) else place


def width_divergence(
  model: Model, prompts: Sequence[Sequence[int]], width: int, *, new_tokens: int, **settings
) -> dict[str, Any]:
  """Continues prompts greedily in a `Generator` of width 1 and in one of `width`.

  Args:
    settings: arguments of both generators.

  Returns:
    widths, new_tokens, first_difference of each row (None: equal), rows_equal, and the largest difference of the
    log-probabilities of tokens before it.
  """
  rows = []
  for size in (1, width):
    generator = dms_jax.Generator(model, width=size, eos=False, **settings)
    tickets = [generator.submit(prompt, max_new_tokens=new_tokens) for prompt in prompts]
    for _ in generator.run():
      pass
    rows.append([(generator.results[t].tokens[0], generator.results[t].logprobs[0]) for t in tickets])
  places, largest = [], 0.0
  for (a, of_a), (b, of_b) in zip(*rows, strict=True):
    places.append(first_difference(a, b))
    largest = max([largest, *(abs(x - y) for x, y in zip(of_a[: places[-1]], of_b[: places[-1]], strict=True))])
  equal = sum(place is None for place in places)
  return {
    "widths": [1, width],
    "new_tokens": new_tokens,
    "first_difference": places,
    "rows_equal": equal,
    "largest_logprob_difference": largest,
  }


def prompt_ids(config: Config, tokenizer, count: int = 1) -> list[int]:
  """Tokens for `count` prompts in one list; a short text is repeated."""
  if config.text is not None and not Path(config.text).is_file():
    raise ValueError(f"--text={config.text}: no such file")
  source = Path(config.text) if config.text else Path(dms_jax.__file__).parent / "model.py"
  ids = tokenizer.encode(files.read_text("text", source))
  wanted = count * config.prompt_tokens
  return (ids * -(-wanted // len(ids)))[:wanted]


def table(results: list[dict]) -> str:
  """Results as text; where transformers ran, also each engine's decode speed over transformers'."""
  names = ["dtype", "engine", "prefill tokens/s", "decode tokens/s", "CR", "decode / transformers"]
  optional = lambda result, name: f"{result[name]:.2f}" if name in result else ""
  rows = [
    [
      r["dtype"], r["engine"], f"{r['prefill_tokens_per_s']:.0f}", f"{r['decode_tokens_per_s']:.1f}",
      optional(r, "achieved_cr"), optional(r, "decode_ratio"),
    ]
    for r in results
  ]  # fmt: skip
  return tables.markdown(names, rows)


def bench_dtype(config: Config, dtype: str, tokenizer, prompt: list[int]) -> list[dict]:
  """Measures all engines on weights of one dtype."""
  dense = checkpoint.load(config.checkpoint, dtype=dtype)
  with tempfile.TemporaryDirectory() as folder:
    others = []
    if config.against_transformers:
      export(Path(folder) / "model", dense, tokenizer, dtype=dtype)
      others = [transformers_engine(Path(folder) / "model", dtype, prompt)]
  engines = [jax_engine("dense", fastest_form(dense), dms_jax.Vanilla(), prompt, config)]
  del dense
  if config.retrofit:
    model = fastest_form(checkpoint.load(config.checkpoint, retrofit=config.retrofit, dtype=dtype))
    engines.append(jax_engine("DMS", model, dms_jax.DMS(), prompt, config))
  results = [{"dtype": dtype, **r} for r in measure(engines + others, config)]
  tokens = {r["engine"]: r.pop("tokens") for r in results}
  if others:
    base = results[-1]
    for r in results[:-1]:
      r["decode_ratio"] = r["decode_tokens_per_s"] / base["decode_tokens_per_s"]
      r["prefill_ratio"] = r["prefill_tokens_per_s"] / base["prefill_tokens_per_s"]
    same = np.array(tokens["dense"][: len(tokens["transformers"])]) == np.array(tokens["transformers"])
    results[0]["same_tokens_as_transformers"] = float(same.mean())
  return results


COLUMNS = (
  "name", "case", "ms", "host_ms", "admit_ms", "roofline_ms", "of_roofline", "CR", "merged_ms", "over_merged",
  "dense_ms", "dense_ratio", "tokens_per_s", "bar", "reached",
)  # fmt: skip


def run_cases(config: Config) -> None:
  """Measures the cases asked for."""
  begin = time.monotonic()
  setup = generate_cases.SMALL if config.scale == "small" else generate_cases.FULL
  order = generate_cases.names(setup)
  wanted = cases_of.chosen(order, () if config.cases == ("all",) else config.cases)
  # Before JAX takes the GPU's memory.
  theirs = generate_cases.run_transformers(setup) if "transformers" in wanted else None
  environment = program.environment()
  bandwidth = bench.read_bandwidth(2**22 if config.scale == "small" else 2**30)
  program.log(f"read bandwidth {bandwidth / 1e12:.3f} TB/s; transformers: {theirs}")
  about = {
    "date": datetime.date.today().isoformat(),
    "read_bandwidth": bandwidth,
    "device": environment["device"],
    "jax": environment["jax"],
    "scale": config.scale,
  }
  folder = Path(config.output)
  path = folder / "cases.json"
  cases_of.check_same(path, about)
  seconds = 0.02 if config.scale == "small" else 0.5
  suite = generate_cases.Suite(setup, bandwidth, seconds=seconds, workers=config.workers, transformers=theirs)
  cases = {name: case for name, case in suite.cases().items() if name in wanted}
  for name, case in cases.items():
    try:
      case.start()
    except Exception as error:  # the case reports it later; the others continue
      program.log(f"{name}: not compiled ahead: {type(error).__name__}")
  suite.programs.wait(config.seconds / 2)
  program.log(f"compiled after {time.monotonic() - begin:.0f} s")
  run = cases_of.Runner(config.seconds - (time.monotonic() - begin), about)
  for name, case in cases.items():
    bars = case.bars if config.scale == "full" else ()
    run(name, case.about, lambda case=case, bars=bars: cases_of.judged(case.run(), bars))
    rows = cases_of.merged(path, run.rows, order)
    program.save_json(path, {"environment": environment, "rows": rows})
  title = f"{'Llama-3.2-1B' if config.scale == 'full' else 'a tiny model'}, {environment['device']}"
  pictures = [
    figures_bench.decode_steps(folder / "cases.png", rows, title),
    figures_bench.scaling(folder / "scaling.png", rows, title),
  ]
  print(tables.of_mappings(rows, COLUMNS))
  measured = [{name: x for name, x in row.items() if name not in about} for row in run.rows.values()]
  program.finish({**about, "rows": measured, "json": str(path), "png": [x for x in pictures if x]}, config)


def main() -> None:
  config = program.read_flags("", Config)
  if config.cases:
    run_cases(config)
    return
  files.check_retrofit("retrofit", config.retrofit)
  tokenizer = Tokenizer.load(config.checkpoint)
  prompt = prompt_ids(config, tokenizer)
  results = []
  for dtype in config.dtypes:
    program.log(f"{dtype}: compiling and measuring")
    results += bench_dtype(config, dtype, tokenizer, prompt)
  print(table(results))
  divergence = None
  if config.divergence_width:
    program.log(f"widths 1 and {config.divergence_width}")
    model = fastest_form(checkpoint.load(config.checkpoint, retrofit=config.retrofit, dtype=config.dtypes[0]))
    ids, size = prompt_ids(config, tokenizer, config.divergence_width), config.prompt_tokens
    divergence = width_divergence(
      model, [ids[i : i + size] for i in range(0, len(ids), size)], config.divergence_width,
      new_tokens=config.new_tokens, prefill_chunk=config.prefill_chunk, decode_block=config.decode_block,
      max_length=size + config.new_tokens,
    )  # fmt: skip
    divergence = {"dtype": config.dtypes[0], **divergence}
  folder = Path(config.output)
  title = f"{Path(config.checkpoint).name}, one row, prompt {config.prompt_tokens}, {jax.devices()[0].device_kind}"
  folder.mkdir(parents=True, exist_ok=True)
  image = figures_bench.engines(folder / "bench.png", results, title)
  found = {"results": results} if divergence is None else {"results": results, "width_divergence": divergence}
  program.save_json(folder / "bench.json", {"environment": program.environment(), **found})
  program.finish({**found, "picture": image})


if __name__ == "__main__":
  program.define_flags("", Config)
  program.run(main, writes="folder")
