"""Traces: held tokens against the formula and other caches, token texts, and the file."""

from __future__ import annotations

import dataclasses
import json
import re

import numpy as np
import pytest

import dms_jax
from dms_jax import policies
from dms_jax import testing as tiny
from dms_jax.tokenizer import byte_tokenizer
from experiments.methods import run, trace
from experiments.methods.budgets import Budget
from experiments.methods.records import Record
from experiments.tasks import get
from experiments.tasks.base import Prompt
from tests import oracle
from tests.programs import read

READ, WRITTEN = 40, 24


def test_dms_holds_what_the_formula_makes_visible_to_the_last_query():
  model = tiny.model(tiny.config(), tiny.dms(scale=1.0, offset=0.0))
  ids = tiny.tokens(model.config, 1, READ + WRITTEN, seed=3)
  logits = read(model, ids)[1][:, 0]  # [L, K, T]
  assert np.abs(logits).min() > 1e-4, "a decision so close could differ with the order of sums"
  evicted = oracle.about(logits > 0, model.dms.shift)
  expected = np.stack([[oracle.visible(head, model.dms.window)[-1] for head in layer] for layer in evicted])
  held = trace.held_at_end(model, policies.DMS(), ids[0], READ, chunk=16)
  np.testing.assert_array_equal(held, expected)
  assert 0 < held.mean() < 1
  np.testing.assert_array_equal(trace.held_at_end(model, policies.DMS(), ids[0], READ + WRITTEN, chunk=16), expected)


@pytest.mark.parametrize(
  "policy", [policies.TOVA(budget=20), policies.SnapKV(budget=30, window=5)], ids=lambda p: type(p).__name__
)
def test_the_counts_are_those_of_the_cache_that_wrote_the_chain(policy):
  """Generation's contiguous cache counts the tokens it holds; the last token is sampled and never read."""
  model = tiny.model(tiny.config(vocab_size=257))
  prompt = [int(token) for token in tiny.tokens(model.config, 1, READ).tolist()[0]]
  out = dms_jax.generate(model, [prompt], policy=policy, max_new_tokens=WRITTEN, eos=False, prefill_chunk=16)
  chain = [*prompt, *map(int, out.tokens[0][:-1])]
  held = trace.held_at_end(model, policy, chain, READ, chunk=16)
  np.testing.assert_array_equal(held.sum(axis=-1), out.metrics.live[:, 0])
  assert held[..., -1].all() and not held.all()


def test_a_trace_names_its_chain():
  model, tokenizer = tiny.model(tiny.config(vocab_size=257)), byte_tokenizer()
  ids = tokenizer.encode("a short prompt, and more")
  record = Record(
    "streaming", "needle", 64, {"budget": 8.0}, 1, 9, 42, 3, 0, "s", 20, 9.0, 9.0, 2.0, {"score": 1.0}, "x"
  )
  found = trace.trace(model, policies.StreamingLLM(window=5, sinks=2), tokenizer, ids, 10, record, chunk=16)
  assert (found.method, found.prompt, found.budget, found.read) == ("streaming", 3, {"budget": 8.0}, 10)
  assert found.held == [1.0] * 2 + [0.0] * (len(ids) - 8) + [1.0] * 6  # the window is the newest token and five more
  assert np.array(found.retention).shape == (2, 2) and np.allclose(found.retention, 8 / len(ids), atol=1e-4)
  assert "".join(found.tokens) == "a short prompt, and more"


@pytest.mark.parametrize("read", [0, 4])
def test_a_trace_needs_a_prompt(read):
  with pytest.raises(ValueError, match="a trace needs 1 to 3 tokens of a prompt"):
    trace.held_at_end(tiny.model(), policies.Vanilla(), [1, 2, 3], read)


@pytest.mark.parametrize("text", ["naïve 🙂 x", "a\ufffdb", ""])
def test_characters_of_several_tokens_stay_whole(text):
  tokenizer = byte_tokenizer()
  pieces = trace.pieces(tokenizer, tokenizer.encode(text))
  assert "".join(pieces) == text and len(pieces) == len(tokenizer.encode(text))


