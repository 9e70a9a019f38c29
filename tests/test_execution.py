"""Choices of execution: what is chosen where; each, on or off, gives the same results."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dms_jax import cache as caches
from dms_jax import policies
from dms_jax import testing as tiny
from dms_jax.cache.base import storage_dtype
from dms_jax.config import LoRAConfig
from dms_jax.execution import FEW_ROWS, LATE_ROWS, LEAST_ROWS, Execution, fastest_form, override
from dms_jax.model import cached_forward, last_logits
from dms_jax.sharding import make_mesh
from pallas_kernels.common.platform import tracing_for
from tests.helpers import close

OFF, LORA = Execution(), LoRAConfig(rank=2)
# Each field switched on, on any device.
ON = dict(
  layers="loop", least_rows=5, late_gates=True, fused_gate=True, joint_updates=LATE_ROWS, weights_left=FEW_ROWS,
  matvec_parts=3, bits_storage=True, embed_barrier=True, jitted_attention=True, layers_apart=True,
  step_layers=3, skipped_filters=True, small_cuts=True, replicated_writes=True,
)  # fmt: skip
# These act elsewhere: see tests/test_sharding.py, tests/generation/test_layerwise.py and test_sampling.py there, and
# tests/policies/test_prompts.py.
ELSEWHERE = {"replicated_writes", "layers_apart", "step_layers", "skipped_filters", "small_cuts"}


@functools.partial(jax.jit, compiler_options=tiny.QUICK)
def step(model, policy, cache, *inputs):
  out, cache = cached_forward(model, policy, cache, *inputs)
  return (last_logits(model, out), out.logits, out.seen), cache


def test_what_is_chosen():
  """By device, rows, tokens and model; whatever depends on a step is off where none is given."""
  model = tiny.model(gates=tiny.dms())
  listed, neuron = model.unstacked(), tiny.model(gates=tiny.dms(gate="neuron")).unstacked()
  with tracing_for("gpu"):
    always = Execution(layers="loop", joint_updates=LATE_ROWS, jitted_attention=True)
    assert Execution.choose() == Execution.choose(listed, 1, 2) == always
    small = dataclasses.replace(always, least_rows=LEAST_ROWS, late_gates=True, fused_gate=True)
    assert Execution.choose(listed, 1, 1) == Execution.choose(listed, LATE_ROWS, 1) == small
    for rows, other in ((LATE_ROWS + 1, listed), (1, model), (1, neuron), (1, tiny.model().unstacked()), (1, None)):
      assert Execution.choose(other, rows, 1) == dataclasses.replace(small, late_gates=False)
  with tracing_for("tpu"):
    assert Execution.choose(listed, 1, 1) == Execution(replicated_writes=True)
    assert fastest_form(model) is model
  with tracing_for("cpu"):
    cpu = Execution.choose(listed, 1, 1)
    assert cpu == Execution.choose()
    assert cpu.weights_left == FEW_ROWS and cpu.bits_storage and cpu.embed_barrier and cpu.layers == "loop"
    assert isinstance(fastest_form(model).params["layers"], list)
  with jax.set_mesh(make_mesh()), tracing_for("gpu"):  # of one device
    assert Execution.choose(listed, 1, 1) == small


def test_override():
  """Inner overrides win, others stay; unknown fields are an error; jitted functions are traced again."""
  traced = []

  @jax.jit
  def weights_left(x):
    traced.append(Execution.choose().weights_left)
    return x

  for _ in range(2):
    weights_left(0.0)
    with override(weights_left=3, layers="scan"):
      weights_left(0.0)
      with override(weights_left=0):
        assert Execution.choose().layers == "scan"
        weights_left(0.0)
      assert Execution.choose().weights_left == 3
  assert traced == [FEW_ROWS, 3, 0]
  with pytest.raises(TypeError, match="no_such_field"), override(no_such_field=True):
    pass
  assert Execution.choose() == Execution.choose()


def run(rows, dtype, kind="contiguous", **fields):
  """A chunk of 6 tokens and 8 decode steps, one row pausing: logits, cache and usage in float32."""
  cfg = tiny.config()
  model, tokens = tiny.model(cfg, tiny.dms(), LORA, dtype=dtype), np.asarray(tiny.tokens(cfg, rows, 14))
  listed = model.unstacked()
  decisions = np.random.default_rng(0).random((2, rows, 2, 14)) < 0.5
  found = []
  with override(**fields):  # little but the steps: each operation is compiled for each override
    model = listed if Execution.choose().layers == "loop" else model
    cache = caches.create(kind, cfg, batch=rows, capacity=24, window=5, lag=1, dtype=dtype)
    for start, stop in ((0, 6), *((t, t + 1) for t in range(6, 14))):
      now = np.full(rows, stop - start, np.int32)
      now[-1] = 0 if rows > 1 and start % 3 == 0 else stop - start
      out, cache = step(model, policies.DMS(window=5), cache, tokens[:, start:stop], now, decisions[..., start:stop])
      found.append(out)
  return [np.asarray(x, np.float32) for x in jax.tree.leaves((found, cache.live(), cache.seen, cache.evicted))]


@pytest.mark.parametrize("rows, dtype", [(1, jnp.float32), (3, jnp.bfloat16)])
def test_each_choice_gives_the_same_results(rows, dtype):
  """Each field alone switched on, on top of an execution with all of them off; every field has a case."""
  assert list(ON) == [field.name for field in dataclasses.fields(Execution)]
  assert all(value != getattr(OFF, name) for name, value in ON.items())
  plain = run(rows, dtype, **vars(OFF))
  for name, value in ON.items():
    if name in ELSEWHERE:
      continue
    fields = {"layers": "loop"} if name == "late_gates" else {}
    changed = run(rows, dtype, **vars(OFF) | fields | {name: value})
    for one, other in zip(changed, plain, strict=True):
      close(one, other, 2e-5 if dtype == jnp.float32 else 0.04)  # bfloat16: 2^-8 a rounding, about ten in a row


def test_each_choice_changes_the_program():
  """No field is dead: switching it on changes what is traced, or what a model or a cache is made of."""
  stacked = tiny.model(gates=tiny.dms())
  models = [tiny.model(gates=tiny.dms(), lora=LORA, dtype=dtype).unstacked() for dtype in (jnp.bfloat16, jnp.float32)]
  tokens, lengths = jax.ShapeDtypeStruct((1, 1), jnp.int32), jax.ShapeDtypeStruct((1,), jnp.int32)

  def logits(model, tokens, lengths):
    kind = dict(capacity=24, window=5, lag=1, dtype=model.dtype, page_format="int8")
    cache = caches.create("paged", model.config, batch=1, **kind)
    return last_logits(model, cached_forward(model, policies.DMS(window=5), cache, tokens, lengths)[0])

  def parts():  # the quickest first
    yield storage_dtype(jnp.bfloat16), type(fastest_form(stacked).params["layers"])
    for model in models:
      yield str(jax.make_jaxpr(logits)(model, tokens, lengths))

  with override(**vars(OFF)):
    plain = list(parts())
  for name in ON.keys() - ELSEWHERE:
    with override(**vars(OFF) | {name: ON[name]}):
      assert any(part != one for part, one in zip(parts(), plain, strict=True)), name
