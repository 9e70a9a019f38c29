"""The Hopper kernel of prefill attention, interpreted and lowered for CUDA; the memory of a chunk."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dms_jax import cache as caches
from dms_jax import policies
from dms_jax import testing as tiny
from dms_jax.model import cached_forward, check_policy
from pallas_kernels.common import compat, warpgroup
from pallas_kernels.common.platform import tracing_for
from pallas_kernels.prefill import gpu, prefill_attention, ref
from tests.kernels.prefill_cases import assert_near, text
from tests.kernels.suite import float64, needs_mosaic_gpu, on_hopper

pytestmark = pytest.mark.slow  # kernels are interpreted

# In units of the largest value. The weights of the second product and the output are rounded to half a unit in the last
# place (2^-9, 2^-12); all sums are float32.
TOLERANCE = {"bfloat16": 6e-3, "float16": 8e-4}


def check(tokens, prefix, heads, group, size, window, rate, dtype="bfloat16", blocks=None, **options):
  args = text(tokens, prefix, heads, group, size, window, rate, dtype, **options)
  with on_hopper():
    out = jax.block_until_ready(gpu.prefill_attention(*args, blocks=blocks or gpu.Blocks(kv=64)))
  assert_near(out, args, TOLERANCE[dtype])
  return out


@needs_mosaic_gpu
def test_tiles_of_three_heads_after_a_prefix():
  """Two tiles of 40 queries, the last one short; kept keys and the band in several blocks each."""
  check(70, 130, 1, 3, 64, 30, 0.6)


@needs_mosaic_gpu
@pytest.mark.parametrize("size", [128, 256])
def test_larger_heads_in_float16_with_more_stages_than_blocks(size):
  check(32, 40, 1, 4, size, 20, 0.5, "float16", gpu.Blocks(kv=64, stages=4 if size == 128 else 2))


@needs_mosaic_gpu
def test_head_size_256_over_two_tiles():
  """The sizes of its own, kept keys and the band in several blocks each."""
  check(70, 200, 1, 2, 256, 30, 0.6, blocks=gpu.default_blocks(256, 132))


@needs_mosaic_gpu
def test_a_group_of_six_in_two_parts_and_two_rows():
  check(20, 60, 1, 6, 64, 12, 0.5, batch=2)


@needs_mosaic_gpu
def test_nothing_evicted():
  """Whole blocks alone, then the diagonal."""
  check(140, 64, 1, 1, 64, 8, 0.0)


@needs_mosaic_gpu
def test_everything_evicted_at_once():
  """W = 0: each query sees itself."""
  args = text(48, 0, 1, 4, 64, 0, 1.0, "bfloat16")
  with on_hopper():
    out = gpu.prefill_attention(*args, blocks=gpu.Blocks(kv=64))
  np.testing.assert_array_equal(np.asarray(out, np.float32), np.repeat(args[2][:, 0, :, None], 4, axis=2))


@needs_mosaic_gpu
@pytest.mark.parametrize("workers, tokens, group, batch", [(1, 90, 3, 2), (4, 70, 6, 2)])
def test_workers_with_several_tiles(workers, tokens, group, batch):
  """As many for each, or one more for some; the next tile's queries are loaded meanwhile. The bits of one tile each.

  A Hopper GPU takes tiles from a counter. The interpreter deals them out in turn, by way of the same board.
  """
  args = tokens, 40, 1, group, 64, 12, 0.5
  several = check(*args, batch=batch, blocks=gpu.Blocks(kv=64, workers=workers))
  one = check(*args, batch=batch, blocks=gpu.Blocks(kv=64))
  np.testing.assert_array_equal(np.asarray(several, np.float32), np.asarray(one, np.float32))


@needs_mosaic_gpu
@pytest.mark.parametrize("tokens, rows", [(5, 24), (24, 24), (25, 32), (50, 56)])
def test_queries_end_a_tile_or_eight_rows(tokens, rows):
  """No copy of a part of a tile is as long as all queries, unless it begins with them: TMA would begin there."""
  q, keys, *rest = (jax.ShapeDtypeStruct(x.shape, x.dtype) for x in text(tokens, 0, 1, 5, 64, 8, 0.5, "bfloat16"))
  prepare = partial(gpu._prepare, gpu.Tile.of(5), gpu.Blocks(), False)
  (q, *_), _ = jax.eval_shape(prepare, q, keys, *rest)
  assert q.shape[1] == rows


@needs_mosaic_gpu
def test_keys_in_any_order():
  check(24, 100, 1, 5, 64, 16, 0.5, shuffle=True)


@needs_mosaic_gpu
@pytest.mark.parametrize(
  "tokens, prefix, group, size, rate, dtype, options",
  [
    (20, 60, 6, 64, 0.5, "bfloat16", {"batch": 2}),  # a group in two parts
    (40, 100, 2, 256, 0.5, "bfloat16", {}),
    (140, 200, 2, 128, 0.0, "float16", {}),  # nothing evicted: most tiles see whole blocks of keys
    (40, 200, 5, 64, 0.7, "bfloat16", {"shuffle": True}),
  ],
)
def test_log_sum_exp_and_mass(tokens, prefix, group, size, rate, dtype, options):
  args = text(tokens, prefix, 1, group, size, 12, rate, dtype, **options)
  weights = np.random.default_rng(1).standard_normal((len(args[0]), tokens)).astype(np.float32)
  weights[:, ::3] = 0
  with on_hopper():
    results = gpu.prefill_attention(*args, blocks=gpu.Blocks(kv=64), lse=True, query_weights=jnp.asarray(weights))
    out, logs, mass = jax.block_until_ready(results)
  assert_near(out, args, TOLERANCE[dtype])
  q, keys, values, *positions = args
  want = ref.prefill_attention(
    *float64(q, keys, values), *(np.asarray(x) for x in positions), lse=True, query_weights=weights
  )
  for got, expected in zip((logs, mass), want[1:], strict=True):
    assert got.dtype == jnp.float32
    np.testing.assert_allclose(got, expected, rtol=0, atol=1e-5 * np.abs(expected).max())


@needs_mosaic_gpu
@pytest.mark.parametrize("size", [64, 256])
def test_mass_beside_sinks_of_a_group_in_parts(size):
  """Tiles of some heads of a group, with unused rows: each row's sink is its own head's. Scores are capped."""
  args, sinks = text(50, 60, 2, 6, size, 12, 0.5, "bfloat16"), jnp.linspace(-2.0, 3.0, 12)
  options = dict(lse=True, query_weights=jnp.ones((1, 50)), softcap=2.0, sinks=sinks)
  with on_hopper():
    results = jax.block_until_ready(gpu.prefill_attention(*args, blocks=gpu.Blocks(kv=64), **options))
  want = ref.prefill_attention(*float64(*args[:3]), *(np.asarray(x) for x in args[3:]), **options)
  for got, expected, tolerance in zip(results, want, (8e-3, 1e-5, 1e-5), strict=True):
    np.testing.assert_allclose(np.asarray(got, np.float64), expected, rtol=0, atol=tolerance * np.abs(expected).max())


@pytest.mark.parametrize(
  "group, heads, queries",
  [(1, 1, 128), (2, 2, 64), (3, 3, 40), (4, 4, 32), (5, 5, 24), (6, 3, 40), (7, 7, 16), (8, 8, 16), (16, 8, 16)],
)
def test_rows_of_a_tile(group, heads, queries):
  """Every query of every head has a row, cut at the warpgroups' edge and at multiples of 8."""
  tile = gpu.Tile.of(group)
  assert tile == gpu.Tile(heads, queries)
  rows = {}
  for piece in tile.pieces():
    assert piece.row % 8 == piece.count % 8 == 0 and piece.row + piece.count <= warpgroup.ROWS
    for i in range(piece.count):
      rows[piece.warpgroup * warpgroup.ROWS + piece.row + i] = piece.head, piece.first + i
  assert rows == {head * queries + i: (head, i) for head in range(heads) for i in range(queries)}


