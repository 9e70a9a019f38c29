"""Decode attention over pages, with and without a window ring, against the oracle."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from pallas_kernels.common import compat_tpu
from pallas_kernels.decode import Pages, decode_attention, ref
from tests.kernels.suite import Backend, assert_close, compiled, float64, normal, on_hopper, running, unchecked

IMPLEMENTATIONS = [Backend("xla"), Backend("tpu", compat_tpu.interpret_mode), Backend("gpu", on_hopper, "bfloat16")]
pytestmark = pytest.mark.parametrize("backend", IMPLEMENTATIONS, ids=str)
LAYERS, LAYER, PAGE, MOST, RING = 2, 1, 16, 9, 21
RAGGED = np.array([[0, 1, 144], [37, 16, 130]])  # slots in pages of two rows and three KV heads; 144 are all
LIVE = np.array([[5, 0, 21], [1, 21, 17]])  # slots in the ring


def native(backend):
  """The dtype and the slots of a ring that a backend takes: on Hopper GPUs a ring is whole tiles of 8."""
  return {"dtype": backend.dtype, "ring": 24 if backend.name == "gpu" else RING}


def make(rng, group=2, size=64, *, dtype="float32", ring=RING, page=PAGE, most=MOST, lengths=RAGGED):
  """Queries, a ring, and pages: table entries without live slots are out of range, and dead slots are NaN."""
  batch, heads = lengths.shape
  q = normal(rng, batch, heads * group, size, dtype=dtype, scale=2.0)
  kv = normal(rng, LAYERS, batch, heads, ring, 2 * size, dtype=dtype)
  kv = jnp.asarray(np.where((np.arange(ring) < LIVE[..., None])[None, ..., None], kv, kv.dtype.type(np.nan)))
  index = np.arange(most * page)
  live = np.broadcast_to(index < lengths[..., None], (LAYERS, batch, heads, most * page)).reshape(-1, page)
  number = LAYERS * batch * heads * most + 5
  table = rng.permutation(number)[: number - 5]
  pool = np.full((number, page, 2 * size), np.nan)
  pool[table] = np.where(live[..., None], rng.standard_normal((number - 5, page, 2 * size)), np.nan)
  pages = np.where(live[:, 0], table, rng.choice([-7, 2**30, number], number - 5)).reshape(LAYERS, batch, heads, most)
  pages = Pages(jnp.asarray(pool, jnp.dtype(dtype)), jnp.asarray(pages, jnp.int32), jnp.asarray(lengths, jnp.int32))
  return q, kv, jnp.asarray(LIVE, jnp.int32), pages


def run(backend, q, kv, lengths, pages, **options):
  with running(backend):
    return compiled(backend, decode_attention, "lse", "mass", "softcap")(
      q, kv, jnp.int32(LAYER), lengths, pages=pages, **options
    )


def expect(q, kv, lengths, pages, **options):
  """The oracle's answer for the numbers as stored."""
  pages = dataclasses.replace(pages, pool=np.asarray(pages.pool, np.float64))
  kv = None if kv is None else float64(kv)[0]
  return ref.decode_attention(float64(q)[0], kv, LAYER, lengths, pages=pages, **options)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("size", [64, 128, 256])
def test_ring_and_pages(backend, size, dtype):
  """One softmax over both, and its log-sum-exp; a ring of 21 slots is not a whole number of tiles."""
  q, kv, lengths, pages = make(np.random.default_rng(0), 2, size, **{**native(backend), "dtype": dtype})
  out, logs = run(backend, q, kv, lengths, pages, lse=True)
  want, want_logs = expect(q, kv, lengths, pages, lse=True)
  assert_close(out, want, dtype)
  np.testing.assert_allclose(logs, want_logs, rtol=0, atol=1e-5)


@pytest.mark.parametrize("group", [1, 3, 8])
def test_pages_alone(backend, group):
  q, _, _, pages = make(np.random.default_rng(group), group, **native(backend))
  out, logs = run(backend, q, None, None, pages, lse=True)
  want, want_logs = expect(q, None, None, pages, lse=True)
  assert_close(out, want, backend.dtype)
  np.testing.assert_allclose(logs, want_logs, rtol=0, atol=1e-5)
  nothing = dataclasses.replace(pages, lengths=jnp.zeros_like(pages.lengths))
  assert (np.asarray(run(backend, q, None, None, nothing)) == 0).all()


