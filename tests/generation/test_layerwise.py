"""Chunks of a prompt read layer by layer: equal to one program of all layers, and compiled once."""

from __future__ import annotations

import jax
import numpy as np
import pytest

import dms_jax
from dms_jax import execution
from dms_jax import testing as tiny
from dms_jax.generation import layerwise

PROMPTS = [list(range(1, 40)), list(range(7, 21)), list(range(3, 70))]


@pytest.mark.parametrize(
  ("policy", "kind"),
  [
    (dms_jax.DMS(window=5), "paged"), (dms_jax.DMS(window=5), "masked"), (dms_jax.Vanilla(), "contiguous"),
    (dms_jax.SnapKV(budget=20, window=7), "contiguous"), (dms_jax.TOVA(budget=16), "contiguous"),
    (dms_jax.H2O(budget=16), "paged"), (dms_jax.Quest(budget=32, page=8), "contiguous"),
  ],
)  # fmt: skip
def test_layer_by_layer_is_all_layers_at_once(policy, kind):
  model = tiny.model(gates=tiny.dms())
  runs = []
  for apart in (False, True):
    with execution.override(layers="loop", layers_apart=apart):
      out = dms_jax.generate(
        model, PROMPTS, policy=policy, cache=kind, max_new_tokens=6, eos=False, prefill_chunk=16, decode_block=3
      )
    runs.append(out)
  whole, apart = runs
  assert whole.tokens == apart.tokens
  np.testing.assert_allclose(np.array(apart.logprobs), np.array(whole.logprobs), atol=1e-5)
  np.testing.assert_array_equal(apart.metrics.achieved_cr, whole.metrics.achieved_cr)
  np.testing.assert_array_equal(
    np.asarray(apart.conversation.cache.live()), np.asarray(whole.conversation.cache.live())
  )


def test_one_program_serves_all_layers_and_numbers():
  model = tiny.model(gates=tiny.dms())
  layerwise._layer.clear_cache()
  with execution.override(layers="loop", layers_apart=True):
    for threshold, length in ((0.0, 40), (1.0, 40), (0.5, 64)):
      policy = dms_jax.DMS(window=5, threshold=threshold)
      dms_jax.generate(model, [list(range(length))], policy=policy, max_new_tokens=0, prefill_chunk=16)
  assert layerwise._layer._cache_size() == 1


def test_only_models_of_many_layers_on_a_cpu():
  model = tiny.model()
  choose = lambda tokens: execution.Execution.choose(execution.fastest_form(model), 1, tokens).layers_apart
  assert jax.default_backend() == "cpu" and not choose(16)
  with execution.override(layers_apart=True):
    assert choose(16) and not choose(1)
