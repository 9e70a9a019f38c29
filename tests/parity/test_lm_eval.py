"""The model of lm-evaluation-harness against the harness's own Hugging Face model, item by item."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from dms_jax import checkpoint
from dms_jax import testing as tiny
from dms_jax.convert import export
from dms_jax.evaluation import likelihood
from dms_jax.tokenizer import byte_tokenizer
from tests.harness_tasks import NAMES, write_tasks

LENGTH = 96  # positions: some texts are longer
NATS = 1e-3  # float32 on both sides: sums of up to 300 log-probabilities, each within 1e-6 relative


@pytest.fixture(scope="module")
def lm_eval(torch, tmp_path_factory):
  pytest.importorskip("transformers", reason="transformers is not installed (make test-parity installs it)")
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
def their_model(folders, lm_eval):
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


def test_a_bos_token_comes_first_in_both(lm_eval, folders, tmp_path):
  """With a tokenizer that adds BOS the same tokens are scored."""
  from lm_eval.api.instance import Instance
  from lm_eval.models.huggingface import HFLM

  from experiments.methods.harness import DmsJaxLM

  model = checkpoint.load(folders[0])
  tokenizer = byte_tokenizer()
  settings = {**tokenizer.settings, "bos_token": "<eos>", "add_bos_token": True}
  tokenizer = dataclasses.replace(tokenizer, settings=settings)
  checkpoint.save(tmp_path / "ours", model, tokenizer)
  theirs = HFLM(
    pretrained=str(export(tmp_path / "theirs", model, tokenizer)), device="cpu", dtype="float32", add_bos_token=True
  )
  ours = DmsJaxLM(str(tmp_path / "ours"))
  asked = [("", "cat"), ("a cat", " sat"), ("<eos>a cat ", "sat")]
  requests = [Instance("loglikelihood", {}, pair, number) for number, pair in enumerate(asked)]
  for a, b in zip(theirs.loglikelihood(requests), ours.loglikelihood(requests), strict=True):
    compare(a, b)
