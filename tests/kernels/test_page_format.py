"""Formats of pages: encoding and decoding, sizes, and another format as one class."""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from pallas_kernels.common import compat, compat_tpu
from pallas_kernels.decode import Pages, decode_attention, ref
from pallas_kernels.paged import FORMATS, PageFormat, format_of
from tests.kernels.suite import assert_close, normal


class Int4(PageFormat):
  """Two numbers from -7 to 7 in a byte, even channels in the low half."""

  def width(self, head_dim):
    return head_dim

  def encode(self, rows):
    numbers, scales = PageFormat("whole", jnp.dtype(jnp.int8), self.largest).encode(rows)
    low, high = numbers[..., ::2] & jnp.int8(15), numbers[..., 1::2] << 4
    return lax.bitcast_convert_type(low | high, jnp.uint8), scales

  def widened(self, cells, dtype):
    cells = lax.bitcast_convert_type(cells, jnp.int8)
    halves = jnp.stack([cells << 4, cells], axis=-1) >> 4
    return halves.reshape(*cells.shape[:-1], -1).astype(dtype)


INT4 = Int4("int4", jnp.dtype(jnp.uint8), 7.0)


@pytest.mark.parametrize("form, error", [(FORMATS["int8"], 0.5 / 127), (FORMATS["float8"], 2**-4), (INT4, 0.5 / 7)])
@pytest.mark.parametrize("bits", [False, True])
def test_what_is_decoded_is_near(form, error, bits):
  """Within half a step of the largest number of a key or value; zeros stay zeros; bits of bfloat16 are numbers."""
  rows = normal(np.random.default_rng(0), 3, 5, 32, dtype="bfloat16").at[1, 2].set(0)
  cells, scales = form.encode(lax.bitcast_convert_type(rows, jnp.uint16) if bits else rows)
  assert cells.dtype == form.dtype and cells.shape[-1] == form.width(16) and scales.dtype == jnp.float32
  pairs = np.asarray(rows, np.float64).reshape(3, 5, 2, 16)
  largest = np.abs(pairs).max(-1)
  np.testing.assert_allclose(scales, largest / form.largest, rtol=1e-6)
  decoded = np.asarray(form.decode(cells, scales), np.float64).reshape(pairs.shape)
  assert (np.abs(decoded - pairs) <= error * largest[..., None] * 1.001).all()
  pool, of_pool = form.empty(6, 8, 16)
  assert pool.shape == (6, 8, form.width(16)) and of_pool.shape == (6, 1, 16)
  assert pool.nbytes + of_pool.nbytes == 6 * 8 * form.slot_bytes(16)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "uint16"])
def test_floats_are_stored_as_they_are(dtype):
  form, rows = format_of(dtype), jnp.ones((2, 8), dtype)
  assert form == PageFormat("float", jnp.dtype(dtype)) and not form.scaled
  cells, scales = form.encode(rows)
  assert cells is rows and scales is None and form.slot_bytes(4) == rows[0].nbytes
  assert form.decode(cells, None).dtype == ("bfloat16" if dtype == "uint16" else dtype)


def test_another_format_is_one_class(monkeypatch):
  """XLA attends to its pages as to the decoded numbers; kernels that cannot read them refuse."""
  monkeypatch.setitem(FORMATS, "int4", INT4)
  rng = np.random.default_rng(1)
  q, rows = normal(rng, 2, 4, 64), normal(rng, 7, 16, 128)
  cells, scales = INT4.encode(rows)
  table, lengths = jnp.asarray([[[[0, 3]], [[5, 1]]]], jnp.int32), jnp.asarray([[19], [32]], jnp.int32)
  pages = Pages(cells, table, lengths, scales.reshape(7, 1, 32))
  assert pages.format == INT4
  plain = dataclasses.replace(pages, pool=INT4.decode(cells, scales), scales=None)
  out = decode_attention(q, None, 0, None, pages=pages, implementation="xla")
  assert_close(out, ref.decode_attention(q, None, 0, None, pages=plain), "float32")
  with compat_tpu.interpret_mode(), pytest.raises(NotImplementedError, match="must be the same, or 8 bits"):
    decode_attention(q, None, 0, None, pages=pages, implementation="tpu")
  if compat.HAS_MOSAIC_GPU:
    with compat.assume_hopper(), pytest.raises(NotImplementedError, match="must be the same, or 8 bits"):
      decode_attention(q.astype(jnp.bfloat16), None, 0, None, pages=pages, implementation="gpu")
