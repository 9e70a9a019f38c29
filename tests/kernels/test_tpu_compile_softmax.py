"""Attention sinks, soft-capped scores: compiled for absent TPUs (make test-tpu)."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import pytest

from pallas_kernels.decode import decode_attention
from pallas_kernels.prefill import prefill_attention
from pallas_kernels.window_bias import window_bias_attention
from tests.tpu import devices

pytestmark = pytest.mark.tpu
pytest.importorskip("libtpu", reason="libtpu is not installed (make test-tpu installs it)")

# query heads, KV heads, head size, window, cap; those without a cap have sinks
MODELS = {
  "gpt-oss": (64, 8, 64, 127, None),
  "gemma-2-27b": (32, 16, 128, 4095, 50.0),
  "gemma-2-2b": (8, 4, 256, 4095, 50.0),
}


@pytest.fixture(scope="module", params=["v4:2x2x1", "v5e:2x2"])  # the least vector memory; the most common
def arrays(request):
  """Makes arguments on a device of each topology."""
  sharding = jax.sharding.SingleDeviceSharding(devices(request.param)[0])
  return lambda *shape, dtype=jnp.bfloat16: jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)


def check(call, *args, names):
  """The program has the kernels: what they refuse XLA would do."""
  program = jax.jit(call).lower(*args).compile()
  text, memory = program.as_text(), program.memory_analysis()
  held, temporary = memory.argument_size_in_bytes, memory.temp_size_in_bytes
  print(f"{names[0]}: arguments {held / 2**20:,.1f} MiB, temporaries {temporary / 2**20:,.1f} MiB a device")
  assert "tpu_custom_call" in text and all(name in text for name in names)
  return held, temporary


@pytest.mark.parametrize("name", ["gpt-oss", "gemma-2-27b"])
def test_decode_attention_compiles(arrays, name):
  """With the mass of slots."""
  n, k, h, _, softcap = MODELS[name]

  def step(q, kv, layer, lengths, sinks):
    return decode_attention(q, kv, layer, lengths, lse=True, mass=True, softcap=softcap, sinks=sinks)

  ints = partial(arrays, dtype=jnp.int32)
  args = arrays(8, n, h), arrays(4, 8, k, 8192, 2 * h), ints(), ints(8, k), None if softcap else arrays(n)
  held, temporary = check(step, *args, names=["decode_"])
  assert temporary < 0.1 * held


@pytest.mark.parametrize("name", ["gpt-oss", "gemma-2-27b"])
def test_prefill_attention_compiles(arrays, name):
  n, k, h, _, softcap = MODELS[name]

  def read(*args):
    *args, sinks = args
    return prefill_attention(*args, lse=True, softcap=softcap, sinks=sinks)

  keys, bounds = arrays(1, k, 8192, h), arrays(1, k, 8192, dtype=jnp.int32)
  args = arrays(1, 4096, n, h), keys, keys, arrays(1, 4096, dtype=jnp.int32), bounds, bounds
  held, temporary = check(read, *args, None if softcap else arrays(n), names=["prefill_"])
  # A v4 also holds the output in float32, times the share that sinks leave.
  assert temporary < 7 * held


@pytest.mark.parametrize("name", MODELS)
def test_window_bias_attention_compiles(arrays, name):
  """Forward and gradients, of sinks too."""
  n, k, h, window, softcap = MODELS[name]

  def run(differentiated, dout):
    def attend(q, k, v, bias, sinks):
      return window_bias_attention(q, k, v, bias, window, softcap=softcap, sinks=sinks)

    out, pull = jax.vjp(attend, *differentiated)
    return out, pull(dout)

  q, kv, bias = arrays(1, 4096, n, h), arrays(1, 4096, k, h), arrays(1, k, 4096, dtype=jnp.float32)
  names = ["window_bias_forward", "window_bias_dq", "window_bias_dkv"]
  held, temporary = check(run, (q, kv, kv, bias, None if softcap else arrays(n)), q, names=names)
  assert temporary < 4 * held