@pytest.mark.parametrize("page, most", [(8, 17), (256, 1), (24, 6)])
def test_sizes_of_pages(backend, page, most):
  """Pages smaller and larger than a block."""
  sizes = dict(page=page, most=most, lengths=np.minimum(RAGGED, 130))
  q, kv, lengths, pages = make(np.random.default_rng(page), **sizes, **native(backend))
  assert_close(run(backend, q, kv, lengths, pages), expect(q, kv, lengths, pages), backend.dtype)


def test_numbering_and_room_change_no_bit(backend):
  """Bit-equal: a rerun, pages elsewhere in the pool, a longer table."""
  rng = np.random.default_rng(1)
  q, kv, lengths, pages = make(rng, **native(backend))
  first = run(backend, q, kv, lengths, pages)
  number = pages.pool.shape[0]
  order = rng.permutation(number)
  inside = (pages.table >= 0) & (pages.table < number)
  moved = jnp.where(inside, jnp.argsort(order)[jnp.clip(pages.table, 0, number - 1)], pages.table)
  moved = dataclasses.replace(pages, pool=pages.pool[order], table=moved.astype(jnp.int32))
  longer = dataclasses.replace(pages, table=jnp.pad(pages.table, ((0, 0),) * 3 + ((0, 11),), constant_values=-1))
  for other in (pages, moved, longer):
    np.testing.assert_array_equal(first, run(backend, q, kv, lengths, other))


