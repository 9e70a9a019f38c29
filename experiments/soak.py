"""Soak test of `Generator`: random requests under a tight budget, checked for losses and leaks.

    python -m experiments.soak --checkpoint=checkpoints/smollm2-135m-instruct \\
      --retrofit=smollm2-135m-cr4 --minutes=10

Each of `--servers` is a `Generator` with a policy and, after a colon, a page format; they take turns. Requests of
random lengths arrive at random times, some with several chains, some sampled, some with a budget or threshold of their
own. Texts are made, and stop strings end some. Some conversations go on with another turn, in any generator that can
continue them, which may have another policy or pages of another size; some are saved and loaded before. A generator
that cannot continue one must refuse it. Some requests are cancelled. The pools are too small for all rows, so rows are
preempted to the host and restored. Without `--checkpoint` the model is tiny and random; `--kernels` gives it sizes that
GPU kernels support.

The traffic warms up until no program has been compiled for a while. From then on the memory of host and device and the
processor's time for a token must not grow. At the end every page must be free. A sample of finished conversations must
be bit-equal to the same requests run alone at the same width.

    python -m experiments.soak --kernels --page_size=32 --minutes=1.5        # on a GPU

Writes OUTPUT/{soak.json, soak.png}; the last line is one JSON object, and the exit status says whether all held.
"""

from __future__ import annotations

import collections
import dataclasses
import math
import os
import random
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import dms_jax
from dms_jax import compilation, policies
from dms_jax.config import DMSConfig, ModelConfig
from dms_jax.generation.batching import Generator
from dms_jax.generation.conversation import Continuation
from dms_jax.model import Model
from dms_jax.params import init_params, param_table
from dms_jax.policies import Policy
from dms_jax.policies.periodic import Periodic
from dms_jax.tokenizer import byte_tokenizer
from experiments.common import files, program
from experiments.reports import figures_bench
from pallas_kernels.paged.format import FORMATS


@dataclasses.dataclass(frozen=True)
class Config:
  """`budget_tokens`: tokens that a head may hold in all rows together; default: one text of the greatest length.
  `check`: conversations to run again alone. After the warm-up memory and the number of live arrays may grow by at most
  the share `growth`, and the process's seconds a token, on all cores, by the share `slowing`.

  Attributes:
    minutes: of measured traffic.
    warm_up: most minutes of traffic before.
    quiet: rounds, each a step of every server, without a new compiled program that end the warm-up.
    servers: a policy and a page format each, such as dms:int8; every second one of a kind has pages twice as large.
    stop: strings that end a text.
    longest_prompt, longest_answer: most tokens of a turn's prompt, and of its answer.
    turns: most turns of a conversation.
  """

  checkpoint: str | None = None
  retrofit: str | None = None
  kernels: bool = False
  minutes: float = 10.0
  servers: tuple[str, ...] = ("dms", "vanilla", "dms:int8", "dms:int8", "tova", "tova")
  stop: tuple[str, ...] = ("e", "zq")
  width: int = 16
  budget_tokens: int | None = None
  longest_prompt: int = 96
  longest_answer: int = 96
  turns: int = 3
  page_size: int = 8
  prefill_chunk: int = 32
  decode_block: int = 8
  check: int = 12
  warm_up: float = 20.0
  quiet: int = 300
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
    for name in ("warm_up", "quiet"):
      if getattr(self, name) < 0:
        raise ValueError(f"--{name}={getattr(self, name)} must be 0 or more")


@dataclasses.dataclass(frozen=True)
class Server:
  """A generator; `name` is that of its policy and page format."""

  name: str
  generator: Generator

  def continues(self, other: Server) -> bool:
    """Whether a conversation of `other` can go on here."""
    mine, theirs = self.generator.policy, other.generator.policy
    formats = {server.name.partition(":")[2] for server in (self, other)}
    return len(formats) == 1 and mine.continues(theirs) and mine.window == theirs.window


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
    """A prompt and the arguments of `submit`, with `seed` in place of the key; later turns keep a policy's numbers."""
    draw, config = self.random, self.config
    prompt = [draw.randrange(self.vocab) for _ in range(draw.randint(1, config.longest_prompt))]
    chains = min(draw.choice((1, 1, 1, 2, 3)), config.width)
    last = talk.turns[-1] if talk.turns else None
    kept = last is not None and last.server.name == server.name
    numbers = last.options["numbers"] if kept else self._numbers(server.generator)
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


