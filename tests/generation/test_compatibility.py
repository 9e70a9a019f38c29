"""Conversations that version 0.1 saved go on with the tokens that it would have chosen."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

import dms_jax
from dms_jax.cache import ContiguousCache, MaskedCache, PagedCache

SAVED = Path(__file__).parents[1] / "goldens" / "v0_1"
EXPECTED = json.loads((SAVED / "expected.json").read_text())
KINDS = {"paged": PagedCache, "slots": ContiguousCache, "masked": MaskedCache}


@pytest.fixture(scope="module")
def model():
  return dms_jax.load(SAVED / "checkpoint", retrofit=SAVED / "retrofit")[0]


@pytest.mark.parametrize("name", sorted(EXPECTED))
def test_a_conversation_of_0_1_goes_on(model, name, tmp_path):
  expected, folder = EXPECTED[name], SAVED / f"conversation_{name}"
  past = dms_jax.load_conversation(folder, model)
  assert type(past.cache) is KINDS[json.loads((folder / "cache.json").read_text())["cache"]]
  out = dms_jax.generate(model, continue_from=past, max_new_tokens=12, eos=False)
  assert out.tokens == expected["tokens"]
  np.testing.assert_allclose(out.logprobs, expected["logprobs"], atol=2e-5)
  dms_jax.save_conversation(tmp_path / "again", past)
  again = dms_jax.load_conversation(tmp_path / "again", model)
  assert dms_jax.generate(model, continue_from=again, max_new_tokens=12, eos=False).logprobs == out.logprobs