def test_bytes_that_are_no_text_are_replaced():
  """Byte 255 never starts a character; 0xE2 alone begins one that never comes."""
  assert trace.pieces(byte_tokenizer(), [97, 255, 98]) == ["a", "\ufffd", "b"]
  assert trace.pieces(byte_tokenizer(), [0xE2]) == ["\ufffd"]
  assert trace.pieces(byte_tokenizer(), []) == []


# The file -------------------------------------------------------------------------------------------------------------

ABOUT = ("dms", "needle", None, {"cr": 4.0}, 1, 9, 42, 0, 0)
ONE = trace.Trace(*ABOUT, 2, ["a", "b", "c"], [0.0, 0.5, 1.0], [[0.5], [1.0]])


def test_a_file_of_traces_grows_and_is_read_back(tmp_path):
  path = tmp_path / "new" / trace.FILE
  assert trace.read("runs", path) == []
  trace.append(path, [ONE])
  trace.append(path, [ONE])
  assert trace.read("runs", path) == [ONE, ONE]


def test_a_trace_of_an_earlier_version_has_no_seed(tmp_path):
  path = tmp_path / trace.FILE
  path.write_text(json.dumps({name: value for name, value in vars(ONE).items() if name != "seed"}) + "\n")
  assert trace.read("runs", path) == [dataclasses.replace(ONE, seed=None)]


def test_traces_of_a_job_are_made_once(tmp_path):
  """Two prompts of three are traced, each under its own budget: half of its prompt and L tokens, rounded up."""
  model, tokenizer, path = tiny.model(tiny.config(vocab_size=257)), byte_tokenizer(), tmp_path / trace.FILE
  texts = ["a prompt", "a longer prompt, the longest", "never"]
  asked = [Prompt(text, tokenizer.encode(text), ()) for text in texts]
  job = run.Job(get("needle")(), 64, asked, max_tokens=(4, 12))
  method = run.Method("tova", model, policies.TOVA(), given=Budget(cr=2.0))
  made = [
    Record(name, "needle", 64, {"cr": 2.0}, 1, most, 0, prompt, 0, "s", 1, 1.0, 1.0, 1.0, {}, text="written")
    for name in ("tova", "h2o") for prompt in range(3) for most in job.max_tokens
  ]  # fmt: skip
  for _ in range(2):
    trace.add(path, job, method, tokenizer, made, prompts=2)
  found = trace.read("runs", path)
  assert [(each.method, each.prompt, each.max_tokens) for each in found] == [("tova", 0, 12), ("tova", 1, 12)]
  assert ["".join(each.tokens) for each in found] == [f"{text}written" for text in texts[:2]]
  held = [round(np.mean(each.retention) * len(each.tokens)) for each in found]
  assert held == [min(len(text) + 12, 2 * (len(text) + 7)) // 2 for text in texts[:2]]
  trace.add(path, dataclasses.replace(job, max_tokens=(0,)), method, tokenizer, made, prompts=2)
  assert trace.read("runs", path) == found
  path.unlink()
  trace.append(path, [dataclasses.replace(each, seed=None) for each in found])  # of an earlier version
  trace.add(path, job, method, tokenizer, made, prompts=2)
  assert len(trace.read("runs", path)) == 2


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"held": [0.0, 2.0, 1.0]}, "must be shares from 0 to 1"), ({"held": [0.0]}, "a share for each token"),
    ({"retention": []}, "one row of heads for each layer"), ({"retention": [[0.5], [0.5, 1.0]]}, "one row of heads"),
    ({"tokens": "abc"}, "needs 'tokens'"), ({"more": 1}, "no field 'more'"), ({"retention": [0.5]}, "must be shares"),
    ({"held": ["x"] * 3}, "must be shares"), ({"tokens": [1, "b", "c"]}, "'tokens' must be texts"),
  ],
)  # fmt: skip
def test_what_is_no_trace_is_named(tmp_path, changes, message):
  path = tmp_path / trace.FILE
  path.write_text(json.dumps({**vars(ONE), **changes}) + "\n")
  with pytest.raises(ValueError, match=re.escape(message)) as caught:
    trace.read("runs", path)
  assert str(caught.value).startswith(f"--runs={path}, line 1")