def by_file(past: Continuation, generator: Generator) -> Continuation:
  """A conversation of a generator, saved and loaded, into a cache of one size: every other size would be compiled."""
  with tempfile.TemporaryDirectory() as folder:
    dms_jax.save_conversation(Path(folder) / "past", past)
    loaded = dms_jax.load_conversation(
      Path(folder) / "past", generator.model, policy=past.policy, capacity=generator.max_length
    )
    return loaded.row(0)


def refuses(server: Server, talk: Talk, request: tuple[list[int], dict[str, Any]]) -> bool:
  """Whether a generator that cannot continue a conversation refuses it, and is left as it was."""
  tickets = set(server.generator.results)
  try:
    submit(server.generator, *request, talk.past)
  except ValueError as error:
    return "\n" not in str(error) and set(server.generator.results) == tickets
  return False


def soak(servers: list[Server], config: Config, traffic: Traffic, count: Callable[[], int]) -> dict[str, Any]:
  """Serves traffic, then finishes all requests.

  Args:
    count: of the programs compiled so far.

  Returns:
    {"samples": of every round, "begin": seconds of the warm-up, "counts", "kept": ended conversations}.
  """
  draw, talks = traffic.random, {}  # (server's number, ticket) -> talk, prompt, options
  counts: collections.Counter[str] = collections.Counter()
  kept: list[Talk] = []
  columns = ("seconds", "pages", "running", "waiting", "memory", "device", "arrays", "tokens", "busy", "programs")
  samples: dict[str, list] = {name: [] for name in columns}
  generators = [server.generator for server in servers]
  start = shown = time.monotonic()
  begin, seconds, changed, programs = None, math.inf, 0, count()

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
          other = draw.randrange(len(servers))
          if not servers[other].continues(server):
            counts["refused"] += 1
            counts["accepted"] += not refuses(servers[other], talk, traffic.request(servers[other], talk))
            other = number
          if draw.random() < 0.1:
            talk.past = by_file(talk.past, generator)
            counts["saved"] += 1
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
      len(jax.live_arrays()), counts["tokens"], time.process_time(), count(),
    )  # fmt: skip
    for name, value in zip(columns, row, strict=True):
      samples[name].append(value)
    if count() > programs:
      programs, changed = count(), len(samples["seconds"])
    if begin is None and (len(samples["seconds"]) - changed >= config.quiet or now >= 60 * config.warm_up):
      begin, seconds = now, now + 60 * config.minutes
      program.log(f"warm after {now:.0f} s, {programs} programs")
    if time.monotonic() - shown > 10:
      shown = time.monotonic()
      program.log(
        f"{now:.0f}/{seconds:.0f} s: {counts['rows']} rows ended, {row[2]} running, {row[3]} waiting, {row[1]} pages, "
        f"{sum(g.preemptions for g in generators)} preemptions, {programs} programs, {(row[4] or 0) / 2**20:.0f} MiB"
      )
  counts["preemptions"] = sum(generator.preemptions for generator in generators)
  return {"samples": samples, "begin": begin, "counts": dict(counts), "kept": kept}


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


def slowing(samples: dict[str, list], begin: float) -> float | None:
  """Relative growth of the process's seconds a token, from the first third after the warm-up to the last third.

  They are those of all cores, so that other work on the machine matters little; None where hardly a token was written.
  """
  at, tokens, busy = (np.asarray(samples[name], float) for name in ("seconds", "tokens", "busy"))
  first = int(np.searchsorted(at, begin))
  third = (len(at) - 1 - first) // 3
  if third < 1:
    return None
  spans = [(first, first + third), (len(at) - 1 - third, len(at) - 1)]
  written = [tokens[b] - tokens[a] for a, b in spans]
  before, after = ((busy[b] - busy[a]) / max(count, 1) for (a, b), count in zip(spans, written, strict=True))
  return float(after / before - 1) if min(written) > 0 and before > 0 else None


