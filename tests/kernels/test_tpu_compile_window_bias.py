"""Window-bias attention compiled for absent TPUs: memory linear in length (make test-tpu)."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import pytest

from pallas_kernels.window_bias import window_bias_attention
from tests.tpu import TOPOLOGIES, devices

pytestmark = pytest.mark.tpu
pytest.importorskip("libtpu", reason="libtpu is not installed (make test-tpu installs it)")

# batch, tokens, query heads, KV heads, head size
SHAPES = {"smollm2": (2, 4096, 9, 3, 64), "llama-8b": (1, 4096, 32, 8, 128), "llama-8b, long": (1, 32768, 32, 8, 128)}
WINDOW = 256


def placed(tree, sharding):
  """Shapes and dtypes of `tree` with a sharding."""
  return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), tree)


def memory_of(program, what):
  """Bytes per device, printed."""
  memory = program.memory_analysis()
  sizes = {
    "arguments": memory.argument_size_in_bytes,
    "outputs": memory.output_size_in_bytes,
    "aliased": memory.alias_size_in_bytes,
    "temporaries": memory.temp_size_in_bytes,
  }
  print(f"{what}: " + ", ".join(f"{name} {size / 2**20:,.1f} MiB" for name, size in sizes.items()) + " a device")
  return sizes


def attention(topology, shape, dtype=jnp.bfloat16, segments=False, bias=True, by_age=False):
  """Forward and gradients as dispatch chooses them, compiled for one device: bytes."""
  b, t, n, k, h = shape
  sharding = jax.sharding.SingleDeviceSharding(devices(topology)[0])
  array = lambda *shape, dtype=dtype: jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)
  q, kv, rows = array(b, t, n, h), array(b, t, k, h), array(b, k, t, dtype=jnp.float32)
  ids = array(b, t, dtype=jnp.int32) if segments else None

  def run(q, k, v, bias, ids, dout):
    out, pull = jax.vjp(lambda *args: window_bias_attention(*args, WINDOW, ids, by_age=by_age), q, k, v, bias)
    return out, pull(dout)

  program = jax.jit(run).lower(q, kv, kv, rows if bias else None, ids, q).compile()
  text = program.as_text()
  assert text.count('custom_call_target="tpu_custom_call"') == 3, "forward, dq and dk with dv"
  for kernel in ("window_bias_forward", "window_bias_dq", "window_bias_dkv"):
    assert kernel in text
  return memory_of(program, f"{topology}, {shape}, {jnp.dtype(dtype).name}{', segments' if segments else ''}")


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("topology", TOPOLOGIES)
def test_window_bias_attention_compiles(topology, name):
  """Temporaries are a few times the arguments at any length; one head's score matrix of the long text takes 4 GiB."""
  sizes = attention(topology, SHAPES[name], segments=name == "smollm2")
  assert sizes["temporaries"] < 4 * sizes["arguments"], sizes


@pytest.mark.parametrize(
  "shape, dtype, segments, bias",
  [
    ((1, 4096, 32, 8, 128), jnp.float32, True, True),  # twice the bytes in vector memory
    ((2, 4096, 9, 3, 64), jnp.float32, False, False),
    ((1, 4096, 16, 2, 128), jnp.bfloat16, True, False),  # groups of eight
    ((1, 4096, 8, 1, 64), jnp.float32, False, True),
    ((3, 300, 4, 4, 128), jnp.bfloat16, True, True),  # no groups; a text of no whole block
    ((1, 1, 2, 2, 64), jnp.bfloat16, False, True),
  ],
)
@pytest.mark.parametrize("topology", ["v4:2x2x1", "v5e:2x2"])  # the least vector memory; the most common
def test_other_cases_compile(topology, shape, dtype, segments, bias):
  attention(topology, shape, dtype, segments, bias)


def test_memory_is_linear_when_compiled():
  """Four times the tokens take four times the temporaries, up to what fits vector memory."""
  lengths = (16384, 65536)
  short, long = (attention("v4:2x2x1", (1, t, 32, 8, 128))["temporaries"] for t in lengths)
  assert long < 4.5 * short, f"{short:,} bytes of temporaries at {lengths[0]} tokens, {long:,} at {lengths[1]}"


def test_a_bias_that_grows_with_age_compiles():
  sizes = attention("v5e:2x2", SHAPES["smollm2"], by_age=True)
  assert sizes["temporaries"] < 4 * sizes["arguments"], sizes
