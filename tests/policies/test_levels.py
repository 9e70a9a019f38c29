"""DMS read at a level: rows with CRs of their own against the mask, requests, methods, refusals."""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import dms_jax
from dms_jax import execution, masks, policies
from dms_jax import testing as tiny
from dms_jax.attention import window_bias_attention
from dms_jax.config import LoRAConfig
from dms_jax.gates import gate_logits
from dms_jax.generation import decode
from dms_jax.model import check_policy, forward, unembed, update_scale
from dms_jax.policies.base import of_rows, row_numbers
from experiments.methods import method
from experiments.methods.budgets import fitted
from experiments.methods.score import masked
from tests import oracle
from tests.programs import read, whole

CRS, LENGTH, NEW = (1.5, 3.0, 6.0, 12.0), 29, 6
GATES = tiny.dms(window=3, scale=20.0, offset=0.0, elastic=(1.5, 12.0))
MODEL = tiny.model(gates=GATES)
BY_CR = tiny.model(gates=GATES, lora=LoRAConfig(rank=2, scale=8.0, by_cr=True))
PROMPTS = [tiny.tokens(MODEL.config, 1, LENGTH - 2 * i, seed=i).tolist()[0] for i in range(len(CRS))]
generate = functools.partial(  # one capacity: programs are shared
  dms_jax.generate, max_new_tokens=NEW, eos=False, decode_block=4, prefill_chunk=8, capacity=64
)


@pytest.fixture(scope="module")
def together():
  return generate(MODEL, PROMPTS, policy=policies.DMS(cr=np.array(CRS)), cache="contiguous")


@pytest.mark.parametrize("kind", ["contiguous", "masked", "paged"])
def test_rows_of_every_level_are_the_mask(kind, together):
  """Tokens and tokens held of each row: those of the whole text under the mask at its threshold; the levels differ."""
  out = (
    together if kind == "contiguous" else generate(MODEL, PROMPTS, policy=policies.DMS(cr=np.array(CRS)), cache=kind)
  )
  held_shares = []
  for row, (cr, prompt) in enumerate(zip(CRS, PROMPTS, strict=True)):
    limit = float(GATES.levels.threshold(cr))
    text = np.asarray([prompt + out.tokens[row]])
    found, logits = read(MODEL, text, limit)
    chosen = found[0].argmax(axis=-1)
    assert chosen[len(prompt) - 1 : -1].tolist() == out.tokens[row]
    held = oracle.held(oracle.about(logits[:, 0, :, :-1] > limit, GATES.lag()), GATES.window)
    np.testing.assert_array_equal(np.asarray(out.metrics.live)[:, row], held)
    held_shares.append(held.mean() / (text.shape[1] - 1))
  assert (np.diff(held_shares) < 0).all()


@pytest.mark.parametrize(
  ("kind", "budgets", "over"),
  [
    ("contiguous", None, "head"), ("paged", (9, 14, 30, 7), "head"), ("contiguous", (9, 14, 30, 7), "layer"),
    *(
      pytest.param(kind, budgets, over, marks=pytest.mark.slow)
      for kind in ("contiguous", "masked", "paged") for budgets, over in ((None, "head"), ((9, 14, 30, 7), "head"))
      if (kind, budgets) not in (("contiguous", None), ("paged", (9, 14, 30, 7)))
    ),
    pytest.param("paged", (9, 14, 30, 7), "layer", marks=pytest.mark.slow),
    pytest.param("masked", (9, 14, 30, 7), "layer", marks=pytest.mark.slow),
  ],
)  # fmt: skip
def test_a_row_is_itself_alone(kind, budgets, over):
  """To the bit, whatever CRs, budgets and prompts are beside it; other numbers compile nothing."""

  def run(order, crs, limits):
    limits = None if budgets is None else np.array(limits)
    policy = policies.DMS(cr=np.array(crs), budget=limits, limit_over=over)
    return generate(MODEL, [PROMPTS[i] for i in order], policy=policy, cache=kind)

  rows, limits = range(len(CRS)), budgets or (0,) * len(CRS)
  whole = run(rows, CRS, limits)
  programs = decode.decode_block, decode.prefill_chunk
  compiled = [program._cache_size() for program in programs]
  for row in rows:
    others = [i for i in rows if i != row]
    beside = run(
      [row, *others], [CRS[row], *(CRS[i - 1] for i in others)], [limits[row], *(limits[i - 1] for i in others)]
    )
    assert beside.tokens[0] == whole.tokens[row] and beside.logprobs[0] == whole.logprobs[row]
    np.testing.assert_array_equal(np.asarray(beside.metrics.live)[:, 0], np.asarray(whole.metrics.live)[:, row])
  assert [program._cache_size() for program in programs] == compiled


