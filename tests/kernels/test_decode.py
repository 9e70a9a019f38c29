"""Decode attention: every implementation against the float64 oracle."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from pallas_kernels.common import compat_tpu
from pallas_kernels.decode import decode_attention, ref
from tests.kernels.suite import Backend, assert_close, compiled, float64, normal, on_hopper, running, unchecked

IMPLEMENTATIONS = [Backend("xla"), Backend("tpu", compat_tpu.interpret_mode), Backend("gpu", on_hopper, "bfloat16")]
pytestmark = pytest.mark.parametrize("backend", IMPLEMENTATIONS, ids=str)
LAYERS, LAYER = 3, 1
SLOTS = 136  # the default: tests of one shape share a compiled program


def make(rng, batch, heads, group, size, slots, dtype="float32"):
  q = normal(rng, batch, heads * group, size, dtype=dtype, scale=2.0)
  return q, normal(rng, LAYERS, batch, heads, slots, 2 * size, dtype=dtype)


def kill(kv, lengths, filler=np.nan):
  """`filler` in every slot past the live prefix."""
  dead = np.arange(kv.shape[3]) >= np.asarray(lengths)[..., None]
  return jnp.asarray(np.where(dead[None, ..., None], kv.dtype.type(filler), kv))


def check(backend, q, kv, lengths):
  with running(backend):
    out = compiled(backend, decode_attention)(q, kill(kv, lengths), jnp.int32(LAYER), lengths)
  assert out.dtype == q.dtype
  expected = ref.decode_attention(*float64(q, kv), LAYER, lengths)
  assert_close(out, expected, q.dtype.name)
  return out


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("size", [64, 128, 256])
def test_head_sizes_and_dtypes(backend, size, dtype):
  rng = np.random.default_rng(0)
  q, kv = make(rng, 2, 2, 4, size, 208, dtype)
  check(backend, q, kv, jnp.array([[208, 1], [77, 128]], jnp.int32))


@pytest.mark.parametrize("group", range(1, 9))
def test_groups(backend, group):
  rng = np.random.default_rng(group)
  q, kv = make(rng, 2, 2, group, 64, SLOTS, backend.dtype)
  check(backend, q, kv, jnp.asarray(rng.integers(0, SLOTS + 1, (2, 2)), jnp.int32))


@pytest.mark.parametrize("slots", [1, 7, 128, 129, 304])
def test_lengths(backend, slots):
  """Empty, one, odd, the block's edges, full and ragged, for caches shorter and longer than a block."""
  rng = np.random.default_rng(slots)
  q, kv = make(rng, 4, 3, 2, 64, slots, backend.dtype)
  edges = np.clip([0, 1, 2, 3, 63, 127, 128, 129, 255, 256, slots - 1, slots], 0, slots).reshape(4, 3)
  for lengths in (edges, np.full((4, 3), slots), np.ones((4, 3), int), rng.integers(0, slots + 1, (4, 3))):
    check(backend, q, kv, jnp.asarray(lengths, jnp.int32))


def test_nothing_live_gives_zeros(backend):
  q, kv = make(np.random.default_rng(1), 2, 2, 3, 64, SLOTS, backend.dtype)
  out = check(backend, q, kv, jnp.zeros((2, 2), jnp.int32))
  assert (np.asarray(out) == 0).all()


def test_other_layers_and_dead_slots_are_never_used(backend):
  """Everything but the live prefix of the layer that is read is NaN."""
  rng = np.random.default_rng(2)
  q, kv = make(rng, 2, 2, 2, 64, SLOTS, backend.dtype)
  lengths = jnp.array([[136, 3], [0, 131]], jnp.int32)
  alone = jnp.full_like(kv, np.nan).at[LAYER].set(kv[LAYER])
  check(backend, q, alone, lengths)
  with running(backend):
    huge = decode_attention(q, kill(kv, lengths, 1e30), LAYER, lengths, implementation=backend.name)
    nan = decode_attention(q, kill(kv, lengths), LAYER, lengths, implementation=backend.name)
  np.testing.assert_array_equal(huge, nan)


def test_large_scores(backend):
  """Scores in the hundreds, of both signs, neither overflow nor vanish."""
  rng = np.random.default_rng(3)
  q, kv = make(rng, 2, 2, 2, 64, SLOTS, backend.dtype)
  for sign in (1, -1):
    check(backend, q * 60, jnp.abs(kv) * sign, jnp.array([[136, 9], [0, 64]], jnp.int32))


