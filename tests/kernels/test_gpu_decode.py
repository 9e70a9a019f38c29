"""The Hopper kernel of decode attention, interpreted with race detection and lowered for CUDA."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.common import compat
from pallas_kernels.common.platform import tracing_for
from pallas_kernels.decode import Pages, decode_attention, gpu, gpu_common, ref, xla
from tests.kernels.suite import needs_mosaic_gpu, on_hopper

# In units of the largest value. The weights of the second product and the output are rounded to half a unit in the last
# place (2^-9, 2^-12); all sums are float32.
TOLERANCE = {jnp.bfloat16: 6e-3, jnp.float16: 8e-4}
LAYERS, LAYER = 2, 1


def inputs(batch, heads, group, h, slots, lengths, dtype=jnp.bfloat16):
  """Queries, a cache whose dead slots are NaN in every layer, and lengths [B, K]."""
  rng = np.random.default_rng(0)
  q = jnp.asarray(rng.normal(size=(batch, heads * group, h)), dtype)
  kv = rng.normal(size=(LAYERS, batch, heads, slots, 2 * h)).astype(np.float32)
  lengths = np.asarray(lengths, np.int32).reshape(batch, heads)
  dead = np.arange(slots) >= lengths[..., None]
  kv = np.where(dead[None, ..., None], np.nan, kv)
  return q, jnp.asarray(kv, dtype), jnp.asarray(lengths)


def run(q, kv, lengths, block=64, stages=2, split=128, workers=3, rest=128, merged=8, **options):
  """The kernel in the interpreter, with few workers."""
  sizes = gpu.Blocks(block, stages, split, workers, rest, merged)
  with on_hopper():
    return jax.block_until_ready(gpu.decode_attention(q, kv, jnp.int32(LAYER), lengths, blocks=sizes, **options))


def check(q, kv, lengths, **sizes):
  out = run(q, kv, lengths, **sizes)
  want = ref.decode_attention(q, kv, LAYER, lengths)
  assert out.dtype == q.dtype
  bound = TOLERANCE[q.dtype.type] * np.abs(want).max()
  np.testing.assert_allclose(np.asarray(out, np.float64), want, rtol=0, atol=bound)
  return np.asarray(out)


@needs_mosaic_gpu
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_ragged_lengths_with_empty_heads(dtype):
  """Lengths 0, 1, odd, at the edges of blocks and chunks, and full; more workers than heads."""
  lengths = [0, 1, 256, 37, 130, 128, 129, 0, 64]
  out = check(*inputs(3, 3, 1, 64, 256, lengths, dtype), stages=3, workers=5)
  assert (out[0, 0] == 0).all() and (out[2, 1] == 0).all()


@needs_mosaic_gpu
@pytest.mark.parametrize("h, group", [(128, 3), (256, 3), (256, 8)])
def test_larger_heads(h, group):
  """At 256 all threads copy four queries at once."""
  check(*inputs(2, 2, group, h, 320, [5, 191, 320, 0]), workers=4, merged=4)


@needs_mosaic_gpu
@pytest.mark.parametrize("processors", [132, 1])
def test_groups_that_fill_no_tile(processors, monkeypatch):
  """A warpgroup merges two or four rows, and a pair has three; with few pairs, and with many."""
  monkeypatch.setattr(gpu, "processors", lambda: processors)
  check(*inputs(2, 2, 3, 64, 320, [5, 191, 320, 0]), workers=4)


@needs_mosaic_gpu
def test_more_workers_than_chunks_and_groups_of_eight():
  check(*inputs(1, 2, 8, 64, 384, [3, 384]), block=128, split=256, workers=7)


@needs_mosaic_gpu
def test_result_depends_on_its_own_slots_alone():
  """Bit for bit, whatever else is in the batch and however many workers there are."""
  q, kv, lengths = inputs(2, 2, 4, 64, 256, [200, 77, 256, 0])
  both = run(q, kv, lengths)
  alone = run(q[:1], kv[:, :1], lengths[:1], workers=5)
  np.testing.assert_array_equal(np.asarray(both[:1], np.float32), np.asarray(alone, np.float32))


@needs_mosaic_gpu
def test_a_block_of_threads_for_each_pair():
  """Pairs without slots, with part of a block, and full; the bits of a list whose chunks are whole pairs, and of a row
  alone."""
  q, kv, lengths = inputs(3, 2, 3, 64, 320, [[320, 0], [1, 64], [127, 65]])
  own = check(q, kv, lengths, workers=0)
  whole, alone = run(q, kv, lengths, split=320, rest=320), run(q[1:2], kv[:, 1:2], lengths[1:2], workers=0)
  np.testing.assert_array_equal(np.asarray(own, np.float32), np.asarray(whole, np.float32))
  np.testing.assert_array_equal(np.asarray(own[1:2], np.float32), np.asarray(alone, np.float32))


@needs_mosaic_gpu
def test_mass_and_pages_without_a_second_kernel():
  """A ring beside pages, a block of threads a pair: attention, log-sum-exp and mass of the oracle."""
  q, kv, lengths = inputs(2, 2, 2, 64, 64, [[64, 3], [0, 61]])
  pool = jnp.nan_to_num(kv.reshape(-1, 64, 128))
  table = jnp.arange(LAYERS * 2 * 2, dtype=jnp.int32).reshape(LAYERS, 2, 2, 1)
  pages = Pages(pool, table, jnp.asarray([[0, 3], [64, 9]], jnp.int32))
  out, logs, masses = run(q, kv, lengths, pages=pages, lse=True, mass=True, workers=0)
  want, want_logs, want_masses = ref.decode_attention(q, kv, LAYER, lengths, pages=pages, lse=True, mass=True)
  np.testing.assert_allclose(np.asarray(out, np.float64), want, rtol=0, atol=6e-3 * np.abs(want).max())
  np.testing.assert_allclose(logs, want_logs, atol=1e-5)
  for a, b in zip(masses, want_masses, strict=True):
    np.testing.assert_allclose(a, b, rtol=0, atol=1e-5)


def test_a_counter_where_workers_have_several_chunks():
  """The capacity of the pages decides: few or short heads need no counter."""
  sizes, paged = gpu.Blocks(64, 2, 256, 528), lambda pages: gpu_common.Variant(272, 32, pages, False, False)
  assert not paged(250).draws(sizes, 64) and paged(1020).draws(sizes, 64)
  assert gpu_common.Variant(8192, 0, 0, False, False).draws(sizes, 64)


@needs_mosaic_gpu
@pytest.mark.parametrize("merged", [1, 2, 3])
def test_partial_results_merged_few_at_a_time(merged):
  """A batch of exactly all partial results, one more, one less, and a pair with none."""
  check(*inputs(1, 4, 4, 64, 512, [512, 385, 256, 0]), merged=merged)


@needs_mosaic_gpu
def test_log_sum_exp():
  q, kv, lengths = inputs(1, 3, 2, 64, 256, [200, 0, 64])
  _, logs = run(q, kv, lengths, lse=True)
  _, want = xla.decode_attention(q.astype(jnp.float32), kv.astype(jnp.float32), LAYER, lengths, lse=True)
  assert logs.dtype == jnp.float32 and (np.asarray(logs[0, 2:4]) == -np.inf).all()
  np.testing.assert_allclose(logs, want, atol=1e-5)


@needs_mosaic_gpu
@pytest.mark.parametrize("group, h, block", [(1, 64, 64), (3, 128, 64), (8, 64, 128), (5, 256, 64)])
def test_mass_beside_the_same_bits(group, h, block):
  """Slots of several chunks, merged apart; asking for mass changes no bit of the attention."""
  lengths = [[0, 1], [391, 256], [384, 130]]
  q, kv, lengths = inputs(3, 2, group, h, 392, lengths)
  sizes = dict(block=block, split=2 * block, workers=5, merged=2)
  plain = run(q, kv, lengths, **sizes)
  out, (mass, _) = run(q, kv, lengths, mass=True, **sizes)
  np.testing.assert_array_equal(np.asarray(out, np.float32), np.asarray(plain, np.float32))
  _, (want, _) = ref.decode_attention(q, kv, LAYER, lengths, mass=True)
  assert (np.asarray(mass)[want == 0] == 0).all()
  np.testing.assert_allclose(mass, want, rtol=0, atol=1e-5)  # float32 sums


@needs_mosaic_gpu
def test_capped_scores_and_sinks_of_head_size_256():
  q, kv, lengths = inputs(2, 2, 4, 256, 136, [[136, 0], [1, 70]])
  options = dict(lse=True, softcap=2.0, sinks=jnp.linspace(-2.0, 3.0, 8))
  out, logs = run(q, kv, lengths, **options)
  want, want_logs = ref.decode_attention(q, kv, LAYER, lengths, **options)
  np.testing.assert_allclose(np.asarray(out, np.float64), want, rtol=0, atol=6e-3 * np.abs(want).max())
  np.testing.assert_allclose(logs, want_logs, rtol=0, atol=1e-5)


@needs_mosaic_gpu
def test_mass_of_a_table_without_places():
  """Pages have no slot; the ring's mass is that of the ring alone, and heads without live slots have none."""
  q, kv, lengths = inputs(1, 3, 2, 64, 64, [64, 0, 9])
  nothing = Pages(kv[0, 0], jnp.zeros((LAYERS, 1, 3, 0), jnp.int32), jnp.zeros((1, 3), jnp.int32))
  _, (mass, of_pages) = run(q, kv, lengths, pages=nothing, mass=True)
  _, (want, _) = ref.decode_attention(q, kv, LAYER, lengths, mass=True)
  assert of_pages.shape == (1, 3, 0)
  np.testing.assert_allclose(mass, want, rtol=0, atol=1e-5)


