"""Window-bias attention: every implementation against the float64 oracle, forward and backward."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.window_bias import ref, tpu, tpu_common, window_bias_attention, xla
from tests.kernels.suite import Backend, assert_close, float64, interpreted_tpu, normal, running, unchecked

IMPLEMENTATIONS = [Backend("xla"), Backend("tpu", interpreted_tpu)]
pytestmark = pytest.mark.parametrize("backend", IMPLEMENTATIONS, ids=str)


@pytest.fixture(params=[8])
def small_blocks(request, monkeypatch):
  """Blocks so small that short texts are many of them."""
  monkeypatch.setattr(xla, "BLOCK", request.param)
  monkeypatch.setattr(xla, "STAGES", 3)
  monkeypatch.setattr(
    tpu,
    "default_blocks",
    lambda *_: tpu_common.Blocks(tpu_common.Tile(32, 16), tpu_common.Tile(16, 16), tpu_common.Tile(16, 32)),
  )


def make(rng, batch, tokens, heads, group, size, dtype="float32"):
  q = normal(rng, batch, tokens, heads * group, size, dtype=dtype, scale=2.0)
  return q, *(normal(rng, batch, tokens, heads, size, dtype=dtype) for _ in range(2))


def biases(rng, batch, heads, tokens):
  """None, soft (log of a probability), and hard (-inf or 0)."""
  soft = -np.abs(rng.standard_normal((batch, heads, tokens))) * 3
  hard = np.where(rng.random((batch, heads, tokens)) < 0.5, -np.inf, 0.0)
  return {"none": None, "soft": jnp.asarray(soft, jnp.float32), "hard": jnp.asarray(hard, jnp.float32)}


def segments(rng, batch, tokens):
  """Contiguous runs of 1 to 9 tokens with ids that repeat."""
  ids = np.repeat(rng.integers(0, 5, (batch, tokens)), 9, axis=1)[:, rng.integers(0, 5) :][:, :tokens]
  return jnp.asarray(np.cumsum(np.diff(ids, axis=1, prepend=ids[:, :1]) != 0, axis=1), jnp.int32)


def check(backend, q, k, v, bias, window, ids=None, dtype="float32"):
  with running(backend):
    out = window_bias_attention(q, k, v, bias, window, ids, implementation=backend.name)
  assert out.dtype == q.dtype and out.shape == q.shape
  assert_close(out, ref.window_bias_attention(*float64(q, k, v), bias, window, ids), dtype)
  return out


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("size", [64, 128])
def test_head_sizes_and_dtypes(backend, size, dtype):
  rng = np.random.default_rng(0)
  check(backend, *make(rng, 2, 40, 2, 2, size, dtype), biases(rng, 2, 2, 40)["soft"], 8, dtype=dtype)


@pytest.mark.parametrize("group", range(1, 9))
def test_groups(backend, group):
  rng = np.random.default_rng(group)
  check(backend, *make(rng, 1, 17, 2, group, 64), biases(rng, 1, 2, 17)["soft"], 4)


@pytest.mark.parametrize("kind", ["none", "soft", "hard"])
@pytest.mark.parametrize("window", [0, 1, 7, 29, 64])
def test_biases_windows_and_segments(backend, kind, window):
  """With and without documents; a window longer than the text leaves no key with a bias."""
  rng = np.random.default_rng(window)
  q, k, v = make(rng, 2, 30, 2, 2, 64)
  bias = biases(rng, 2, 2, 30)[kind]
  documents = [None, segments(rng, 2, 30), jnp.arange(60, dtype=jnp.int32).reshape(2, 30)]
  if backend.interpreted:
    documents = [documents[(window + len(kind)) % 3]]
  for ids in documents:
    check(backend, q, k, v, bias, window, ids)
  if (window == 64 or kind == "none") and not backend.interpreted:
    with running(backend):
      free, biased = (window_bias_attention(q, k, v, b, window, implementation=backend.name) for b in (None, bias))
    assert_close(free, np.asarray(biased, float), "float32")


@pytest.mark.parametrize("tokens", [1, 5, 16, 33, 131])
def test_lengths_against_blocks(backend, tokens, small_blocks):
  """Texts shorter than a block, of whole blocks, and neither; more blocks than stages."""
  rng = np.random.default_rng(tokens)
  q, k, v = make(rng, 2, tokens, 1, 2, 64)
  for number, (kind, bias) in enumerate(biases(rng, 2, 1, tokens).items()):
    if backend.interpreted and number != tokens % 3:
      continue
    check(backend, q, k, v, bias, 3, segments(rng, 2, tokens) if kind != "none" else None)


def reference_gradients(q, k, v, bias, cotangent, window, ids, by_age=False):
  """JAX differentiates the formula over the full score matrix in float64."""
  t, group = q.shape[1], q.shape[2] // k.shape[2]

  def loss(q, k, v, bias):
    i, j = jnp.arange(t)[:, None], jnp.arange(t)[None]
    scores = jnp.einsum("btnh,bsnh->bnts", q, jnp.repeat(k, group, 2)) / np.sqrt(q.shape[3])
    times = jnp.maximum(i - j, 1) if by_age else 1
    scores = scores + jnp.where(i - j > window, jnp.repeat(bias, group, 1)[:, :, None] * times, 0.0)
    visible = jnp.broadcast_to(j <= i, (q.shape[0], t, t))
    if ids is not None:
      visible = visible & (ids[:, :, None] == ids[:, None])
    weights = jax.nn.softmax(jnp.where(visible[:, None], scores, -jnp.inf), axis=-1)
    return jnp.sum(jnp.einsum("bnts,bsnh->btnh", weights, jnp.repeat(v, group, 2)) * cotangent)

  with jax.enable_x64(True), jax.numpy_dtype_promotion("standard"):
    q, k, v, bias, cotangent = (jnp.asarray(np.asarray(x, np.float64)) for x in (q, k, v, bias, cotangent))
    return [np.asarray(x) for x in jax.jit(jax.grad(loss, (0, 1, 2, 3)))(q, k, v, bias)]


@pytest.mark.parametrize("small_blocks", [16], indirect=True)
@pytest.mark.parametrize("kind, with_ids, window", [("soft", False, 5), ("soft", True, 0), ("hard", True, 5)])
def test_gradients(backend, kind, with_ids, window, small_blocks):
  """Of q, k, v and the bias, in blocks, against float64; a bias of -inf has a zero gradient, never NaN."""
  rng = np.random.default_rng(6)
  q, k, v = make(rng, 2, 41, 2, 3, 16)
  bias = biases(rng, 2, 2, 41)[kind]
  ids, cotangent = segments(rng, 2, 41) if with_ids else None, normal(rng, *q.shape)
  expected = reference_gradients(q, k, v, bias, cotangent, window, ids)
  assert expected[0].dtype == np.float64

  def loss(*args):
    return jnp.sum(window_bias_attention(*args, window, ids, implementation=backend.name) * cotangent)

  with running(backend):
    found = jax.jit(jax.grad(loss, (0, 1, 2, 3)))(q, k, v, bias)
  for name, grad, want in zip("qkvb", found, expected, strict=True):
    assert np.isfinite(grad).all(), name
    np.testing.assert_allclose(grad, want, rtol=0, atol=2e-5 * np.abs(want).max(), err_msg=name)


@pytest.mark.parametrize("small_blocks", [16], indirect=True)
@pytest.mark.parametrize("kind, with_ids, window", [("soft", True, 0), ("hard", False, 5)])
def test_bias_that_grows_with_age(backend, kind, with_ids, window, small_blocks):
  """Output and gradients, in blocks, against float64."""
  rng = np.random.default_rng(9)
  q, k, v = make(rng, 2, 41, 2, 3, 16)
  bias, cotangent = biases(rng, 2, 2, 41)[kind] / 8, normal(rng, *q.shape)
  ids = segments(rng, 2, 41) if with_ids else None
  expected = reference_gradients(q, k, v, bias, cotangent, window, ids, by_age=True)

  def loss(*args):
    out = window_bias_attention(*args, window, ids, by_age=True, implementation=backend.name)
    return jnp.sum(out * cotangent), out

  with running(backend):
    found, out = jax.jit(jax.grad(loss, (0, 1, 2, 3), has_aux=True))(q, k, v, bias)
  assert_close(out, ref.window_bias_attention(*float64(q, k, v), bias, window, ids, by_age=True), "float32")
  for name, grad, want in zip("qkvb", found, expected, strict=True):
    np.testing.assert_allclose(grad, want, rtol=0, atol=2e-5 * np.abs(want).max(), err_msg=name)


def test_two_runs_are_bit_equal(backend):
  rng = np.random.default_rng(7)
  args = (*make(rng, 2, 30, 2, 2, 64), biases(rng, 2, 2, 30)["soft"])
  with running(backend):
    grad = jax.jit(
      jax.grad(lambda *a: jnp.sum(window_bias_attention(*a, 4, implementation=backend.name) ** 2), (0, 1, 2, 3))
    )
    for one, two in zip(grad(*args), grad(*args), strict=True):
      np.testing.assert_array_equal(one, two)


def test_memory_is_linear_in_length(backend):
  """Four times the tokens take about four times the temporaries, forward and backward; a score matrix takes sixteen."""
  if backend.interpreted:
    pytest.skip("the kernel is compiled for its own device in test_tpu_compile_window_bias.py")

  def temporaries(tokens):
    shape = lambda heads: jax.ShapeDtypeStruct((1, tokens, heads, 64), jnp.float32)
    args = (shape(4), shape(2), shape(2), jax.ShapeDtypeStruct((1, 2, tokens), jnp.float32))
    loss = lambda *a: jnp.sum(window_bias_attention(*a, 256, implementation=backend.name) ** 2)
    return jax.jit(jax.grad(loss, (0, 1, 2, 3))).lower(*args).compile().memory_analysis().temp_size_in_bytes

  with running(backend):
    short, long = temporaries(2048), temporaries(8192)
  assert long < 5 * short, f"{short:,} bytes at 2,048 tokens, {long:,} at 8,192"


def test_bad_shapes_are_named(backend):
  rng = np.random.default_rng(8)
  q, k, v = make(rng, 1, 6, 2, 2, 64)
  bias = jnp.zeros((1, 2, 6))
  for args, message in (
    ((q, k[:, :5], v, bias, 1), "k "),
    ((q[:, :, :3], k, v, bias, 1), "N=3"),
    ((q, k, v, bias[..., :5], 1), "bias"),
    ((q, k, v, bias, 1, jnp.zeros((1, 5), jnp.int32)), "segment_ids"),
  ):
    with pytest.raises(ValueError, match=message):
      unchecked(window_bias_attention)(*args)
  with pytest.raises(ValueError, match="unknown implementation"):
    window_bias_attention(q, k, v, bias, 1, implementation="cuda")
