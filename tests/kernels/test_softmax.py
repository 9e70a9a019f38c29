"""Soft-capping of scores, attention sinks: XLA equals the oracles; the kernels refuse them by name."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import decode, prefill, window_bias
from pallas_kernels.common import compat
from pallas_kernels.decode import gpu as decode_gpu
from pallas_kernels.decode import ref as decode_ref
from pallas_kernels.prefill import NEVER
from pallas_kernels.prefill import gpu as prefill_gpu
from pallas_kernels.prefill import ref as prefill_ref
from pallas_kernels.window_bias import gpu as window_bias_gpu
from pallas_kernels.window_bias import ref as window_bias_ref
from tests.kernels.suite import assert_close, needs_mosaic_gpu, normal

CAP, B, T, N, K, H = 1.5, 2, 9, 4, 2, 64


@pytest.fixture
def arrays():
  rng = np.random.default_rng(0)
  return normal(rng, B, T, N, H, scale=2.0), normal(rng, B, T, K, H), normal(rng, B, T, K, H)


def cases(q, k, v):
  """By operation: (dispatched, oracle, Hopper kernel, arguments)."""
  heads = lambda x: jnp.swapaxes(x, 1, 2)
  position = jnp.broadcast_to(jnp.arange(T, dtype=jnp.int32), (B, T))
  keys = jnp.broadcast_to(position[:, None], (B, K, T))
  kv, lengths = jnp.concatenate([heads(k), heads(v)], -1)[None], jnp.full((B, K), T, jnp.int32)
  of_prefill = q, heads(k), heads(v), position, keys, jnp.full_like(keys, NEVER)
  return {
    "decode": (decode.decode_attention, decode_ref, decode_gpu, (q[:, -1], kv, 0, lengths)),
    "prefill": (prefill.prefill_attention, prefill_ref, prefill_gpu, of_prefill),
    "window_bias": (window_bias.window_bias_attention, window_bias_ref, window_bias_gpu, (q, k, v, None, 0, None)),
  }


OPTIONS = {"softcap": CAP, "sinks": jnp.asarray([-1.0, 0.5, 4.0, 30.0])}  # of 30: nothing else is seen
REASONS = {"softcap": r"soft-capping of scores at 1\.5", "sinks": "attention sinks"}


@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("name", ["decode", "prefill", "window_bias"])
def test_softmax(arrays, name, option):
  """And what the operation returns besides: log-sum-exp and mass."""
  attend, ref, _, args = cases(*arrays)[name]
  more = {"decode": dict(lse=True, mass=True), "prefill": dict(lse=True, query_weights=jnp.ones((B, T)))}.get(name, {})
  options = {option: OPTIONS[option], **more}
  results, plain = attend(*args, **options), attend(*args)
  expected = getattr(ref, f"{name}_attention")(*args, **options)
  for ours, theirs in zip(*map(jax.tree.leaves, (results, expected)), strict=True):
    assert_close(ours, theirs, "float32")
  assert np.abs(jax.tree.leaves(results)[0] - plain).max() > 0.01


def test_gradients_of_sinks(arrays):
  """Those of one more key, without a value, whose score each head's sink is."""
  q, k, v = arrays
  weights = normal(np.random.default_rng(1), B, T, N, H)

  def by_formula(q, k, v, sinks):
    grouped = q.reshape(B, T, K, N // K, H)
    scores = jnp.einsum("btkgh,bskh->bkgts", grouped, k) * H**-0.5
    scores = jnp.where(jnp.tri(T, dtype=bool), scores, -jnp.inf)
    sink = jnp.broadcast_to(sinks.reshape(K, N // K, 1, 1), (*scores.shape[:-1], 1))
    shares = jax.nn.softmax(jnp.concatenate([scores, sink], axis=-1), axis=-1)[..., :-1]
    return jnp.einsum("bkgts,bskh->btkgh", shares, v).reshape(q.shape)

  ours = lambda q, k, v, sinks: window_bias.window_bias_attention(q, k, v, None, 0, None, sinks=sinks)
  found, expected = (
    jax.grad(lambda *args, attend=attend: jnp.sum(attend(*args) * weights), argnums=(0, 1, 2, 3))(
      q, k, v, OPTIONS["sinks"]
    )
    for attend in (ours, by_formula)
  )
  for one, theirs in zip(found, expected, strict=True):
    assert np.abs(theirs).max() > 1e-3
    assert_close(one, theirs, "float32")


@needs_mosaic_gpu
@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("name", ["decode", "prefill", "window_bias"])
def test_kernels_refuse_them(arrays, name, option):
  _, _, gpu, args = cases(*arrays)[name]
  with compat.assume_hopper(), pytest.raises(NotImplementedError, match=REASONS[option]):
    getattr(gpu, f"{name}_attention")(*args, **{option: OPTIONS[option]})
