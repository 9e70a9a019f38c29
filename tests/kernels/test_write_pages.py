"""Slots of 8 bits written into pages: XLA's scatter, and the TPU kernel interpreted."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.common import compat_tpu
from pallas_kernels.paged import ref, tpu, write_pages
from tests.kernels.suite import Backend, running

WIDTH, NOWHERE = 128, -1
IMPLEMENTATIONS = [Backend("xla"), Backend("tpu", compat_tpu.interpret_mode)]
pytestmark = pytest.mark.parametrize("backend", IMPLEMENTATIONS, ids=str)


def numbers(rng, *shape, dtype):
  return np.asarray(jnp.asarray(rng.integers(-100, 100, shape), dtype))


def case(page, slots, dtype):
  """(arguments of `write_pages`, the pool it should give): archives own separate pages and have empty places."""
  rng, slots = np.random.default_rng(0), np.asarray(slots, np.int32)
  archives, most = slots.shape
  places = -(-200 // page)
  number = archives * places + 3
  table = rng.permutation(number)[: archives * places].reshape(archives, places).astype(np.int32)
  pool, rows = (numbers(rng, *shape, WIDTH, dtype=dtype) for shape in ((number, page), (archives, most)))
  want = ref.write_pages(pool, table, slots, rows)
  used = slots.max(axis=1) // page + 1
  table[np.arange(places) >= used[:, None]] = number  # what an archive does not own
  return tuple(map(jnp.asarray, (pool, table, slots, rows))), want


def chunk(first, count, most, skip=3):
  """Slots of `most` rows: `count` go to `first` and the slots after it, every `skip`-th row and the rest nowhere."""
  slots = np.full(most, NOWHERE)
  going = [i for i in range(most) if i % skip][:count]
  slots[going] = first + np.arange(len(going))
  return slots


@pytest.mark.parametrize("dtype", [jnp.int8, jnp.float8_e4m3fn])
@pytest.mark.parametrize(
  "page, slots",
  [
    (32, [[0], [31], [32], [77], [NOWHERE], [10**6]]),
    (64, [chunk(0, 60, 99), chunk(31, 1, 99), chunk(64, 0, 99), chunk(100, 33, 99), chunk(3, 29, 99)]),
    (128, [chunk(0, 0, 50), chunk(100, 32, 50), chunk(127, 2, 50)]),
    (32, [[NOWHERE, 10**6]] * 3),
  ],
)
def test_slots_are_written_and_others_stay(backend, page, slots, dtype):
  """In the middle of a tile, over its end, over several pages, and none at all."""
  arguments, want = case(page, slots, dtype)
  with running(backend):
    out = np.asarray(write_pages(*arguments, implementation=backend.name))
  assert out.dtype == want.dtype
  np.testing.assert_array_equal(out.view(np.int8), want.view(np.int8))


def test_more_entries_than_a_call_takes(backend, monkeypatch):
  """Several calls, one after the other; archives in two axes."""
  monkeypatch.setattr(tpu, "ENTRIES", 6)
  (pool, table, slots, rows), want = case(64, [chunk(i, 20 + i, 50) for i in range(6)], jnp.int8)
  apart = lambda x: x.reshape(2, 3, *x.shape[1:])
  with running(backend):
    out = write_pages(pool, apart(table), apart(slots), apart(rows), implementation=backend.name)
  np.testing.assert_array_equal(out, want)


def test_refuses_with_the_reason(backend):
  if backend.name == "xla":
    pytest.skip("it takes everything")
  arguments, _ = case(32, [[3]], jnp.int8)
  with pytest.raises(NotImplementedError, match=f"needs a TPU, the device is a {jax.default_backend()}"):
    write_pages(*arguments, implementation="tpu")
  pool, table, slots, rows = arguments
  for wrong, reason in (
    (pool[:, :16], "pages of 16 slots"),
    (pool.astype(jnp.bfloat16), "in bfloat16: must be 8 bits"),
  ):
    with compat_tpu.interpret_mode(), pytest.raises(NotImplementedError, match=reason):
      write_pages(wrong, table, slots, rows.astype(wrong.dtype), implementation="tpu")
