"""Prefill attention compiled for absent TPUs: memory linear in the text (make test-tpu)."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.prefill import prefill_attention
from tests.tpu import TOPOLOGIES, devices

pytestmark = pytest.mark.tpu
pytest.importorskip("libtpu", reason="libtpu is not installed (make test-tpu installs it)")

# batch, tokens, cached slots before them, query heads, KV heads, head size
SHAPES = {
  "smollm2, after a prefix": (4, 4096, 4200, 9, 3, 64),
  "llama-8b, after a prefix": (1, 4096, 8256, 32, 8, 128),
  "smollm2, short texts": (32, 1024, 0, 9, 3, 64),
  "llama-8b, long": (1, 32768, 0, 32, 8, 128),
}


def attention(topology, shape, dtype=jnp.bfloat16):
  """Compiles one call through the dispatch; bytes of arguments and temporaries, printed."""
  b, t, prefix, n, k, h = shape
  device = devices(topology)[0]
  struct = partial(jax.ShapeDtypeStruct, sharding=jax.sharding.SingleDeviceSharding(device))
  kv, bounds = struct((b, k, prefix + t, h), dtype), struct((b, k, prefix + t), jnp.int32)
  arguments = struct((b, t, n, h), dtype), kv, kv, struct((b, t), jnp.int32), bounds, bounds
  program = jax.jit(prefill_attention).lower(*arguments).compile()
  text = program.as_text()
  assert "tpu_custom_call" in text and "prefill_" in text
  memory = program.memory_analysis()
  sizes = memory.argument_size_in_bytes, memory.temp_size_in_bytes
  held, temporary = (f"{x / 2**20:,.1f} MiB" for x in sizes)
  print(f"{topology}, {shape}, {np.dtype(dtype).name}: arguments {held}, temporaries {temporary} a device")
  return sizes


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("topology", TOPOLOGIES)
def test_prefill_attention_compiles(topology, name):
  """Temporaries, the gathered keys and the queries by tiles, are a few times the arguments at any length. A head of 64
  fills half of a row of 128 lanes."""
  arguments, temporaries = attention(topology, SHAPES[name])
  assert temporaries < (5 if SHAPES[name][-1] == 64 else 4) * arguments


@pytest.mark.parametrize(
  "shape, dtype",
  [
    ((1, 4096, 100, 32, 8, 128), jnp.float32),  # twice the bytes in vector memory
    ((2, 300, 1000, 16, 2, 64), jnp.float32),  # groups of eight
    ((3, 1, 700, 4, 4, 128), jnp.bfloat16),  # one query a row, no groups
    ((8, 16, 8192, 9, 3, 64), jnp.bfloat16),  # a small chunk after a long prefix
  ],
)
@pytest.mark.parametrize("topology", ["v4:2x2x1", "v5e:2x2"])  # the least vector memory; the most common
def test_other_prefill_cases_compile(topology, shape, dtype):
  attention(topology, shape, dtype)
