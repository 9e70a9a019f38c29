"""Generation where some layers slide over a window that is larger than that of DMS."""

from __future__ import annotations

import functools

import jax
import numpy as np
import pytest

import dms_jax
from dms_jax import execution, policies
from dms_jax import testing as tiny
from dms_jax.generation.batching import Generator
from dms_jax.generation.pages import BudgetError
from tests.helpers import OTHER_FAMILIES, check_pages
from tests.oracle import held
from tests.programs import read

CONFIG, WINDOW, NEW = OTHER_FAMILIES["gemma3"], 2, 24  # its layers 0 and 2 slide over 6 tokens
PROMPTS = [np.asarray(tiny.tokens(CONFIG, 1, length, length))[0].tolist() for length in (19, 3, 11)]
SIZES = dict(width=3, page_size=2, prefill_chunk=8, decode_block=4, max_length=96, eos=False)


@pytest.fixture(scope="module")
def model():
  return tiny.model(CONFIG, tiny.dms(window=WINDOW))


@pytest.fixture(scope="module")
def outputs(model):
  return functools.cache(
    lambda kind: dms_jax.generate(model, PROMPTS, max_new_tokens=NEW, eos=False, prefill_chunk=8, cache=kind)
  )


@pytest.mark.parametrize("kind", ["masked", "contiguous", "paged"])
def test_every_cache_writes_what_the_mask_does(model, outputs, kind):
  """Tokens, tokens held by layers of both kinds, and the achieved CR, which counts all of them."""
  slides, out = np.asarray(CONFIG.sliding_layers), outputs(kind)
  for row, (prompt, new) in enumerate(zip(PROMPTS, out.tokens, strict=True)):
    text = [*prompt, *new[:-1]]
    logits, z = read(model, np.array([text]))
    assert logits[0, len(prompt) - 1 :].argmax(-1).tolist() == new
    evicted = np.concatenate([z[:, 0, :, 1:] > 0, np.zeros((*z.shape[:1], z.shape[2], 1), bool)], axis=-1)
    live = out.metrics.live[:, row]
    assert (live[slides] == CONFIG.sliding_window).all()
    np.testing.assert_array_equal(live[~slides], held(evicted[~slides], WINDOW))
  seen = np.array([len(prompt) + NEW - 1 for prompt in PROMPTS])
  assert out.metrics.achieved_cr == pytest.approx(1 / np.mean(out.metrics.live / seen[:, None]))


@pytest.mark.parametrize("size", [0, 2])
def test_programs_of_some_layers_write_the_same(model, outputs, size):
  """Chunks layer by layer, and decode steps of two layers a program."""
  with execution.override(layers="loop", layers_apart=True, step_layers=size):
    out = dms_jax.generate(model, PROMPTS, max_new_tokens=NEW, eos=False, prefill_chunk=8)
  assert out.tokens == outputs("paged").tokens
  np.testing.assert_array_equal(out.metrics.live, outputs("paged").metrics.live)


def finish(generator):
  while generator.busy:
    generator.step()
    check_pages(generator.cache)
    live = np.asarray(generator.cache.live())[np.asarray(CONFIG.sliding_layers)]
    assert (live == np.minimum(generator.cache.seen, CONFIG.sliding_window)[:, None]).all()
  assert int(generator.cache.table.pool.count) == generator.cache.pages
  return generator.results


def test_generator_preempts_and_resumes(model, outputs):
  """A pool too small for all rows: one waits on the host, and every row ends as in `generate`."""
  empty = Generator(model, **SIZES).cache
  for spare in (12, 20, 400):
    budget = empty.fixed_bytes + (empty.pages + spare) * empty.page_bytes
    generator = Generator(model, budget=budget, **SIZES)
    tickets = [generator.submit(prompt, max_new_tokens=NEW) for prompt in PROMPTS]
    try:
      results = finish(generator)
    except BudgetError:
      assert spare == 12
      continue
    assert [results[ticket].tokens[0] for ticket in tickets] == outputs("paged").tokens
    assert bool(generator.preemptions) == (spare < 400)


@pytest.mark.parametrize("policy", [policies.DMS(), policies.H2O(budget=7, window=2)], ids=["shares", "rewrites"])
def test_chains_share_no_page_of_a_sliding_layer(model, policy):
  """Chains of one prompt write what each writes alone, though a sliding layer writes into old pages."""
  generator = Generator(model, temperature=0.8, policy=policy, pages=400, **SIZES)
  keys = jax.random.split(jax.random.key(1), 3)
  together = generator.submit(PROMPTS[0], max_new_tokens=NEW, chains=3, key=keys)
  alone = [generator.submit(PROMPTS[0], max_new_tokens=NEW, key=keys[chain : chain + 1]) for chain in range(3)]
  results = finish(generator)
  assert results[together].tokens == [results[ticket].tokens[0] for ticket in alone]
  assert len(set(map(tuple, results[together].tokens))) == 3


def test_compression_leaves_sliding_layers_their_windows(model):
  """Rows give up archived tokens of the other layers alone."""
  empty = Generator(model, on_pressure="compress", **SIZES).cache
  budget = empty.fixed_bytes + (empty.pages + 24) * empty.page_bytes
  generator = Generator(model, budget=budget, on_pressure="compress", **SIZES)
  tickets = [generator.submit(prompt, max_new_tokens=NEW) for prompt in PROMPTS]
  results = finish(generator)
  assert any(results[ticket].given_up[0] for ticket in tickets)


def test_conversation_goes_on_from_disk(model, tmp_path):
  """Saved and loaded between turns, from pages of one size to those of another, as a text read at once."""
  turn = [[5, 6, 7]] * 3
  first = dms_jax.generate(model, PROMPTS, max_new_tokens=9, eos=False)
  want = dms_jax.generate(model, turn, max_new_tokens=9, eos=False, continue_from=first)
  dms_jax.save_conversation(tmp_path / "saved", first)
  loaded = dms_jax.load_conversation(tmp_path / "saved", model)
  got = dms_jax.generate(model, turn, max_new_tokens=9, eos=False, continue_from=loaded)
  assert got.tokens == want.tokens
  np.testing.assert_array_equal(got.metrics.live, want.metrics.live)
  for row, prompt in enumerate(PROMPTS):
    text = [*prompt, *first.tokens[row], *turn[row], *got.tokens[row][:-1]]
    logits, _ = read(model, np.array([text]))
    assert logits[0, -9:].argmax(-1).tolist() == got.tokens[row]
