"""Against the outputs of NVIDIA's PyTorch DMS on a tiny random Qwen3, W = 16 (`tests/goldens`), both gates, float32.

Golden tokens are fed rather than our own: one of the sets holds a near tie. Logits agree to 4e-5 in float32.
"""

from __future__ import annotations

import functools
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from dms_jax import cache as caches
from dms_jax import policies
from dms_jax import testing as tiny
from dms_jax.config import DMSConfig, ModelConfig
from dms_jax.model import Eviction, Model, cached_forward, forward, last_logits, unembed
from dms_jax.params import map_table, param_table
from tests import oracle

GOLDENS = Path(__file__).parent / "goldens"
PROMPT, STEPS, TOTAL, WINDOW = 61, 49, 110, 16
ATOL = 1e-4
GATES = {"separate_head": "adapter", "neuron_head": "neuron"}
step = jax.jit(cached_forward, compiler_options=tiny.QUICK)


@functools.cache
def load(kind: str) -> tuple[Model, dict[str, np.ndarray]]:
  raw = json.loads((GOLDENS / f"{kind}.config.json").read_text())
  cfg = ModelConfig(
    "qwen3", raw["num_hidden_layers"], raw["hidden_size"], raw["intermediate_size"], raw["num_attention_heads"],
    raw["num_key_value_heads"], raw["head_dim"], raw["vocab_size"], raw["max_position_embeddings"], raw["rope_theta"],
    None, raw["rms_norm_eps"], raw["tie_word_embeddings"], qk_norm=True, eos_token_ids=(raw["eos_token_id"],),
  )  # fmt: skip
  dms = DMSConfig(GATES[kind], raw["dms_window_size"], raw["dms_alpha_scale"], raw["dms_initial_alpha_offset"], shift=1)
  state = load_file(GOLDENS / f"{kind}.safetensors")

  def leaf(_, spec):
    if not spec.layered:
      return jnp.asarray(state[spec.hf_name]).reshape(spec.shape)
    layers = [state[spec.hf_name.format(layer=i)].reshape(spec.shape[1:]) for i in range(cfg.num_layers)]
    return jnp.asarray(np.stack(layers))

  golden = dict(np.load(GOLDENS / f"{kind}_f32.npz"))
  return Model(map_table(leaf, param_table(cfg, dms)), cfg, dms), golden


def feed(model, policy, cache, tokens, chunk):
  """Takes tokens [B, T] in chunks; returns logits [B, T, V], gate logits [L, B, K, T], live after each chunk, cache."""
  logits, gates, live = [], [], []
  for start in range(0, tokens.shape[1], chunk):
    part = jnp.asarray(tokens[:, start : start + chunk], jnp.int32)
    count = part.shape[1]
    part = jnp.pad(part, ((0, 0), (0, chunk - count)))
    out, cache = step(model, policy, cache, part, jnp.full(len(tokens), count, jnp.int32))
    assert not out.stalled.any()
    logits.append(unembed(model, out.hidden)[:, :count])
    gates.append(out.logits[..., :count])
    live.append(np.asarray(out.seen.live))
  return np.concatenate(logits, 1), np.concatenate(gates, -1), np.stack(live), cache


@pytest.mark.parametrize("kind", GATES)
def test_whole_text(kind):
  model, golden = load(kind)
  hidden, z = forward(model, jnp.asarray(golden["input_ids"], jnp.int32), eviction=Eviction(threshold=0.0))
  np.testing.assert_array_equal(np.asarray(z > 0), golden["decisions"][..., :PROMPT] > 0)
  np.testing.assert_allclose(unembed(model, hidden), golden["prefill_logits"], atol=ATOL, rtol=0)


@pytest.mark.parametrize("kind", GATES)
@pytest.mark.parametrize("kind_of_cache", ["masked", "contiguous"])
@pytest.mark.parametrize("chunk", [PROMPT, 13, 1])
def test_prefill_and_decode(kind, kind_of_cache, chunk):
  """Logits, decisions, lengths at all 50 steps and the compression ratio at T = 110, whatever the chunks."""
  model, golden = load(kind)
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
  model, golden = load(kind)
  policy = policies.Vanilla(window=WINDOW)
  cache = caches.create(kind_of_cache, model.config, batch=2, capacity=TOTAL, window=WINDOW, lag=1)
  logits, _, _, cache = feed(model, policy, cache, golden["input_ids"], PROMPT)
  np.testing.assert_allclose(logits, golden["noevict_prefill_logits"], atol=ATOL, rtol=0)
  token = jnp.argmax(logits[:, -1], -1).astype(jnp.int32)
  for i in range(STEPS):
    np.testing.assert_array_equal(token, golden["noevict_tokens"][:, i])
    out, cache = step(model, policy, cache, token[:, None], jnp.ones(2, jnp.int32))
    logits = last_logits(model, out)
    np.testing.assert_allclose(logits, golden["noevict_decode_logits"][:, i], atol=ATOL, rtol=0)
    token = jnp.argmax(logits, -1).astype(jnp.int32)
    assert (out.seen.live == PROMPT + i + 1).all()


@pytest.mark.parametrize("kind", GATES)
def test_left_padding(kind):
  """Seven pads in front of row 0: real positions match the reference, the row alone, and its cached form."""
  model, golden = load(kind)
  ids, mask = jnp.asarray(golden["leftpad_ids"], jnp.int32), golden["leftpad_mask"].astype(bool)
  hidden, _ = forward(
    model,
    ids,
    positions=jnp.asarray(golden["leftpad_position_ids"], jnp.int32),
    segment_ids=jnp.asarray(mask, jnp.int32),
    eviction=Eviction(threshold=0.0),
  )
  logits = np.asarray(unembed(model, hidden))
  np.testing.assert_allclose(logits[mask], golden["leftpad_prefill_logits"][mask], atol=ATOL, rtol=0)
  without_positions, _ = forward(model, ids, segment_ids=jnp.asarray(mask, jnp.int32), eviction=Eviction(threshold=0.0))
  np.testing.assert_array_equal(hidden[mask], without_positions[mask])
  pads = int((~mask[0]).sum())
  cache = caches.create("contiguous", model.config, batch=1, capacity=TOTAL, window=WINDOW, lag=1)
  alone, *_ = feed(model, policies.DMS(window=WINDOW), cache, ids[:1, pads:], PROMPT - pads)
  np.testing.assert_allclose(alone[0], golden["leftpad_prefill_logits"][0, pads:], atol=ATOL, rtol=0)


@pytest.mark.parametrize("kind", GATES)
def test_oracle_agrees(kind):
  """The float64 oracle of the other tests, written from the formulas alone, reproduces the reference too."""
  model, golden = load(kind)
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
