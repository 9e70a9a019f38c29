"""Generator: each request as if it were alone, whatever the pool, neighbours and pauses."""

from __future__ import annotations

import jax
import numpy as np
import pytest

import dms_jax
from dms_jax import policies
from dms_jax import testing as tiny
from dms_jax.config import DMSConfig
from dms_jax.generation import batching as serving
from dms_jax.generation import pages as memories
from dms_jax.generation.batching import Generator
from dms_jax.generation.pages import BudgetError
from tests.helpers import check_pages

WIDTH, PAGE = 3, 4
SIZES = dict(width=WIDTH, page_size=PAGE, prefill_chunk=8, decode_block=4, max_length=96, eos=False)
SMALL = dict(pages=400, **SIZES)  # one pool's size, so that programs are compiled once


@pytest.fixture(scope="module")
def model():
  return tiny.model(gates=DMSConfig(window=3))


def prompt(model, length, seed=0):
  return np.asarray(tiny.tokens(model.config, 1, length, seed))[0].tolist()


def finish(generator):
  """Runs to the end, checking pages and the budget on the way; the results."""
  while generator.busy:
    generator.step()
    check_pages(generator.cache)
    assert generator.budget is None or generator.cache.nbytes <= generator.budget
  assert int(generator.cache.table.pool.count) == generator.cache.pages and not generator.cache.live().any()
  return generator.results


def alone(model, requests, **settings):
  """What each request gives in a generator of its own."""
  results = []
  for request in requests:
    generator = Generator(model, **SMALL, **settings)
    generator.submit(*request[:1], **request[1])
    results.append(finish(generator)[0])
  return results


def assert_same(result, expected):
  assert result.tokens == expected.tokens and result.finish_reason == expected.finish_reason
  assert result.logprobs == expected.logprobs  # to the bit
  assert [usage.until() for usage in result.usage] == [usage.until() for usage in expected.usage]


def test_equals_generate(model):
  """The same tokens as `generate`, whose other shapes may change the last bits."""
  prompts = [prompt(model, n, n) for n in (5, 19, 1, 12)]
  generator = Generator(model, **SMALL)
  tickets = [generator.submit(p, max_new_tokens=20) for p in prompts]
  shorter = generator.submit(prompts[1], max_new_tokens=7)
  results = finish(generator)
  expected = dms_jax.generate(model, prompts, max_new_tokens=20, eos=False, prefill_chunk=8, cache="paged")
  for ticket, tokens, logprobs, live in zip(
    tickets, expected.tokens, expected.logprobs, expected.metrics.held_tokens, strict=True
  ):
    assert results[ticket].tokens == [tokens] and results[ticket].finish_reason == ["length"]
    np.testing.assert_allclose(results[ticket].logprobs[0], logprobs, atol=2e-5)
    assert results[ticket].held == [pytest.approx(live)]
  used = expected.metrics
  assert [results[t].seen[0] for t in tickets] == used.seen.tolist()
  assert [results[t].peak[0] for t in tickets] == pytest.approx(used.peak)
  assert [results[t].reads[0] for t in tickets] == pytest.approx(used.decode_reads.mean(axis=(0, 2)))
  prompt_reads = [results[t].usage[0].prompt_reads / results[t].usage[0].heads for t in tickets]
  assert prompt_reads == pytest.approx(used.prompt_reads.mean(axis=(0, 2)))
  cut, whole = results[shorter], results[tickets[1]]  # a shorter chain is the start of a longer one
  assert cut.tokens[0] == whole.tokens[0][:7] and cut.usage[0].until() == whole.usage[0].until(7)
  assert cut.reads[0] < whole.reads[0] and cut.usage[0].until(1)["reads"] == 0


def requests_of(model):
  rng = np.random.default_rng(0)
  return [
    (
      prompt(model, int(rng.integers(1, 40)), seed),
      dict(max_new_tokens=int(rng.integers(1, 40)), chains=int(rng.choice([1, 1, 2])), key=jax.random.key(seed)),
    )
    for seed in range(7)
  ]