@pytest.mark.parametrize("kind", ["contiguous", "paged"])
def test_rows_have_updates_of_their_own(kind):
  """`LoRAConfig.by_cr`: tokens and tokens held of each row are the mask's; to the bit alone; nothing compiled anew."""
  run = functools.partial(generate, BY_CR, cache=kind)
  if kind == "paged":  # as on a GPU: rows are padded, gates come late, updates are joint
    gpu = dict(least_rows=5, late_gates=True, joint_updates=8, layers_apart=False, step_layers=0)
    run = execution.override(**gpu)(functools.partial(generate, BY_CR.unstacked(), cache=kind))
  out = run(PROMPTS, policy=policies.DMS(cr=np.array(CRS)))
  for row, (cr, prompt) in enumerate(zip(CRS, PROMPTS, strict=True)):
    limit, text = float(GATES.levels.threshold(cr)), np.asarray([prompt + out.tokens[row]])
    found, logits = read(BY_CR, text, limit)
    assert found[0].argmax(axis=-1)[len(prompt) - 1 : -1].tolist() == out.tokens[row]
    held = oracle.held(oracle.about(logits[:, 0, :, :-1] > limit, GATES.lag()), GATES.window)
    np.testing.assert_array_equal(np.asarray(out.metrics.live)[:, row], held)
    if cr == CRS[-1]:
      assert np.abs(found - read(MODEL, text, limit)[0]).max() > 0.1  # the updates matter
  compiled = decode.decode_block._cache_size()
  back = run(PROMPTS[::-1], policy=policies.DMS(cr=np.array(CRS[::-1])))
  assert back.tokens[::-1] == out.tokens and back.logprobs[::-1] == out.logprobs
  assert decode.decode_block._cache_size() == compiled


@pytest.mark.parametrize("layers", ["loop", "scan"])
def test_joint_updates_change_nothing(layers):
  """`Execution.joint_updates`: the same tokens, and log-probabilities but for float32's rounding."""
  found = []
  for most in (0, len(CRS)):
    with execution.override(layers=layers, joint_updates=most, layers_apart=False, step_layers=0):
      model = execution.fastest_form(BY_CR)
      found.append(generate(model, PROMPTS, policy=policies.DMS(cr=np.array(CRS)), cache="contiguous"))
  apart, joint = found
  assert joint.tokens == apart.tokens
  np.testing.assert_allclose(joint.logprobs, apart.logprobs, atol=1e-4)
  assert joint.logprobs != apart.logprobs  # another order of sums: the switch acts