def test_neighbours_change_no_bit(backend):
  q, kv, lengths, pages = make(np.random.default_rng(2), **native(backend))
  first = run(backend, q, kv, lengths, pages)
  for length in (0, 144):
    table = jnp.where((np.arange(2) == 0)[:, None, None], 0, pages.table)
    company = jnp.asarray(np.where(np.arange(2)[:, None] == 0, length, RAGGED), jnp.int32)
    other = run(backend, q, kv, lengths.at[0].set(length // 6), Pages(pages.pool, table, company))
    np.testing.assert_array_equal(first[1], other[1])


def scaled(rng, pages, dtype):
  """Pages of 8 bits instead of `pages`, with a scale for each key and value, NaN in dead slots."""
  number, page, _ = pages.pool.shape
  scales = jnp.asarray(rng.uniform(0.5, 2, (number, page, 2)), jnp.float32) * 0.02
  scales = jnp.where(jnp.isnan(pages.pool[..., :1]), jnp.nan, scales).reshape(number, 1, 2 * page)
  pool = jnp.asarray(rng.integers(-120, 121, pages.pool.shape), jnp.float32).astype(dtype)
  return Pages(pool, pages.table, pages.lengths, scales)


@pytest.mark.parametrize("page, size", [(PAGE, 64), (32, 64), (128, 64), (32, 256)])
def test_scaled_pages(backend, page, size):
  """8-bit pages beside a ring in full precision, and alone; smaller and larger than a block."""
  rng = np.random.default_rng(3)
  q, kv, lengths, pages = make(rng, size=size, page=page, most=-(-RAGGED.max() // page), **native(backend))
  for dtype in (jnp.int8, jnp.float8_e4m3fn):
    stored = scaled(rng, pages, dtype)
    for ring, in_ring in ((kv, lengths), (None, None)):
      out, logs = run(backend, q, ring, in_ring, stored, lse=True)
      want, want_logs = expect(q, ring, in_ring, stored, lse=True)
      assert_close(out, want, backend.dtype)
      np.testing.assert_allclose(logs, want_logs, rtol=0, atol=1e-5)


@pytest.mark.parametrize("stored", [None, jnp.int8, jnp.float8_e4m3fn])
def test_mass(backend, stored):
  """Of a ring and of pages in one softmax, 0 in dead slots; in q's own dtype and in 8 bits."""
  rng = np.random.default_rng(4)
  q, kv, lengths, pages = make(rng, 3, page=32, most=5, **native(backend))
  pages = pages if stored is None else scaled(rng, pages, stored)
  out, logs, masses = run(backend, q, kv, lengths, pages, lse=True, mass=True)
  want, want_logs, want_masses = expect(q, kv, lengths, pages, lse=True, mass=True)
  assert_close(out, want, backend.dtype)
  np.testing.assert_allclose(logs, want_logs, rtol=0, atol=1e-5)
  for mass, expected in zip(masses, want_masses, strict=True):
    assert mass.dtype == jnp.float32 and (np.asarray(mass)[expected == 0] == 0).all()
    np.testing.assert_allclose(mass, expected, rtol=0, atol=1e-5)


def test_capped_scores_and_sinks_of_scaled_pages(backend):
  """A slot's scale comes before the cap."""
  rng = np.random.default_rng(11)
  q, kv, lengths, pages = make(rng, page=32, most=5, **native(backend))
  options = dict(lse=True, mass=True, softcap=2.0, sinks=jnp.asarray([-1.0, 0.0, 1.0, 2.0, 3.0, 4.0]))
  pages = scaled(rng, pages, jnp.int8)
  results, want = (of(q, kv, lengths, pages, **options) for of in (lambda *a, **o: run(backend, *a, **o), expect))
  assert_close(results[0], want[0], backend.dtype)
  for found, expected in zip(jax.tree.leaves(results[1:]), jax.tree.leaves(want[1:]), strict=True):
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5)


def test_mass_of_pages_alone(backend):
  q, _, _, pages = make(np.random.default_rng(8), **native(backend))
  out, (of_ring, mass) = run(backend, q, None, None, pages, mass=True)
  want, (_, expected) = expect(q, None, None, pages, mass=True)
  assert_close(out, want, backend.dtype)
  assert of_ring is None
  np.testing.assert_allclose(mass, expected, rtol=0, atol=1e-5)


def test_bits_of_bfloat16(backend):
  q, kv, lengths, pages = make(np.random.default_rng(5), dtype="bfloat16")
  bits = lambda x: lax.bitcast_convert_type(x, jnp.uint16)
  plain = run(backend, q, kv, lengths, pages)
  stored = run(backend, q, bits(kv), lengths, dataclasses.replace(pages, pool=bits(pages.pool)))
  np.testing.assert_array_equal(plain, stored)


def test_temporaries_stay_below_a_hundredth(backend):
  """Only blocks are copied from a pool of 30 layers with 8,192 slots a head."""
  if backend.name != "xla":
    pytest.skip("compiled for its own device in test_tpu_compile_decode.py")
  shape = jax.ShapeDtypeStruct
  pages = Pages(
    shape((30 * 2 * 2 * 64, 128, 128), jnp.float32), shape((30, 2, 2, 64), jnp.int32), shape((2, 2), jnp.int32)
  )
  kv = shape((30, 2, 2, 80, 128), jnp.float32)
  call = jax.jit(lambda *args, pages: decode_attention(*args, pages=pages, lse=True, implementation="xla"))
  memory = call.lower(shape((2, 6, 64), jnp.float32), kv, jnp.int32(1), shape((2, 2), jnp.int32), pages=pages).compile()
  temporaries = memory.memory_analysis().temp_size_in_bytes
  size = int(np.prod(pages.pool.shape)) * 4
  assert temporaries < 0.01 * size, f"{temporaries:,} bytes beside a pool of {size:,}"


def test_bad_shapes_are_named(backend):
  q, kv, lengths, pages = make(np.random.default_rng(6))
  change = lambda **fields: dataclasses.replace(pages, **fields)
  for wrong, message in (
    (change(pool=pages.pool[..., :100]), "2H = 128"),
    (change(table=pages.table[:, :1]), "B=2"),
    (change(table=pages.table[:, :, :2], lengths=pages.lengths[:, :2]), "same L and K"),
    (change(lengths=pages.lengths[:1]), "pages.lengths"),
    (change(scales=jnp.ones(pages.pool.shape[:2])), "takes no pages.scales"),
    (change(pool=pages.pool.astype(jnp.int8)), "needs pages.scales"),
    (change(pool=pages.pool.astype(jnp.int8), scales=jnp.ones(pages.pool.shape[:2])), "must be .P, 1, 2 . page."),
  ):
    with pytest.raises(ValueError, match=message):
      unchecked(decode_attention)(q, kv, 0, lengths, pages=wrong)
