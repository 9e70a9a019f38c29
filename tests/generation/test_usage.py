"""Tokens held and keys read by each step of each row, from both loops, against the mask in numpy."""

from __future__ import annotations

import numpy as np
import pytest

import dms_jax
from dms_jax import policies
from dms_jax import testing as tiny
from dms_jax.config import DMSConfig
from tests import oracle
from tests.programs import read

WINDOW, CHUNK, NEW = 3, 8, 14
LENGTHS = (5, 19, 12)
SETTINGS = dict(max_new_tokens=NEW, eos=False, prefill_chunk=CHUNK, decode_block=4)


@pytest.fixture(scope="module")
def model():
  return tiny.model(gates=DMSConfig(window=WINDOW))


@pytest.fixture(scope="module")
def prompts(model):
  return [tiny.tokens(model.config, 1, n, seed=n).tolist()[0] for n in LENGTHS]


def visible(evicted: np.ndarray, position: int) -> int:
  """Keys that the query at `position` sees, summed over layers and heads: j <= i and (i - j <= W or not evicted[j])."""
  j = np.arange(evicted.shape[-1])
  return int(((j <= position) & ((position - j <= WINDOW) | ~evicted)).sum())


def expected(model, prompt, tokens) -> dict:
  """What a row holds and reads by the mask of its whole text, which no cache has seen."""
  _, z = read(model, [prompt + tokens[:-1]])
  evicted = oracle.about(z[:, 0] > 0, model.dms.shift)  # [L, K, T]
  held = [visible(evicted, len(prompt) + step) for step in range(len(tokens) - 1)]
  ends = [min(start + CHUNK, len(prompt)) - 1 for start in range(0, len(prompt), CHUNK)]
  after_chunks = [visible(evicted, end) for end in ends]
  return dict(
    steps=held, prompt_held=after_chunks[-1], prompt_peak=max(after_chunks), prompt=len(prompt),
    prompt_reads=sum(visible(evicted, query) for query in range(len(prompt))),
  )  # fmt: skip


def check(usage, wanted):
  ((held, reads),) = usage.steps
  np.testing.assert_array_equal(held, wanted["steps"])
  np.testing.assert_array_equal(reads, wanted["steps"])  # a query reads what is held once it is
  for name in ("prompt", "prompt_held", "prompt_peak", "prompt_reads"):
    assert getattr(usage, name) == wanted[name], name


@pytest.mark.parametrize("kind", ["contiguous", "masked", "paged"])
def test_generate_counts_what_the_mask_says(model, prompts, kind):
  out = dms_jax.generate(model, prompts, cache=kind, **SETTINGS)
  heads = model.config.num_layers * model.config.num_kv_heads
  for row, (prompt, tokens) in enumerate(zip(prompts, out.tokens, strict=True)):
    wanted = expected(model, prompt, tokens)
    check(out.usage[row], wanted)
    assert out.seen[row] == len(prompt) + NEW - 1 == out.metrics.seen[row]
    assert out.held[row] == wanted["steps"][-1] / heads == out.metrics.held_tokens[row]
    assert out.reads[row] == sum(wanted["steps"]) / heads
    assert out.peak[row] == max(wanted["prompt_peak"], *wanted["steps"]) / heads == out.metrics.peak[row]
    assert out.usage[row].until(5)["reads"] == sum(wanted["steps"][:4]) / heads


def test_generator_counts_what_the_mask_says(model, prompts):
  generator = dms_jax.Generator(model, width=3, prefill_rows=2, page_size=4, pages=400, max_length=96, eos=False,
                                prefill_chunk=CHUNK, decode_block=4)  # fmt: skip
  tickets = [generator.submit(prompt, max_new_tokens=NEW) for prompt in prompts]
  for _ in generator.run():
    pass
  for ticket, prompt in zip(tickets, prompts, strict=True):
    result = generator.results[ticket]
    check(result.usage[0], expected(model, prompt, result.tokens[0]))


def test_rows_that_end_early_stop_counting(model, prompts):
  free = dms_jax.generate(model, prompts, **SETTINGS)
  last = next(token for token in free.tokens[0][1:] if token not in free.tokens[1])
  out = dms_jax.generate(model, prompts, **SETTINGS | dict(eos=[last]))
  short = len(out.tokens[0])
  assert 1 < short < NEW and len(out.tokens[1]) == NEW
  for row, usage in enumerate(out.usage):
    assert len(usage.steps[0][0]) == len(out.tokens[row]) - 1
    assert usage.until() == free.usage[row].until(len(out.tokens[row]))


@pytest.mark.parametrize("new", [0, 1])
def test_without_decode_steps(model, prompts, new):
  out = dms_jax.generate(model, prompts, **SETTINGS | dict(max_new_tokens=new))
  assert out.seen == list(LENGTHS) and out.reads == [0] * 3
  assert out.held == out.metrics.held_tokens.tolist() and out.peak == out.metrics.peak.tolist()


def test_later_turns_count_from_what_is_held(model, prompts):
  """A row that goes on without a prompt, and rows with one."""
  whole = dms_jax.generate(model, prompts, **SETTINGS)
  half = dms_jax.generate(model, prompts, **SETTINGS | dict(max_new_tokens=6))
  rest = dms_jax.generate(model, None, continue_from=half, **SETTINGS | dict(max_new_tokens=NEW - 6))
  assert rest.tokens == [tokens[6:] for tokens in whole.tokens]
  for row, usage in enumerate(rest.usage):
    (before,), (after,), (both,) = half.usage[row].steps, usage.steps, whole.usage[row].steps
    np.testing.assert_array_equal(np.concatenate([before, after], axis=1), both)
    assert usage.sampled == 0 and usage.prompt == half.seen[row] and rest.seen[row] == whole.seen[row]
    assert usage.prompt_held == before[0][-1]


@pytest.mark.parametrize("name", ["Quest", "TOVA"])
def test_other_policies_count_alike_in_both_loops(model, prompts, name):
  policy = {"Quest": policies.Quest(page=4, cr=2.0, dense_layers=1), "TOVA": policies.TOVA(budget=9)}[name]
  out = dms_jax.generate(model, prompts, policy=policy, cache="masked", **SETTINGS)
  generator = dms_jax.Generator(
    model, policy=policy, width=3, prefill_rows=2, page_size=4, pages=400, max_length=96, eos=False,
    prefill_chunk=CHUNK, decode_block=4,
  )  # fmt: skip
  tickets = [generator.submit(prompt, max_new_tokens=NEW) for prompt in prompts]
  for _ in generator.run():
    pass
  for row, ticket in enumerate(tickets):
    result = generator.results[ticket]
    assert result.tokens == [out.tokens[row]]
    np.testing.assert_array_equal(result.usage[0].steps, out.usage[row].steps)
    assert result.usage[0].until() == out.usage[row].until()
    if name == "Quest":
      assert out.reads[row] < sum(out.usage[row].steps[0][0]) / out.usage[row].heads  # it holds more than it reads
