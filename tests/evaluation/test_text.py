"""Quality on a text read in chunks under a policy, against the mask and the formula in numpy."""

from __future__ import annotations

import numpy as np
import pytest

from dms_jax import policies
from dms_jax import testing as tiny
from dms_jax.evaluation.text import cache_for_text, text_quality
from dms_jax.generation.decode import prefill_chunk
from dms_jax.model import check_policy
from tests.helpers import OTHER_FAMILIES
from tests.programs import quick, read

LENGTH, CHUNK = 20, 8  # the last chunk is shorter


@pytest.fixture(scope="module")
def model():
  return tiny.model(gates=tiny.dms(scale=1.0, offset=0.0))


@pytest.fixture(scope="module")
def tokens(model):
  return np.asarray(tiny.tokens(model.config, 1, 2 * LENGTH))[0]


@pytest.mark.parametrize("sliding", [False, True])
def test_chunks_under_dms_equal_the_mask(model, tokens, sliding):
  """Evictions depend on the tokens alone, so that chunks change nothing. float32: sums run in another order."""
  original = tiny.model()
  if sliding:  # layers of two kinds, whose windows differ
    config = OTHER_FAMILIES["gemma3"]
    original, model = tiny.model(config), tiny.model(config, tiny.dms(window=2, scale=1.0, offset=0.0))
  masked = text_quality(original, model, tokens, LENGTH)
  chunked = text_quality(original, model, tokens, LENGTH, policy=policies.DMS(), chunk=CHUNK)
  for name in ("perplexity_original", "perplexity", "kl", "achieved_cr", "reads_cr"):
    assert chunked[name] == pytest.approx(masked[name], rel=2e-5), name
  np.testing.assert_array_equal(chunked["held_per_head"], masked["held_per_head"])
  assert chunked["kl"] > 0.01 and chunked["achieved_cr"] > 1.1


def test_kl_of_a_policy_that_compacts_after_each_chunk(model, tokens):
  """KL and perplexity in float64 from logits of single chunks, read by the program that reads prompts."""
  policy = check_policy(model, policies.H2O(budget=8, window=4))
  found = text_quality(model, None, tokens[:LENGTH], LENGTH, policy=policy, chunk=CHUNK)
  original = read(model, tokens[None, :LENGTH], None)[0][0].astype(np.float64)
  chunk = quick(prefill_chunk)
  own = []
  for last in range(1, LENGTH + 1):  # a chunk that ends at each position gives the logits there
    cache = cache_for_text(model, policy, 1, LENGTH)
    logits = np.zeros((1, model.config.vocab_size), np.float32)
    for start in range(0, last, CHUNK):
      count = min(CHUNK, last - start)
      part = np.zeros((1, CHUNK), np.int32)
      part[0, :count] = tokens[start : start + count]
      number = lambda value: np.full(1, value, np.int32)
      cache, logits, _, _ = chunk(model, policy, cache, part, number(count), number(last - start - count), logits)
    own.append(np.asarray(logits, np.float64)[0])
  log = lambda x: x - np.log(np.exp(x).sum(-1, keepdims=True))
  p, q = log(original), log(np.stack(own))
  kl = (np.exp(p) * (p - q)).sum(-1)[:-1].mean()
  nll = -q[np.arange(LENGTH - 1), tokens[1:LENGTH]].mean()
  assert found["kl"] == pytest.approx(kl, rel=1e-4)
  assert found["perplexity"] == pytest.approx(np.exp(nll), rel=2e-5)
  assert found["held_per_head"].max() <= 8 and kl > 1e-3


def test_bad_chunks_are_refused(model, tokens):
  for settings in ({"chunk": 0, "policy": policies.DMS()}, {"chunk": 8}):
    with pytest.raises(ValueError, match="chunk="):
      text_quality(model, model, tokens, LENGTH, **settings)