@pytest.mark.parametrize("case", ["dms", pytest.param("h2o", marks=pytest.mark.slow)])
def test_a_row_is_bit_equal_whatever_the_pool_its_neighbours_and_pauses(model, case):
  """Random arrivals under a budget in which not all rows fit: rows are preempted and come back, none feels it."""
  settings = dict(temperature=0.8)
  if case == "h2o":
    settings["policy"] = policies.H2O(budget=24, window=3)
  requests = requests_of(model)
  expected = alone(model, requests, **settings)
  empty = Generator(model, **SIZES, **settings).cache
  needed = max(int(np.ceil(max(r.held) - 3)) for r in expected) * 4 // PAGE + 8  # of the largest row, in pages
  needed *= 2 if case == "h2o" else 1  # its chains share no page
  budget = empty.fixed_bytes + max(needed + 6, empty.pages) * empty.page_bytes
  generator = Generator(model, budget=budget, **SIZES, **settings)
  rng, tickets = np.random.default_rng(1), []
  for text, options in requests:
    tickets.append(generator.submit(text, **options))
    for _ in range(int(rng.integers(0, 3))):
      generator.step()
  results = finish(generator)
  if case != "h2o":  # whose budget bounds every row
    assert generator.preemptions
  for ticket, one in zip(tickets, expected, strict=True):
    assert_same(results[ticket], one)


NUMBERS = {
  "dms": (policies.DMS(), [{"threshold": 1e4}, {}, {"threshold": -3.0}, {"threshold": 0.5}]),
  "tova": (policies.TOVA(budget=9), [{"budget": 24}, {}, {"budget": 5}, {"budget": 12}]),
  "quest": (policies.Quest(page=4, cr=2.0, dense_layers=1), [{"cr": 1.0}, {}, {"cr": 4.0}, {"cr": 8.0}]),
  "snapkv": (policies.SnapKV(window=3, budget=9), [{"budget": 30}, {}, {"budget": 5}, {"budget": 12}]),
}


@pytest.mark.parametrize(
  "case", ["dms", "tova", *(pytest.param(c, marks=pytest.mark.slow) for c in ("quest", "snapkv"))]
)
def test_requests_with_numbers_of_their_own_are_as_if_alone(model, case):
  """Whatever the numbers of the neighbours; without compiling anything; also after a pause on the host."""
  policy, numbers = NUMBERS[case]
  settings = dict(policy=policy, temperature=0.8)
  sizes = [31, 17, 26, 22]
  requests = [
    (prompt(model, n, n), dict(max_new_tokens=24, key=jax.random.key(n), **own))
    for n, own in zip(sizes, numbers, strict=True)
  ]
  expected = alone(model, requests, **settings)
  before = serving.decoding.decode_block._cache_size()
  generator = Generator(model, **SMALL, **settings)
  tickets = [generator.submit(text, **options) for text, options in requests]
  generator.step()
  newest = max(generator._running, key=lambda chain: chain.age)
  generator._preempt(newest)
  results = finish(generator)
  assert serving.decoding.decode_block._cache_size() == before
  for ticket, one in zip(tickets, expected, strict=True):
    assert_same(results[ticket], one)
    assert results[ticket].reads == one.reads and results[ticket].peak == one.peak
  bound = "reads" if case == "quest" else "held"
  used = [getattr(result, bound)[0] for result in results.values()]
  assert used[0] == max(used) and len({tuple(result.tokens[0]) for result in results.values()}) == 4
  if case == "tova":
    assert used == [24, 9, 5, 12]
  name = "threshold" if case == "dms" else "cr" if case == "quest" else "budget"
  with pytest.raises(ValueError, match=f"level=3: not a number of this {type(policy).__name__} .*there are: {name}"):
    generator.submit([1], key=jax.random.key(0), level=3)
  if case != "dms":
    with pytest.raises(ValueError, match=f"{name}=0.* must be"):
      generator.submit([1], key=jax.random.key(0), **{name: 0})


def test_a_key_for_each_chain(model):
  """Chain 2 of 3 alone, by its own key, is what it is among the others."""
  keys = jax.random.split(jax.random.key(5), 3)
  generator = Generator(model, **SMALL, temperature=0.8)
  whole = generator.submit(prompt(model, 12), max_new_tokens=12, chains=3, key=keys)
  one = generator.submit(prompt(model, 12), max_new_tokens=12, key=keys[1:2])
  results = finish(generator)
  assert results[one].tokens[0] == results[whole].tokens[1] != results[whole].tokens[0]
  assert results[one].logprobs[0] == results[whole].logprobs[1] and results[one].reads[0] == results[whole].reads[1]
  with pytest.raises(ValueError, match="one for each of the 2 rows"):
    generator.submit([1], chains=2, key=keys)


