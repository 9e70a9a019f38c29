"""Soak test of `Generator`: random requests under a tight budget, checked for losses and leaks.

    python -m experiments.soak --checkpoint=checkpoints/smollm2-135m-instruct \\
      --retrofit=smollm2-135m-cr4 --minutes=10

Each of `--servers` is a `Generator` with a policy and, after a colon, a page format; they take turns. Requests of
random lengths arrive at random times, some with several chains, some sampled, some with a budget or threshold of their
own. Texts are made, and stop strings end some. Some conversations go on with another turn, in any generator of the same
policy and format, whose pages have another size; some requests are cancelled. The pools are too small for all rows, so
rows are preempted to the host and restored. Without `--checkpoint` the model is tiny and random; `--kernels` gives it
sizes that GPU kernels support.

At the end every page must be free. The memory of host and device and the processor's time for a token must not have
grown since the warm-up. A sample of finished conversations must be bit-equal to the same requests run alone at the same
width.

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
from dms_jax import policies
from dms_jax.config import DMSConfig, ModelConfig
from dms_jax.generation.batching import Generator
from dms_jax.model import Model
from dms_jax.params import init_params, param_table
from dms_jax.policies import Policy
from dms_jax.policies.periodic import Periodic
from dms_jax.tokenizer import byte_tokenizer
from experiments.common import files, program
from experiments.reports import plots
from pallas_kernels.paged.format import FORMATS


@dataclasses.dataclass(frozen=True)
class Config:
  """`budget_tokens`: tokens that a head may hold in all rows together; default: one text of the greatest length.
  `check`: conversations to run again alone. `warm_up`: share of the time; after it memory and the number of live arrays
  may grow by at most the share `growth`, and the process's seconds a token, on all cores, by the share `slowing`.

  Attributes:
    minutes: of the run.
    servers: a policy and a page format each, such as dms:int8; every second one of a kind has pages twice as large.
    stop: strings that end a text.
    longest_prompt, longest_answer: most tokens of a turn's prompt, and of its answer.
    turns: most turns of a conversation.
  """

  checkpoint: str | None = None
  retrofit: str | None = None
  kernels: bool = False
  minutes: float = 10.0
  servers: tuple[str, ...] = ("dms", "dms", "dms:int8", "tova", "tova")
  stop: tuple[str, ...] = ("e", "zq")
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
  slowing: float = 0.3
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
    for name in self.servers:
      policies.get(name.partition(":")[0])
      if (form := name.partition(":")[2]) and form not in FORMATS:
        raise ValueError(f"--servers={name}: the page format must be one of {sorted(FORMATS)}")
    if not 0 < self.warm_up < 1:
      raise ValueError(f"--warm_up={self.warm_up} must lie between 0 and 1")


@dataclasses.dataclass(frozen=True)
class Server:
  """A generator; `name` is that of its policy and page format. Conversations go from one to any other of its name."""

  name: str
  generator: Generator


@dataclasses.dataclass(frozen=True)
class Turn:
  """A request, where it ran, and what each of its chains was."""

  server: Server
  prompt: list[int]
  options: dict[str, Any]
  answers: list[tuple]


@dataclasses.dataclass
class Talk:
  """A conversation: its finished turns, and the chain and cache that the next turn continues."""

  turns: list[Turn]
  past: Any = None


class Traffic:
  """Makes random requests; equal seeds and equal finishing times give equal requests."""

  def __init__(self, config: Config, vocab: int):
    self.config, self.vocab, self.random = config, vocab, random.Random(config.seed)

  def request(self, server: Server, talk: Talk) -> tuple[list[int], dict[str, Any]]:
    """A prompt and the arguments of `submit`, with `seed` in place of the key; later turns keep the first's numbers."""
    draw, config = self.random, self.config
    prompt = [draw.randrange(self.vocab) for _ in range(draw.randint(1, config.longest_prompt))]
    chains = min(draw.choice((1, 1, 1, 2, 3)), config.width)
    numbers = talk.turns[0].options["numbers"] if talk.turns else self._numbers(server.generator)
    return prompt, dict(
      chains=chains, max_new_tokens=draw.randint(1, config.longest_answer), temperature=draw.choice((0.0, 0.9)),
      seed=draw.randrange(2**31), numbers=numbers,
    )  # fmt: skip

  def _numbers(self, generator: Generator) -> dict[str, int | float]:
    """Numbers of a request's own for the policy, or none."""
    draw, found = self.random, generator.numbers
    if draw.random() < 0.5:
      return {}
    if "budget" in found:
      return {"budget": draw.randint(found["budget"] // 2, found["budget"])}
    return {"threshold": draw.choice((-2.0, 0.5, 2.0))} if "threshold" in found else {}


def submit(generator: Generator, prompt: list[int], options: dict[str, Any], past) -> int:
  """Submits a request that keeps its cache; returns its ticket."""
  options = dict(options)
  key, numbers = jax.random.key(options.pop("seed")), options.pop("numbers")
  return generator.submit(prompt, key=key, keep=True, continue_from=past, **options, **numbers)


def answers(result) -> list[tuple]:
  """What must be equal of the chains of a request: tokens, log-probabilities, texts, ends."""
  return list(zip(result.tokens, result.logprobs, result.text, result.finish_reason, strict=True))


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


def soak(servers: list[Server], config: Config, traffic: Traffic, seconds: float) -> dict[str, Any]:
  """Serves `seconds` of traffic, then finishes all requests: {samples of every round, counts, ended conversations}."""
  draw, talks = traffic.random, {}  # (server's number, ticket) -> talk, prompt, options
  counts: collections.Counter[str] = collections.Counter()
  kept: list[Talk] = []
  columns = ("seconds", "pages", "running", "waiting", "memory", "device", "arrays", "tokens", "busy")
  samples: dict[str, list] = {name: [] for name in columns}
  generators = [server.generator for server in servers]
  start = shown = time.monotonic()

  def ask(number: int, talk: Talk) -> None:
    prompt, options = traffic.request(servers[number], talk)
    talks[number, submit(generators[number], prompt, options, talk.past)] = talk, prompt, options

  while (now := time.monotonic() - start) < seconds or any(generator.busy for generator in generators):
    for number, server in enumerate(servers):
      generator = server.generator
      arriving = now < seconds and len(generator.waiting) < config.width
      while arriving and draw.random() < 0.5:
        ask(number, Talk([]))
        counts["requests"] += 1
        arriving = len(generator.waiting) < config.width
      own = sorted(ticket for at, ticket in talks if at == number)
      if own and draw.random() < 0.03:
        ticket = draw.choice(own)
        generator.cancel(ticket)
        del talks[number, ticket], generator.results[ticket]
        counts["cancelled"] += 1
      for _, _, tokens, text in generator.step():
        counts["tokens"] += len(tokens)
        counts["characters"] += len(text)
      for ticket in [ticket for at, ticket in talks if at == number and generator.results[ticket].finished]:
        talk, prompt, options = talks.pop((number, ticket))
        result = generator.results.pop(ticket)
        counts["rows"] += options["chains"]
        counts["turns"] += talk.past is not None
        counts["stopped"] += result.finish_reason.count("stop")
        talk.turns.append(Turn(server, prompt, options, answers(result)))
        if now < seconds and len(talk.turns) < config.turns and draw.random() < 0.4:
          talk.past = result.stored[0]
          other = draw.choice([at for at, one in enumerate(servers) if one.name == server.name])
          counts["moved"] += other != number
          ask(other, talk)
          continue
        talk.past = None
        counts["conversations"] += 1  # a uniform sample of ended conversations
        if len(kept) < config.check:
          kept.append(talk)
        elif (place := draw.randrange(counts["conversations"])) < config.check:
          kept[place] = talk
    row = (
      now, sum(g.cache.pages - int(g.cache.table.pool.count) for g in generators),
      sum(len(g._running) for g in generators),
      sum(sum(map(len, g.waiting)) + len(g.preempted) for g in generators), memory(), device_memory(),
      len(jax.live_arrays()), counts["tokens"], time.process_time(),
    )  # fmt: skip
    for name, value in zip(columns, row, strict=True):
      samples[name].append(value)
    if time.monotonic() - shown > 10:
      shown = time.monotonic()
      program.log(
        f"{now:.0f}/{seconds:.0f} s: {counts['rows']} rows ended, {row[2]} running, {row[3]} waiting, {row[1]} pages, "
        f"{sum(g.preemptions for g in generators)} preemptions, {(row[4] or 0) / 2**20:.0f} MiB"
      )
  counts["preemptions"] = sum(generator.preemptions for generator in generators)
  return {"samples": samples, "counts": dict(counts), "kept": kept}


def alone(talk: Talk) -> bool:
  """Whether a conversation run with all other rows empty gives bit-equal tokens, log-probabilities and texts."""
  past = None
  for turn in talk.turns:
    generator = turn.server.generator
    ticket = submit(generator, turn.prompt, turn.options, past)
    for _ in generator.run():
      pass
    result = generator.results.pop(ticket)
    if answers(result) != turn.answers:
      return False
    past = result.stored[0]
  return True


def lost_pages(generator: Generator) -> int:
  """Pages that are not free, or owned by none, though no row is left."""
  pool = jax.device_get(generator.cache.table.pool)
  free = np.unique(pool.free[: int(pool.count)])
  return int(max(generator.cache.pages - free.size, (pool.owners != 0).sum()))


def slowing(samples: dict[str, list], warm_up: float) -> float | None:
  """Relative growth of the process's seconds a token, from the first third after the warm-up to the last third.

  They are those of all cores, so that other work on the machine matters little; None where hardly a token was written.
  """
  at, tokens, busy = (np.asarray(samples[name], float) for name in ("seconds", "tokens", "busy"))
  begin = int(np.searchsorted(at, warm_up * at[-1]))
  third = (len(at) - 1 - begin) // 3
  if third < 1:
    return None
  spans = [(begin, begin + third), (len(at) - 1 - third, len(at) - 1)]
  written = [tokens[b] - tokens[a] for a, b in spans]
  before, after = ((busy[b] - busy[a]) / max(count, 1) for (a, b), count in zip(spans, written, strict=True))
  return float(after / before - 1) if min(written) > 0 and before > 0 else None


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


def verdict(servers: list[Server], config: Config, outcome: dict[str, Any]) -> dict[str, Any]:
  """The checks, and whether each of them held."""
  samples, kept = outcome["samples"], outcome["kept"]
  generators = [server.generator for server in servers]
  every = lambda: sum(lost_pages(generator) for generator in generators)
  lost = every()
  memory_growth, device_growth, arrays_growth = (
    growth(samples[name], samples["seconds"], config.warm_up) for name in ("memory", "device", "arrays")
  )
  slower = slowing(samples, config.warm_up)
  same = [alone(talk) for talk in program.progress(kept, desc="alone")]
  checks = {
    "no_page_lost": lost == 0 and every() == 0,
    "memory_flat": memory_growth is None or memory_growth <= config.growth,
    "device_flat": device_growth is None or device_growth <= config.growth,
    "arrays_flat": arrays_growth <= config.growth,
    "time_flat": slower is None or slower <= config.slowing,
    "bit_equal_alone": all(same),
    "something_was_preempted": outcome["counts"]["preemptions"] > 0,
  }
  return {
    "passed": all(checks.values()), "checks": checks, "lost_pages": lost, "memory_growth": memory_growth,
    "device_growth": device_growth, "arrays_growth": arrays_growth, "slowing": slower,
    "conversations_checked": len(same), "turns_checked": sum(len(talk.turns) for talk in kept),
    "rows_checked": sum(len(turn.answers) for talk in kept for turn in talk.turns), **outcome["counts"],
    "steps": len(samples["seconds"]), "pages": sum(generator.cache.pages for generator in generators),
    "cache_bytes": sum(generator.cache.nbytes for generator in generators),
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


def served_model(config: Config) -> tuple[Model, Any]:
  """The checkpoint's model and tokenizer, or a tiny one with random weights whose gates evict about half.

  For `kernels` it is in bfloat16, with heads of 64.
  """
  if config.checkpoint is not None:
    return dms_jax.load(config.checkpoint, retrofit=config.retrofit)
  size, dtype = (64, jnp.bfloat16) if config.kernels else (16, jnp.float32)
  shape = ModelConfig(num_layers=2, d_model=64, d_ff=96, num_heads=4, num_kv_heads=2, head_dim=size, vocab_size=257)
  dms = DMSConfig(window=8)
  params = init_params(param_table(shape, dms), jax.random.key(config.seed), dtype, stddev=0.1)
  gates = jax.random.normal(jax.random.key(1), params["layers"]["dms_proj"].shape, dtype)
  model = Model({**params, "layers": {**params["layers"], "dms_proj": 0.3 * gates}}, shape, dms)
  return model, byte_tokenizer()


def policy_of(name: str, budget: int) -> Policy:
  """The policy called `name`, which holds at most `budget` tokens a head if it has a budget."""
  cls = policies.get(name)
  if "budget" not in {field.name for field in dataclasses.fields(cls)} or cls.uses_gates:
    return cls()
  policy = cls(**{"budget": budget})
  return policy.replace(buffer=max(budget // 4, 1)) if isinstance(policy, Periodic) else policy


def made(config: Config) -> list[Server]:
  """The servers, all of one model."""
  model, tokenizer = served_model(config)
  longest = config.turns * (config.longest_prompt + config.longest_answer)
  seen: collections.Counter[str] = collections.Counter()
  servers = []
  for name in config.servers:
    policy, _, form = name.partition(":")
    servers.append(Server(name, Generator(
      model, policy=policy_of(policy, longest // 4), width=config.width, max_length=longest, temperature=1.0, eos=False,
      stop=config.stop, page_size=config.page_size * (1 + seen[name] % 2), page_format=form or None,
      budget_tokens=config.budget_tokens or longest, prefill_chunk=config.prefill_chunk,
      decode_block=config.decode_block, tokenizer=tokenizer,
    )))  # fmt: skip
    seen[name] += 1
  return servers


def run(config: Config) -> tuple[dict[str, Any], dict[str, list]]:
  """(verdict, samples) of a soak."""
  servers = made(config)
  vocabulary = servers[0].generator.model.config.vocab_size
  outcome = soak(servers, config, Traffic(config, vocabulary), 60 * config.minutes)
  return verdict(servers, config, outcome), outcome["samples"]


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
