"""Slots of 8 bits written into pages on TPUs, in JAX's interpreter with race detection, against plain numpy."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import compat_tpu
from pallas_kernels.decode.tpu_append import append
from pallas_kernels.platform import platform

pytestmark = pytest.mark.slow  # kernels are interpreted
ARCHIVES, WIDTH = 5, 128


def case(page, most, dtype, first, count):
  """(arguments of `append`, the pool it should give): every archive has pages of its own, some places none."""
  rng, places = np.random.default_rng(0), -(-200 // page)
  numbers = lambda *shape: rng.integers(-100, 100, shape)
  number = ARCHIVES * places + 3
  table = rng.permutation(number)[: ARCHIVES * places].reshape(ARCHIVES, places).astype(np.int32)
  pool, rows = (
    np.asarray(jnp.asarray(numbers(*shape), dtype)) for shape in ((number, page, WIDTH), (ARCHIVES, most, WIDTH))
  )
  want = pool.copy()
  for archive, (begin, held) in enumerate(zip(first, count, strict=True)):
    for i in range(held):
      want[table[archive, (begin + i) // page], (begin + i) % page] = rows[archive, i]
    table[archive, -(-(begin + held) // page) :] = number  # what an archive does not own
  first, count = (jnp.asarray(x, jnp.int32) for x in (first, count))
  return (jnp.asarray(pool), jnp.asarray(table), first, jnp.asarray(rows), count), want


@pytest.mark.parametrize("dtype", [jnp.int8, jnp.float8_e4m3fn])
@pytest.mark.parametrize("page, most, first, count", [
  (32, 1, (0, 31, 32, 77, 5), (1, 1, 1, 1, 0)),
  (64, 70, (0, 31, 64, 100, 3), (70, 1, 0, 33, 29)),
  (128, 40, (0, 100, 0, 127, 128), (0, 40, 0, 2, 32)),
  (32, 3, (0, 1, 2, 3, 4), (0, 0, 0, 0, 0)),
])  # fmt: skip
def test_slots_are_written_and_others_stay(page, most, first, count, dtype):
  """In the middle of a tile, over its end, over several pages, and none at all."""
  arguments, want = case(page, most, dtype, first, count)
  with compat_tpu.interpret_mode():
    out = np.asarray(append(*arguments))
  assert out.dtype == want.dtype
  np.testing.assert_array_equal(out.view(np.int8), want.view(np.int8))


def test_refuses_with_the_reason():
  arguments, _ = case(32, 1, jnp.int8, (0,) * ARCHIVES, (0,) * ARCHIVES)
  with pytest.raises(NotImplementedError, match=f"needs a TPU, the device is a {platform()}"):
    append(*arguments)
  pool, *others = arguments
  for wrong, reason in (
    (pool[:, :16], "pages of 16 slots"),
    (pool.astype(jnp.bfloat16), "in bfloat16: must be 8 bits"),
  ):
    with compat_tpu.interpret_mode(), pytest.raises(NotImplementedError, match=reason):
      append(wrong, *others)