def test_streams_what_it_results_in(model):
  generator = Generator(model, **SMALL)
  generator.submit(prompt(model, 7), max_new_tokens=11, chains=2)
  generator.submit(prompt(model, 3), max_new_tokens=5)
  streamed = {}
  for ticket, chain, tokens, _ in generator.run():
    streamed.setdefault((ticket, chain), []).extend(tokens)
  for (ticket, chain), tokens in streamed.items():
    assert tokens == generator.results[ticket].tokens[chain]
  assert len(streamed) == 3 and all(result.finished for result in generator.results.values())


@pytest.mark.slow
def test_a_growing_pool_changes_nothing(model):
  """Without a budget it starts at a page a head and grows; with one up to the budget, then rows are preempted."""
  requests = [(prompt(model, 20, s), dict(max_new_tokens=20)) for s in range(4)]
  keeps = dict(policy=policies.Vanilla(window=3))
  expected = alone(model, requests, **keeps)
  generator = Generator(model, **SIZES, **keeps)
  first = generator.cache.pages
  budget = generator.cache.fixed_bytes + 90 * generator.cache.page_bytes
  limited = Generator(model, budget=budget, pages=first, **SIZES, **keeps)
  for server in (generator, limited):
    for text, options in requests:
      server.submit(text, **options)
    results = finish(server)
    for ticket, one in enumerate(expected):
      assert_same(results[ticket], one)
  assert generator.cache.pages > first and generator.preemptions == 0
  assert first < limited.cache.pages <= 90 and limited.preemptions


