"""Prompts read together: exactly as one by one, for all policies; the host at work beside it."""

from __future__ import annotations

import signal

import jax
import numpy as np
import pytest

from dms_jax import execution, policies
from dms_jax import testing as tiny
from dms_jax.config import DMSConfig
from dms_jax.generation import layerwise
from dms_jax.generation.batching import Generator
from dms_jax.generation.together import default_rows
from dms_jax.tokenizer import byte_tokenizer
from tests.helpers import check_pages

SIZES = dict(width=6, page_size=4, prefill_chunk=16, decode_block=4, max_length=96, eos=False, temperature=0.8)
LENGTHS = (5, 19, 1, 12, 30, 16, 4)  # two chunks at most; some share a program, some do not
W = 3


@pytest.fixture(scope="module")
def model():
  return tiny.model(gates=DMSConfig(window=W))


def prompts_of(model):
  return [tiny.tokens(model.config, 1, n, seed=n).tolist()[0] for n in LENGTHS]


def served(model, *, apart=False, calls=None, numbers=None, prefill_rows=4, **settings):
  """The results of seven prompts, the second with two chains; `apart`: each has ended before the next is submitted."""
  generator = Generator(model, **{"pages": 400, **SIZES, **settings}, prefill_rows=prefill_rows)
  call = generator.reader._call

  def counted(prompts, *rest):
    calls.append(len(prompts))
    return call(prompts, *rest)

  if calls is not None:
    generator.reader._call = counted
  for place, prompt in enumerate(prompts_of(model)):
    own = numbers[place % len(numbers)] if numbers else {}
    generator.submit(prompt, max_new_tokens=6, chains=1 + (place == 1), key=jax.random.key(place), **own)
    while apart and generator.busy:
      generator.step()
  while generator.busy:
    generator.step()
    check_pages(generator.cache)
  assert int(generator.cache.table.pool.count) == generator.cache.pages
  return generator.results


CASES = {
  "dms": (policies.DMS(), [{"threshold": 0.5}, {}, {"threshold": -1.0}]),
  "snapkv": (policies.SnapKV(window=W, budget=9), [{"budget": 12}, {}]),
  "tova": (policies.TOVA(budget=9), None),
  "tova_exact": (policies.TOVA(budget=9, exact_prefill=True), None),
  "h2o": (policies.H2O(budget=12, window=W), None),
  "quest": (policies.Quest(page=4, cr=2.0, dense_layers=1), None),
  "rkv": (policies.RKV(budget=12, window=W), None),
  "streaming": (policies.StreamingLLM(window=W, sinks=2), None),
  "vanilla": (policies.Vanilla(window=W), None),
}
SLOW = [name for name in CASES if name not in ("dms", "snapkv")]


@pytest.mark.parametrize("case", ["dms", "snapkv", *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW)])
def test_together_is_one_by_one(model, case):
  policy, numbers = CASES[case]
  single, joint = [], []
  expected = served(model, apart=True, calls=single, numbers=numbers, policy=policy)
  results = served(model, calls=joint, numbers=numbers, policy=policy)
  assert len(joint) < len(single) and max(joint) > 1 == max(single)
  for ticket, one in expected.items():
    assert results[ticket].tokens == one.tokens
    assert results[ticket].logprobs == one.logprobs  # to the bit
    for usage, alone in zip(results[ticket].usage, one.usage, strict=True):
      assert usage.until() == alone.until() and usage.prompt_reads == alone.prompt_reads > 0


def test_another_number_of_prompts_rounds_otherwise(model):
  """It is another shape, whose products may be summed in another order, as at another width."""
  several, one = (served(model, prefill_rows=rows) for rows in (4, 1))
  for ticket, result in several.items():
    assert result.tokens == one[ticket].tokens
    np.testing.assert_allclose(result.logprobs[0], one[ticket].logprobs[0], atol=2e-5)  # float32 through two layers
    assert [usage.until() for usage in result.usage] == [usage.until() for usage in one[ticket].usage]


@pytest.mark.slow
@pytest.mark.parametrize("page_format", ["int8", "float8"])
def test_together_into_pages_of_eight_bits(model, page_format):
  expected, results = (served(model, apart=apart, page_format=page_format) for apart in (True, False))
  assert [(r.tokens, r.logprobs) for r in results.values()] == [(r.tokens, r.logprobs) for r in expected.values()]


