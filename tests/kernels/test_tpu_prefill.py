"""The TPU kernel of prefill attention beyond the shared suite: several tiles, refusals."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.prefill import NEVER, prefill_attention, tpu
from tests.kernels.prefill_cases import assert_near, text
from tests.kernels.suite import interpreted_tpu

pytestmark = pytest.mark.slow  # kernels are interpreted

# In units of the largest value, as in test_gpu_prefill; float32 rounds only sums.
TOLERANCE = {"bfloat16": 6e-3, "float32": 1e-6}
SMALL = tpu.Blocks(128, 128)


def check(args, blocks=SMALL):
  with interpreted_tpu():
    out = jax.block_until_ready(tpu.prefill_attention(*args, blocks=blocks))
  assert_near(out, args, TOLERANCE[args[0].dtype.name])
  return out


@pytest.mark.parametrize(
  "tokens, prefix, heads, group, size, window, rate, dtype, options",
  [
    (90, 300, 2, 3, 64, 40, 0.6, "float32", {}),  # three tiles, a position's heads in two of them
    (70, 200, 1, 4, 128, 150, 0.5, "bfloat16", {"batch": 2}),  # a band of several blocks
    (150, 400, 1, 1, 64, 8, 0.0, "bfloat16", {}),  # nothing evicted
    (140, 0, 1, 2, 64, 0, 1.0, "float32", {}),  # everything evicted at once: each query sees itself
    (40, 400, 1, 5, 64, 16, 0.5, "float32", {"shuffle": True}),
  ],
)
def test_several_tiles_and_blocks(tokens, prefix, heads, group, size, window, rate, dtype, options):
  check(text(tokens, prefix, heads, group, size, window, rate, dtype, **options))


def test_tiles_that_visit_nothing_between_others():
  """Only a tile with blocks is loaded ahead; a head without any follows one with two."""
  q, keys, values, q_pos, first, last = text(512, 0, 2, 1, 64, 500, 0.0, "float32")
  q_pos = jnp.where((q_pos // 128) % 2 == 1, -2, q_pos)
  first, last = first.at[:, 1, 128:].set(NEVER), last.at[:, 1, 128:].set(-1)
  out = check((q, keys, values, q_pos, first, last))
  assert (np.asarray(out[:, 128:256]) == 0).all() and (np.asarray(out[:, 384:]) == 0).all()


def test_blocks_larger_than_the_text():
  check(text(9, 30, 1, 2, 64, 4, 0.5, "float32"), tpu.Blocks(256, 256))


def test_sizes_by_shape():
  assert tpu.default_blocks(131072) == tpu.Blocks(512, 512)
  assert tpu.default_blocks(130) == tpu.Blocks(256, 512)
  with pytest.raises(ValueError, match="must be multiples of 128"):
    tpu.Blocks(64, 128)


def test_refuses_with_the_reason():
  args = text(8, 0, 1, 2, 64, 4, 0.5, "float32")
  call = partial(prefill_attention, implementation="tpu")
  with pytest.raises(NotImplementedError, match="needs a TPU, the device is a cpu"):
    call(*args)
  q, keys, values, *positions = args
  with interpreted_tpu():
    with pytest.raises(NotImplementedError, match="must all be bfloat16 or all float32"):
      call(q, keys.astype(jnp.bfloat16), values, *positions)
    with pytest.raises(NotImplementedError, match="head size 32"):
      call(q[..., :32], keys[..., :32], values[..., :32], *positions)
    with pytest.raises(NotImplementedError, match="returns no mass of keys"):
      call(*args, query_weights=jnp.ones((1, 8)))
