"""Generator under pressure: what rows give up, against a float64 oracle; nothing where pages last."""

from __future__ import annotations

import random

import jax
import numpy as np
import pytest

from dms_jax import policies
from dms_jax import testing as tiny
from dms_jax.generation import decode, pressure, together
from dms_jax.generation.batching import Generator
from tests.helpers import check_falling_thresholds, check_pages

WIDTH, PAGE = 3, 4
SIZES = dict(width=WIDTH, page_size=PAGE, prefill_chunk=8, decode_block=4, max_length=96, eos=False)
GATES = {
  "one ratio": tiny.dms(window=3, scale=3.0, offset=1.0),
  "elastic": tiny.dms(window=3, scale=20.0, offset=0.0, elastic=(1.2, 12.0), elastic_thresholds=(21.6, -10.4)),
}
COMPRESS = dict(on_pressure="compress")


def prompt(model, length, seed=0):
  return np.asarray(tiny.tokens(model.config, 1, length, seed))[0].tolist()


def pooled(model, spare, **settings):
  """A generator whose budget is one page a head and row, and `spare` pages more."""
  empty = Generator(model, **SIZES, **settings).cache
  return Generator(model, budget=empty.fixed_bytes + (empty.pages + spare) * empty.page_bytes, **SIZES, **settings)


def finish(generator):
  """Runs to the end, checking pages and the budget on the way."""
  while generator.busy:
    generator.step()
    check_pages(generator.cache)
    assert generator.cache.nbytes <= generator.budget
  assert int(generator.cache.table.pool.count) == generator.cache.pages and not generator.cache.live().any()
  return generator.results


@pytest.mark.parametrize("case", GATES)
@pytest.mark.parametrize("form", [None, pytest.param("int8", marks=pytest.mark.slow)])
def test_nothing_changes_while_pages_last(case, form):
  """Tokens, log-probabilities and usage are equal to the bit; only then are logits stored."""
  model, found = tiny.model(gates=GATES[case]), []
  for mode in pressure.MODES:
    generator = pooled(model, 400, temperature=0.8, page_format=form, on_pressure=mode)
    assert sorted(generator.cache.stats) == ([] if mode == "preempt" else ["score"])
    for seed, length in enumerate((31, 5, 18, 12)):
      generator.submit(prompt(model, length, seed), max_new_tokens=20, chains=1 + seed % 2, key=jax.random.key(seed))
    found.append(finish(generator))
  for ticket, result in found[0].items():
    other = found[1][ticket]
    assert (result.tokens, result.logprobs, result.reads) == (other.tokens, other.logprobs, other.reads)
    assert not any(other.given_up)


@pytest.mark.parametrize("case", GATES)
def test_rows_under_pressure_are_the_oracle_with_a_falling_threshold(case):
  """Each greedy token, against float64 logits of the whole text; the threshold falls where the result says it did."""
  model = tiny.model(gates=GATES[case])
  generator = pooled(model, 20, **COMPRESS)
  prompts = [prompt(model, length, length) for length in (30, 22, 26)]
  tickets = [generator.submit(text, max_new_tokens=40) for text in prompts]
  results = finish(generator)
  check_falling_thresholds(model, float(generator.policy.limit), prompts, [results[ticket] for ticket in tickets])


def test_it_compresses_before_it_preempts():
  """The same requests and pages: fewer chains are preempted, and more tokens are held by none."""
  model, outcomes = tiny.model(gates=GATES["elastic"]), {}
  for mode in pressure.MODES:
    generator = pooled(model, 40, on_pressure=mode)
    for seed in range(6):
      generator.submit(prompt(model, 20, seed), max_new_tokens=30)
    results = finish(generator)
    lost = [sum(one.tokens for one in chain) for result in results.values() for chain in result.given_up]
    outcomes[mode] = generator.preemptions, sum(lost)
  assert outcomes["preempt"][0] > 0 == outcomes["preempt"][1]
  assert outcomes["compress"][0] < outcomes["preempt"][0] and outcomes["compress"][1] > 0