def growth(values: list[float | None], seconds: list[float], begin: float) -> float | None:
  """Relative growth of the median, from the first tenth of the samples after the warm-up to the last tenth.

  Args:
    values: a sample of every step, None if the system does not report it.
    seconds: the time of each sample; `begin`: that of the warm-up's end.
  """
  if values[0] is None:
    return None
  first = next(i for i, at in enumerate(seconds) if at >= begin)
  few = max((len(values) - first) // 10, 1)
  before, after = (float(np.median(values[i : i + few])) for i in (first, len(values) - few))
  return after / before - 1


def verdict(servers: list[Server], config: Config, outcome: dict[str, Any]) -> dict[str, Any]:
  """The checks, and whether each of them held."""
  samples, kept, begin = outcome["samples"], outcome["kept"], outcome["begin"]
  generators = [server.generator for server in servers]
  every = lambda: sum(lost_pages(generator) for generator in generators)
  lost = every()
  memory_growth, device_growth, arrays_growth = (
    growth(samples[name], samples["seconds"], begin) for name in ("memory", "device", "arrays")
  )
  slower = slowing(samples, begin)
  late = samples["programs"][-1] - samples["programs"][int(np.searchsorted(samples["seconds"], begin))]
  same = [alone(talk) for talk in program.progress(kept, desc="alone")]
  checks = {
    "no_page_lost": lost == 0 and every() == 0,
    "memory_flat": memory_growth is None or memory_growth <= config.growth,
    "device_flat": device_growth is None or device_growth <= config.growth,
    "arrays_flat": arrays_growth <= config.growth,
    "time_flat": slower is None or slower <= config.slowing,
    "bit_equal_alone": all(same),
    "others_refused": outcome["counts"].get("accepted", 0) == 0,
    "something_was_preempted": outcome["counts"]["preemptions"] > 0,
  }
  return {
    "passed": all(checks.values()), "checks": checks, "lost_pages": lost, "memory_growth": memory_growth,
    "device_growth": device_growth, "arrays_growth": arrays_growth, "slowing": slower,
    "warm_up_seconds": round(begin, 1), "programs": samples["programs"][-1], "programs_after_warm_up": late,
    "conversations_checked": len(same), "turns_checked": sum(len(talk.turns) for talk in kept),
    "rows_checked": sum(len(turn.answers) for talk in kept for turn in talk.turns), **outcome["counts"],
    "steps": len(samples["seconds"]), "pages": sum(generator.cache.pages for generator in generators),
    "cache_bytes": sum(generator.cache.nbytes for generator in generators),
  }  # fmt: skip


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


def policy_of(name: str, budget: int, window: int) -> Policy:
  """The policy called `name`, with at most `budget` tokens a head if it has a budget; the dense one with `window`."""
  cls = policies.get(name)
  if cls is policies.Vanilla:
    return cls(window=window)
  if "budget" not in {field.name for field in dataclasses.fields(cls)} or cls.uses_gates:
    return cls()
  policy = cls(**{"budget": budget})
  return policy.replace(buffer=max(budget // 4, 1)) if isinstance(policy, Periodic) else policy


def made(config: Config) -> list[Server]:
  """The servers, all of one model."""
  model, tokenizer = served_model(config)
  if model.dms is None:
    raise ValueError(f"--checkpoint={config.checkpoint} has no eviction gates: give --retrofit=FOLDER")
  longest = config.turns * (config.longest_prompt + config.longest_answer)
  seen: collections.Counter[str] = collections.Counter()
  servers = []
  for name in config.servers:
    policy, _, form = name.partition(":")
    servers.append(Server(name, Generator(
      model, policy=policy_of(policy, longest // 4, model.dms.window), width=config.width, max_length=longest,
      temperature=1.0, eos=False, stop=config.stop, page_size=config.page_size * (1 + seen[name] % 2),
      page_format=form or None, budget_tokens=config.budget_tokens or longest, prefill_chunk=config.prefill_chunk,
      decode_block=config.decode_block, tokenizer=tokenizer,
    )))  # fmt: skip
    seen[name] += 1
  return servers


def run(config: Config) -> tuple[dict[str, Any], dict[str, list]]:
  """(verdict, samples) of a soak."""
  servers = made(config)
  vocabulary = servers[0].generator.model.config.vocab_size
  with compilation.counted() as count:
    outcome = soak(servers, config, Traffic(config, vocabulary), count)
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
  series = figures_bench.over_time(samples)
  image = figures_bench.soak(folder / "soak.png", series, result["warm_up_seconds"], result["pages"], title)
  report = {"config": program.flag_values(), "environment": program.environment(), **result, "over_time": series}
  program.save_json(folder / "soak.json", report)
  program.finish({**result, "picture": image})
  if not result["passed"]:
    sys.exit(1)


if __name__ == "__main__":
  program.define_flags("", Config)
  program.run(main, writes="folder")
