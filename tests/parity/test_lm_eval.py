"""The model of lm-evaluation-harness against its Hugging Face model, item by item; without torch."""

from __future__ import annotations

import configparser
import dataclasses
import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from tokenizers.processors import TemplateProcessing

import dms_jax
from dms_jax import checkpoint, policies
from dms_jax import testing as tiny
from dms_jax.convert import export
from dms_jax.evaluation import likelihood
from dms_jax.tokenizer import byte_tokenizer
from tests.harness_tasks import NAMES, write_tasks

ROOT = Path(__file__).parents[2]
LENGTH = 96  # positions: some texts are longer
NATS = 1e-3  # float32 on both sides: sums of up to 300 log-probabilities, each within 1e-6 relative


@pytest.fixture(scope="module")
def lm_eval(tmp_path_factory):
  with pytest.MonkeyPatch.context() as patch:
    patch.setenv("HF_DATASETS_CACHE", str(tmp_path_factory.mktemp("datasets")))
    yield pytest.importorskip("lm_eval", reason="lm-eval is not installed (make test-parity installs it)")


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
  """(our checkpoint, its export for transformers) of a random model."""
  folder = tmp_path_factory.mktemp("harness")
  model = tiny.model(tiny.config(vocab_size=257, max_position_embeddings=LENGTH, eos_token_ids=(256,)))
  checkpoint.save(folder / "ours", model, byte_tokenizer())
  return folder / "ours", export(folder / "theirs", model, byte_tokenizer())


@pytest.fixture(scope="module")
def their_model(folders, lm_eval, transformers):
  from lm_eval.models.huggingface import HFLM

  return HFLM(pretrained=str(folders[1]), device="cpu", dtype="float32", batch_size=1)


def run(lm_eval, model, folder, names=NAMES):
  from lm_eval.tasks import TaskManager

  found = lm_eval.simple_evaluate(
    model, tasks=list(names), task_manager=TaskManager(include_path=str(folder)), bootstrap_iters=0
  )
  return found["results"], found["samples"]


def test_equals_the_hugging_face_model_item_by_item(lm_eval, folders, their_model, tmp_path, monkeypatch):
  from experiments.methods.harness import DmsJaxLM

  monkeypatch.setattr(likelihood, "BUCKET", LENGTH)  # one shape
  monkeypatch.setattr(likelihood, "TARGETS", LENGTH)
  ours = DmsJaxLM(str(folders[0]), batch_size=2, prefill_chunk=32)
  assert ours.max_length == their_model.max_length == LENGTH
  _, samples = run(lm_eval, their_model, write_tasks(tmp_path / "plain"), ["tiny_written"])
  plain = samples["tiny_written"][0]["resps"][0][0]
  stop = plain[2:4]  # it ends the first text early
  tasks = write_tasks(tmp_path / "stopped", stop)
  (expected, theirs), (found, mine) = (run(lm_eval, model, tasks) for model in (their_model, ours))
  for name in NAMES:
    for a, b in zip(theirs[name], mine[name], strict=True):
      assert a["doc_id"] == b["doc_id"] and a["arguments"] == b["arguments"]
      for x, y in zip(a["resps"], b["resps"], strict=True):
        compare(x[0], y[0])
    for metric, value in expected[name].items():
      if isinstance(value, float):
        assert found[name][metric] == pytest.approx(value, rel=1e-4), (name, metric)
  assert mine["tiny_written"][0]["resps"][0][0] == plain.split(stop)[0] != plain


def compare(theirs, ours):
  """A text, a log-likelihood, or a log-likelihood with whether it is greedy."""
  if isinstance(theirs, str):
    assert ours == theirs
  elif isinstance(theirs, tuple):
    np.testing.assert_allclose(ours[0], theirs[0], atol=NATS)
    assert ours[1] == theirs[1]
  else:
    np.testing.assert_allclose(ours, theirs, atol=NATS)


def test_a_bos_token_comes_first_in_both(lm_eval, folders, transformers, tmp_path):
  """With a tokenizer whose post-processor adds BOS the same tokens are scored."""
  from lm_eval.api.instance import Instance
  from lm_eval.models.huggingface import HFLM

  from experiments.methods.harness import DmsJaxLM

  model = checkpoint.load(folders[0])
  tokenizer = byte_tokenizer()
  tokenizer.backend.post_processor = TemplateProcessing(single="<eos> $A", special_tokens=[("<eos>", 256)])
  tokenizer = dataclasses.replace(tokenizer, settings={**tokenizer.settings, "bos_token": "<eos>"})
  checkpoint.save(tmp_path / "ours", model, tokenizer)
  theirs = HFLM(
    pretrained=str(export(tmp_path / "theirs", model, tokenizer)), device="cpu", dtype="float32", add_bos_token=True
  )
  ours = DmsJaxLM(str(tmp_path / "ours"))
  asked = [("", "cat"), ("a cat", " sat"), ("<eos>a cat ", "sat")]
  requests = [Instance("loglikelihood", {}, pair, number) for number, pair in enumerate(asked)]
  for a, b in zip(theirs.loglikelihood(requests), ours.loglikelihood(requests), strict=True):
    compare(a, b)


