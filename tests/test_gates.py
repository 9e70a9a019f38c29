"""Eviction gates: what they read, in which precision, and the borrowed channel."""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from dms_jax import testing as tiny
from dms_jax.config import DMSConfig
from dms_jax.gates import clear_neuron, gate_logits, step_gate_logits
from dms_jax.model import Eviction, forward

CONFIG = tiny.config(num_heads=6, num_kv_heads=2)
RNG = np.random.default_rng(0)
X = RNG.standard_normal((2, 5, CONFIG.d_model)).astype(np.float32)
Q = RNG.standard_normal((2, 5, 6, 16)).astype(np.float32)
LAYER = {
  "dms_norm": jnp.asarray(RNG.standard_normal(CONFIG.d_model), jnp.float32),
  "dms_proj": jnp.asarray(RNG.standard_normal((2, CONFIG.d_model)), jnp.float32),
}


def test_neuron_is_the_last_channel_of_the_first_head_of_a_group():
  logits = gate_logits(CONFIG, DMSConfig("neuron"), {}, jnp.asarray(X), jnp.asarray(Q))
  np.testing.assert_allclose(logits, np.moveaxis(100 * Q[:, :, [0, 3], -1] - 5, 1, 2), rtol=1e-6)


def test_adapter_is_a_projection_of_the_normed_residual():
  logits = gate_logits(CONFIG, DMSConfig("adapter", scale=7.0, offset=2.0), LAYER, jnp.asarray(X), jnp.asarray(Q))
  x = X.astype(np.float64)
  normed = x / np.sqrt((x**2).mean(-1, keepdims=True) + CONFIG.rms_norm_eps) * np.asarray(LAYER["dms_norm"])
  expected = 7 * np.einsum("btd,kd->bkt", normed, np.asarray(LAYER["dms_proj"])) - 2
  np.testing.assert_allclose(logits, expected, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_a_fused_adapter_is_the_same(dtype):
  """As a decode step on a GPU computes it."""
  x, q = jnp.asarray(X[:, :1], dtype), jnp.asarray(Q[:, :1])
  expected = gate_logits(CONFIG, DMSConfig("adapter"), LAYER, x, q)
  logits = gate_logits(CONFIG, DMSConfig("adapter"), LAYER, x, q, fused=True)
  assert logits.dtype == jnp.float32
  np.testing.assert_allclose(logits, expected, rtol=1e-5, atol=1e-3)


@pytest.mark.parametrize("granularity", ["head", "layer"])
def test_adapters_of_all_layers_at_once(granularity):
  """Each layer's own x with its own weights."""
  dms, layers = DMSConfig("adapter", granularity=granularity), [LAYER, {n: w[..., ::-1] for n, w in LAYER.items()}]
  x = jnp.asarray(RNG.standard_normal((2, 3, 1, CONFIG.d_model)), jnp.bfloat16)
  logits = step_gate_logits(CONFIG, dms, layers, x)
  q = jnp.zeros((3, 1, 6, 16))
  expected = [gate_logits(CONFIG, dms, layer, of_layer, q) for layer, of_layer in zip(layers, x, strict=True)]
  assert logits.dtype == jnp.float32
  np.testing.assert_allclose(logits, jnp.stack(expected), rtol=1e-5, atol=1e-3)


@pytest.mark.parametrize("gate", ["adapter", "neuron"])
def test_layer_granularity_follows_head_0(gate):
  head, layer = (
    gate_logits(CONFIG, DMSConfig(gate, granularity=g), LAYER, jnp.asarray(X), jnp.asarray(Q))
    for g in ("head", "layer")
  )
  np.testing.assert_array_equal(layer, np.repeat(head[:, :1], 2, axis=1))


@pytest.mark.parametrize("gate", ["adapter", "neuron"])
def test_float32_whatever_the_model(gate):
  """In a bfloat16 model the logits are float32 of what bfloat16 holds: no rounding of the product."""
  x, q = jnp.asarray(X, jnp.bfloat16), jnp.asarray(Q)
  logits = gate_logits(CONFIG, DMSConfig(gate), LAYER, x, q)
  exact = gate_logits(CONFIG, DMSConfig(gate), LAYER, x.astype(jnp.float32), q)
  assert logits.dtype == jnp.float32
  np.testing.assert_array_equal(logits, exact)


def test_clear_neuron():
  cleared = np.asarray(clear_neuron(CONFIG, jnp.asarray(Q)))
  expected = Q.copy()
  expected[:, :, [0, 3], -1] = 0
  np.testing.assert_array_equal(cleared, expected)


def test_the_borrowed_channel_never_attends():
  """With eviction off too: scaling the borrowed row of the projection changes decisions and nothing else."""
  cfg = tiny.config()
  model, tokens = tiny.model(cfg, tiny.dms(gate="neuron")), tiny.tokens(cfg, 1, 12)
  layers = dict(model.params["layers"])
  layers["q_proj"] = layers["q_proj"].at[:, :: cfg.group_size, -1].multiply(3.0)
  scaled = model.replace(params={**model.params, "layers": layers})
  (hidden, z), (hidden_scaled, z_scaled) = (forward(m, tokens) for m in (model, scaled))
  np.testing.assert_array_equal(hidden, hidden_scaled)
  np.testing.assert_allclose(z_scaled + 5, 3 * (z + 5), rtol=1e-4, atol=1e-3)
  plain, _ = forward(dataclasses.replace(model, dms=None), tokens)
  assert np.abs(plain - hidden).max() > 1e-4


def test_fresh_gates_keep_everything():
  """A projection of zeros gives -offset everywhere: nothing is evicted before training."""
  model = tiny.model(gates=tiny.dms(window=0))
  layers = dict(model.params["layers"], dms_proj=jnp.zeros_like(model.params["layers"]["dms_proj"]))
  model, tokens = model.replace(params={**model.params, "layers": layers}), tiny.tokens(model.config, 1, 12)
  dense, _ = forward(model, tokens)
  hidden, z = forward(model, tokens, eviction=Eviction(threshold=0.0))
  np.testing.assert_array_equal(z, -5.0)
  np.testing.assert_array_equal(hidden, dense)