@needs_mosaic_gpu
@pytest.mark.parametrize("mass", [False, True])
@pytest.mark.parametrize("group, h", [(1, 64), (3, 64), (4, 128), (6, 128), (8, 64), (2, 256), (8, 256)])
def test_lowers_for_cuda(group, h, mass):
  """With a tile for each block of threads, and with several, from a counter."""
  struct, tokens = jax.ShapeDtypeStruct, 500 if mass else 9000
  kv, bounds = struct((2, 2, 5000, h), jnp.bfloat16), struct((2, 2, 5000), jnp.int32)
  q, q_pos = struct((2, tokens, 2 * group, h), jnp.bfloat16), struct((2, tokens), jnp.int32)
  with compat.assume_hopper():
    call = jax.jit(partial(prefill_attention, implementation="gpu", lse=mass))
    options = {"query_weights": struct((2, tokens), jnp.float32)} if mass else {}
    lowered = call.trace(q, kv, kv, q_pos, bounds, bounds, **options).lower(lowering_platforms=("cuda",)).as_text()
  assert "prefill_" in lowered and ("prefill_mass_" in lowered) == mass


def test_refuses_with_the_reason():
  args = text(8, 0, 1, 2, 64, 4, 0.5, "bfloat16")
  reason = "needs a Hopper GPU, the default device is a cpu" if compat.HAS_MOSAIC_GPU else "older than 0.11"
  call = partial(prefill_attention, implementation="gpu")
  with tracing_for("cpu"), pytest.raises(NotImplementedError, match=reason):
    call(*args)
  if not compat.HAS_MOSAIC_GPU:
    return
  q, keys, values, *positions = args
  with compat.assume_hopper():
    with pytest.raises(NotImplementedError, match="must all be bfloat16 or all float16"):
      call(q, keys.astype(jnp.float32), values, *positions)
    with pytest.raises(NotImplementedError, match="head size 32"):
      call(q[..., :32], keys[..., :32], values[..., :32], *positions)
  with pytest.raises(ValueError, match="must be a multiple of 64"):
    gpu.Blocks(kv=96)


