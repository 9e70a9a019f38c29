"""The TPU kernels of window-bias attention beyond the shared suite: blocks, 16-bit gradients."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.common import compat_tpu
from pallas_kernels.window_bias import ref, tpu, tpu_common, window_bias_attention
from pallas_kernels.window_bias.common import segment_bounds
from tests.kernels import suite
from tests.kernels.window_bias_cases import close, gradients, inputs

pytestmark = pytest.mark.slow  # kernels are interpreted


def visibility(ids, tokens, window):
  """(visible, far) [B, T, T] from the definitions."""
  i, j = np.arange(tokens)[:, None], np.arange(tokens)[None]
  visible = (j <= i)[None] if ids is None else (j <= i) & (ids[:, :, None] == ids[:, None])
  return visible, np.broadcast_to(i - j > window, visible.shape)


@pytest.mark.parametrize("by_keys", [False, True])
@pytest.mark.parametrize("documents", [False, True])
@pytest.mark.parametrize("tile, window", [((16, 8), 20), ((8, 16), 0), ((8, 8), 7), ((32, 32), 96), ((8, 8), None)])
def test_steps_are_the_visible_blocks(tile, window, documents, by_keys):
  """Each once, next to the others of its owner, and marked with the kind of its pairs."""
  batch, tokens, tile = 3, 96, tpu_common.Tile(*tile)
  rng = np.random.default_rng(0)
  ids = np.sort(rng.integers(0, 5, (batch, tokens)), axis=1).astype(np.int32) if documents else None
  start = segment_bounds(jnp.asarray(ids))[0][:, None, None] if documents else None
  variant = tpu_common.Variant(window or 0, window is not None, tpu_common.Blocks(tile, tile, tile))
  pairs = tpu_common.visible_pairs(variant, tile, batch, tokens, start, by_keys)
  assert pairs.rows == (1 if documents else batch)
  visible, far = visibility(ids, tokens, window if window is not None else tokens)
  places, blocks = (np.asarray(x)[: int(pairs.count)] for x in (pairs.places, pairs.blocks))
  rows, kinds, queries, keys = places >> 2, places & 3, blocks >> 16, blocks & 0xFFFF
  block = lambda x: x.reshape(len(x), tokens // tile.q, tile.q, tokens // tile.kv, tile.kv)
  seen, biased = block(visible), block(far)
  found = np.argwhere(seen.any(axis=(2, 4)))
  if by_keys:
    found = found[np.lexsort((found[:, 1], found[:, 2], found[:, 0]))]
  np.testing.assert_array_equal(np.stack([rows, queries, keys], axis=1), found)
  whole = seen.all(axis=(2, 4))
  expected = np.where(
    whole & biased.all(axis=(2, 4)),
    tpu_common.FAR,
    np.where(whole & ~biased.any(axis=(2, 4)), tpu_common.FREE, tpu_common.MIXED),
  )
  np.testing.assert_array_equal(kinds, expected[rows, queries, keys])


@pytest.mark.parametrize(
  "tokens, heads, kv_heads, size, window, bias, segments",
  [(90, 3, 1, 64, 20, True, True), (64, 2, 2, 128, 0, True, False), (64, 2, 1, 64, 0, False, True)],
)
def test_bfloat16_gradients(tokens, heads, kv_heads, size, window, bias, segments):
  """Through blocks of every kind; each of four products adds half a unit in the last place, 2^-9."""
  tile = tpu_common.Tile(32, 32)
  q, k, v, rows, ids, dout = inputs(1, tokens, heads, kv_heads, size, jnp.bfloat16, bias, segments)
  differentiated = (q, k, v) if rows is None else (q, k, v, rows)

  def attend(q, k, v, bias=None):
    return tpu.window_bias_attention(q, k, v, bias, window, ids, blocks=tpu_common.Blocks(tile, tile, tile))

  with suite.interpreted_tpu():
    out, pull = jax.vjp(attend, *differentiated)
    grads = pull(dout)
  close(out, ref.window_bias_attention(q, k, v, rows, window, ids), 6e-3)
  for got, want in zip(grads, gradients(q, k, v, rows, window, ids, dout), strict=True):
    close(got, want, 1.2e-2)


def test_refuses_with_the_reason():
  q = jnp.zeros((1, 8, 2, 64), jnp.bfloat16)
  with pytest.raises(NotImplementedError, match="needs a TPU, the device is a cpu"):
    window_bias_attention(q, q, q, None, 4, implementation="tpu")
  with compat_tpu.interpret_mode():
    with pytest.raises(NotImplementedError, match="must all be bfloat16 or all float32"):
      window_bias_attention(*(q.astype(jnp.float16),) * 3, None, 4, implementation="tpu")
    with pytest.raises(NotImplementedError, match="head size 40"):
      window_bias_attention(*(q[..., :40],) * 3, None, 4, implementation="tpu")
    shape = jax.ShapeDtypeStruct((1, 2**20, 2, 64), jnp.bfloat16)
    with pytest.raises(NotImplementedError, match="more than fit the scalar memory"):
      jax.eval_shape(lambda x: window_bias_attention(x, x, x, None, 4, implementation="tpu"), shape)
