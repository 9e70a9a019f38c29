"""Generator: random requests, budgets, stops, cancellations, later turns, against `generate` alone."""

from __future__ import annotations

import dataclasses
import random
from typing import Any

import jax
import numpy as np
import pytest

import dms_jax
from dms_jax import policies
from dms_jax import testing as tiny
from dms_jax.config import DMSConfig
from dms_jax.generation.batching import Generator
from dms_jax.tokenizer import byte_tokenizer
from tests.helpers import check_pages

WIDTH, LONGEST, VOCABULARY = 4, 96, 257
STOPS = ["e", "zq", "\x07a"]
SETTINGS = dict(prefill_chunk=8, decode_block=4)
ATOL = 3e-5  # float32 through two layers, whose products another width sums in another order

# A policy, and numbers that requests may set.
CASES = {
  "dms": (policies.DMS(), lambda draw: {"threshold": draw.choice([-1.0, 0.5, 1e4])}),
  "dms-budget": (policies.DMS(budget=12), lambda draw: {"budget": draw.randint(12, 30)}),
  "tova": (policies.TOVA(budget=12), lambda draw: {"budget": draw.randint(12, 30)}),
  "keydiff": (policies.KeyDiff(budget=12), lambda draw: {"budget": draw.randint(12, 30)}),
  "rkv": (policies.RKV(budget=12, buffer=5, window=3), lambda draw: {"budget": draw.randint(6, 20)}),
  "vanilla": (policies.Vanilla(window=3), lambda draw: {}),
}


@dataclasses.dataclass
class Asked:
  """A request: what `generate` needs to repeat it, and the request that it continues."""

  prompt: list[int]
  options: dict[str, Any]
  numbers: dict[str, Any]
  past: tuple[Asked, int] | None
  outputs: dict[int, Any] = dataclasses.field(default_factory=dict)

  @property
  def tokens(self) -> int:
    """Tokens of the whole conversation at most."""
    before = 0 if self.past is None else self.past[0].tokens
    return before + len(self.prompt) + 1 + self.options["max_new_tokens"]


def request(draw, numbers, past=None) -> Asked:
  own = numbers(draw) if past is None and draw.random() < 0.6 else {} if past is None else past[0].numbers
  options = dict(
    max_new_tokens=draw.randint(1, 14), chains=draw.choice([1, 1, 2, 3]) if past is None else 1,
    temperature=draw.choice([0.0, 0.9]), key=jax.random.key(draw.randrange(2**31)),
  )  # fmt: skip
  return Asked([draw.randrange(VOCABULARY) for _ in range(draw.randint(1, 22))], options, own, past)


def repeated(model, policy, asked: Asked, chain: int):
  """The output of `generate` for one chain of a request, alone."""
  if chain not in asked.outputs:
    past = None if asked.past is None else repeated(model, policy, *asked.past)
    key = asked.options["key"]
    asked.outputs[chain] = dms_jax.generate(
      model, [asked.prompt], policy=policy.replace(**asked.numbers), stop=STOPS, eos=[3], continue_from=past,
      max_new_tokens=asked.options["max_new_tokens"], temperature=asked.options["temperature"],
      key=key if asked.options["chains"] == 1 else jax.random.fold_in(key, chain), tokenizer=byte_tokenizer(),
      cache="paged", **SETTINGS,
    )  # fmt: skip
  return asked.outputs[chain]


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("case", CASES)
def test_random_requests_are_those_of_generate_alone(case, seed):
  """Tokens, texts, ends and usage; a cancelled chain is the start of its own; no page is lost or shared wrongly."""
  policy, numbers = CASES[case]
  draw = random.Random(f"{case}{seed}")
  model = tiny.model(tiny.config(vocab_size=VOCABULARY), DMSConfig(window=3))
  settings = dict(
    policy=policy, width=WIDTH, max_length=LONGEST, page_size=4, temperature=1.0, stop=STOPS, eos=[3],
    tokenizer=byte_tokenizer(), prefill_rows=draw.choice([1, 3]), stream=draw.random() < 0.5, **SETTINGS,
  )  # fmt: skip
  empty = Generator(model, **settings).cache
  heads = model.config.num_layers * model.config.num_kv_heads
  own = heads * -(-LONGEST // 4)  # pages of one text of the greatest length
  budget = empty.fixed_bytes + own * draw.choice([1, 2, 8]) * empty.page_bytes
  generator = Generator(model, budget=budget, pages=draw.choice([None, empty.pages]), **settings)
  policy = generator.policy if policy.by_row() is policy else policy
  asked, cancelled, ended, left = {}, set(), [], 14
  while left or generator.busy:
    while left and draw.random() < 0.5:
      past = draw.choice(ended) if ended and draw.random() < 0.4 else None
      new, left = request(draw, numbers, past), left - 1
      if new.tokens > LONGEST:
        continue
      stored = None if past is None else generator.results[past[2]].stored[past[1]]
      ticket = generator.submit(new.prompt, keep=True, continue_from=stored, **new.options, **new.numbers)
      new.past = past and past[:2]
      asked[ticket] = new
    running = [ticket for ticket in asked if not generator.results[ticket].finished]
    if running and draw.random() < 0.04:
      cancelled.add(ticket := draw.choice(running))
      generator.cancel(ticket)
    generator.step()
    check_pages(generator.cache)
    assert generator.cache.nbytes <= budget
    ended = [
      (asked[ticket], chain, ticket) for ticket in asked if ticket not in cancelled
      for chain, stored in enumerate(generator.results[ticket].stored) if stored is not None
    ]  # fmt: skip
  assert int(generator.cache.table.pool.count) == generator.cache.pages and len(asked) > 5
  for ticket, one in asked.items():
    result = generator.results[ticket]
    for chain, tokens in enumerate(result.tokens):
      out = repeated(model, policy, one, chain)
      if result.finish_reason[chain] == "cancelled":
        assert ticket in cancelled and out.tokens[0][: len(tokens)] == tokens
        continue
      assert (tokens, result.finish_reason[chain]) == (out.tokens[0], out.finish_reason[0])
      assert result.text[chain] == out.text[0]
      np.testing.assert_allclose(result.logprobs[chain], out.logprobs[0], atol=ATOL)
      usage = result.usage[chain].until(), out.usage[0].until()
      assert {name: usage[0][name] for name in ("seen", "held", "reads")} == {
        name: usage[1][name] for name in ("seen", "held", "reads")
      }
