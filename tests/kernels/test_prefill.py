"""Prefill attention: every implementation against the float64 oracle."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.prefill import NEVER, gpu, prefill_attention, ref, tpu, xla
from tests import oracle
from tests.kernels.suite import (
  Backend,
  assert_close,
  compiled,
  float64,
  interpreted_tpu,
  normal,
  on_hopper,
  running,
  unchecked,
)  # fmt: skip

IMPLEMENTATIONS = [Backend("xla"), Backend("gpu", on_hopper), Backend("tpu", interpreted_tpu)]
pytestmark = pytest.mark.parametrize("backend", IMPLEMENTATIONS, ids=str)


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
  """Blocks so small that short texts are several of them."""
  monkeypatch.setattr(xla, "BLOCK", 64)
  monkeypatch.setattr(xla, "KEYS", 32)
  monkeypatch.setattr(xla, "WEIGHTED", 16)
  monkeypatch.setattr(gpu, "default_blocks", lambda *_: gpu.Blocks(kv=64))
  monkeypatch.setattr(tpu, "default_blocks", lambda *_: tpu.Blocks(128, 128))


def dtype_of(backend):
  """The dtype of cases that are not about dtypes."""
  return "bfloat16" if backend.name == "gpu" else "float32"


def make(rng, batch, tokens, heads, group, size, slots, dtype="float32"):
  q = normal(rng, batch, tokens, heads * group, size, dtype=dtype, scale=2.0)
  return q, *(normal(rng, batch, heads, slots, size, dtype=dtype) for _ in range(2))


def ranges(rng, batch, heads, slots, span):
  """Random first and last positions: kept keys, evicted ones, ones that every query sees, and dead ones."""
  position = rng.integers(0, span, (batch, heads, slots))
  kind = rng.integers(0, 4, position.shape)
  first = np.select([kind == 2, kind == 3], [-1, NEVER], position)
  last = np.select([kind == 1, kind == 3], [position + rng.integers(0, 9), -1], NEVER)
  return jnp.asarray(first, jnp.int32), jnp.asarray(last, jnp.int32)


def kill(x, first, last):
  """NaN in every slot that no query sees."""
  return jnp.asarray(np.where(np.asarray(first > last)[..., None], x.dtype.type(np.nan), x))


def check(backend, q, keys, values, q_pos, first, last, dtype="float32"):
  with running(backend):
    run = compiled(backend, prefill_attention)
    out = run(q, kill(keys, first, last), kill(values, first, last), q_pos, first, last)
  assert out.dtype == q.dtype
  assert_close(out, ref.prefill_attention(*float64(q, keys, values), q_pos, first, last), dtype)
  return out


def check_mass(backend, args, weights, dtype):
  """Log-sum-exp and mass against the oracle; the output is bit for bit what it is without them."""
  q, keys, values, q_pos, first, last = args
  args = q, kill(keys, first, last), kill(values, first, last), q_pos, first, last
  weights = jnp.asarray(weights, jnp.float32)
  with running(backend):
    run = functools.partial(compiled(backend, prefill_attention, "lse"), *args)
    (out, logs, mass), (_, alone), (_, only_mass) = (
      run(lse=True, query_weights=weights),
      run(lse=True),
      run(query_weights=weights),
    )
    plain = run()
  _, want_logs, want_mass = ref.prefill_attention(
    *float64(q, keys, values), q_pos, first, last, lse=True, query_weights=weights
  )
  assert logs.dtype == mass.dtype == jnp.float32
  for one, two in ((out, plain), (logs, alone), (mass, only_mass)):
    np.testing.assert_array_equal(np.asarray(one, np.float32), np.asarray(two, np.float32))
  nothing = np.isneginf(want_logs)
  np.testing.assert_array_equal(np.isneginf(logs), nothing)
  assert_close(jnp.where(nothing, 0.0, logs), np.where(nothing, 0.0, want_logs), "float32")
  np.testing.assert_array_equal(np.asarray(mass)[want_mass == 0], 0)
  assert_close(mass, want_mass, "float32")
  return logs, mass


@pytest.mark.parametrize("group, size", [(1, 64), (3, 64), (4, 128)])
def test_log_sum_exp_and_mass(backend, group, size):
  """Two rows, the second one shorter; queries before every key and padding, whose weights give nothing."""
  rng, dtype = np.random.default_rng(group), dtype_of(backend)
  q, keys, values = make(rng, 2, 150, 2, group, size, 70, dtype)
  q_pos = np.stack([np.arange(150) - 1, np.where(np.arange(150) < 90, np.arange(150) + 20, -2)])
  first, last = ranges(rng, 2, 2, 70, 150)
  first = first.at[0, 0].max(5)
  check_mass(backend, (q, keys, values, jnp.asarray(q_pos, jnp.int32), first, last), rng.random((2, 150)), dtype)


@pytest.mark.parametrize("observed", [0, 1, 32])
def test_mass_of_the_last_queries(backend, observed):
  """As TOVA (the last one) and SnapKV (a few) weigh them: most blocks of queries have no weight."""
  rng, dtype = np.random.default_rng(observed), dtype_of(backend)
  q, keys, values = make(rng, 1, 200, 1, 2, 64, 230, dtype)
  position = jnp.arange(230, dtype=jnp.int32)[None, None]
  last = jnp.where(jnp.asarray(rng.random((1, 1, 230)) < 0.6), position + 40, NEVER)
  weights = np.arange(200)[None] >= 200 - observed
  args = q, keys, values, jnp.arange(30, 230, dtype=jnp.int32)[None], position, last
  _, mass = check_mass(backend, args, weights, dtype)
  np.testing.assert_allclose(mass.sum(), 2 * observed, rtol=1e-5)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("size", [64, 128, 256])
def test_head_sizes_and_dtypes(backend, size, dtype):
  rng = np.random.default_rng(0)
  q, keys, values = make(rng, 2, 9, 2, 3, size, 70, dtype)
  q_pos = jnp.asarray(np.stack([np.arange(60, 69), np.arange(9)]), jnp.int32)
  check(backend, q, keys, values, q_pos, *ranges(rng, 2, 2, 70, 69), dtype)


@pytest.mark.parametrize("group", range(1, 9))
def test_groups(backend, group):
  rng, dtype = np.random.default_rng(group), dtype_of(backend)
  q, keys, values = make(rng, 1, 5, 2, group, 64, 33, dtype)
  q_pos = jnp.arange(20, 25, dtype=jnp.int32)[None]
  check(backend, q, keys, values, q_pos, *ranges(rng, 1, 2, 33, 25), dtype)


@pytest.mark.parametrize("tokens", [1, 3, 63, 64, 65])
def test_chunk_lengths(backend, tokens):
  """One query, odd chunks, and both sides of the edge of a tile of 64 queries, which all backends have here."""
  rng, dtype = np.random.default_rng(tokens), dtype_of(backend)
  q, keys, values = make(rng, 1, tokens, 1, 2, 64, 40, dtype)
  q_pos = jnp.arange(tokens, dtype=jnp.int32)[None]
  check(backend, q, keys, values, q_pos, *ranges(rng, 1, 1, 40, max(tokens, 2)), dtype)


def test_chunk_after_a_cached_prefix(backend):
  """A cache's layout: the window's tokens, the chunk, then an archive with free slots; one row is shorter."""
  rng, dtype = np.random.default_rng(5), dtype_of(backend)
  window, seen, tokens, archive = 9, 80, 21, 50
  position = np.concatenate([np.arange(seen - window - 1, seen), seen + np.arange(tokens)])
  length = np.array([tokens, 13])
  real = (position < seen + length[:, None])[:, None]
  evicted = rng.random((2, 2, position.size)) < 0.6
  archived = np.arange(archive) < rng.integers(1, archive, (2, 2, 1))
  first = np.concatenate(
    [np.where(np.broadcast_to(real, evicted.shape), position, NEVER), np.where(archived, -1, NEVER)], axis=2
  )
  last = np.concatenate(
    [np.where(real, np.where(evicted, position + window, NEVER), -1), np.where(archived, NEVER, -1)], axis=2
  )
  q, keys, values = make(rng, 2, tokens, 2, 2, 64, first.shape[2], dtype)
  q_pos = np.where(np.arange(tokens) < length[:, None], seen + np.arange(tokens), -2)
  out = check(backend, q, keys, values, *(jnp.asarray(x, jnp.int32) for x in (q_pos, first, last)), dtype)
  assert (np.asarray(out[1, 13:], float) == 0).all()


@pytest.mark.parametrize("window, rate", [(0, 0.5), (0, 1.0), (1, 0.5), (6, 0.5), (6, 1.0), (30, 0.5), (6, 0.0)])
def test_the_formula_of_eviction(backend, window, rate):
  """first = position, last = position + W if evicted: exactly `i - j <= W or not evicted[j]`."""
  rng, dtype = np.random.default_rng(1), dtype_of(backend)
  evicted = rng.random((1, 2, 24)) < rate
  q, keys, values = make(rng, 1, 24, 2, 2, 64, 24, dtype)
  position = np.broadcast_to(np.arange(24), evicted.shape)
  last = np.where(evicted, position + window, NEVER)
  with running(backend):
    q_pos, first, last = (jnp.asarray(x, jnp.int32) for x in (np.arange(24)[None], position, last))
    out = compiled(backend, prefill_attention)(q, keys, values, q_pos, first, last)
  q, keys, values = float64(q, keys, values)
  for head in range(4):
    mask = oracle.visible(evicted[0, head // 2], window)
    scores = q[0, :, head] @ keys[0, head // 2].T / 8
    weights = np.where(mask, np.exp(scores - scores.max()), 0)
    expected = weights / weights.sum(-1, keepdims=True) @ values[0, head // 2]
    assert_close(out[0, :, head], expected, dtype)


def test_nothing_visible_gives_zeros(backend):
  """Padding queries (position -2), queries before every key, and a cache with nothing but NaN."""
  rng, dtype = np.random.default_rng(2), dtype_of(backend)
  q, keys, values = make(rng, 2, 6, 2, 2, 64, 12, dtype)
  q_pos = jnp.array([[-2, -2, 0, 1, 2, 3], [5, 6, 7, 8, -2, -2]], jnp.int32)
  first = jnp.full((2, 2, 12), 2, jnp.int32)
  out = check(backend, q, keys, values, q_pos, first, jnp.full_like(first, NEVER), dtype)
  assert (np.asarray(out[0, :4], float) == 0).all() and (np.asarray(out[1, 4:], float) == 0).all()
  dead = jnp.full_like(first, NEVER)
  out = check(backend, q, keys, values, q_pos, dead, jnp.full_like(first, -1), dtype)
  assert (np.asarray(out, float) == 0).all()


def test_two_runs_are_bit_equal_and_jit_agrees(backend):
  rng, dtype = np.random.default_rng(3), dtype_of(backend)
  q, keys, values = make(rng, 2, 20, 2, 2, 64, 50, dtype)
  q_pos = jnp.asarray(np.stack([np.arange(20), np.arange(20) + 9]), jnp.int32)
  first, last = ranges(rng, 2, 2, 50, 29)
  run = compiled(backend, prefill_attention)
  run = jax.jit(run) if backend.name == "tpu" else run  # interpreted, but as a part of a program
  with running(backend):
    one, two = (np.asarray(run(q, keys, values, q_pos, first, last)) for _ in range(2))
  np.testing.assert_array_equal(one.view(np.uint8), two.view(np.uint8))
  assert_close(one, ref.prefill_attention(*float64(q, keys, values), q_pos, first, last), dtype)


def test_free_slots_change_no_bit(backend):
  """Nor do neighbours: a row alone, in a cache just large enough, gives the same bits as in the batch."""
  rng, dtype = np.random.default_rng(6), dtype_of(backend)
  q, keys, values = make(rng, 2, 20, 1, 2, 64, 150, dtype)
  q_pos = jnp.asarray(np.stack([np.arange(20), np.arange(20) + 30]), jnp.int32)
  first, last = ranges(rng, 2, 1, 150, 50)
  first, last = first.at[..., 50:].set(NEVER), last.at[..., 50:].set(-1)
  with running(backend):
    run = compiled(backend, prefill_attention)
    both = run(q, keys, values, q_pos, first, last)
    args = q[1:], keys[1:, :, :50], values[1:, :, :50], q_pos[1:], first[1:, :, :50], last[1:, :, :50]
    alone = run(*args)
  np.testing.assert_array_equal(np.asarray(both[1:], np.float32), np.asarray(alone, np.float32))


def test_bad_shapes_are_named(backend):
  q, keys, values = make(np.random.default_rng(4), 1, 3, 2, 2, 64, 8)
  pos, first = jnp.zeros((1, 3), jnp.int32), jnp.zeros((1, 2, 8), jnp.int32)
  for args, message in (
    ((q, keys, values[:, :, :7], pos, first, first), "keys"),
    ((q[:, :, :3], keys, values, pos, first, first), "N=3"),
    ((q, keys, values, pos[:, :2], first, first), "q_pos"),
    ((q, keys, values, pos, first[..., :7], first), "k_first"),
  ):
    with pytest.raises(ValueError, match=message):
      unchecked(prefill_attention)(*args)
  with pytest.raises(ValueError, match="query_weights"):
    unchecked(prefill_attention)(q, keys, values, pos, first, first, query_weights=jnp.ones((1, 2)))
  with pytest.raises(ValueError, match="unknown implementation"):
    prefill_attention(q, keys, values, pos, first, first, implementation="cuda")