@needs_mosaic_gpu
def test_more_pairs_than_a_call_takes(monkeypatch):
  """Three rows in calls of two and of one give the same bits as in one call, of the layer that is read."""
  q, kv, lengths = inputs(3, 2, 2, 64, 64, [[64, 3], [0, 61], [64, 9]])
  pool = jnp.nan_to_num(kv.reshape(-1, 64, 128))
  table = jnp.arange(LAYERS * 3 * 2, dtype=jnp.int32).reshape(LAYERS, 3, 2, 1)
  pages, sinks = (
    Pages(pool, table, jnp.asarray([[0, 3], [64, 9], [8, 0]], jnp.int32)),
    jnp.asarray([-1.0, 0.0, 1.0, 2.0]),
  )
  options = dict(pages=pages, lse=True, mass=True, sinks=sinks)
  whole = run(q, kv, lengths, **options)
  monkeypatch.setattr(gpu, "MOST_PAIRS", 4)
  for one, parts in zip(jax.tree.leaves(whole), jax.tree.leaves(run(q, kv, lengths, **options)), strict=True):
    np.testing.assert_array_equal(np.asarray(one, np.float32), np.asarray(parts, np.float32))


def lower(batch, heads, group, h, slots, call=partial(decode_attention, implementation="gpu"), **options):
  struct = jax.ShapeDtypeStruct
  with compat.assume_hopper():
    call = jax.jit(partial(call, **options))
    arguments = (
      struct((batch, heads * group, h), jnp.bfloat16),
      struct((LAYERS, batch, heads, slots, 2 * h), jnp.bfloat16),
      struct((), jnp.int32),
      struct((batch, heads), jnp.int32),
    )
    return call.trace(*arguments).lower(lowering_platforms=("cuda",)).as_text()


