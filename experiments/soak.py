"""Soak test of `Generator`: random requests under a tight budget, checked for losses and leaks.

    python -m experiments.soak --checkpoint=checkpoints/smollm2-135m-instruct \\
      --retrofit=experiments/results/retrofit/smollm2-135m-cr4 --minutes=10

Requests of random lengths arrive at random times, some with several chains, some sampled. Some conversations continue
with another turn; some requests are cancelled. The pool is too small for all rows, so rows are preempted to the host
and restored. Without `--checkpoint` the model is tiny and random; `--kernels` gives it sizes that GPU kernels support.
At the end every page must be free, and the memory of host and device must not have grown since the warm-up. A sample of
finished conversations must be bit-equal to the same requests run alone at the same width.

    python -m experiments.soak --kernels --page_size=32 --minutes=1.5        # on a GPU

Writes OUTPUT/{soak.json, soak.png}; the last line is one JSON object, and the exit status says whether all held.
"""

from __future__ import annotations

import collections
import dataclasses
import os
import random
import sys
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import dms_jax
from dms_jax.config import DMSConfig, ModelConfig
from dms_jax.generation.batching import Generator
from dms_jax.model import Model
from dms_jax.params import init_params, param_table
from experiments.common import files, program
from experiments.reports import plots


@dataclasses.dataclass(frozen=True)
class Config:
  """`budget_tokens`: tokens that a head may hold in all rows together; default: one text of the greatest length.
  `check`: conversations to run again alone. `warm_up`: share of the time; after it memory and the number of live arrays
  may grow by at most the share `growth`.

  Attributes:
    minutes: of the run.
    longest_prompt, longest_answer: most tokens of a turn's prompt, and of its answer.
    turns: most turns of a conversation.
  """

  checkpoint: str | None = None
  retrofit: str | None = None
  kernels: bool = False
  minutes: float = 10.0
  width: int = 8
  budget_tokens: int | None = None
  longest_prompt: int = 96
  longest_answer: int = 96
  turns: int = 3
  page_size: int = 8
  prefill_chunk: int = 32
  decode_block: int = 8
  check: int = 12
  warm_up: float = 0.3
  growth: float = 0.05
  seed: int = 0
  output: str = "runs/soak"

  def __post_init__(self):
    for name in ("minutes", "width", "longest_prompt", "longest_answer", "turns", "check"):
      if getattr(self, name) <= 0:
        raise ValueError(f"--{name}={getattr(self, name)} must be above 0")
    if self.retrofit is not None and self.checkpoint is None:
      raise ValueError(f"--retrofit={self.retrofit} is an adapter of a checkpoint: give --checkpoint too")
    if self.kernels and self.checkpoint is not None:
      raise ValueError("--kernels shapes the random model, and --checkpoint brings its own: give one of them")
    if not 0 < self.warm_up < 1:
      raise ValueError(f"--warm_up={self.warm_up} must lie between 0 and 1")


@dataclasses.dataclass(frozen=True)
class Turn:
  """A request, and the (tokens, log-probabilities) of each of its chains."""

  prompt: list[int]
  options: dict[str, Any]
  answers: list[tuple[list[int], list[float]]]


@dataclasses.dataclass
class Talk:
  """A conversation: its finished turns, and the chain and cache that the next turn continues."""

  turns: list[Turn]
  past: Any = None


class Traffic:
  """Makes random requests; equal seeds and equal finishing times give equal requests."""

  def __init__(self, config: Config, vocab: int):
    self.config, self.vocab, self.random = config, vocab, random.Random(config.seed)

  def request(self) -> tuple[list[int], dict[str, Any]]:
    """A prompt and the arguments of `submit`, with `seed` in place of the key."""
    draw, config = self.random, self.config
    prompt = [draw.randrange(self.vocab) for _ in range(draw.randint(1, config.longest_prompt))]
    chains = min(draw.choice((1, 1, 1, 2, 3)), config.width)
    return prompt, dict(
      chains=chains,
      max_new_tokens=draw.randint(1, config.longest_answer),
      temperature=draw.choice((0.0, 0.9)),
      seed=draw.randrange(2**31),
    )


def submit(generator: Generator, prompt: list[int], options: dict[str, Any], past) -> int:
  """Submits a request that keeps its cache; returns its ticket."""
  options = dict(options)
  key = jax.random.key(options.pop("seed"))
  return generator.submit(prompt, key=key, keep=True, continue_from=past, **options)


def memory() -> int | None:
  """Resident memory of this process in bytes; None if the system does not report it."""
  try:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
  except OSError:
    return None


def device_memory() -> int | None:
  """Bytes in use on the device; None if the runtime does not report them."""
  stats = jax.devices()[0].memory_stats()
  return stats["bytes_in_use"] if stats else None