def steady_texts(model, texts, crs, size):
  """(logits [T, V], tokens held [L, K]) of each text under a mask whose thresholds numpy moves block by block."""
  dms, slope = model.dms, float(model.dms.levels.slope)
  lag, window = dms.lag(), dms.window

  def attention(layer, x, q, k, v, limit):
    logits = gate_logits(model.config, dms, layer, x, q)
    bias = masks.hard_bias(masks.about_key(logits > limit, lag, False))
    return window_bias_attention(q, k, v, bias, window, None), logits

  def run(tokens, limits):
    inputs = jnp.broadcast_to(limits, (model.config.num_layers, *limits.shape))
    hidden, z = forward(model, tokens, cr=crs[row], attention=attention, attention_inputs=inputs)
    return unembed(model, hidden), z

  found, programs = [], jax.jit(run, compiler_options=tiny.QUICK)
  for row, text in enumerate(texts):
    tokens = np.pad(np.asarray([text], np.int32), ((0, 0), (0, 48 - len(text))))
    limits = np.full(48, np.float32(dms.levels.threshold(crs[row])))
    for block in range(48 // size):
      known, share = (block - 1) * size, 1 / np.float32(crs[row])
      if known > 0:
        kept = known - np.mean(np.sum(np.asarray(z)[:, 0, :, :known] > limits[:known], axis=-1))
        asked = max(known * share - window * (1 - share), known * share * 0.25)
        odds = lambda x, known=known, share=share: np.log((x + 2 * size * share) / (known - x + 2 * size * (1 - share)))
        move = slope * np.clip(6 * (odds(kept) - odds(asked)), -0.75, 0.75)
        limits[block * size : (block + 1) * size] += np.float32(move)
      logits, z = programs(tokens, limits)
    evicts = oracle.about(np.asarray(z)[:, 0, :, : len(text) - 1] > limits[: len(text) - 1], lag)
    found.append((np.asarray(logits)[0], oracle.held(evicts, window), limits))
  return found


def test_a_steady_threshold_holds_rows_to_their_ratio():
  """Contiguous, paged, masked, chunks of 8, 5, 1: the same to the token, and as under a mask of numpy's thresholds."""
  crs, outs = np.array(CRS), {}
  for kind, chunk in (("contiguous", 16), ("paged", 5), ("masked", 1)):  # 16 becomes 8
    policy = policies.DMS(cr=crs, steady=8)
    outs[kind, chunk] = generate(MODEL, PROMPTS, policy=policy, cache=kind, prefill_chunk=chunk)
  first, *others = outs.values()
  for other in others:
    assert other.tokens == first.tokens
    np.testing.assert_array_equal(other.metrics.live, first.metrics.live)
  texts = [prompt + new for prompt, new in zip(PROMPTS, first.tokens, strict=True)]
  moved = []
  for row, (logits, held, limits) in enumerate(steady_texts(MODEL, texts, crs, 8)):
    chosen = logits.argmax(axis=-1)[len(PROMPTS[row]) - 1 : len(texts[row]) - 1]
    assert chosen.tolist() == first.tokens[row]
    np.testing.assert_array_equal(np.asarray(first.metrics.live)[:, row], held)
    moved.append(np.ptp(limits))
  assert min(moved) > 0.1
  back = generate(MODEL, PROMPTS[::-1], policy=policies.DMS(cr=crs[::-1].copy(), steady=8), cache="contiguous")
  assert back.tokens[::-1] == first.tokens and back.logprobs[::-1] == first.logprobs
  generator = dms_jax.Generator(
    MODEL, width=4, page_size=4, pages=200, eos=False, decode_block=4, policy=policies.DMS(steady=8)
  )
  tickets = [generator.submit(p, max_new_tokens=NEW, cr=cr) for p, cr in zip(PROMPTS, CRS, strict=True)]
  list(generator.run())
  assert [generator.results[ticket].tokens[0] for ticket in tickets] == first.tokens
  more = [list(range(20, 24 + row)) for row in range(len(CRS))]  # a later turn, from the middle of a block on
  later = generate(MODEL, more, continue_from=outs["contiguous", 16])
  policy = policies.DMS(cr=crs, steady=8)
  whole_texts = [text + turn for text, turn in zip(texts, more, strict=True)]
  once = generate(MODEL, whole_texts, policy=policy, cache="masked", prefill_chunk=1)
  assert later.tokens == once.tokens
  np.testing.assert_array_equal(later.metrics.live, once.metrics.live)


def test_updates_grow_with_the_cr():
  """At CR 1, and under a policy without gates, the model is the original to the bit; at one CR it can be merged."""
  tokens = tiny.tokens(BY_CR.config, 2, 16)
  np.testing.assert_array_equal(whole(BY_CR, tokens)[0], whole(MODEL, tokens)[0])
  assert float(update_scale(BY_CR, policies.Vanilla().target)) == 0.0
  crs = np.array([1.0, 2.0, 12.0, 20.0], np.float32)
  np.testing.assert_allclose(update_scale(BY_CR, crs), [0.0, 8 * math.log(2) / math.log(12), 8.0, 8.0], rtol=1e-6)
  for policy in (policies.DMS(), policies.DMS(threshold=float(GATES.levels.threshold(4.0)) + 1e-6)):
    np.testing.assert_allclose(check_policy(BY_CR, policy).target, 4.0, rtol=1e-5)
  merged = BY_CR.at(3.0).merged()
  assert merged.lora is None and not merged.dms.elastic
  limit = GATES.levels.threshold(3.0)
  np.testing.assert_allclose(read(merged, tokens, 0.0)[0], read(BY_CR, tokens, limit)[0], atol=2e-4)
  with pytest.raises(ValueError, match=r"lora.by_cr: these low-rank updates depend .* use Model.at"):
    BY_CR.merged()
  with pytest.raises(ValueError, match=r"cr=13: these gates are for ratios from 1.5 to 12"):
    BY_CR.at(13)
  with pytest.raises(ValueError, match="cr=2: these gates are not for a range"):
    tiny.model().at(2)
  with pytest.raises(ValueError, match=r"lora.by_cr scales updates .* needs dms.elastic"):
    tiny.model(gates=tiny.dms(), lora=BY_CR.lora)


def test_requests_have_budgets_of_their_own():
  """`submit(cr=, budget=)` answers as `generate` with these numbers for its rows; compiling nothing for others."""
  budgets = (9, 14, 30, 7)
  together = generate(MODEL, PROMPTS, policy=policies.DMS(cr=np.array(CRS), budget=np.array(budgets)), cache="paged")
  options = dict(policy=policies.DMS(budget=20), width=4, page_size=4, eos=False, prefill_chunk=8, decode_block=4)
  generator = dms_jax.Generator(MODEL, pages=200, **options)
  assert generator.numbers == {"budget": 20, "cr": 4.0}
  generator.submit(PROMPTS[0], max_new_tokens=NEW)
  list(generator.run())
  compiled = decode.decode_block._cache_size()
  numbers = zip(PROMPTS, CRS, budgets, strict=True)
  tickets = [generator.submit(p, max_new_tokens=NEW, cr=cr, budget=budget) for p, cr, budget in numbers]
  list(generator.run())
  assert decode.decode_block._cache_size() == compiled
  results = [generator.results[ticket] for ticket in tickets]
  assert [result.tokens[0] for result in results] == together.tokens
  for result, budget in zip(results, budgets, strict=True):
    assert result.held[0] <= budget and result.usage[0].prompt_peak <= budget * result.usage[0].heads
  with pytest.raises(ValueError, match="DMS: budget=3 tokens must be 4 or more at window=3"):
    generator.submit(PROMPTS[0], budget=3)


def test_requests_have_levels_of_their_own(together):
  """`submit(cr=)` answers as `generate`, whatever the generator's own; without it, the ratio whose threshold is 0."""
  generator = dms_jax.Generator(MODEL, width=4, page_size=4, pages=200, eos=False, prefill_chunk=8, decode_block=4)
  assert generator.numbers == {"cr": 4.0}
  tickets = [generator.submit(p, max_new_tokens=NEW, cr=cr) for p, cr in zip(PROMPTS, CRS, strict=True)]
  list(generator.run())
  assert [generator.results[ticket].tokens[0] for ticket in tickets] == together.tokens
  with pytest.raises(ValueError, match=r"DMS: cr=20 must lie between 1.5 and 12"):
    generator.submit(PROMPTS[0], cr=20)
  with pytest.raises(ValueError, match=r"threshold=1.0: not a number of this DMS"):
    generator.submit(PROMPTS[0], threshold=1.0)


def test_a_shared_limit_can_go_on_with_more_alone():
  """A later turn under another shared limit: larger ones go on, a smaller one is refused."""
  policy = policies.DMS(budget=9, limit_over="layer")
  first = generate(MODEL, PROMPTS[:1], policy=policy, cache="contiguous")
  for budget in (9, 12):
    later = generate(MODEL, [[5, 6]], policy=policy.replace(budget=budget), continue_from=first)
    assert np.asarray(later.metrics.live).mean(axis=-1).max() <= budget
  with pytest.raises(ValueError, match="holds 9 tokens a head after 34 cannot go on under DMS with 8"):
    generate(MODEL, [[5, 6]], policy=policy.replace(budget=8), continue_from=first)


def test_numbers_of_levels():
  plain = check_policy(MODEL, policies.DMS())
  assert plain.cr == 4.0 and abs(float(plain.limit)) < 1e-5 and row_numbers(plain) == {"cr": 4.0}
  assert not plain.bounded and plain.data_dependent and check_policy(MODEL, plain) == plain
  raw = check_policy(MODEL, policies.DMS(threshold=2.0))
  assert raw.cr is None and raw.limit == 2.0 and row_numbers(raw) == {"threshold": 2.0}
  rows = of_rows(check_policy(MODEL, policies.DMS(cr=np.array([2.0, 6.0]))), 2, [1, 1, 0])
  np.testing.assert_array_equal(rows.limit, GATES.levels.threshold(jnp.asarray([6.0, 6.0, 2.0])))
  both = check_policy(MODEL, policies.DMS(cr=6.0, budget=9))
  assert both.bounded and int(both.capacity(50)) == 9 and row_numbers(both) == {"budget": 9, "cr": 6.0}
  hard = check_policy(MODEL, policies.DMS(cr=2.5, hard=True, threshold=math.inf))
  assert hard.bounded and int(hard.capacity(50)) == 20 and hard.limit == math.inf


@pytest.mark.parametrize(
  ("gates", "policy", "message"),
  [
    (tiny.dms(), policies.DMS(cr=4), "DMS: cr=4 needs gates trained for a range of ratios"),
    (GATES, policies.DMS(cr=13.0), "DMS: cr=13.0 must lie between 1.5 and 12"),
    (GATES, policies.DMS(cr=np.array([2.0, 1.0])), r"DMS: cr=\[2. 1.\] must lie between 1.5 and 12"),
    (GATES, policies.DMS(cr=math.nan), "DMS: cr=nan must lie between"),
    (GATES, policies.DMS(cr=4.0, threshold=1.0), "DMS: cr=4.0 sets the threshold: leave threshold=1.0 out"),
    (GATES, policies.DMS(cr="4"), "DMS: cr=4 must be a number"),
    (GATES, policies.DMS(budget=9, limit_over="row"), 'DMS: limit_over=.row. must be "head" or "layer"'),
    (GATES, policies.DMS(hard=True), "DMS: hard=True makes a limit of cr=: give it too"),
    (GATES, policies.DMS(cr=4.0, steady=0.5), "DMS: steady=0.5 must be a whole number of tokens"),
    (GATES, policies.DMS(cr=4.0, steady=8, budget=9), "DMS: steady=8 holds rows to their cr, budget="),
    (GATES, policies.DMS(threshold=1.0, steady=8), "DMS: steady holds rows to cr= of gates for a range"),
  ],
)  # fmt: skip
def test_refusals(gates, policy, message):
  with pytest.raises(ValueError, match=message):
    check_policy(tiny.model(gates=gates), policy)


def test_methods_of_one_retrofit_have_a_level_for_each_cr():
  """`--methods=dms --cr=2,4,8`: three levels of one retrofit, each a mask at its threshold; --thresholds is raw."""
  read = lambda name, cls: cls()
  build = functools.partial(method.build, ["dms"], tiny.model(), "o", [("", "elastic", MODEL, "r")], read)
  found = build(crs=(2, 4, 8))
  assert [m.label for m in found] == ["dms, CR 2", "dms, CR 4", "dms, CR 8"]
  assert [masked(m.policy, m.given) for m in found] == [float(GATES.levels.threshold(cr)) for cr in (2, 4, 8)]
  group, note = fitted(MODEL, found[0].policy, found[0].given, [20, 30])
  assert group.numbers == {"cr": [2.0, 2.0]} and not note and len({m.checkpoint for m in found}) == 3
  assert [masked(m.policy, m.given) for m in build()] == pytest.approx([0.0], abs=1e-5)
  assert [masked(m.policy, m.given) for m in build(thresholds=(-1.0, 2.0))] == [-1.0, 2.0]
  with pytest.raises(ValueError, match=r"DMS: cr=16.0 must lie between"):
    build(crs=(16,))