@pytest.mark.parametrize("name", ["h2o", "vase", "snapkv"])
def test_a_cut_copies_no_pool_on_a_gpu(name):
  """A chunk after which heads are cut to their budget: XLA once fused the read of what moves into its write.

  Temporaries do not grow with the pool. Only XLA for GPUs fused them, so the test is skipped elsewhere.
  """
  if jax.default_backend() != "gpu":
    pytest.skip("compiles for the GPU that is attached")
  config = tiny.config(num_layers=4, d_model=64, d_ff=64, num_heads=8, num_kv_heads=4, head_dim=64)
  model = tiny.model(config, dtype=jnp.bfloat16)
  policy = check_policy(model, policies.get(name)(budget=256))
  options = dict(batch=2, capacity=512, longest=1024, policy=policy, lag=1, dtype=jnp.bfloat16)
  tokens, lengths = jnp.zeros((2, 256), jnp.int32), jnp.full(2, 256, jnp.int32)
  step, temporaries, sizes = jax.jit(cached_forward, donate_argnums=2), [], []
  for pages in (10000, 20000):
    make = lambda pages=pages: caches.create("paged", config, **options).with_pages(pages)
    cache = jax.eval_shape(make)
    memory = step.lower(model, policy, cache, tokens, lengths).compile().memory_analysis()
    temporaries.append(memory.temp_size_in_bytes)
    sizes.append(cache.store.pages.size * 2)
  assert temporaries[1] - temporaries[0] < 0.05 * (sizes[1] - sizes[0]), f"{temporaries} bytes beside {sizes}"