def soak(generator: Generator, config: Config, traffic: Traffic, seconds: float) -> dict[str, Any]:
  """Serves `seconds` of traffic, then finishes all requests: {samples of every step, counts, ended conversations}."""
  draw, talks = traffic.random, {}
  counts: collections.Counter[str] = collections.Counter()
  kept: list[Talk] = []
  columns = ("seconds", "pages", "running", "waiting", "memory", "device", "arrays")
  samples: dict[str, list] = {name: [] for name in columns}
  start = shown = time.monotonic()
  while (now := time.monotonic() - start) < seconds or generator.busy:
    arriving = now < seconds and len(generator.waiting) < config.width
    while arriving and draw.random() < 0.5:
      prompt, options = traffic.request()
      talks[submit(generator, prompt, options, None)] = (Talk([]), prompt, options)
      counts["requests"] += 1
      arriving = len(generator.waiting) < config.width
    if talks and draw.random() < 0.03:
      ticket = draw.choice(sorted(talks))
      generator.cancel(ticket)
      del talks[ticket], generator.results[ticket]
      counts["cancelled"] += 1
    for _, _, tokens, _ in generator.step():
      counts["tokens"] += len(tokens)
    for ticket in [ticket for ticket in talks if generator.results[ticket].finished]:
      talk, prompt, options = talks.pop(ticket)
      result = generator.results.pop(ticket)
      counts["rows"] += options["chains"]
      counts["turns"] += talk.past is not None
      talk.turns.append(Turn(prompt, options, list(zip(result.tokens, result.logprobs, strict=True))))
      if now < seconds and len(talk.turns) < config.turns and draw.random() < 0.4:
        talk.past = result.stored[0]
        prompt, options = traffic.request()
        talks[submit(generator, prompt, options, talk.past)] = (talk, prompt, options)
        continue
      talk.past = None
      counts["conversations"] += 1  # a uniform sample of ended conversations
      if len(kept) < config.check:
        kept.append(talk)
      elif (place := draw.randrange(counts["conversations"])) < config.check:
        kept[place] = talk
    row = (
      now, generator.cache.pages - int(generator.cache.table.pool.count), sum(c is not None for c in generator.chains),
      sum(map(len, generator.waiting)) + len(generator.preempted), memory(), device_memory(), len(jax.live_arrays()),
    )  # fmt: skip
    for name, value in zip(columns, row, strict=True):
      samples[name].append(value)
    if time.monotonic() - shown > 10:
      shown = time.monotonic()
      program.log(
        f"{now:.0f}/{seconds:.0f} s: {counts['rows']} rows ended, {row[2]} running, {row[3]} waiting, "
        f"{row[1]}/{generator.cache.pages} pages, {generator.preemptions} preemptions, {(row[4] or 0) / 2**20:.0f} MiB"
      )
  return {"samples": samples, "counts": {**counts, "preemptions": generator.preemptions}, "kept": kept}


def alone(generator: Generator, talk: Talk) -> bool:
  """Whether a conversation run with all other rows empty gives bit-equal tokens and log-probabilities."""
  past = None
  for turn in talk.turns:
    ticket = submit(generator, turn.prompt, turn.options, past)
    for _ in generator.run():
      pass
    result = generator.results.pop(ticket)
    if list(zip(result.tokens, result.logprobs, strict=True)) != turn.answers:
      return False
    past = result.stored[0]
  return True


def lost_pages(generator: Generator) -> int:
  """Pages that are not free, or owned by none, though no row is left."""
  pool = jax.device_get(generator.cache.table.pool)
  free = np.unique(pool.free[: int(pool.count)])
  return int(max(generator.cache.pages - free.size, (pool.owners != 0).sum()))