def test_a_waiting_prompt_is_never_read_in_vain(monkeypatch):
  """Chains are compressed as its chunks need pages: each is read once, but for those that found none at first."""
  model, calls, rounds, vain = tiny.model(gates=GATES["elastic"]), [], [], []
  reading, compressing, giving_up = together._prefill_rows, pressure._compressed, Generator._give_up
  monkeypatch.setattr(together, "_prefill_rows", lambda *args, **kwargs: calls.append(1) or reading(*args, **kwargs))
  monkeypatch.setattr(pressure, "_compressed", lambda *args: rounds.append(int(args[-1])) or compressing(*args))
  monkeypatch.setattr(Generator, "_give_up", lambda *args: vain.append(1) or giving_up(*args))
  generator = pooled(model, 40, **COMPRESS)
  for seed in range(6):
    generator.submit(prompt(model, 20, seed), max_new_tokens=16)
  results = finish(generator)
  assert not vain and not generator.preemptions and len(calls) <= 6 * 3 + len(rounds)
  lost = sum(len(chain) for result in results.values() for chain in result.given_up)
  assert rounds and max(rounds) > 1 and lost <= sum(rounds)  # all chains of a compression are one program


def test_a_chain_is_compressed_at_most_so_often():
  """At the highest level, or after MOST times, it is preempted, or alone raises the error that it always did."""
  model = tiny.model(gates=GATES["elastic"])
  generator = pooled(model, 24, **COMPRESS)
  for seed in range(3):
    generator.submit(prompt(model, 12, seed), max_new_tokens=60, cr=1.2)
  results = finish(generator)
  chains = [chain for result in results.values() for chain in result.given_up]
  assert max(map(len, chains)) <= pressure.MOST and generator.preemptions
  assert all(one.numbers["cr"] <= 12.0 for chain in chains for one in chain)


@pytest.mark.parametrize("seed", [0, *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(1, 6))])
def test_no_page_is_lost(seed):
  """Random requests that share prompts, stop, are cancelled and continued, in a pool that is always short."""
  draw = random.Random(seed)
  gates = GATES[draw.choice(list(GATES))]
  model = tiny.model(gates=gates)
  policy = policies.DMS(budget=24) if draw.random() < 0.4 else policies.DMS()
  generator, left, tickets, past = pooled(model, 30, policy=policy, **COMPRESS), 12, [], []
  while left or generator.busy:
    if left and draw.random() < 0.6:
      left -= 1
      more = dict(continue_from=past.pop()) if past and draw.random() < 0.5 else {}
      chains = 1 if more else draw.choice([1, 1, 2])
      text = prompt(model, draw.randint(1, 20), left)
      tickets.append(
        generator.submit(text, max_new_tokens=draw.randint(1, 24), chains=chains, keep=not more, **more)
      )  # fmt: skip
    if tickets and draw.random() < 0.05:
      generator.cancel(draw.choice(tickets))
    generator.step()
    check_pages(generator.cache)
    past = [one for ticket in tickets for one in generator.results[ticket].stored if one is not None][:2]
  assert all(generator.results[ticket].finished for ticket in tickets)
  assert int(generator.cache.table.pool.count) == generator.cache.pages


def test_other_numbers_compile_nothing():
  """Rows of every level, compressed or not: one decode program."""
  model = tiny.model(gates=GATES["elastic"])
  generator = pooled(model, 20, **COMPRESS)
  generator.submit(prompt(model, 20), max_new_tokens=40)
  finish(generator)
  programs = decode.decode_block, pressure._compressed
  before = [program._cache_size() for program in programs]
  for seed, cr in enumerate((1.2, 3.0, 6.0, 12.0)):
    generator.submit(prompt(model, 20, seed), max_new_tokens=40, cr=cr)
  results = finish(generator)
  assert any(chain for result in results.values() for chain in result.given_up)
  assert [program._cache_size() for program in programs] == before


def test_refusals():
  model = tiny.model(gates=GATES["elastic"])
  with pytest.raises(ValueError, match=r"on_pressure='wait' must be one of \('preempt', 'compress'\)"):
    Generator(model, on_pressure="wait", **SIZES)
  with pytest.raises(ValueError, match='on_pressure="compress" goes by gate logits, which TOVA has not: use DMS'):
    Generator(model, policy=policies.TOVA(budget=9), **COMPRESS, **SIZES)