@pytest.mark.parametrize("case", ["vanilla", pytest.param("tova_exact", marks=pytest.mark.slow)])
def test_in_few_pages_some_prompts_wait_or_are_read_alone(model, case):
  """A pool that holds the largest request and little more: the same tokens, no page lost, nothing stalls unseen."""
  policy, _ = CASES[case]
  expected = served(model, policy=policy)
  largest = 4 * -(-(30 + 6 - W - 1) // 4)  # pages of the longest text in 4 heads
  empty = Generator(model, **SIZES, policy=policy).cache
  joint: list[int] = []
  budget = empty.fixed_bytes + (largest + 12) * empty.page_bytes
  results = served(model, calls=joint, policy=policy, pages=None, budget=budget)
  assert [r.tokens for r in results.values()] == [r.tokens for r in expected.values()]
  assert max(joint) > 1


def certain(reader, groups, free):
  """(how many of the first `groups` surely find pages, the pages that they take)."""
  claims = reader.claims(free)
  all(claims.add(*group) for group in groups)
  return claims.found, claims.taken


def test_certain_counts_pages(model):
  """What it allows fits for certain, and one page less refuses the last request."""
  generator = Generator(model, **SIZES, policy=policies.Vanilla(window=W), pages=400)
  heads = generator.memory.heads
  # 0, 1, 4 and 1 pages a head; another chain copies its last one
  groups = [(4, 1, {}), (5, 1, {}), (19, 2, {}), (8, 3, {})]
  pages = [0, heads, heads * (4 + 1), heads * (1 + 2)]
  for count in range(1, 5):
    taken = sum(pages[:count])
    assert certain(generator.reader, groups[:count], taken) == (count, taken)
    if taken:
      assert certain(generator.reader, groups[:count], taken - 1)[0] == count - 1
  exact = Generator(model, **SIZES, policy=policies.TOVA(budget=9, exact_prefill=True), pages=400).reader
  assert [certain(exact, [(8, 1, {}), (n, 1, {})], 1000)[0] for n in (12, 17)] == [2, 1]
  bounded = Generator(model, **SIZES, policy=policies.TOVA(budget=9, window=W), pages=400).reader
  pages = [certain(bounded, [(30, 1, {"budget": budget})], 1000)[1] for budget in (9, 29)]
  assert pages == [heads * -(-(budget - W - 1) // 4) for budget in (9, 29)]  # the request's budget, not the generator's


def test_a_cancelled_chain_has_the_text_of_its_tokens(model):
  """Whether texts stream or not; a key of another kind is refused before anything is queued."""
  texts = []
  for stream in (True, False):
    generator = Generator(model, **SIZES, pages=400, stream=stream, tokenizer=byte_tokenizer())
    with pytest.raises(ValueError, match=r"key: it is of kind \S*rbg"):
      generator.submit([5, 6, 7], max_new_tokens=9, key=jax.random.key(0, impl="rbg"))
    ticket = generator.submit([5, 6, 7], max_new_tokens=40, key=jax.random.key(0))
    generator.step()
    generator.cancel(ticket)
    result = generator.results[ticket]
    assert result.finish_reason == ["cancelled"] and result.tokens[0] and not generator.busy
    texts.append((result.tokens, result.text))
  assert texts[0] == texts[1] and texts[0][1][0]


def test_rows_of_a_call():
  assert [default_rows(width) for width in (1, 64, 256, 2048, 65536)] == [1, 1, 4, 32, 64]
  with pytest.raises(ValueError, match="prefill_rows=0 must be 1 or more"):
    Generator(tiny.model(), prefill_rows=0)


# The host's work beside the device's ----------------------------------------------------------------------------------


def test_one_new_token_needs_no_decode_block(model, monkeypatch):
  def never(*_, **__):
    raise AssertionError("a decode block ran")

  monkeypatch.setattr("dms_jax.generation.decode.decode_block", never)
  generator = Generator(model, pages=400, **SIZES, prefill_rows=4)
  tickets = [generator.submit(prompt, max_new_tokens=1, key=jax.random.key(0)) for prompt in prompts_of(model) * 2]
  news = generator.step()
  assert [ticket for ticket, _, tokens, _ in news for _ in tokens] == tickets and not generator.busy
  assert all(generator.results[ticket].finish_reason == ["length"] for ticket in tickets)
  assert generator.results[tickets[1]].usage[0].until()["seen"] == 19


def test_a_later_request_begins_while_a_block_runs(model):
  """Tokens of every block come with the step that ran it; what is submitted meanwhile is as if alone."""
  generator = Generator(model, pages=400, **SIZES)
  first = generator.submit([1, 2, 3], max_new_tokens=12, key=jax.random.key(0))
  generator.step()
  assert len(generator.results[first].tokens[0]) == 5  # the prompt's and four steps'
  second = generator.submit([4, 5], max_new_tokens=12, key=jax.random.key(1))
  streamed = {first: generator.results[first].tokens[0][:], second: []}
  for ticket, _, tokens, _ in generator.run():
    streamed[ticket] += tokens
  assert streamed == {ticket: result.tokens[0] for ticket, result in generator.results.items()}
  other = Generator(model, pages=400, **SIZES)
  other.submit([4, 5], max_new_tokens=12, key=jax.random.key(1))
  list(other.run())
  assert other.results[0].tokens == generator.results[second].tokens


def test_cancelling_keeps_what_others_have_to_say(model):
  generator = Generator(model, pages=400, **SIZES)
  gone, stays = (generator.submit([1, 2, n], max_new_tokens=9, key=jax.random.key(n)) for n in (3, 4))
  streamed = [token for ticket, _, tokens, _ in generator.step() if ticket == stays for token in tokens]
  generator.cancel(gone)  # a block is in flight, in which the other chain ends
  del generator.results[gone]
  assert generator.busy
  for ticket, _, tokens, _ in generator.run():
    assert ticket == stays
    streamed += tokens
  assert streamed == generator.results[stays].tokens[0] and len(generator.results[stays].tokens[0]) == 9


def test_whole_texts_equal_streamed_ones():
  cfg = tiny.config(vocab_size=257)
  model, texts = tiny.model(cfg), {}
  for stream in (True, False):
    generator = Generator(
      model, pages=400, **SIZES, stream=stream, tokenizer=byte_tokenizer(), stop=["e", "zq"], prefill_rows=2
    )
    tickets = [generator.submit("abc" * n, max_new_tokens=24, key=jax.random.key(n)) for n in range(1, 5)]
    pieces = {ticket: "" for ticket in tickets}
    for ticket, _, _, text in generator.run():
      assert stream or not pieces[ticket]  # at once
      pieces[ticket] += text
    assert pieces == {ticket: generator.results[ticket].text[0] for ticket in tickets}
    texts[stream] = pieces
  assert texts[True] == texts[False] and any(texts[True].values())


def test_shared_pages_are_those_of_the_prompt(model):
  """Two requests begun together: chains of each own its full pages once, and the row's last one each."""
  generator = Generator(model, **SIZES, policy=policies.Vanilla(window=W), pages=400, prefill_rows=2)
  for n in (19, 14):
    generator.submit(prompts_of(model)[1][:n], chains=3, max_new_tokens=1 + 4, key=jax.random.key(n))
  generator._admit()
  owners = check_pages(generator.cache)
  full, heads = (19 - W - 1) // 4 + (14 - W - 1) // 4, generator.memory.heads
  parts = 3 * sum((n - W - 1) % 4 > 0 for n in (19, 14))
  assert (owners == 3).sum() == full * heads and (owners == 1).sum() == parts * heads
  np.testing.assert_array_equal(generator.cache.seen, [19] * 3 + [14] * 3)


def test_every_program_is_compiled_once():
  """Whether or not the weights were placed on a device explicitly, as `load` does."""
  from dms_jax.cache import rows as cache_rows
  from dms_jax.generation import decode, pages, rows, together

  programs = (
    decode.decode_block, rows._first_tokens, together._whole, pages._settled, cache_rows.fork_row, rows._placed,
    rows._over,
  )  # fmt: skip
  placed = jax.device_put(tiny.model(tiny.config(num_layers=1), DMSConfig(window=W)), jax.devices()[0])
  for program in programs:
    program.clear_cache()
  generator = Generator(placed, pages=400, **SIZES, prefill_rows=2)
  for number in range(9):
    generator.submit([1 + number] * (1 + number), max_new_tokens=7, chains=1 + number % 3, key=jax.random.key(number))
  list(generator.run())
  assert [program._cache_size() for program in programs] == [1] * len(programs)


@pytest.mark.parametrize("name", ["dms", "snapkv", "quest"])
def test_layer_by_layer_is_all_layers_at_once(model, name):
  """Prompts of several requests through one compiled layer, in a pool that grows."""
  policy, numbers = CASES[name]
  layerwise._layer.clear_cache()
  runs = []
  for apart in (False, True):
    with execution.override(layers="loop", layers_apart=apart):
      runs.append(served(model, policy=policy, numbers=numbers, pages=60))
  assert layerwise._layer._cache_size()
  for whole, one in zip(*(run.values() for run in runs), strict=True):
    assert whole.tokens == one.tokens
    np.testing.assert_allclose(np.concatenate(one.logprobs), np.concatenate(whole.logprobs), atol=1e-5)
    for own, other in zip(one.usage, whole.usage, strict=True):
      jax.tree.map(np.testing.assert_array_equal, vars(own), vars(other))


def test_ctrl_c_between_the_layers_of_a_chunk_waits_for_its_end(model, monkeypatch):
  """The interrupt comes after the chunk: the generator goes on and writes what it would have written."""
  call = layerwise._layer

  def interrupting(*args):
    monkeypatch.setattr(layerwise, "_layer", call)
    signal.raise_signal(signal.SIGINT)
    return call(*args)

  with execution.override(layers="loop", layers_apart=True):
    expected = [result.tokens for result in served(model).values()]
    generator = Generator(model, **SIZES, pages=400, prefill_rows=4)
    for place, prompt in enumerate(prompts_of(model)):
      generator.submit(prompt, max_new_tokens=6, chains=1 + (place == 1), key=jax.random.key(place))
    monkeypatch.setattr(layerwise, "_layer", interrupting)
    with pytest.raises(KeyboardInterrupt):
      generator.step()
    while generator.busy:
      generator.step()
  assert [result.tokens for result in generator.results.values()] == expected