@needs_mosaic_gpu
@pytest.mark.parametrize("group, h", [(1, 64), (3, 64), (4, 128), (8, 128), (1, 256), (8, 256)])
def test_lowers_for_cuda(group, h):
  for mass in (False, True):
    text = lower(2, 3, group, h, 8192, lse=group == 3, mass=mass)
    assert "decode_" in text and ("decode_mass_" in text) == mass


@needs_mosaic_gpu
@pytest.mark.parametrize("scaled", [False, True])
def test_shared_memory_holds_blocks_of_large_heads_and_the_list_of_pairs(scaled):
  """A kernel that takes more than a Hopper GPU has is not lowered."""
  struct, (batch, heads, page) = jax.ShapeDtypeStruct, (gpu.MOST_PAIRS // 8, 8, 64)
  pool = struct((500, page, 512), jnp.int8 if scaled else jnp.bfloat16)
  lengths, scales = struct((batch, heads), jnp.int32), struct((500, 1, 2 * page), jnp.float32) if scaled else None
  pages = Pages(pool, struct((LAYERS, batch, heads, 64), jnp.int32), lengths, scales)
  call = jax.jit(partial(decode_attention, implementation="gpu"))
  arguments = struct((batch, heads * 2, 256), jnp.bfloat16), struct((LAYERS, batch, heads, 272, 512), jnp.bfloat16)
  with compat.assume_hopper():
    call.trace(*arguments, struct((), jnp.int32), lengths, pages=pages).lower(lowering_platforms=("cuda",))


@needs_mosaic_gpu
def test_calls_of_some_rows_are_lowered_once():
  """8,192 pairs are two calls of one function, of the workers' kernel and the merging one."""
  text = lower(4096, 2, 4, 64, 4096)
  assert text.count("call @attend") == 2 and text.count("call @mosaic_gpu_v2") == 2


@needs_mosaic_gpu
def test_a_block_of_threads_a_pair_is_one_kernel_for_any_number_of_pairs():
  for slots, batch in ((2048, gpu.MOST_PAIRS), (1024, 80)):
    text = lower(batch, 3, 3, 64, slots, gpu.decode_attention, lse=True)
    assert text.count("call @mosaic_gpu_v2") == 1 and "64x2_pair" in text


@needs_mosaic_gpu
@pytest.mark.parametrize(
  "h, ring, page, stored",
  [
    (64, 80, 32, "bfloat16"),
    (128, 0, 256, "bfloat16"),
    (128, 272, 32, "int8"),
    (64, 0, 16, "float8_e4m3fn"),
    (256, 272, 32, "bfloat16"),
    (256, 272, 32, "int8"),
    (256, 0, 64, "float8_e4m3fn"),
  ],
)
def test_pages_lower_for_cuda(h, ring, page, stored):
  """Beside a ring and alone, smaller and larger than a block, in 8 bits and in q's own dtype."""
  struct, (batch, heads, most) = jax.ShapeDtypeStruct, (2, 3, 64)
  lengths = struct((batch, heads), jnp.int32)
  pool = struct((500, page, 2 * h), jnp.dtype(stored))
  scales = None if stored == "bfloat16" else struct((500, 1, 2 * page), jnp.float32)
  pages = Pages(pool, struct((LAYERS, batch, heads, most), jnp.int32), lengths, scales)
  kv = struct((LAYERS, batch, heads, ring, 2 * h), jnp.bfloat16) if ring else None
  with compat.assume_hopper():
    attend = partial(decode_attention, implementation="gpu")
    arguments = struct((batch, heads * 4, h), jnp.bfloat16), kv, struct((), jnp.int32), lengths if ring else None
    for call in (attend, partial(attend, mass=True)):
      text = jax.jit(call).trace(*arguments, pages=pages).lower(lowering_platforms=("cuda",)).as_text()
      assert f"decode_pages{page}_" in text


def test_refuses_with_the_reason():
  q, kv, lengths = inputs(1, 1, 2, 64, 64, [10])
  reason = "needs a Hopper GPU, the default device is a cpu" if compat.HAS_MOSAIC_GPU else "older than 0.11"
  call = partial(decode_attention, implementation="gpu")
  with tracing_for("cpu"), pytest.raises(NotImplementedError, match=reason):
    call(q, kv, 0, lengths)
  if not compat.HAS_MOSAIC_GPU:
    return
  with compat.assume_hopper():
    with pytest.raises(NotImplementedError, match="must both be bfloat16 or both float16"):
      call(q.astype(jnp.float32), kv.astype(jnp.float32), 0, lengths)
    with pytest.raises(NotImplementedError, match="head size 32"):
      call(q[..., :32], kv[..., :64], 0, lengths)
    with pytest.raises(NotImplementedError, match="must be a multiple of 8"):
      call(q, kv[..., :63, :], 0, lengths)
    with pytest.raises(NotImplementedError, match="9 query heads a KV head"):
      call(jnp.zeros((1, 9, 64), q.dtype), kv, 0, lengths)
    table, pool = jnp.zeros((LAYERS, 1, 1, 2), jnp.int32), jnp.zeros((4, 24, 128), q.dtype)
    scales = jnp.ones((4, 1, 16))
    for pages, reason in (
      (Pages(pool, table, lengths), "pages of 24 slots: must be a multiple of 8, and divide 64"),
      (Pages(pool[:, :8].astype(jnp.int8), table, lengths, scales), "pages of 8 slots: must be a multiple of 16"),
      (Pages(pool[:, :8].astype(jnp.float32), table, lengths), "must be the same, or 8 bits with scales"),
      (Pages(pool[:0, :8], table, lengths), "a pool of 0 pages"),
    ):
      with pytest.raises(NotImplementedError, match=reason):
        call(q, None, 0, None, pages=pages)


@pytest.mark.parametrize("pairs, split, rest", [(3, 128, 128), (70, 256, 64), (128, 512, 192)])
def test_each_chunk_has_a_number(pairs, split, rest):
  """Whole chunks of all pairs in order, then pieces of the remainders; a pair without live slots has one piece."""
  rng = np.random.default_rng(pairs)
  sizes, lengths = gpu.Blocks(64, 2, split, 4, rest), rng.integers(0, 900, (2, pairs)).astype(np.int32)
  lengths[:, rng.random(pairs) < 0.3] = 0
  blocks, *counts = (np.asarray(x) for x in gpu_common.chunks_of(jnp.asarray(lengths), sizes))
  np.testing.assert_array_equal(blocks, np.maximum((-(-lengths // 64)).sum(axis=0), 1))
  np.testing.assert_array_equal(counts[0], blocks // (split // 64))
  np.testing.assert_array_equal(counts[1], -(-(blocks % (split // 64)) // (rest // 64)))
  assert sum(counts).max() <= sizes.most_chunks(int(blocks.max())) <= blocks.max()
  padded = [np.pad(np.cumsum(x) - x, (0, 128 - pairs), constant_values=x.sum()) for x in counts]
  starts = jnp.asarray(np.concatenate(padded), jnp.int32)
  for first, count in zip((0, 128), counts, strict=True):
    numbers = jnp.arange(count.sum(), dtype=jnp.int32)
    found = jax.jit(jax.vmap(partial(gpu_common.find, starts, first, 128)))(numbers)
    np.testing.assert_array_equal(found, np.repeat(np.arange(pairs), count))


def test_sizes_by_shape():
  """Two workers a processor, four for heads of 64; longer chunks in larger caches, as long as no worker is idle."""
  assert gpu.default_blocks(32, 8, 8192, 128, 132) == gpu.Blocks(64, 3, 1024, 264, rest=256, merged=4)
  assert gpu.default_blocks(1, 8, 32768, 128, 132).split == 256
  assert gpu.default_blocks(1, 3, 512, 64, 132) == gpu.Blocks(64, 3, 128, 264)
  assert gpu.default_blocks(8, 8, 8192, 64, 132) == gpu.Blocks(64, 2, 256, 528)
  assert gpu.default_blocks(32, 8, 272, 128, 132, paged=True) == gpu.Blocks(64, 3, 512, 264)
  assert gpu.default_blocks(8, 8, 272, 64, 132, paged=True) == gpu.Blocks(64, 2, 256, 528)
  assert gpu.default_blocks(248, 8, 272, 64, 132, paged=True) == gpu.Blocks(64, 3, 1024, 264, rest=256, merged=4)
  by_pair = gpu.Blocks(64, 2, 128, 0)
  assert gpu.default_blocks(32, 8, 1024, 128, 132) == gpu.default_blocks(2048, 2, 2048, 64, 132) == by_pair
  assert gpu.default_blocks(2048, 2, 24, 64, 132, paged=True) == by_pair
  assert gpu.default_blocks(32, 3, 1024, 64, 132) == gpu.Blocks(64, 2, 128, 528)
  assert gpu.default_blocks(1, 8, 0, 128, 132, paged=True, scaled=True) == gpu.Blocks(64, 4, 128, 264)
  wide = lambda *sizes, **more: gpu.default_blocks(*sizes, 132, **more)
  assert wide(8, 8, 8192, 256) == gpu.Blocks(64, 3, 512, 132, merged=4)
  assert wide(512, 8, 272, 256, paged=True) == gpu.Blocks(64, 2, 512, 132, merged=4)
  assert wide(512, 8, 272, 256, paged=True, scaled=True).stages == 1  # beside the list of 4,096 pairs
  with pytest.raises(ValueError, match="two or more times block"):
    gpu.Blocks(64, 2, 96, 4)
  with pytest.raises(ValueError, match="two or more times"):
    gpu.Blocks(64, 2, 64, 4)
  with pytest.raises(ValueError, match="up to split"):
    gpu.Blocks(64, 2, 128, 4, 192)
  with pytest.raises(ValueError, match="merged 0 must be 1 or more"):
    gpu.Blocks(64, 2, 128, 4, merged=0)
