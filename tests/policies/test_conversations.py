"""Policies through the model: generation, numbers of requests, later turns, temporaries of a step."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import dms_jax
from dms_jax import cache as caches
from dms_jax import policies
from dms_jax import testing as tiny
from dms_jax.generation.conversation import check_continues
from dms_jax.model import cached_forward, check_policy

GENERATED = {
  "streaming": policies.StreamingLLM(window=5, sinks=2),
  "tova": policies.TOVA(budget=10, exact_prefill=True),
  "h2o": policies.H2O(budget=10, exact_prefill=True),
  "h2o-cr": policies.H2O(cr=2.0, window=5, exact_prefill=True),
  "random": policies.Random(budget=10, window=3, exact_prefill=True),
  "quest": policies.Quest(budget=12, page=4, dense_layers=1),
}


@pytest.mark.parametrize("case", [c if c == "tova" else pytest.param(c, marks=pytest.mark.slow) for c in GENERATED])
def test_generation(case):
  """Both caches agree; a head never holds more than the budget; a chunked prompt is as one read token by token."""
  policy = GENERATED[case]
  model = tiny.model(gates=tiny.dms() if case in ("streaming", "tova") else None)  # which are not asked
  prompts = [tiny.tokens(model.config, 1, n, seed=n).tolist()[0] for n in (23, 9, 1)]
  run = functools.partial(
    dms_jax.generate, model, prompts, policy=policy, max_new_tokens=12, eos=False, decode_block=6, history=True
  )
  slots, masked = run(prefill_chunk=8), run(prefill_chunk=8, cache="masked")
  assert slots.tokens == masked.tokens
  np.testing.assert_allclose(slots.logprobs, masked.logprobs, atol=2e-5)
  for name in ("live", "decode_reads", "prompt_reads", "history"):
    np.testing.assert_array_equal(getattr(slots.metrics, name), getattr(masked.metrics, name))
  if case != "quest":  # whose single tokens select, and whose prompts are read densely
    single = run(prefill_chunk=1)
    assert slots.tokens == single.tokens
    np.testing.assert_array_equal(slots.metrics.live, single.metrics.live)
    np.testing.assert_array_equal(slots.metrics.prompt_reads, single.metrics.prompt_reads)
  resolved = slots.conversation.policy
  bound = np.asarray(resolved.capacity(jnp.asarray(slots.metrics.seen, jnp.int32)))
  assert (slots.metrics.live.max(axis=(0, 2)) <= bound).all() and (slots.metrics.peak <= bound).all()
  if resolved.bounded:
    np.testing.assert_array_equal(slots.metrics.live, np.broadcast_to(bound[:, None], slots.metrics.live.shape))
    capacity = int(resolved.capacity(23 + 12))
    assert run(prefill_chunk=8, capacity=capacity).tokens == slots.tokens
    with pytest.raises(ValueError, match=f"capacity={capacity - 1} is too small"):
      run(capacity=capacity - 1)
  more = dms_jax.generate(model, continue_from=slots, max_new_tokens=5, eos=False)  # under the same policy
  whole = run(max_new_tokens=17, prefill_chunk=8)
  assert [a + b for a, b in zip(slots.tokens, more.tokens, strict=True)] == whole.tokens


def test_a_conversation_keeps_to_its_policy():
  model = tiny.model()
  held = dms_jax.generate(model, [[1, 2, 3]], policy=policies.TOVA(budget=4), max_new_tokens=3)
  with pytest.raises(ValueError, match="held under TOVA cannot go on under Vanilla"):
    dms_jax.generate(model, [[4]], policy=policies.Vanilla(), continue_from=held)
  wider = dms_jax.generate(model, [[4] * 9], policy=policies.TOVA(budget=8), continue_from=held, max_new_tokens=3)
  assert (wider.metrics.live == 8).all()


def test_a_chunk_without_room_is_left_out_whole():
  model, policy = tiny.model(), policies.TOVA(budget=30)
  cache = caches.create("contiguous", model.config, batch=2, capacity=10, policy=policy, lag=1)
  take = jax.jit(cached_forward)
  tokens = tiny.tokens(model.config, 2, 8)
  out, cache = take(model, policy, cache, tokens, jnp.array([8, 2]))
  out, cache = take(model, policy, cache, tokens, jnp.array([3, 8]))
  assert out.stalled.tolist() == [True, False] and out.lengths.tolist() == [0, 8] and cache.seen.tolist() == [8, 10]


@pytest.mark.parametrize("name", ["h2o", "quest", "rkv"])
def test_a_decode_step_copies_no_cache(name):
  """Scores and summaries ride along: temporaries stay below 2 % of a cache of 8 rows of 8,192 slots.

  Pruning takes the space of six of the 16 layers, one layer at a time, whether layers are stacked or a list.
  """
  layers = 16 if name == "rkv" else 8
  cfg = tiny.config(num_layers=layers, d_model=64, d_ff=64, num_heads=8, num_kv_heads=4, head_dim=64)
  model = tiny.model(cfg).unstacked() if name == "rkv" else tiny.model(cfg)
  policy = {
    "h2o": policies.H2O(budget=8192, window=255), "quest": policies.Quest(budget=1024),
    "rkv": policies.RKV(budget=4096),
  }[name]  # fmt: skip
  policy = check_policy(model, policy)
  make = functools.partial(caches.create, "contiguous", cfg, batch=8, capacity=8192, policy=policy, lag=1)
  cache = jax.eval_shape(make)
  tokens, lengths = jax.ShapeDtypeStruct((8, 1), jnp.int32), jax.ShapeDtypeStruct((8,), jnp.int32)
  compiled = jax.jit(cached_forward, donate_argnums=2).lower(model, policy, cache, tokens, lengths).compile()
  memory, size = compiled.memory_analysis(), cache.kv.size * cache.kv.dtype.itemsize
  share = 6 / 16 if name == "rkv" else 0.02
  assert memory.temp_size_in_bytes < share * size, f"{memory.temp_size_in_bytes:,} bytes beside a cache of {size:,}"
  assert memory.alias_size_in_bytes >= size


# Later turns ----------------------------------------------------------------------------------------------------------

GATES = tiny.dms(window=3, scale=1.0, offset=0.0)
# What holds the same whether it is read in turns or in one go; its name, its gates, and the policy.
IN_ONE_GO = {
  "dms-budget": (GATES, policies.DMS(budget=9)),
  "dms-cr": (GATES, policies.DMS(cr=2.5, threshold=0.5, hard=True)),
  "rkv": (None, policies.RKV(budget=10, buffer=4, window=3, exact_prefill=True)),
  "streaming": (None, policies.StreamingLLM(window=5, sinks=2)),
}


@pytest.mark.parametrize(
  "case", ["dms-budget", "rkv", *(pytest.param(c, marks=pytest.mark.slow) for c in ("dms-cr", "streaming"))]
)
def test_turns_hold_what_one_text_holds(case):
  """Two turns: tokens of the second, and what every head holds, as if the whole text were one prompt."""
  gates, policy = IN_ONE_GO[case]
  model = tiny.model(gates=gates)
  first, second = (tiny.tokens(model.config, 1, n, seed=n).tolist()[0] for n in (17, 9))
  settings = dict(eos=False, prefill_chunk=8, decode_block=4, capacity=48)
  run = functools.partial(dms_jax.generate, model, policy=policy, max_new_tokens=6, **settings)
  turn = run([first])
  later = run([second], continue_from=turn)
  whole = run([[*first, *turn.tokens[0], *second]])
  assert later.tokens == whole.tokens
  np.testing.assert_allclose(later.logprobs, whole.logprobs, atol=2e-5)
  np.testing.assert_array_equal(later.metrics.live, whole.metrics.live)


def test_a_turn_without_a_prompt_goes_on_as_one_answer():
  """R-KV as it is by default reads each prompt densely and cuts at its end; between prompts it only prunes."""
  model, policy = tiny.model(), policies.RKV(budget=10, buffer=4, window=3)
  run = functools.partial(dms_jax.generate, model, policy=policy, eos=False, decode_block=4, capacity=48)
  prompt = tiny.tokens(model.config, 1, 17).tolist()[0]
  turn = run([prompt], max_new_tokens=7)
  more, whole = run(None, continue_from=turn, max_new_tokens=6), run([prompt], max_new_tokens=13)
  assert turn.tokens[0] + more.tokens[0] == whole.tokens[0]
  np.testing.assert_array_equal(more.metrics.live, whole.metrics.live)
  cut = run([prompt[:5]], continue_from=turn, max_new_tokens=1)  # the end of the next prompt cuts all that is held
  assert (cut.metrics.live == 10).all() and (turn.metrics.live > 10).all()


def test_what_cannot_go_on_is_refused():
  """Other tokens are held under a budget than without one, and more than a smaller budget allows."""
  tri = policies.TriAttention(budget=6, window=3)
  for held, policy, message in (
    (policies.DMS(), policies.DMS(budget=6), "under DMS without a budget cannot go on under DMS with a budget"),
    (policies.DMS(budget=6), policies.DMS(), "under DMS with a budget cannot go on under DMS without a budget"),
    (policies.DMS(budget=6), policies.Vanilla(), "held under DMS cannot go on under Vanilla"),
    (tri, policies.Vanilla(), "held under TriAttention cannot go on under Vanilla"),
    (policies.DMS(), tri, "held under DMS cannot go on under TriAttention"),
    (policies.DMS(budget=8), policies.DMS(budget=8, window=4), "window=4, but the conversation has window=3; its own"),
    (
      policies.DMS(budget=6),
      policies.DMS(budget=5),
      "holds 6 tokens a head after 8 cannot go on under DMS with 5: give",
    ),
    (
      policies.TOVA(cr=1.0),
      policies.TOVA(cr=2.0),
      "holds 6 tokens a head after 8 cannot go on under TOVA with 4: give",
    ),
  ):
    held, policy = (p if p.window == 4 else p.replace(window=3) for p in (held, policy))
    with pytest.raises(ValueError, match=message):
      check_continues(policy, held, np.array([4, 6]), np.array([8, 8]))
  for policy in (
    policies.DMS(budget=9, window=3),
    policies.RKV(budget=4, window=3),
    policies.Quest(budget=9, window=3),
  ):
    check_continues(policy, policy, np.array([6]), np.array([8]))
  model = tiny.model()
  held = dms_jax.generate(model, [[1, 2, 3, 4, 5, 6, 7]], policy=policies.TOVA(budget=6), max_new_tokens=2, eos=False)
  with pytest.raises(ValueError, match="policy: a conversation that holds 6 tokens a head after 8 cannot go on"):
    dms_jax.generate(model, [[4]], policy=policies.TOVA(budget=5), continue_from=held)
  generator = dms_jax.Generator(model, policy=policies.TOVA(budget=6), width=1)
  with pytest.raises(ValueError, match="continue_from: a conversation that holds 6 tokens a head after 8 cannot"):
    generator.submit([4], continue_from=held, budget=5)


# Budgets of requests --------------------------------------------------------------------------------------------------


def test_a_request_s_budget_decides_over_h2o_s_half():
  """The recent half is that of the request's own budget, as in `generate` under it alone; no number of a shape."""
  model = tiny.model()
  prompt = tiny.tokens(model.config, 1, 23).tolist()[0]
  settings = dict(eos=False, prefill_chunk=8, decode_block=4)
  generator = dms_jax.Generator(model, policy=policies.H2O(budget=16), width=2, page_size=4, pages=200, **settings)
  tickets = {n: generator.submit(prompt, max_new_tokens=12, budget=n) for n in (7, 30)}
  list(generator.run())
  for budget, ticket in tickets.items():
    assert generator.results[ticket].held == [budget]
  alone = dms_jax.generate(model, [prompt], policy=policies.H2O(budget=7), max_new_tokens=12, **settings)
  assert alone.conversation.policy.window == 3 and (alone.metrics.live == 7).all()
  assert generator.results[tickets[7]].tokens == alone.tokens
  with pytest.raises(ValueError, match="H2O: budget=0 tokens must be 1 or more"):
    generator.submit(prompt, budget=0)
  own = dms_jax.Generator(model, policy=policies.H2O(budget=16, window=9), width=1)  # a window that was asked for stays
  with pytest.raises(ValueError, match="H2O: budget=7 tokens must be 10 or more at window=9"):
    own.submit(prompt, budget=7)