def test_a_pool_beyond_half_the_budget_grows_through_the_host(model, monkeypatch):
  """One text takes all pages of the budget, to the last; the old pool is gone before the new one exists."""
  request = (prompt(model, 20), dict(max_new_tokens=20))
  keeps = dict(policy=policies.Vanilla(window=3))
  (expected,) = alone(model, [request], **keeps)
  pages = 4 * -(-(39 - 4) // PAGE)  # of 4 heads: all tokens but the newest and the window's
  empty = Generator(model, **SIZES, **keeps).cache
  stores, grown = [], memories._regrown

  def watched(x, count):
    new = grown(x, count)
    assert x.is_deleted()
    stores.append(count)
    return new

  monkeypatch.setattr(memories, "_regrown", watched)
  for lacking in (0, 1):
    budget = empty.fixed_bytes + (pages - lacking) * empty.page_bytes
    generator = Generator(model, budget=budget, pages=pages // 2, **SIZES, **keeps)
    generator.submit(request[0], **request[1])
    if lacking:
      with pytest.raises(BudgetError, match="fills budget"):
        finish(generator)
      assert expected.tokens[0][: len(generator.results[0].tokens[0])] == generator.results[0].tokens[0]
    else:
      assert_same(finish(generator)[0], expected)
    assert generator.cache.pages == pages - lacking == stores[-1]


def test_a_request_that_does_not_fit_is_not_read_in_every_block(model):
  """It waits until more pages are free than when it was last tried, though the pool could grow a little."""
  keeps = dict(policy=policies.Vanilla(window=3), **SIZES)
  empty = Generator(model, **keeps).cache
  budget = empty.fixed_bytes + 70 * empty.page_bytes
  generator = Generator(model, budget=budget, pages=30, **keeps)
  calls, call = [], generator.reader._call
  generator.reader._call = lambda prompts, *rest: calls.append(prompts[0].ids.size) or call(prompts, *rest)
  generator.submit(prompt(model, 10), max_new_tokens=50)
  generator.step()
  generator.submit(prompt(model, 40, 1), max_new_tokens=4)
  results = finish(generator)
  assert [r.finish_reason for r in results.values()] == [["length"]] * 2
  assert calls.count(40) <= 2 * 5  # chunks of 8: tried once beside the other text, and once alone


@pytest.mark.slow
def test_turns_continue_from_what_was_kept(model):
  """Three turns with other work in between equal one conversation in `generate`; also with a pool of another size."""
  first, second = prompt(model, 21), prompt(model, 6, 1)
  generator = Generator(model, **SMALL)
  ticket = generator.submit(first, max_new_tokens=9, keep=True)
  generator.submit(prompt(model, 12, 3), max_new_tokens=30)
  kept = finish(generator)[ticket].stored[0]
  other = Generator(model, **{**SMALL, "pages": 150})
  other.submit(prompt(model, 15, 4), max_new_tokens=20)
  ticket = other.submit(second, max_new_tokens=9, continue_from=kept)
  out = dms_jax.generate(model, [first], max_new_tokens=9, eos=False, prefill_chunk=8)
  more = dms_jax.generate(model, [second], max_new_tokens=9, eos=False, prefill_chunk=8, continue_from=out)
  assert finish(other)[ticket].tokens == more.tokens
  assert generator.results[0].tokens == out.tokens


def test_cancelled_rows_leave_no_page(model):
  generator = Generator(model, **SMALL)
  tickets = [generator.submit(prompt(model, 20, s), max_new_tokens=40, chains=2) for s in range(3)]
  generator.step()
  generator.cancel(tickets[0])
  generator.cancel(tickets[2])
  results = finish(generator)
  assert results[tickets[0]].finish_reason == ["cancelled"] * 2 and results[tickets[0]].tokens[0]
  assert results[tickets[2]].tokens == [[], []]
  assert results[tickets[1]].finish_reason == ["length"] * 2
  with pytest.raises(ValueError, match="ticket=7: there is none"):
    generator.cancel(7)


def test_a_row_beyond_the_budget_is_an_error_and_the_rest_goes_on(model):
  keeps = dict(policy=policies.Vanilla(window=3), **SIZES)
  empty = Generator(model, **keeps).cache
  budget = empty.fixed_bytes + 14 * empty.page_bytes  # a row of 4 heads: 3 pages each, 16 tokens
  generator = Generator(model, budget=budget, **keeps)
  large = generator.submit(prompt(model, 10), max_new_tokens=40)
  small = generator.submit(prompt(model, 6), max_new_tokens=6)
  with pytest.raises(BudgetError, match=rf"ticket {large}: a text of \d+ tokens fills budget={budget} bytes"):
    finish(generator)
  assert len(generator.results[large].tokens[0]) > 1
  generator.cancel(large)
  assert finish(generator)[small].finish_reason == ["length"]
  generator.submit(prompt(model, 60), max_new_tokens=1)
  with pytest.raises(BudgetError, match="60 tokens of prompt and its chains do not fit"):
    finish(generator)
  with pytest.raises(BudgetError, match="give a larger budget or a smaller width"):
    Generator(model, budget=100, **keeps)


@pytest.mark.parametrize(
  "arguments, message",
  [
    (dict(chains=4), "chains=4 must lie between 1 and the width 3"),
    (dict(max_new_tokens=0), "max_new_tokens=0 must be 1 or more"),
    (dict(max_new_tokens=96), "need 97 positions; max_length=96"),
  ],
)
def test_bad_requests_are_named(model, arguments, message):
  generator = Generator(model, **SMALL)
  with pytest.raises(ValueError, match=message):
    generator.submit([1, 2], **arguments)
  assert not generator.busy


def test_no_program_is_larger_than_a_text(model):
  """Chunks and blocks longer than the longest text are cut to it; the results are the same."""
  generator = Generator(model, width=2, max_length=12, prefill_chunk=256, decode_block=64, pages=60, page_size=PAGE)
  assert (generator.reader.chunk, generator.decode_block) == (12, 12)
  generator.submit(prompt(model, 7), max_new_tokens=6)
  expected = dms_jax.generate(model, [prompt(model, 7)], max_new_tokens=6)
  assert finish(generator)[0].tokens == expected.tokens


def test_bad_settings_are_named(model):
  with pytest.raises(ValueError, match="max_length=4096 must lie between 1 and the model's"):
    Generator(model, max_length=4096)
  with pytest.raises(ValueError, match="width=0 must be 1 or more"):
    serving.Generator(model, width=0)
