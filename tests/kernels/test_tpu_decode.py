"""The TPU kernel of decode attention: division of work, interpreted results, refusals.

The suites of test_decode.py and test_decode_pages.py hold for it too.
"""

from __future__ import annotations

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.common import compat_tpu
from pallas_kernels.decode import Pages, decode_attention, ref, tpu
from tests.kernels.suite import assert_close, float64, normal

pytestmark = pytest.mark.slow  # kernels are interpreted

LENGTHS = np.array([[96, 1, 33], [0, 64, 7]])
ARCHIVED = np.array([[0, 48, 5], [33, 64, 0]])
PAGE, MOST = 16, 4


def inputs(dtype="float32"):
  """Queries, a cache and pages of one layer, NaN where nothing is live."""
  rng = np.random.default_rng(0)
  q = normal(rng, 2, 6, 64, dtype=dtype)
  kv = normal(rng, 1, 2, 3, 96, 128, dtype=dtype)
  kv = jnp.where((np.arange(96) < LENGTHS[..., None])[None, ..., None], kv, jnp.asarray(np.nan, kv.dtype))
  pool = normal(rng, 24, PAGE, 128, dtype=dtype)
  table = rng.permutation(24).reshape(1, 2, 3, MOST)
  table = np.where(np.arange(MOST) * PAGE < ARCHIVED[..., None], table, 10**6)
  pages = Pages(pool, jnp.asarray(table, jnp.int32), jnp.asarray(ARCHIVED, jnp.int32))
  return q, kv, jnp.asarray(LENGTHS, jnp.int32), pages


def run(q, kv, lengths, pages, blocks, **params):
  with compat_tpu.interpret_mode(**params):
    return np.asarray(tpu.decode_attention(q, kv, jnp.int32(0), lengths, pages=pages, blocks=blocks))


def test_workers_and_stages_change_no_bit():
  """The same chunks however many divide them, one after the other or on two cores, and however far ahead they load."""
  q, kv, lengths, pages = inputs()
  first = run(q, kv, lengths, pages, tpu.Blocks(32, 3, 2, 2))
  want = ref.decode_attention(*float64(q, kv), 0, lengths, pages=pages)
  assert_close(first, want, "float32")
  np.testing.assert_array_equal(first, run(q, kv, lengths, pages, tpu.Blocks(32, 2, 2, 1)))
  np.testing.assert_array_equal(first, run(q, kv, lengths, pages, tpu.Blocks(32, 3, 2, 5), num_cores_or_threads=2))


def test_whole_pairs_as_chunks_and_blocks_smaller_than_pages():
  q, kv, lengths, pages = inputs()
  want = ref.decode_attention(*float64(q, kv), 0, lengths, pages=pages)
  assert_close(run(q, kv, lengths, pages, tpu.Blocks(8, 2, 0, 1)), want, "float32")


def test_work_is_divided_by_live_blocks():
  """Every chunk with anything live once, in order; no worker has more than a chunk above its share."""
  rng = np.random.default_rng(1)
  blocks = tpu.Blocks(16, 2, 3, 4)
  counts = [np.where(rng.random(40) < 0.3, 0, rng.integers(0, most, 40)) for most in (33, 500)]
  items, bounds, held = jax.jit(lambda *counts: tpu.work_list(counts, (32, 512), blocks))(
    *(jnp.asarray(x, jnp.int32) for x in counts)
  )
  total = -(-counts[0] // 16) + -(-counts[1] // 16)
  chunks = held.shape[1]
  assert chunks == -(-(2 + 32) // 3)
  want = [(p, c) for p in range(40) for c in range(-(-total[p] // 3))]
  assert [divmod(int(i), chunks) for i in items[: len(want)]] == want
  assert int(held.sum()) == len(want) == bounds[-1] and bounds[0] == 0
  size = lambda p, c: min(3, total[p] - 3 * c)
  shares = [sum(size(*want[i]) for i in range(*pair)) for pair in itertools.pairwise(bounds)]
  assert max(shares) < total.sum() / 4 + 4 and sum(shares) == total.sum()


def test_nothing_live_has_no_work():
  zeros = jnp.zeros((5,), jnp.int32)
  _, bounds, held = tpu.work_list((zeros, zeros), (64, 0), tpu.Blocks(16, 2, 0, 3))
  assert not held.any() and not bounds.any()


def test_refuses_with_the_reason():
  q, kv, lengths, pages = inputs()
  call = lambda *args, **options: decode_attention(*args, implementation="tpu", **options)
  with pytest.raises(NotImplementedError, match="needs a TPU, the device is a cpu"):
    call(q, kv, 0, lengths)
  shape = lambda *sizes: jnp.zeros(sizes, jnp.float32)
  wide = jnp.zeros((1, 64, 1, 4096), jnp.int32)
  bits = Pages(pages.pool.astype(jnp.int8), pages.table, pages.lengths, jnp.ones((24, 1, 2 * PAGE)))
  for args, options, reason in (
    ((q.astype(jnp.float16), kv.astype(jnp.float16), 0, lengths), {}, "only bfloat16 and float32"),
    ((q, kv.astype(jnp.bfloat16), 0, lengths), {}, "must be the same"),
    ((q, kv[..., :90, :], 0, lengths), {}, "90 slots .* above 64 they must be a multiple of 8"),
    ((shape(2, 27, 64), kv, 0, lengths), {}, "9 query heads a KV head"),
    ((shape(2, 3, 32), shape(1, 2, 3, 8, 64), 0, lengths), {}, "head size 32"),
    ((q, kv, 0, lengths), {"pages": bits}, "pages of 16 slots in int8: must be a power of 2, at least 32"),
    ((q, None, 0, None), {"pages": Pages(pages.pool[:, :12], pages.table, pages.lengths)}, "must be a power of 2"),
    ((shape(64, 1, 64), None, 0, None), {"pages": Pages(pages.pool, wide, jnp.zeros((64, 1), jnp.int32))}, "scalar"),
  ):
    with compat_tpu.interpret_mode(), pytest.raises(NotImplementedError, match=reason):
      call(*args, **options)
  with pytest.raises(ValueError, match="power of 2"):
    tpu.Blocks(48, 2, 0, 1)


def test_sizes_by_shape():
  """256 KiB a block; one core does whole pairs, two share chunks of 2,048 slots."""
  assert tpu.default_blocks(128, jnp.bfloat16, 1) == tpu.Blocks(512, 8, 0, 1)
  assert tpu.default_blocks(64, jnp.bfloat16, 2) == tpu.Blocks(1024, 8, 2, 2)
  assert tpu.default_blocks(128, jnp.float32, 2) == tpu.Blocks(256, 8, 8, 2)
