"""Prompt chunks and decode steps in parts: equal to one program of all layers, compiled once."""

from __future__ import annotations

import functools
import importlib

import jax
import numpy as np
import pytest

import dms_jax
from dms_jax import compilation, execution
from dms_jax import testing as tiny
from dms_jax.generation import growth, layerwise

generating = importlib.import_module("dms_jax.generation.generate")  # `dms_jax.generate` is the function

PROMPTS = [list(range(1, 40)), list(range(7, 21)), list(range(3, 70))]


@pytest.mark.parametrize(
  ("policy", "kind"),
  [
    (dms_jax.DMS(window=5), "paged"), (dms_jax.SnapKV(budget=20, window=7), "contiguous"),
    (dms_jax.H2O(budget=16), "paged"), *(
      pytest.param(policy, kind, marks=pytest.mark.slow)
      for policy, kind in (
        (dms_jax.DMS(window=5), "masked"), (dms_jax.Vanilla(), "contiguous"), (dms_jax.TOVA(budget=16), "contiguous"),
        (dms_jax.Quest(budget=32, page=8), "contiguous"), (dms_jax.KeyDiff(budget=16), "contiguous"),
      )
    ),
  ],
)  # fmt: skip
def test_layer_by_layer_is_all_layers_at_once(policy, kind):
  """Three layers: decode steps take two, then one."""
  model = tiny.model(tiny.config(num_layers=3), tiny.dms())
  layerwise._step_layers.clear_cache()
  runs = []
  for apart, size in ((False, 0), (True, 2)):
    with execution.override(layers="loop", layers_apart=apart, step_layers=size):
      out = dms_jax.generate(
        model, PROMPTS, policy=policy, cache=kind, max_new_tokens=6, eos=False, prefill_chunk=16, decode_block=3,
        history=True,
      )  # fmt: skip
    runs.append(out)
  assert layerwise._step_layers._cache_size() or kind == "masked"
  whole, apart = runs
  assert whole.tokens == apart.tokens
  np.testing.assert_allclose(np.array(apart.logprobs), np.array(whole.logprobs), atol=1e-5)
  for name in ("achieved_cr", "history", "decode_reads", "peak", "live"):
    np.testing.assert_array_equal(getattr(apart.metrics, name), getattr(whole.metrics, name))
  for one, other in zip(apart.usage, whole.usage, strict=True):
    jax.tree.map(np.testing.assert_array_equal, vars(one), vars(other))
  np.testing.assert_array_equal(
    np.asarray(apart.conversation.cache.live()), np.asarray(whole.conversation.cache.live())
  )


def test_one_program_serves_all_layers_numbers_and_samplings():
  model = tiny.model(tiny.config(num_layers=4), tiny.dms())
  layerwise._layer.clear_cache()
  layerwise._step_layers.clear_cache()
  layerwise._end_step.clear_cache()
  with execution.override(layers="loop", layers_apart=True, step_layers=2):
    for threshold, length, sampling in (
      (0.0, 40, {}), (1.0, 40, dict(temperature=0.7, key=jax.random.key(0))),
      (0.5, 64, dict(temperature=1.0, top_k=3, key=jax.random.key(0))),
    ):  # fmt: skip
      policy = dms_jax.DMS(window=5, threshold=threshold)
      settings = dict(max_new_tokens=3, prefill_chunk=16, decode_block=2, capacity=80, eos=False)
      dms_jax.generate(model, [list(range(length))], policy=policy, **settings, **sampling)
  assert layerwise._layer._cache_size() == layerwise._step_layers._cache_size() == 1
  assert layerwise._end_step._cache_size() == 2  # greedy and sampled


def test_only_models_of_many_layers_on_a_cpu():
  model = tiny.model()
  choose = lambda tokens: execution.Execution.choose(execution.fastest_form(model), 1, tokens)
  assert jax.default_backend() == "cpu" and not choose(16).layers_apart and not choose(1).step_layers
  with execution.override(layers_apart=True, step_layers=2):
    assert choose(16).layers_apart and not choose(1).layers_apart
    assert choose(1).step_layers == 2 and not choose(16).step_layers
    assert not execution.Execution.choose(model, 1, 1).step_layers  # stacked layers


def test_few_sizes_of_parts_for_a_step():
  """All parts of a step have one size, for which two programs would be compiled otherwise, unless it is small."""
  sizes = {count: execution._part(count) for count in (16, 22, 24, 28, 30, 32, 36, 48, 80)}
  assert sizes == {16: 4, 22: 2, 24: 4, 28: 4, 30: 3, 32: 4, 36: 4, 48: 4, 80: 4}


@pytest.mark.parametrize("kind", ["contiguous", "paged"])
def test_steps_are_compiled_before_the_cache_grows(kind, monkeypatch):
  """The first block in a larger cache compiles nothing, and the text is that of a cache which never grows."""
  model, policy = tiny.model(tiny.config(num_layers=3), tiny.dms()), dms_jax.DMS(window=5)
  sizes, compiled = [], []

  def block(model, policy, cache, *arguments, **settings):
    growth._compiling.submit(lambda: None).result()  # what is compiled ahead counts as before
    before = programs()
    found = layerwise.decode_block(model, policy, cache, *arguments, **settings)
    sizes.append(cache.size)
    compiled.append(programs() - before)
    return found

  run = functools.partial(
    dms_jax.generate, model, [[1, 2, 3]], policy=policy, cache=kind, max_new_tokens=320, eos=False, prefill_chunk=8,
    decode_block=16,
  )  # fmt: skip
  with execution.override(layers="loop", layers_apart=True, step_layers=2), compilation.counted() as programs:
    whole = run(capacity=512)
    monkeypatch.setattr(generating, "decode_steps", block)
    grown = run()
  larger = [count for size, count in zip(sizes, compiled, strict=True) if size > sizes[0]]
  assert larger and not any(larger)
  assert grown.tokens == whole.tokens
