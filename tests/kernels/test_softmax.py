"""Soft-capping of scores and attention sinks: every implementation against the float64 oracles."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import decode, prefill, window_bias
from pallas_kernels.common import compat, softmax
from pallas_kernels.decode import Pages
from pallas_kernels.decode import ref as decode_ref
from pallas_kernels.prefill import gpu as prefill_gpu
from pallas_kernels.prefill import ref as prefill_ref
from pallas_kernels.prefill import tpu as prefill_tpu
from pallas_kernels.window_bias import ref as window_bias_ref
from pallas_kernels.window_bias import tpu as window_bias_tpu
from pallas_kernels.window_bias import tpu_common
from tests.kernels import prefill_cases, window_bias_cases
from tests.kernels.suite import (
  Backend,
  assert_close,
  float64,
  interpreted_tpu,
  needs_mosaic_gpu,
  normal,
  on_hopper,
  running,
)

BACKENDS = [Backend("xla"), Backend("tpu", interpreted_tpu), Backend("gpu", on_hopper, "bfloat16")]
CAP, N, K, H, LAYERS, LAYER = 1.5, 4, 2, 64, 2, 1
SINKS = jnp.asarray([-30.0, 0.5, 4.0, 30.0])  # the first adds nothing, beside the last nothing else is seen
OPTIONS = {"sinks": {"sinks": SINKS}, "softcap": {"softcap": CAP}, "both": {"softcap": CAP, "sinks": SINKS}}
# In units of the largest value: rounded weights, outputs and, beside sinks, outputs once more; gradients pass through
# four such products.
FORWARD, BACKWARD = {"float32": 1e-5, "bfloat16": 8e-3}, {"float32": 2e-5, "bfloat16": 1.6e-2}


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
  """Blocks so small that short texts are several of them."""
  tile = tpu_common.Tile(32, 32)
  monkeypatch.setattr(prefill_gpu, "default_blocks", lambda *_: prefill_gpu.Blocks(kv=64))
  monkeypatch.setattr(prefill_tpu, "default_blocks", lambda *_: prefill_tpu.Blocks(128, 128))
  monkeypatch.setattr(window_bias_tpu, "default_blocks", lambda *_: tpu_common.Blocks(tile, tile, tile))


def of_decode(dtype, paged=False):
  """Heads without live slots, with one and with several blocks of them."""
  rng = np.random.default_rng(0)
  q, kv = normal(rng, 2, N, H, dtype=dtype, scale=2.0), normal(rng, LAYERS, 2, K, 136, 2 * H, dtype=dtype)
  pages = None
  if paged:
    table = jnp.arange(LAYERS * 2 * K, dtype=jnp.int32).reshape(LAYERS, 2, K, 1)
    pages = Pages(normal(rng, LAYERS * 2 * K, 64, 2 * H, dtype=dtype), table, jnp.asarray([[0, 3], [64, 9]], jnp.int32))
  lengths = jnp.asarray([[136, 1], [0, 131]], jnp.int32)
  dead = np.arange(136) >= np.asarray(lengths)[..., None]
  return (q, jnp.where(dead[None, ..., None], jnp.asarray(np.nan, kv.dtype), kv), LAYER, lengths), {"pages": pages}


def of_prefill(dtype):
  """A prefix, the diagonal, padding, and a query that sees nothing."""
  *arrays, q_pos, first, last = prefill_cases.text(70, 60, K, N // K, H, 12, 0.5, dtype, batch=2)
  q_pos = q_pos.at[1, 50:].set(-2)
  return (*arrays, q_pos, jnp.maximum(first, 61), last), {}


def of_window_bias(dtype):
  *args, ids, _ = window_bias_cases.inputs(1, 90, N, K, H, dtype, True, True)
  return (*args, 20, ids), {}


CASES = {
  "decode": (decode.decode_attention, decode_ref.decode_attention, of_decode),
  "decode of pages": (decode.decode_attention, decode_ref.decode_attention, partial(of_decode, paged=True)),
  "prefill": (prefill.prefill_attention, prefill_ref.prefill_attention, of_prefill),
  "window_bias": (window_bias.window_bias_attention, window_bias_ref.window_bias_attention, of_window_bias),
}


def wanted(name, backend, args) -> dict:
  """What the operation returns besides the output, as far as the backend can."""
  if name.startswith("decode"):
    return {"lse": True, "mass": True}
  if name == "prefill" and backend.name != "tpu":
    weights = np.random.default_rng(1).random(args[3].shape).astype(np.float32)
    weights[:, ::3] = 0
    return {"lse": True, "query_weights": jnp.asarray(weights)}
  return {"lse": True}


def combined(values, alone) -> list[tuple]:
  """(backend, one of `values`, option): all for XLA; a kernel, which is slow to interpret, has its sinks without a cap
  for the value `alone`, and both otherwise."""
  kernel_option = lambda value: "sinks" if value == alone else "both"
  return [(b, x, o) for b in BACKENDS for x in values for o in OPTIONS if not b.interpreted or o == kernel_option(x)]


@pytest.mark.parametrize("backend, name, option", combined(CASES, "decode"), ids=str)
def test_results(backend, name, option):
  """Output, log-sum-exp and mass; the output alone, which differs from that of a plain softmax."""
  options = OPTIONS[option]
  attend, oracle, make = CASES[name]
  args, more = make(jnp.dtype(backend.dtype))
  more |= wanted(name, backend, args)
  with running(backend):
    results = attend(*args, **more, **options, implementation=backend.name)
    pages = {"pages": more["pages"]} if "pages" in more else {}
    alone = attend(*args, **pages, **options, implementation=backend.name)
    plain = attend(*args, **pages, implementation=backend.name)
  exact = [x if x is None or isinstance(x, int) else float64(x)[0] for x in args]
  out, logs, *masses = jax.tree.leaves(oracle(*exact, **more, **options))
  ours, our_logs, *our_masses = jax.tree.leaves(results)
  assert ours.dtype == backend.dtype and our_logs.dtype == jnp.float32
  for one in (ours, alone):
    window_bias_cases.close(one, out, FORWARD[backend.dtype])
  nothing = np.isneginf(logs)
  np.testing.assert_array_equal(np.isneginf(our_logs), nothing)
  assert_close(jnp.where(nothing, 0.0, our_logs), np.where(nothing, 0.0, logs), "float32")
  for mass, expected in zip(our_masses, masses, strict=True):
    assert_close(mass, expected, "float32")
  assert np.abs(np.asarray(ours, np.float32) - np.asarray(plain, np.float32)).max() > 0.01


@pytest.mark.parametrize("name", ["decode of pages", "prefill"])
@pytest.mark.parametrize("backend", BACKENDS, ids=str)
def test_a_row_is_itself_alone(backend, name):
  attend, _, make = CASES[name]
  args, more = make(jnp.dtype(backend.dtype))
  options = {name: value for option in OPTIONS.values() for name, value in option.items()}
  with running(backend):
    both = attend(*args, **more, **options, implementation=backend.name)
    if name == "prefill":
      one = [x[1:] for x in args]
    else:
      q, kv, layer, lengths = args
      pages = more["pages"]
      one = q[1:], kv[:, 1:], layer, lengths[1:]
      more = {"pages": Pages(pages.pool, pages.table[:, 1:], pages.lengths[1:])}
    alone = attend(*one, **more, **options, implementation=backend.name)
  np.testing.assert_array_equal(np.asarray(both[1:], np.float32), np.asarray(alone, np.float32))


@pytest.mark.parametrize("backend, biased, option", combined([True, False], False), ids=str)
def test_gradients(backend, biased, option):
  """Of every argument and of the sinks, through the output and the log-sum-exp."""
  options = OPTIONS[option]
  q, k, v, bias, ids, dout = window_bias_cases.inputs(1, 90, N, K, H, jnp.dtype(backend.dtype), biased, biased)
  dlogs = normal(np.random.default_rng(1), *q.shape[:3])
  differentiated = {name: x for name, x in (("bias", bias), ("sinks", options.get("sinks"))) if x is not None}
  softcap = options.get("softcap")

  def attend(q, k, v, bias=None, sinks=None):
    options = dict(lse=True, softcap=softcap, sinks=sinks, implementation=backend.name)
    return window_bias.window_bias_attention(q, k, v, bias, 20, ids, **options)

  with running(backend):
    _, pull = jax.vjp(lambda q, k, v, more: attend(q, k, v, **more), q, k, v, differentiated)
    dq, dk, dv, more = jax.block_until_ready(pull((dout, dlogs)))
  exact = [None if x is None else float64(x)[0] for x in (q, k, v, bias)]
  expected = window_bias_cases.gradients(*exact, 20, ids, *float64(dout), dlogs=dlogs, **options)
  found = dq, dk, dv, *(more[name] for name in ("bias", "sinks") if name in more)
  for ours, theirs in zip(found, expected, strict=True):
    window_bias_cases.close(ours, theirs, BACKWARD[backend.dtype])


# Query heads, KV heads, head size, cap.
MODELS = {"gpt-oss": (64, 8, 64, None), "gemma-2-27b": (32, 16, 128, 50.0)}


@needs_mosaic_gpu
@pytest.mark.parametrize("name", MODELS)
def test_lowers_for_cuda(name):
  """Every operation, with gradients of all arguments and mass; gpt-oss has sinks."""
  n, k, h, softcap = MODELS[name]
  struct = lambda *shape, dtype=jnp.bfloat16: jax.ShapeDtypeStruct(shape, dtype)
  ints, floats = partial(struct, dtype=jnp.int32), partial(struct, dtype=jnp.float32)
  sinks, options = struct(n) if softcap is None else None, dict(softcap=softcap, implementation="gpu")

  def loss(differentiated):
    q, k, v, bias, sinks = differentiated
    out = window_bias.window_bias_attention(q, k, v, bias, 127, sinks=sinks, **options)
    return out.astype(jnp.float32).sum()

  def chunk(args, weights, sinks):
    return prefill.prefill_attention(*args, lse=True, query_weights=weights, sinks=sinks, **options)

  def step(args, sinks):
    return decode.decode_attention(*args, mass=True, sinks=sinks, **options)

  keys, bounds = struct(2, k, 5000, h), ints(2, k, 5000)
  args = struct(2, 1000, n, h), keys, keys, ints(2, 1000), bounds, bounds
  trained = struct(1, 1000, n, h), *(struct(1, 1000, k, h),) * 2, floats(1, k, 1000), sinks
  slots = struct(2, n, h), struct(2, 2, k, 8192, 2 * h), ints(), ints(2, k)
  programs = {
    ("window_bias_forward_", "window_bias_dq_", "window_bias_dkv_"): (jax.grad(loss), trained),
    ("prefill_", "prefill_mass_"): (chunk, args, floats(2, 1000), sinks),
    ("decode_mass_",): (step, slots, sinks),
  }
  with compat.assume_hopper():
    for names, (program, *arguments) in programs.items():
      text = jax.jit(program).trace(*arguments).lower(lowering_platforms=("cuda",)).as_text()
      assert all(name in text for name in names)


def test_capping_by_exp2():
  """Near zero, where it subtracts, and where exp2 over- and underflows; to 8 float32 units in the last place of 1."""
  scores = np.concatenate([np.linspace(-200, 200, 4001), np.geomspace(1e-6, 1e6, 200), [0.0, -1e6]])
  capped = softmax.soft_capped_by_exp2(jnp.asarray(scores, jnp.float32), 50.0)
  np.testing.assert_allclose(capped, 50 * np.tanh(scores / 50), rtol=0, atol=50 * 2**-20)
  slope = softmax.before_cap(jnp.ones_like(capped), capped, 50.0)
  np.testing.assert_allclose(slope, 1 - np.tanh(scores / 50) ** 2, rtol=0, atol=2e-6)


def test_nothing_is_added_without_sinks():
  """No program has an operation of theirs."""
  for attend, _, make in CASES.values():
    args, more = make(jnp.float32)
    program = str(jax.make_jaxpr(lambda attend=attend, args=args, more=more: attend(*args, **more))())
    assert "logistic" not in program