def growth(values: list[float | None], seconds: list[float], warm_up: float) -> float | None:
  """Relative growth of the median, from the first tenth of the time after the warm-up to the last tenth.

  Args:
    values: a sample of every step, None if the system does not report it.
    seconds: the time of each sample.
  """
  if values[0] is None:
    return None
  first = next(i for i, at in enumerate(seconds) if at >= warm_up * seconds[-1])
  few = max((len(values) - first) // 10, 1)
  before, after = (float(np.median(values[i : i + few])) for i in (first, len(values) - few))
  return after / before - 1


def verdict(generator: Generator, config: Config, outcome: dict[str, Any]) -> dict[str, Any]:
  """The checks, and whether each of them held."""
  samples, kept = outcome["samples"], outcome["kept"]
  lost = lost_pages(generator)
  memory_growth, device_growth, arrays_growth = (
    growth(samples[name], samples["seconds"], config.warm_up) for name in ("memory", "device", "arrays")
  )
  same = [alone(generator, talk) for talk in program.progress(kept, desc="alone")]
  checks = {
    "no_page_lost": lost == 0 and lost_pages(generator) == 0,
    "memory_flat": memory_growth is None or memory_growth <= config.growth,
    "device_flat": device_growth is None or device_growth <= config.growth,
    "arrays_flat": arrays_growth <= config.growth,
    "bit_equal_alone": all(same),
    "something_was_preempted": outcome["counts"]["preemptions"] > 0,
  }
  return {
    "passed": all(checks.values()), "checks": checks, "lost_pages": lost, "memory_growth": memory_growth,
    "device_growth": device_growth, "arrays_growth": arrays_growth,
    "conversations_checked": len(same), "turns_checked": sum(len(talk.turns) for talk in kept),
    "rows_checked": sum(len(turn.answers) for talk in kept for turn in talk.turns), **outcome["counts"],
    "steps": len(samples["seconds"]), "pages": generator.cache.pages, "cache_bytes": generator.cache.nbytes,
  }  # fmt: skip


def over_time(samples: dict[str, list], bins: int = 120) -> dict[str, list]:
  """[least, mean, greatest] of the samples in each of `bins` equal parts of the time, and `seconds`, their ends."""
  at = np.asarray(samples["seconds"])
  ends = np.linspace(0, at[-1], bins + 1)[1:]
  part = np.minimum(np.searchsorted(ends, at), bins - 1)
  found = [i for i in range(bins) if (part == i).any()]
  result = {"seconds": [round(float(ends[i]), 1) for i in found]}
  for name in ("pages", "running", "waiting", "memory"):
    values = np.array([x or 0 for x in samples[name]], float)
    groups = [values[part == i] for i in found]
    result[name] = [[float(g.min()), round(float(g.mean()), 2), float(g.max())] for g in groups]
  return result


def picture(path: Path, series: dict[str, list], pages: int, title: str) -> str | None:
  """Pages in use, rows, and memory over time, each as mean and range; None without matplotlib."""
  if (plt := plots.pyplot()) is None:
    return None
  figure, axes = plt.subplots(3, 1, figsize=(9, 7.5), sharex=True, layout="constrained")

  def draw(axis, name: str, color: str, label: str, scale: float = 1.0):
    least, mean, most = np.array(series[name]).T / scale
    axis.fill_between(series["seconds"], least, most, color=color, alpha=0.2, lw=0)
    axis.plot(series["seconds"], mean, color=color, lw=1.6, label=label)

  draw(axes[0], "pages", plots.DMS, "in use: mean and range")
  axes[0].axhline(pages, color=plots.DENSE, lw=0.8, ls="--", label="the pool")
  draw(axes[1], "waiting", plots.DENSE, "waiting, or on the host")
  draw(axes[1], "running", plots.DMS, "in the batch")
  draw(axes[2], "memory", plots.DMS, "of the process", 2**20)
  for axis, label in zip(axes, ("pages", "rows", "memory, MiB"), strict=True):
    axis.set(ylabel=label, ylim=(0, None), xlim=(0, series["seconds"][-1]))
    axis.grid(alpha=0.25)
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(loc="lower right", bbox_to_anchor=(1, 1), ncols=2, frameon=False, borderaxespad=0)
  axes[2].set_xlabel("seconds")
  figure.suptitle(title)
  figure.savefig(path, dpi=110)
  plt.close(figure)
  return str(path)


def served_model(config: Config):
  """The checkpoint's model, or a tiny one with random weights whose gates evict about half; for `kernels` in bfloat16,
  with heads of 64."""
  if config.checkpoint is not None:
    return dms_jax.load(config.checkpoint, retrofit=config.retrofit)[0]
  size, dtype = (64, jnp.bfloat16) if config.kernels else (16, jnp.float32)
  shape = ModelConfig(num_layers=2, d_model=64, d_ff=96, num_heads=4, num_kv_heads=2, head_dim=size, vocab_size=128)
  dms = DMSConfig(window=8)
  params = init_params(param_table(shape, dms), jax.random.key(config.seed), dtype, stddev=0.1)
  gates = jax.random.normal(jax.random.key(1), params["layers"]["dms_proj"].shape, dtype)
  return Model({**params, "layers": {**params["layers"], "dms_proj": 0.3 * gates}}, shape, dms)


def run(config: Config) -> tuple[dict[str, Any], dict[str, list]]:
  """(verdict, samples) of a soak."""
  model = served_model(config)
  longest = config.turns * (config.longest_prompt + config.longest_answer)
  generator = Generator(
    model, width=config.width, max_length=longest, temperature=1.0, eos=False, page_size=config.page_size,
    budget_tokens=config.budget_tokens or longest, prefill_chunk=config.prefill_chunk, decode_block=config.decode_block,
  )  # fmt: skip
  outcome = soak(generator, config, Traffic(config, model.config.vocab_size), 60 * config.minutes)
  return verdict(generator, config, outcome), outcome["samples"]


def main() -> None:
  config = program.read_flags("", Config)
  files.check_retrofit("retrofit", config.retrofit)
  result, samples = run(config)
  folder = Path(config.output)
  folder.mkdir(parents=True, exist_ok=True)
  name = Path(config.checkpoint).name if config.checkpoint else "a tiny random model"
  title = (
    f"{config.minutes:g} minutes of random traffic on {name}, width {config.width}, {jax.devices()[0].device_kind}"
  )
  series = over_time(samples)
  image = picture(folder / "soak.png", series, result["pages"], title)
  report = {"config": program.flag_values(), "environment": program.environment(), **result, "over_time": series}
  program.save_json(folder / "soak.json", report)
  program.finish({**result, "picture": image})
  if not result["passed"]:
    sys.exit(1)


if __name__ == "__main__":
  program.define_flags("", Config)
  program.run(main, writes="folder")
