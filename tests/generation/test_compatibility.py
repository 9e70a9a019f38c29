"""Conversations of every schema go on with the tokens that their own version would have chosen."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

import dms_jax
from dms_jax.cache import ContiguousCache, MaskedCache, PagedCache

GOLDENS = Path(__file__).parents[1] / "goldens"
SAMPLES = ("v0_1", "v0_2", "schema_2")
EXPECTED = {sample: json.loads((GOLDENS / sample / "expected.json").read_text()) for sample in SAMPLES}
KINDS = {"paged": PagedCache, "slots": ContiguousCache, "contiguous": ContiguousCache, "masked": MaskedCache}


@pytest.fixture(scope="module")
def models():
  folders = {sample: GOLDENS / sample for sample in SAMPLES}
  return {name: dms_jax.load(path / "checkpoint", retrofit=path / "retrofit")[0] for name, path in folders.items()}


@pytest.mark.parametrize("sample, name", [(sample, name) for sample in EXPECTED for name in sorted(EXPECTED[sample])])
def test_a_conversation_goes_on(models, sample, name, tmp_path):
  model, expected, folder = models[sample], EXPECTED[sample][name], GOLDENS / sample / f"conversation_{name}"
  past = dms_jax.load_conversation(folder, model)
  assert type(past.cache) is KINDS[json.loads((folder / "cache.json").read_text())["cache"]]
  out = dms_jax.generate(model, continue_from=past, max_new_tokens=12, eos=False)
  assert out.tokens == expected["tokens"]
  np.testing.assert_allclose(out.logprobs, expected["logprobs"], atol=2e-5)
  dms_jax.save_conversation(tmp_path / "again", past)
  again = dms_jax.load_conversation(tmp_path / "again", model)
  assert dms_jax.generate(model, continue_from=again, max_new_tokens=12, eos=False).logprobs == out.logprobs
