"""The Hopper kernels of window-bias attention, interpreted with race detection, lowered for CUDA."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import pytest

from pallas_kernels.common import compat
from pallas_kernels.common.platform import tracing_for
from pallas_kernels.window_bias import gpu, ref, window_bias_attention
from tests.kernels.suite import needs_mosaic_gpu, on_hopper
from tests.kernels.window_bias_cases import close, gradients, inputs

# In units of the largest value. A 16-bit output is off by half a unit in the last place (2^-9, 2^-12), and so is each
# weight that enters the second product; gradients pass through four such products.
TOLERANCE = {jnp.bfloat16: (6e-3, 1.2e-2), jnp.float16: (1e-3, 2e-3)}


def check(b, t, n, k, h, window, dtype, bias=True, segments=False, softcap=None, by_age=False, **blocks):
  """Output and gradients in the interpreter, against the oracle."""
  q, keys, values, rows, ids, dout = inputs(b, t, n, k, h, dtype, bias, segments)
  rows = rows / 32 if by_age else rows  # else hardly a key would be seen from afar
  sizes = dataclasses.replace(gpu.default_blocks(h, 10**9, 132), **blocks)
  differentiated = (q, keys, values) if rows is None else (q, keys, values, rows)

  def attend(q, k, v, bias=None):
    return gpu.window_bias_attention(q, k, v, bias, window, ids, softcap=softcap, by_age=by_age, blocks=sizes)

  with on_hopper():
    out, pull = jax.vjp(attend, *differentiated)
    grads = jax.block_until_ready(pull(dout))
  forward, backward = TOLERANCE[dtype]
  options = {"softcap": softcap, "by_age": by_age}
  close(out, ref.window_bias_attention(q, keys, values, rows, window, ids, **options), forward)
  for got, want in zip(grads, gradients(q, keys, values, rows, window, ids, dout, **options), strict=True):
    close(got, want, backward)


@needs_mosaic_gpu
def test_bfloat16_over_two_tiles_with_segments():
  check(1, 256, 1, 1, 64, 16, jnp.bfloat16, segments=True)


@needs_mosaic_gpu
def test_float16_with_groups_of_three_and_padding():
  check(1, 100, 3, 1, 64, 40, jnp.float16)


@needs_mosaic_gpu
def test_window_zero_and_head_size_128():
  check(1, 128, 1, 1, 128, 0, jnp.bfloat16)


@needs_mosaic_gpu
def test_capped_scores_at_head_size_128():
  check(1, 128, 1, 1, 128, 16, jnp.bfloat16, softcap=1.0)


@needs_mosaic_gpu
def test_segments_without_a_bias_in_two_rows():
  check(2, 90, 1, 1, 64, 16, jnp.bfloat16, bias=False, segments=True)


@needs_mosaic_gpu
@pytest.mark.parametrize("window, segments, softcap", [(0, False, None), (16, True, 4.0)])
def test_bias_that_grows_with_age(window, segments, softcap):
  """Two tiles, so that blocks of keys without masks are among them."""
  check(1, 256, 2, 1, 64, window, jnp.bfloat16, segments=segments, softcap=softcap, by_age=True)


def test_few_tiles_of_keys_give_each_query_head_its_own_blocks():
  of = lambda batch, tokens, heads: gpu.default_blocks(128, batch * tokens * heads, 132).split_group
  assert of(2, 4096, 4) and not of(1, 8192, 8)


@needs_mosaic_gpu
def test_gradients_of_each_query_head_apart():
  check(1, 128, 2, 1, 64, 16, jnp.bfloat16, split_group=True, dkv_overlap=False, dq_overlap=False)


@needs_mosaic_gpu
@pytest.mark.parametrize(
  "h, bias, segments, by_age",
  [(64, True, False, False), (64, True, True, True), (128, True, True, False), (128, False, False, False)],
)
def test_lowers_for_cuda(h, bias, segments, by_age):
  b, t, n, k = 1, 1000, 6, 2
  struct = lambda shape, dtype: jax.ShapeDtypeStruct(shape, dtype)
  q, kv = struct((b, t, n, h), jnp.bfloat16), struct((b, t, k, h), jnp.bfloat16)
  rows = struct((b, k, t), jnp.float32) if bias else None
  ids = struct((b, t), jnp.int32) if segments else None

  def loss(q, k, v, bias, ids):
    return window_bias_attention(q, k, v, bias, 64, ids, by_age=by_age, implementation="gpu").astype(jnp.float32).sum()

  with compat.assume_hopper():
    step = jax.jit(jax.grad(loss, argnums=(0, 1, 2, 3) if bias else (0, 1, 2)))
    text = step.trace(q, kv, kv, rows, ids).lower(lowering_platforms=("cuda",)).as_text()
  for name in ("window_bias_forward_", "window_bias_dq_", "window_bias_dkv_"):
    assert name in text


def test_refuses_with_the_reason():
  q = jnp.zeros((1, 8, 2, 64), jnp.bfloat16)
  old = not compat.HAS_MOSAIC_GPU
  reason = "older than 0.11" if old else "needs a Hopper GPU, the default device is a cpu"
  with tracing_for("cpu"), pytest.raises(NotImplementedError, match=reason):
    window_bias_attention(q, q, q, None, 4, implementation="gpu")
  if old:
    with pytest.raises(NotImplementedError, match=r"needs jax >= 0\.11"), compat.gpu_interpret_mode():
      pass
    return
  with compat.assume_hopper():
    with pytest.raises(NotImplementedError, match="must all be bfloat16 or all float16"):
      window_bias_attention(*(q.astype(jnp.float32),) * 3, None, 4, implementation="gpu")
    with pytest.raises(NotImplementedError, match="head size 32"):
      window_bias_attention(*(q[..., :32],) * 3, None, 4, implementation="gpu")
