"""Against the outputs of NVIDIA's PyTorch DMS on a tiny random Qwen3, both gates, float32.

Golden tokens are fed rather than our own: one of the sets holds a near tie. Logits agree to 4e-5 in float32.
"""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest

from dms_jax import cache as caches
from dms_jax import policies
from dms_jax.model import Eviction
from tests import oracle
from tests.helpers import GATES, load_golden
from tests.programs import last_logits, step, unembed, whole

PROMPT, STEPS, TOTAL, WINDOW = 61, 49, 110, 16
ATOL = 1e-4


def feed(model, policy, cache, tokens, chunk):
  """Takes tokens [B, T] in chunks; returns logits [B, T, V], gate logits [L, B, K, T], live after each chunk, cache."""
  logits, gates, live = [], [], []
  for start in range(0, tokens.shape[1], chunk):
    part = np.asarray(tokens[:, start : start + chunk], np.int32)
    count = part.shape[1]
    part = np.pad(part, ((0, 0), (0, chunk - count)))
    out, cache = step(model, policy, cache, part, np.full(len(tokens), count, np.int32))
    assert not np.asarray(out.stalled).any()
    logits.append(np.asarray(unembed(model, out.hidden))[:, :count])
    gates.append(np.asarray(out.logits)[..., :count])
    live.append(np.asarray(out.seen.live))
  return np.concatenate(logits, 1), np.concatenate(gates, -1), np.stack(live), cache


@pytest.mark.parametrize("kind", GATES)
def test_whole_text(kind):
  model, golden = load_golden(kind)
  hidden, z = whole(model, jnp.asarray(golden["input_ids"], jnp.int32), eviction=Eviction(threshold=0.0))
  np.testing.assert_array_equal(np.asarray(z > 0), golden["decisions"][..., :PROMPT] > 0)
  np.testing.assert_allclose(unembed(model, hidden), golden["prefill_logits"], atol=ATOL, rtol=0)


@pytest.mark.parametrize("kind", GATES)
@pytest.mark.parametrize("kind_of_cache", ["masked", "contiguous"])
@pytest.mark.parametrize("chunk", [PROMPT, 13, 1])
def test_prefill_and_decode(kind, kind_of_cache, chunk):
  """Logits, decisions, lengths at all 50 steps and the compression ratio at T = 110, whatever the chunks."""
  model, golden = load_golden(kind)
  cache = caches.create(kind_of_cache, model.config, batch=2, capacity=TOTAL, window=WINDOW, lag=1)
  policy = policies.DMS(window=WINDOW)
  logits, gates, live, cache = feed(model, policy, cache, golden["input_ids"], chunk)
  np.testing.assert_allclose(logits, golden["prefill_logits"], atol=ATOL, rtol=0)
  lengths = [live[-1]]
  logits, more, live, cache = feed(model, policy, cache, golden["tokens"][:, :STEPS], 1)
  np.testing.assert_allclose(logits, golden["decode_logits"], atol=ATOL, rtol=0)
  np.testing.assert_array_equal(np.concatenate([gates, more], -1) > 0, golden["decisions"] > 0)
  lengths = np.concatenate([np.stack(lengths), live])
  np.testing.assert_array_equal(lengths.reshape(STEPS + 1, model.config.num_layers, -1), golden["cache_lengths"])
  np.testing.assert_array_equal(cache.live(), lengths[-1])
  held = np.mean(np.asarray(cache.live()) / TOTAL)
  np.testing.assert_allclose(1 / held, golden["cr"], rtol=1e-6)


@pytest.mark.parametrize("kind", GATES)
@pytest.mark.parametrize("kind_of_cache", ["masked", "contiguous"])
def test_eviction_off(kind, kind_of_cache):
  """A dense policy on a model with gates, which then follows its own (greedy) tokens."""
  model, golden = load_golden(kind)
  policy = policies.Vanilla(window=WINDOW)
  cache = caches.create(kind_of_cache, model.config, batch=2, capacity=TOTAL, window=WINDOW, lag=1)
  logits, _, _, cache = feed(model, policy, cache, golden["input_ids"], PROMPT)
  np.testing.assert_allclose(logits, golden["noevict_prefill_logits"], atol=ATOL, rtol=0)
  token = np.argmax(logits[:, -1], -1).astype(np.int32)
  for i in range(STEPS):
    np.testing.assert_array_equal(token, golden["noevict_tokens"][:, i])
    out, cache = step(model, policy, cache, token[:, None], np.ones(2, np.int32))
    logits = np.asarray(last_logits(model, out))
    np.testing.assert_allclose(logits, golden["noevict_decode_logits"][:, i], atol=ATOL, rtol=0)
    token = np.argmax(logits, -1).astype(np.int32)
    assert (np.asarray(out.seen.live) == PROMPT + i + 1).all()


@pytest.mark.parametrize("kind", GATES)
def test_left_padding(kind):
  """Seven pads before row 0: real positions match the reference, the row alone, and the row through a cache."""
  model, golden = load_golden(kind)
  ids, mask = np.asarray(golden["leftpad_ids"], np.int32), golden["leftpad_mask"].astype(bool)
  hidden, _ = whole(
    model,
    ids,
    positions=jnp.asarray(golden["leftpad_position_ids"], jnp.int32),
    segment_ids=jnp.asarray(mask, jnp.int32),
    eviction=Eviction(threshold=0.0),
  )
  logits = np.asarray(unembed(model, hidden))
  np.testing.assert_allclose(logits[mask], golden["leftpad_prefill_logits"][mask], atol=ATOL, rtol=0)
  without_positions, _ = whole(model, ids, segment_ids=jnp.asarray(mask, jnp.int32), eviction=Eviction(threshold=0.0))
  np.testing.assert_array_equal(np.asarray(hidden)[mask], np.asarray(without_positions)[mask])
  pads = int((~mask[0]).sum())
  cache = caches.create("contiguous", model.config, batch=1, capacity=TOTAL, window=WINDOW, lag=1)
  alone, *_ = feed(model, policies.DMS(window=WINDOW), cache, ids[:1, pads:], PROMPT - pads)
  np.testing.assert_allclose(alone[0], golden["leftpad_prefill_logits"][0, pads:], atol=ATOL, rtol=0)


@pytest.mark.parametrize("kind", GATES)
def test_oracle_agrees(kind):
  """The float64 oracle of the other tests, written from the formulas, reproduces the reference."""
  model, golden = load_golden(kind)
  weights = {
    **{f"layers/{n}": w for n, w in model.params["layers"].items()},
    **{n: w for n, w in model.params.items() if n != "layers"},
  }
  tokens = np.concatenate([golden["input_ids"], golden["tokens"][:, :STEPS]], 1)
  for row in range(2):
    logits, gates, seen = oracle.forward(weights, model.config, model.dms, tokens[row], window=WINDOW)
    expected = np.concatenate([golden["prefill_logits"], golden["decode_logits"]], 1)[row]
    np.testing.assert_allclose(logits, expected, atol=ATOL, rtol=0)
    np.testing.assert_array_equal(gates > 0, golden["decisions"][:, row] > 0)
    for head in range(2):
      lengths = golden["cache_lengths"][:, :, 2 * row + head]
      np.testing.assert_array_equal(seen[:, head].sum(-1)[:, PROMPT - 1 :].T, lengths)
      for layer in range(3):
        history = oracle.slot_reuse(golden["decisions"][layer, row, head] > 0, WINDOW, 1)
        assert [len(h) for h in history[PROMPT - 1 :]] == list(lengths[:, layer])