def test_two_runs_and_any_company_are_bit_equal(backend):
  """A row's result does not depend on how long its neighbours are, and a rerun repeats it."""
  rng = np.random.default_rng(4)
  q, kv = make(rng, 4, 3, 3, 64, 304, backend.dtype)
  lengths = np.array([[140, 17, 0], [3, 304, 64], [0, 1, 129], [0, 0, 0]])
  with running(backend):
    run = lambda lengths: np.asarray(
      decode_attention(q, kv, LAYER, jnp.asarray(lengths, jnp.int32), implementation=backend.name)
    )
    first = run(lengths)
    np.testing.assert_array_equal(first, run(lengths))
    for company in (0, 1, 304):
      other = np.where(np.arange(4)[:, None] == 0, lengths, company)
      np.testing.assert_array_equal(first[0], run(other)[0])


def test_log_sum_exp(backend):
  rng = np.random.default_rng(9)
  q, kv = make(rng, 2, 2, 2, 64, SLOTS, backend.dtype)
  lengths = jnp.array([[136, 3], [0, 131]], jnp.int32)
  with running(backend):
    out, logs = decode_attention(q, kill(kv, lengths), LAYER, lengths, lse=True, implementation=backend.name)
  want, want_logs = ref.decode_attention(*float64(q, kv), LAYER, lengths, lse=True)
  assert_close(out, want, backend.dtype)
  assert logs.dtype == jnp.float32
  np.testing.assert_allclose(logs, want_logs, rtol=0, atol=1e-5)


@pytest.mark.parametrize("slots, group", [(7, 3), (SLOTS, 1), (304, 8)])
def test_mass(backend, slots, group):
  """The attention of a KV head's slots adds up to the query heads of its group; dead slots get 0."""
  rng = np.random.default_rng(10)
  q, kv = make(rng, 2, 2, group, 64, slots, backend.dtype)
  lengths = jnp.array([[slots, 3], [0, slots - 5]], jnp.int32)
  with running(backend):
    out, (mass, of_pages) = decode_attention(
      q, kill(kv, lengths), LAYER, lengths, mass=True, implementation=backend.name
    )
  want, (want_mass, _) = ref.decode_attention(*float64(q, kv), LAYER, lengths, mass=True)
  assert_close(out, want, backend.dtype)
  assert of_pages is None and mass.dtype == jnp.float32 and (np.asarray(mass)[np.asarray(want_mass) == 0] == 0).all()
  np.testing.assert_allclose(mass, want_mass, rtol=0, atol=1e-5)
  np.testing.assert_allclose(mass.sum(-1), np.where(lengths > 0, float(group), 0.0), rtol=0, atol=1e-5)


def test_bits_of_bfloat16(backend):
  """A cache that stores bfloat16 as uint16 gives the same result."""
  rng = np.random.default_rng(5)
  q, kv = make(rng, 2, 2, 2, 64, 90, "bfloat16")
  lengths = jnp.array([[90, 3], [0, 31]], jnp.int32)
  with running(backend):
    plain = decode_attention(q, kv, LAYER, lengths, implementation=backend.name)
    bits = decode_attention(q, lax.bitcast_convert_type(kv, jnp.uint16), LAYER, lengths, implementation=backend.name)
  np.testing.assert_array_equal(plain, bits)


def test_jitted_with_a_traced_layer(backend):
  rng = np.random.default_rng(6)
  q, kv = make(rng, 2, 2, 2, 64, SLOTS, backend.dtype)
  lengths = jnp.array([[50, 3], [0, 31]], jnp.int32)
  with running(backend):
    run = lambda layer: decode_attention(q, kv, layer, lengths, implementation=backend.name)
    run = run if backend.name == "gpu" else jax.jit(run)  # that interpreter's callbacks may block a compiled program
    for layer in range(LAYERS):
      out = run(jnp.int32(layer))
      assert_close(out, ref.decode_attention(*float64(q, kv), layer, lengths), backend.dtype)


def test_bad_shapes_are_named(backend):
  q, kv = make(np.random.default_rng(7), 2, 2, 2, 64, 8)
  lengths = jnp.zeros((2, 2), jnp.int32)
  for args, message in (
    ((q, kv[..., :100], 0, lengths), "2H = 128"),
    ((q[:, :3], kv, 0, lengths), "N=3"),
    ((q, kv, 0, lengths[:, :1]), "lengths"),
    ((q[:1], kv, 0, lengths[:1]), "B=1"),
    ((q, None, 0, None), "nothing to attend to"),
    ((q, kv, 0, None), "kv and lengths go together"),
  ):
    with pytest.raises(ValueError, match=message):
      unchecked(decode_attention)(*args)
  with pytest.raises(ValueError, match="unknown implementation"):
    decode_attention(q, kv, 0, lengths, implementation="cuda")
