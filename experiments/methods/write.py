"""Writes chains under a method in one `Generator`; the chains of a prompt share its pages."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np
from jaxtyping import Array, Int, Key

from dms_jax import BudgetError, Generator
from dms_jax.config import ModelConfig
from dms_jax.generation.detokenize import Detokenizer
from dms_jax.generation.results import ChainUsage
from dms_jax.policies import Policy
from dms_jax.spmd import row_parts
from dms_jax.tokenizer import Tokenizer
from experiments.methods.budgets import Group, most_tokens
from experiments.methods.method import Method
from experiments.methods.records import Record
from experiments.methods.stopwatch import ChainTimes

CHUNK = 256  # prompt tokens that one compiled call reads
ROUND = 64  # tokens to whose multiple the length of a cache is rounded up


def longest_text(job: Any, method: Method, group: Group, most: int) -> int:
  """Tokens of the longest text of a group, rounded so that tasks with prompts of similar lengths share programs."""
  longest = max(len(job.asked[row].tokens) for row in group.rows) + most
  return min(-(-longest // ROUND) * ROUND, method.model.config.max_position_embeddings)


def chain_keys(job: Any, number: int, chains: Sequence[int]) -> jax.Array | None:
  """The sampling keys of some chains of a prompt; None where sampling is greedy."""
  return _keys(jax.random.key(job.seed), number, np.asarray(chains, np.int32)) if job.temperature else None


@jax.jit
def _keys(key: Key[Array, ""], number: int, chains: Int[Array, "n"]) -> Key[Array, "n"]:
  return jax.vmap(lambda chain: jax.random.fold_in(jax.random.fold_in(key, number), chain))(chains)


def generator_of(
  job: Any, method: Method, group: Group, tokenizer: Tokenizer, most: int, width: int, memory: int | None
) -> Generator:
  """A generator for all prompts of a group; its shapes do not depend on which of them are done."""
  longest = longest_text(job, method, group, most)
  try:
    generator = Generator(
      method.model, policy=group.policy, width=width, max_length=longest, temperature=job.temperature,
      top_p=None if job.top_p == 1 else job.top_p, stop=job.task.stop, budget=memory, prefill_chunk=CHUNK,
      tokenizer=tokenizer, stream=False,
    )  # fmt: skip
  except BudgetError as error:
    raise ValueError(f"--kv_budget_gib, with --width={width}: {error}") from None
  policy, slots = group.policy, _slots(group, longest)
  if policy.data_dependent:  # the pool grows where a text needs more
    slots = min(longest, policy.window + 1 + longest // 2)
  generator.memory.reserve(slots, min(CHUNK, longest))
  return generator


def _slots(group: Group, longest: int) -> int:
  """Most slots of a head."""
  return min(most_tokens(group.policy, group.numbers, longest), longest)


def enough_gib(job: Any, method: Method, group: Group, most: int, generator: Generator) -> float:
  """Cache memory, in GiB on each device, in which every prompt of a group is answered, whatever the heads keep.

  The chains of a prompt begin together: they share its pages and take one more a head, or copy them where the policy
  rewrites them. Then each goes on alone if need be, at its longest.
  """
  longest, memory = longest_text(job, method, group, most), generator.memory
  own = memory.own
  row = own.row_pages(min(_slots(group, longest) + CHUNK, longest), longest, least=1)  # while it reads a chunk
  others = (job.chains - 1) * (row if group.policy.rewrites or own.sliding is not None else memory.pool_heads)
  return (own.fixed_bytes + (row + others) * own.page_bytes) / 2**30


def _text_until(tokens: Sequence[int], generator: Generator, prompt: Any) -> str:
  """The text of a chain that ends after these tokens because of its length."""
  row = Detokenizer.create(generator.tokenizer, generator.stop_strings, prompt)
  row.advance(tokens, "length")
  return row.text


def _shared(usage: ChainUsage, policy: Policy, config: ModelConfig) -> float:
  """`Record.shared`: chains copy the window of their prompt, and share what lies before it unless it is rewritten.

  In layers that slide they share nothing.
  """
  if policy.rewrites:
    return 0.0
  copied, part = min(usage.prompt, policy.window + 1), len(config.global_layers) / config.num_layers
  slid = min(usage.prompt, config.sliding_window or 0)
  return usage.prompt_held / usage.heads - part * copied - (1 - part) * slid


def write(
  job: Any, method: Method, wanted: Sequence[tuple[int, int, int]], tokenizer: Tokenizer,
  record: Callable[..., Record], *, width: int, memory: int | None, tick: Callable[[int], None],
) -> Iterator[list[Record]]:  # fmt: skip
  """Writes the chains of `wanted`, (prompt, chain, most new tokens), and yields their records as chains end.

  A chain of fewer new tokens is the start of the same chain of more, in tokens and usage. Where the budget depends on
  the most new tokens, each number is written apart.
  """
  cuts = [(most,) for most in job.max_tokens] if method.given.follows_length else [job.max_tokens]
  pools = row_parts(method.model)  # a prompt's chains share one
  width = min(width, len(job.asked) * job.chains)  # more rows than chains would stay empty
  width = pools * max(-(-width // pools), job.chains)
  for lengths in cuts:
    most = max(lengths)
    if own := {key for key in wanted if key[2] in lengths}:
      group, _ = method.fitted(job, most)
      yield from _write_group(job, method, group, own, tokenizer, record, most, width, memory, tick)


def _write_group(
  job: Any, method: Method, group: Group, wanted: set[tuple[int, int, int]], tokenizer: Tokenizer,
  record: Callable[..., Record], most: int, width: int, memory: int | None, tick: Callable[[int], None],
) -> Iterator[list[Record]]:  # fmt: skip
  """`write` up to `most` new tokens."""
  generator = generator_of(job, method, group, tokenizer, most, width, memory)
  running: dict[int, tuple[int, list[int]]] = {}  # ticket -> prompt, its chains
  ended: dict[int, int] = {}  # ticket -> chains that have ended
  cuts: dict[int, dict[int, list[int]]] = {}  # prompt -> chain -> most new tokens, in order
  for prompt, chain, cut in sorted(wanted):
    cuts.setdefault(prompt, {}).setdefault(chain, []).append(cut)
  times = ChainTimes(generator)

  def step(run: Callable[..., Any], *args: Any, **request: Any) -> Any:
    try:
      return run(*args, **request)
    except BudgetError:
      enough = 1.006 * enough_gib(job, method, group, most, generator)  # three digits are not below it
      raise ValueError(
        f"--kv_budget_gib={memory / 2**30:.3g} is too little for {method.label} on {job.name}: {width} rows, and "
        f"chains of up to {longest_text(job, method, group, most):,} tokens, fit --kv_budget_gib={enough:.3g}"
      ) from None

  for place, number in enumerate(group.rows):
    if chains := list(cuts.get(number, ())):
      keys, prompt = chain_keys(job, number, chains), job.asked[number].tokens
      request = dict(chains=len(chains), key=keys, **group.of_row(place))
      if not running:
        step(times.warm_up, prompt, most, **request)
      running[generator.submit(prompt, max_new_tokens=most, **request)] = (number, chains)
  unfinished = 0  # tokens of the chains that have not ended
  while generator.busy:
    found, news = [], step(times.step)
    unfinished += sum(len(new) for _, _, new, _ in news)
    for ticket, index in dict.fromkeys((ticket, index) for ticket, index, *_ in news):
      (number, chains), result = running[ticket], generator.results[ticket]
      if result.finish_reason[index] == "running":
        continue
      chain, tokens, usage = chains[index], result.tokens[index], result.usage[index]
      unfinished -= len(tokens)
      for cut in cuts[number][chain]:
        text = result.text[index]
        if len(tokens) > cut:
          text = _text_until(tokens[:cut], generator, job.asked[number].tokens)
        used = usage.until(cut)
        found.append(dict(
          prompt=number, chain=chain, most=cut, tokens=used["seen"], reads=used["reads"], peak=used["peak"],
          shared=_shared(usage, generator.policy, generator.model.config),
          achieved_cr=used["seen"] / used["held"], text=text, answer=job.task.answer(text),
          seconds=times.until(ticket, index, min(cut, len(tokens))),
        ))  # fmt: skip
      ended[ticket] = ended.get(ticket, 0) + 1
      if ended[ticket] == len(chains):
        del running[ticket], generator.results[ticket]
    if found:
      grades = job.task.grades([(each["text"], job.asked[each["prompt"]]) for each in found])
      yield [record(**each, grades=own) for each, own in zip(found, grades, strict=True)]
    tick(unfinished)
