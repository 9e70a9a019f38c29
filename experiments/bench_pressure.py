"""A Generator whose pages run out: compressing its rows against preempting them, at rising load.

    python -m experiments.bench_pressure --checkpoint=checkpoints/smollm2-135m-instruct \\
      --retrofit=experiments/results/retrofit/smollm2-135m-cr4 --width=32 --prompt_tokens=2048 --new_tokens=512
    python -m experiments.bench_pressure            # a tiny random model on any machine, as a test

All requests are submitted at once and answered greedily. A first run without a limit is the unhurried one: its answers,
and the most pages that it owned. At a load of 1.5 the pool has that number of pages divided by 1.5. Each load is
measured under both modes of `Generator(on_pressure=)`, after runs that compile. Latency is the time from submission to
the last token, waiting included.

KL is KL(unhurried || under pressure) in nats: each answer is read again, token by token, once at its own level
throughout, and once with what its chain gave up, where it gave it up; means are over the tokens of answers. `equal` is
the share of an answer's tokens before it first differs from the unhurried one. `--dms.cr`, `--dms.threshold` and
`--dms.budget` are of the policy. Writes OUTPUT/{pressure.json, pressure.png}; the last line is one JSON object.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

import dms_jax
from dms_jax import cache as caches
from dms_jax import testing
from dms_jax.cache.pool import Pool
from dms_jax.cache.release import release
from dms_jax.generation.batching import Generator
from dms_jax.generation.pressure import MODES
from dms_jax.generation.results import GivenUp, Result
from dms_jax.metrics import kl_divergence
from dms_jax.model import Model, cached_forward, check_policy, unembed
from dms_jax.policies import DMS
from dms_jax.policies.base import row_numbers
from experiments.common import files, program
from experiments.reports import figures_bench, tables

COLUMNS = (
  "load", "mode", "pages", "tokens_per_s", "latency_s", "latency_p95_s", "first_token_s", "preemptions",
  "compressions", "given_up", "kl", "kl_p95", "equal",
)  # fmt: skip
CHUNK = 64  # tokens of an answer that one compiled call reads again


@dataclasses.dataclass(frozen=True)
class Config:
  """Settings of a run; without a checkpoint a tiny random model is measured, at lengths of its own.

  Attributes:
    text: a file whose tokens are the prompts; default the library's own source.
    requests: how many; default twice the width.
    prompt_tokens: the most tokens of a prompt; the least is half of it.
    new_tokens: the most tokens of an answer; the least is half of it.
    loads: pages needed over pages in the pool.
    page_size: slots of a page; default the format's.
    page_format: as of `experiments.generate`.
  """

  checkpoint: str | None = None
  retrofit: str | None = None
  dtype: str = "float32"
  text: str | None = None
  width: int = 8
  requests: int | None = None
  prompt_tokens: int = 512
  new_tokens: int = 128
  loads: tuple[float, ...] = (0.5, 0.75, 1.0, 1.5)
  page_size: int | None = None
  page_format: str | None = None
  prefill_chunk: int = 256
  decode_block: int = 32
  seed: int = 0
  output: str = "runs/bench_pressure"

  def __post_init__(self):
    for name in ("width", "requests", "prompt_tokens", "new_tokens"):
      if getattr(self, name) is not None and getattr(self, name) < 1:
        raise ValueError(f"--{name}={getattr(self, name)} must be 1 or more")
    if not self.loads or min(self.loads) <= 0:
      raise ValueError(f"--loads={','.join(map(str, self.loads))} must be above 0")
    if self.checkpoint is None and self.retrofit is not None:
      raise ValueError(f"--retrofit={self.retrofit} is an adapter of a checkpoint: give --checkpoint too")


TINY = dict(width=3, prompt_tokens=40, new_tokens=24, page_size=4, prefill_chunk=8, decode_block=4)


def loaded(config: Config) -> tuple[Model, list[int]]:
  """The model, and the ids of a text."""
  if config.checkpoint is None:
    model = testing.model(testing.config(vocab_size=257), testing.dms(window=3, scale=3.0, offset=1.0))
    return model, np.random.default_rng(config.seed).integers(0, 257, 4096).tolist()
  model, tokenizer = dms_jax.load(config.checkpoint, retrofit=config.retrofit, dtype=config.dtype)
  source = Path(config.text) if config.text else Path(dms_jax.__file__).parent / "model.py"
  if not source.is_file():
    raise ValueError(f"--text={config.text}: no such file")
  return model.replace(tokenizer=None), tokenizer.encode(files.read_text("text", source))


def requests_of(config: Config, ids: list[int]) -> list[tuple[list[int], int]]:
  """(prompt, most new tokens) of each request."""
  rng, found = np.random.default_rng(config.seed), []
  for _ in range(config.requests or 2 * config.width):
    length, new = (int(rng.integers(-(-most // 2), most + 1)) for most in (config.prompt_tokens, config.new_tokens))
    start = int(rng.integers(0, max(len(ids) - length, 1)))
    found.append((ids[start : start + length], new))
  return found


def serve(generator: Generator, asked: list[tuple[list[int], int]]) -> tuple[list[Result], dict[str, float]]:
  """Answers all requests: (results in order, seconds, latencies)."""
  begin, preemptions = time.perf_counter(), generator.preemptions
  tickets = [generator.submit(prompt, max_new_tokens=new) for prompt, new in asked]
  first, last = {}, {}
  for ticket, _, tokens, _ in generator.run():
    last[ticket] = time.perf_counter() - begin
    if tokens:
      first.setdefault(ticket, last[ticket])
  results = [generator.results.pop(ticket) for ticket in tickets]
  seconds, latency = time.perf_counter() - begin, list(last.values())
  return results, {
    "seconds": seconds,
    "tokens_per_s": sum(len(result.tokens[0]) for result in results) / seconds,
    "latency_s": float(np.mean(latency)),
    "latency_p95_s": float(np.percentile(latency, 95)),
    "first_token_s": float(np.mean(list(first.values()))),
    "preemptions": generator.preemptions - preemptions,
  }


@partial(jax.jit, donate_argnames="cache")
def _read(model: Model, policy: DMS, cache, tokens, length):
  out, cache = cached_forward(model, policy, cache, tokens, length, remaining=jnp.ones_like(length))
  return unembed(model, out.hidden[0]), cache


@partial(jax.jit, donate_argnames="cache")
def _release(cache, policy: DMS):
  return release(cache, jnp.full(1, -policy.limit), in_order=not policy.overwrites)[0]


def logits_of(
  model: Model, policy: DMS, tokens: list[int], given_up: list[GivenUp], most: int
) -> Float[jax.Array, "T V"]:
  """Logits after each token of a text, which gives up tokens where a chain did.

  Args:
    policy: with `scored`.
    most: tokens of the longest text.
  """
  cache = caches.for_model(model, policy, batch=1, capacity=most, kind="paged", longest=most, page_size=16)
  found, done = [], 0
  for stop, numbers in [*((one.seen, one.numbers) for one in given_up), (len(tokens), None)]:
    while done < stop:
      part = tokens[done : min(done + CHUNK, stop)]
      padded = jnp.asarray([part + [0] * (CHUNK - len(part))], jnp.int32)
      logits, cache = _read(model, policy, cache, padded, jnp.asarray([len(part)], jnp.int32))
      found.append(logits[: len(part)])
      done += len(part)
    if numbers is not None:
      policy = policy.replace(**{name: jnp.asarray(value) for name, value in numbers.items()})
      cache = _release(cache, policy)
  return jnp.concatenate(found)


def differences(model: Model, policy: DMS, asked, results: list[Result]) -> list[np.ndarray]:
  """KL(unhurried || under pressure) at each token of each answer."""
  policy = check_policy(model, policy.replace(scored=True))
  numbers = row_numbers(policy)
  policy = policy.replace(**{name: jnp.asarray(value) for name, value in numbers.items()})
  most, found = max(len(prompt) + new for prompt, new in asked), []
  for (prompt, _), result in zip(asked, results, strict=True):
    text, given = prompt + result.tokens[0][:-1], result.given_up[0]
    if not given:
      found.append(np.zeros(len(result.tokens[0])))
      continue
    calm, pressed = (logits_of(model, policy, text, some, most)[len(prompt) - 1 :] for some in ([], given))
    found.append(np.asarray(kl_divergence(pressed, calm, "forward")))
  return found


def summary(calm: list[Result], results: list[Result], kl: list[np.ndarray]) -> dict[str, float]:
  """What pressure did to the answers; `given_up` is tokens a chain, mean over layers and heads."""
  given = [result.given_up[0] for result in results]
  equal = []
  for one, other in zip(calm, results, strict=True):
    a, b = np.array(one.tokens[0]), np.array(other.tokens[0])
    equal.append(float(np.cumprod(a == b).mean()))
  every = np.concatenate(kl)
  return {
    "compressions": sum(map(len, given)),
    "given_up": float(np.mean([sum(one.tokens for one in chain) for chain in given])),
    "held": float(np.mean([result.held[0] for result in results])),
    "kl": float(every.mean()),
    "kl_p95": float(np.percentile(every, 95)),
    "equal": float(np.mean(equal)),
  }


def limit_pages(generator: Generator, pages: int) -> None:
  """Leaves an idle generator `pages` pages. The arrays keep their shapes, so that nothing is compiled anew."""
  table = generator.cache.table
  pool = Pool.create(generator.cache.pages).replace(count=jnp.int32(pages))
  generator.cache = generator.cache.replace(table=table.replace(pool=pool))
  generator._free = None


def measure(config: Config, model: Model, policy: DMS, asked: list[tuple[list[int], int]]) -> Iterator[dict[str, Any]]:
  """A row for each load and mode; the first is the unhurried run."""
  longest = max(len(prompt) + new for prompt, new in asked)
  settings = dict(
    policy=policy, width=config.width, max_length=longest, eos=False, page_size=config.page_size,
    page_format=config.page_format, prefill_chunk=config.prefill_chunk, decode_block=config.decode_block, stream=False,
  )  # fmt: skip
  empty = Generator(model, **settings).cache
  most = empty.archived.size * -(-longest // empty.page_size)
  generators = {mode: Generator(model, on_pressure=mode, pages=most, **settings) for mode in MODES}
  for generator in generators.values():
    generator.memory.limit = most
  calm, _ = serve(generators["preempt"], asked)
  pages = generators["preempt"].peak_pages
  calm, times = serve(generators["preempt"], asked)
  yield {"load": 0.0, "mode": "unhurried", "pages": pages, **times, **summary(calm, calm, [np.zeros(1)] * len(calm))}
  few = {load: min(max(int(pages / load), empty.pages), most) for load in config.loads}
  for generator in generators.values():  # compiles what only short pools need
    limit_pages(generator, min(few.values()))
    serve(generator, asked)
  for load in program.progress(config.loads, desc="loads"):
    for mode, generator in generators.items():
      limit_pages(generator, few[load])
      results, times = serve(generator, asked)
      if lost := few[load] - int(generator.cache.table.pool.count):
        raise RuntimeError(f"load {load}, {mode}: {lost} pages are owned, though no row is left")
      about = summary(calm, results, differences(model, policy, asked, results))
      size = generator.cache.fixed_bytes + few[load] * generator.cache.page_bytes
      yield {"load": load, "mode": mode, "pages": few[load], "cache_bytes": size, **times, **about}


def main() -> None:
  config = program.read_flags("", Config)
  policy = program.read_flags("dms", DMS)
  files.check_retrofit("retrofit", config.retrofit)
  if config.checkpoint is None:
    config = dataclasses.replace(config, **TINY)
  model, ids = loaded(config)
  folder, device = Path(config.output), jax.devices()[0].device_kind
  folder.mkdir(parents=True, exist_ok=True)
  name = Path(config.checkpoint).name if config.checkpoint else "a tiny random model"
  title = f"{name}, {config.width} rows, prompts to {config.prompt_tokens}, answers to {config.new_tokens}, {device}"
  rows: list[dict[str, Any]] = []
  for row in measure(config, model, policy, requests_of(config, ids)):
    rows.append(row)
    program.log(tables.of_mappings([row], COLUMNS))
    program.save_json(folder / "pressure.json", {"environment": program.environment(), "rows": rows})
  picture = figures_bench.pressure(folder / "pressure.png", rows, title)
  print(tables.of_mappings(rows, COLUMNS))
  program.finish({"rows": rows, "picture": picture}, config)


if __name__ == "__main__":
  program.define_flags("", Config)
  program.define_flags("dms", DMS)
  program.run(main, writes="folder")
