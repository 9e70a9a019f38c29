"""The twin in PyTorch: whole texts and decoding by ring and archive equal ours."""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

import dms_jax
from dms_jax import testing as tiny
from dms_jax.config import RopeScaling
from dms_jax.families.huggingface import config_to_hf
from dms_jax.model import Eviction, forward, unembed

torch = pytest.importorskip("torch", reason="torch is not installed (make test-parity installs it)")

from experiments.torch_reference import attention as twin_attention  # noqa: E402
from experiments.torch_reference import decode as twin_decode  # noqa: E402
from experiments.torch_reference import model as twin_model  # noqa: E402
from tests.parity.twin import LOGITS, one_thread, quick, to_torch, twin_of  # noqa: E402, F401  (one_thread is a fixture)

# Whole texts and decoding ---------------------------------------------------------------------------------------------

LLAMA3 = RopeScaling(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=32)
SHAPES = {
  "llama": tiny.config(),
  "llama3-rope": tiny.config(rope_theta=500000.0, rope_scaling=LLAMA3, tie_embeddings=False),
  "qwen2": tiny.config(family="qwen2", qkv_bias=True, num_kv_heads=1),
  "qwen3": tiny.neuron_config(),
}


@pytest.mark.parametrize("shape", SHAPES)
def test_forward_equals_ours(shape):
  """Every family under hard decisions, with packed documents: logits and gate logits."""
  model = tiny.model(SHAPES[shape], tiny.dms(offset=0.0, scale=5.0))
  tokens, ids = tiny.tokens(model.config, 2, 70), jnp.asarray([[1] * 70, [1] * 30 + [2] * 40], jnp.int32)
  hidden, z = quick(forward)(model, tokens, segment_ids=ids, eviction=Eviction(0.5))
  weights, config, dms = twin_of(model)
  found, logits = twin_model.forward(weights, config, dms, to_torch(tokens), segments=to_torch(ids), threshold=0.5)
  want = np.asarray(unembed(model, hidden))
  np.testing.assert_allclose(found, want, rtol=0, atol=LOGITS * np.abs(want).max())
  np.testing.assert_allclose(logits, z, rtol=0, atol=1e-4)
  assert 0.2 < (logits > 0.5).float().mean() < 0.8


def test_spellings_of_config_json():
  """That of transformers 5 gives the same config as that of transformers 4, which we write."""
  for config in SHAPES.values():
    values = config_to_hf(config, "float32")
    scaling = values.pop("rope_scaling") or {"rope_type": "default"}
    other = {**values, "rope_parameters": {"rope_theta": values.pop("rope_theta"), **scaling}}
    other.pop("rope_theta")
    found, want = (twin_model.ModelConfig.from_hf(v) for v in (other, config_to_hf(config, "float32")))
    assert dataclasses.replace(found, rope_scaling=None) == dataclasses.replace(want, rope_scaling=None)
    assert (found.rope_scaling is None) == (want.rope_scaling is None) == (config.rope_scaling is None)
    positions = torch.arange(9)[None]
    for ours, theirs in zip(*(twin_model.rope_tables(c, positions) for c in (found, want)), strict=True):
      assert torch.equal(ours, theirs)


CACHES = [
  ("adapter", "head", 5, 1), ("adapter", "head", 0, 1), ("adapter", "head", 0, 0), ("adapter", "head", 3, 0),
  ("adapter", "layer", 4, 1), ("neuron", "head", 5, 1), ("neuron", "layer", 0, 1), ("neuron", "head", 2, 0),
]  # fmt: skip


GENERATE = dict(eos=False, cache="contiguous", capacity=64, decode_block=6)  # few shapes to compile


def gated_model(gate, granularity, window, shift):
  dms = tiny.dms(gate=gate, granularity=granularity, window=window, shift=shift, offset=0.0)
  return tiny.model(tiny.neuron_config() if gate == "neuron" else tiny.config(), dms)


@pytest.mark.parametrize("case", CACHES, ids=lambda case: "-".join(map(str, case)))
def test_decoding_equals_the_masked_formula(case):
  """Token by token, the ring and archive give the logits of the mask over the whole text, and hold what it says."""
  gated = gated_model(*case)
  weights, config, dms = twin_of(gated)
  tokens = to_torch(tiny.tokens(gated.config, 2, 30))
  with torch.no_grad():
    want, z = twin_model.forward(weights, config, dms, tokens)
    cache = twin_decode.Cache(config, dms, 2)
    for t, column in enumerate(tokens.T):
      logits = twin_decode.read(weights, config, dms, cache, column)
      np.testing.assert_allclose(logits, want[:, t], rtol=0, atol=LOGITS * want.abs().max())
      outside = torch.stack([twin_attention.hard_outside(x > 0, dms.shift) for x in z[..., : t + 1]])
      masks = torch.stack([twin_attention.additive_mask(x, dms.window) for x in outside])
      np.testing.assert_array_equal(cache.live(), (masks[..., t, :] == 0).sum(-1))
  assert 1 < 30 / cache.live().float().mean() < 30


@pytest.mark.parametrize("case", CACHES[::2], ids=lambda case: "-".join(map(str, case)))
def test_decoding_equals_generate(case):
  """Prompts padded on the left, two turns: tokens of both, and the tokens that each head holds."""
  gated = gated_model(*case)
  weights, config, dms = twin_of(gated)
  prompts, mask = np.array(tiny.tokens(gated.config, 3, 20)), np.ones((3, 20), bool)
  mask[0, :7], mask[2, :13] = False, False
  first = dms_jax.generate(gated, prompts, mask=mask, max_new_tokens=12, **GENERATE)
  tokens, cache = twin_decode.generate(weights, config, dms, to_torch(prompts), 12, mask=torch.from_numpy(mask))
  assert tokens.tolist() == first.tokens
  np.testing.assert_array_equal(cache.live(), first.metrics.live)

  following = np.array(tiny.tokens(gated.config, 3, 9, seed=1))
  second = dms_jax.generate(gated, following, max_new_tokens=10, continue_from=first, **{**GENERATE, "cache": None})
  turn = torch.cat([tokens[:, -1:], to_torch(following)], dim=1)
  more, cache = twin_decode.generate(weights, config, dms, turn, 10, cache=cache)
  assert more.tolist() == second.tokens
  np.testing.assert_array_equal(cache.live(), second.metrics.live)
  np.testing.assert_array_equal(cache.seen(), second.metrics.seen)


def test_a_threshold_trades_compression():
  model = gated_model(*CACHES[0])
  weights, config, dms = twin_of(model)
  prompts, counts = np.array(tiny.tokens(model.config, 3, 20)), {}
  for threshold in (-8.0, 8.0):
    out = dms_jax.generate(model, prompts, policy=dms_jax.DMS(threshold=threshold), max_new_tokens=12, **GENERATE)
    tokens, cache = twin_decode.generate(weights, config, dms, to_torch(prompts), 12, threshold=threshold)
    assert tokens.tolist() == out.tokens
    np.testing.assert_array_equal(cache.live(), out.metrics.live)
    counts[threshold] = cache.live().sum()
  assert counts[-8.0] < counts[8.0]
