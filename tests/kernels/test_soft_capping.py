"""Soft-capping of scores: XLA equals the oracles; the kernels refuse it by name."""

from __future__ import annotations

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


@pytest.mark.parametrize("name", ["decode", "prefill", "window_bias"])
def test_soft_capping(arrays, name):
  attend, ref, _, args = cases(*arrays)[name]
  operation = f"{name}_attention"
  out = attend(*args, softcap=CAP)
  assert_close(out, getattr(ref, operation)(*args, softcap=CAP), "float32")
  assert np.abs(out - attend(*args)).max() > 0.01


@needs_mosaic_gpu
@pytest.mark.parametrize("name", ["decode", "prefill", "window_bias"])
def test_kernels_refuse_it(arrays, name):
  _, _, gpu, args = cases(*arrays)[name]
  with compat.assume_hopper(), pytest.raises(NotImplementedError, match=r"soft-capping of scores at 1\.5"):
    getattr(gpu, f"{name}_attention")(*args, softcap=CAP)