def test_each_request_has_its_own_budget(lm_eval, folders, monkeypatch):
  """Results come in the order of the requests, and equal those of one text alone with its budget in tokens."""
  from lm_eval.api.instance import Instance

  from experiments.methods.harness import DmsJaxLM

  monkeypatch.setattr(likelihood, "BUCKET", LENGTH)
  model, tokenizer = dms_jax.load(folders[0])
  ours = DmsJaxLM(str(folders[0]), policy="tova", cr=2, batch_size=2, prefill_chunk=16, max_gen_toks=8)
  assert type(ours.policy) is policies.TOVA
  asked = [("the cat sat", " on a mat"), ("while rain fell over old", " grey roofs"), ("no one", "A"), ("no one", "B")]
  requests = [Instance("loglikelihood", {}, pair, number) for number, pair in enumerate(asked)]
  for (context, continuation), (value, greedy) in zip(asked, ours.loglikelihood(requests, True), strict=True):
    read = len(context + continuation) - 1  # one token a byte; the last one is not read
    row = ours._passage(tokenizer.encode(context), tokenizer.encode(continuation))
    policy = policies.TOVA(budget=-(-read // 2))
    ((alone,),) = likelihood.score([(model, policy)], [row], batch=2, chunk=16)
    np.testing.assert_allclose(value, alone.logprobs.sum(), atol=1e-4)
    assert greedy == alone.greedy.all()
  texts = [context for context, _ in asked[:3]]
  requests = [Instance("generate_until", {}, (text, {"until": []}), number) for number, text in enumerate(texts)]
  for text, found in zip(texts, ours.generate_until(requests, True), strict=True):
    policy = policies.TOVA(budget=(len(text) + 8 + 1) // 2)
    out = dms_jax.generate(model, [text], policy=policy, max_new_tokens=8, prefill_chunk=16)
    assert found == out.text[0]


BAD = [
  (dict(policy="no"), "unknown policy 'no'"),
  (dict(policy="tova", windows=3), "windows=3: policy=tova has .*, and no windows"),
  (dict(windows=3), "windows=...: no such argument; .* need policy=NAME"),
  (dict(policy="tova", budget="many"), "budget=many must be a whole number"),
  (dict(policy="tova", cr=2, budget=8), "cr=2 and budget=8: give one of them"),
  (dict(policy="vanilla", cr=2), "Vanilla has no budget"),
  (dict(policy="tova", cr=0.5), "must be 1 or more"),
  (dict(policy="tova", cr=2, budget_rule="some"), "budget_rule=some must be one of paper, seen"),
  (dict(policy="dms"), "load a retrofit"),
  (dict(batch_size="auto"), "batch_size=auto must be a number"),
  (dict(device="cuda:0"), "device=cuda:0: JAX computes on cpu"),
  (dict(max_length=97), "max_length=97 must lie between 2 and the model's 96"),
]


@pytest.mark.parametrize(("given", "message"), BAD, ids=lambda value: value[:20] if isinstance(value, str) else "")
def test_bad_arguments_are_refused(lm_eval, folders, given, message):
  from experiments.methods.harness import DmsJaxLM

  with pytest.raises(ValueError, match=message):
    DmsJaxLM(str(folders[0]), **given)


def test_settings_of_generation(lm_eval):
  from experiments.methods.harness import Sampling

  assert Sampling.read({"until": "x", "max_tokens": 3}, 9) == (Sampling(("x",), 0.0, None, None), 3)
  sampled = {"until": ["a", "", "a"], "do_sample": True, "temperature": 0.5, "top_p": 1, "top_k": 0, "num_beams": 1}
  assert Sampling.read(sampled, 9) == (Sampling(("a",), 0.5, None, None), 9)
  for given, message in (
    ({"do_sample": True}, "needs a temperature"),
    ({"num_beams": 2}, "num_beams"),
    ({"max_gen_toks": 0}, "max_gen_toks"),
  ):
    with pytest.raises(ValueError, match=message):
      Sampling.read(given, 9)


def test_the_entry_point_names_the_model(lm_eval):
  from lm_eval.api.registry import get_model

  setup = configparser.ConfigParser()
  setup.read(ROOT / "setup.cfg")
  name, target = setup["options.entry_points"]["lm_eval.models"].strip().split(" = ")
  module, _, cls = target.partition(":")
  assert get_model(name) is getattr(importlib.import_module(module), cls)


WITHOUT_TORCH = """
import runpy, sys
from importlib.machinery import PathFinder

class Without(PathFinder):
  @classmethod
  def find_spec(cls, name, *args):
    return None if name.partition(".")[0] == "torch" else PathFinder.find_spec(name, *args)

sys.meta_path[:] = [Without if finder is PathFinder else finder for finder in sys.meta_path]
sys.argv[0] = "lm_eval_model"
runpy.run_module("experiments.lm_eval_model", run_name="__main__", alter_sys=True)
"""


def program_flags(ours, tasks, output):
  return [
    f"--checkpoint={ours}", f"--include_path={tasks}", f"--tasks={','.join(NAMES)}", "--policy=streamingllm", "--cr=2",
    "--limit=2", "--batch=2", f"--output={output}",
  ]  # fmt: skip


def test_the_program_needs_no_torch(lm_eval, folders, tmp_path):
  """All kinds of requests under StreamingLLM; torch cannot be imported."""
  tasks = write_tasks(tmp_path / "tasks")
  done = subprocess.run(
    [sys.executable, "-c", WITHOUT_TORCH, *program_flags(folders[0], tasks, tmp_path / "all.json")], cwd=ROOT,
    capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)},
  )  # fmt: skip
  assert done.returncode == 0, done.stderr[-2000:]
  last = json.loads(done.stdout.splitlines()[-1])
  assert set(last["results"]) == set(NAMES) and last["policy"] == "StreamingLLM"
  assert last["n-samples"]["tiny_choice"] == {"original": 5, "effective": 2}
  assert len(json.loads((tmp_path / "all.json").read_text())["samples"]["tiny_written"]) == 2
