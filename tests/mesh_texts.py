"""Texts, likelihoods and traces on eight devices against one, for evaluation/test_mesh.py."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from dms_jax import policies, spmd
from dms_jax import testing as tiny
from dms_jax.evaluation import likelihood
from dms_jax.evaluation.text import held_by_position, text_quality
from dms_jax.execution import fastest_form
from dms_jax.model import Model
from dms_jax.policies import Policy
from dms_jax.sharding import make_mesh
from experiments.methods import trace
from tests.mesh_cases import of_family
from tests.programs import run_cases

GATES = tiny.dms(window=5, scale=1.0, offset=0.0)
HEADS, LENGTH = dict(num_heads=8, num_kv_heads=4, vocab_size=96), 20
THREE_HEADS = dict(num_heads=6, num_kv_heads=3, vocab_size=96)  # which two devices do not share: they split rows
# float32 sums run in another order: of log-probabilities as in generation, of keys read not at all.
NATS = 3e-5


def of(sizes: dict[str, int]) -> tuple[Model, Model]:
  """(original, retrofit)."""
  config = tiny.config(**sizes)
  return fastest_form(tiny.model(config)), fastest_form(tiny.model(config, GATES))


def text(model: Model, chunks: int = 3) -> np.ndarray:
  return np.asarray(tiny.tokens(model.config, 1, chunks * LENGTH))[0]


def scores_texts(data: int, tensor: int, models: tuple[Model, Model], chunks: int = 3, **settings) -> None:
  """Three chunks, which two devices do not share evenly: by chunk and by head."""
  mesh = make_mesh(data, tensor)
  one, many = (
    text_quality(*its, text(models[0], chunks), LENGTH, batch=2, **settings)
    for its in (models, [spmd.place(model, mesh) for model in models])
  )
  assert one.keys() == many.keys() and one["by_chunk"].keys() == many["by_chunk"].keys()
  for name, values in one["by_chunk"].items():
    exact = name in ("held", "reads")
    np.testing.assert_allclose(many["by_chunk"][name], values, rtol=0, atol=0 if exact else NATS, err_msg=name)
  np.testing.assert_array_equal(many["held_per_head"], one["held_per_head"])
  assert one["kl"] > 100 * NATS and one["achieved_cr"] > 1.1


def texts() -> None:
  """By the mask, whole; through caches, in chunks and token by token."""
  models = of(HEADS)
  scores_texts(2, 1, models, threshold=0.3)
  scores_texts(2, 2, models, threshold=0.3)
  scores_texts(2, 2, models, policy=policies.DMS(threshold=0.3))
  scores_texts(1, 2, models, policy=policies.H2O(budget=8, window=4), chunk=8)


def texts_by_rows() -> None:
  models = of(THREE_HEADS)
  scores_texts(1, 2, models, threshold=0.3)
  scores_texts(2, 2, models, policy=policies.H2O(budget=8, window=4), chunk=8)


def texts_of_families() -> None:
  """Biases; layers that slide; norms over all heads; sinks and experts, whole and split."""
  for name, sizes in (
    ("gpt2", {}), ("gemma3", {}), ("olmo2", dict(num_heads=8, num_kv_heads=4)), ("gpt_oss", {}),
    ("mixtral", dict(num_experts=3)), ("gemma3", dict(num_heads=4, num_kv_heads=1)),
  ):  # fmt: skip
    model = of_family(name, **sizes)
    gates = dataclasses.replace(model.dms, scale=GATES.scale, offset=GATES.offset)
    scores_texts(2, 2, (model.replace(dms=None), model.replace(dms=gates)), threshold=0.3)


def shares_by_position() -> None:
  """Three chunks on two devices that read one each."""
  _, model = of(HEADS)
  (where, one), (ends, many) = (
    held_by_position(each, text(model), LENGTH, 4, threshold=0.3)
    for each in (model, spmd.place(model, make_mesh(2, 2)))
  )
  np.testing.assert_array_equal(ends, where)
  np.testing.assert_array_equal(many, one)


def scores_rows(data: int, tensor: int, sizes: dict[str, int]) -> None:
  """Three rows, two at a time: dense, by the mask, and through caches with a budget for each row."""
  likelihood.BUCKET = 8
  limits: tuple[float | Policy | None, ...] = (
    None, 0.3, policies.Vanilla(), policies.StreamingLLM(budget=np.array([9, 6, 9]), sinks=2),
    policies.SnapKV(budget=12, window=5),
  )  # fmt: skip
  (_, model), rows = of(sizes), []
  for seed, (length, scored) in enumerate(((20, 5), (31, 17), (20, 1))):
    ids = np.asarray(tiny.tokens(model.config, 1, length, seed))[0]
    rows.append(likelihood.Passage(ids, np.arange(length - scored - 1, length - 1, dtype=np.int32), ids[-scored:]))
  one, many = (
    likelihood.score([(each, limit) for limit in limits], rows, batch=2, chunk=8)
    for each in (model, spmd.place(model, make_mesh(data, tensor)))
  )
  for its, ours in zip(one, many, strict=True):
    for want, got in zip(its, ours, strict=True):
      np.testing.assert_allclose(got.logprobs, want.logprobs, rtol=0, atol=NATS)
      np.testing.assert_array_equal(got.greedy, want.greedy)
      assert (got.held is None) == (want.held is None)
      if want.held is not None:
        np.testing.assert_array_equal(got.held, want.held)


def likelihoods() -> None:
  scores_rows(2, 2, HEADS)


def likelihoods_by_rows() -> None:
  scores_rows(2, 2, THREE_HEADS)


def traces() -> None:
  """One chain, in a row of the first device, or of all that share its heads."""
  for sizes in (HEADS, THREE_HEADS):
    _, model = of(sizes)
    placed, ids = spmd.place(model, make_mesh(2, 2)), text(model, 2)
    for policy in (policies.DMS(threshold=0.3), policies.H2O(budget=12, window=4)):
      one, many = (trace.held_at_end(each, policy, ids, 25, chunk=8) for each in (model, placed))
      np.testing.assert_array_equal(many, one)
      assert 0 < one.mean() < 1


def refusals() -> None:
  original, model = of(HEADS)
  placed, rows = spmd.place(model, make_mesh(2, 2)), [likelihood.Passage(*np.zeros((3, 2), np.int32))]
  together = policies.TOVA(budget=9, per_layer=True)
  for message, call in (
    ("must be on the same mesh", lambda: text_quality(original, placed, text(model), LENGTH)),
    (r"decide together here \(TOVA\)", lambda: text_quality(placed, None, text(model), LENGTH, policy=together)),
    (r"decide together here \(TOVA\)", lambda: likelihood.score([(placed, together)], rows)),
  ):  # fmt: skip
    with pytest.raises(ValueError, match=message):
      call()


QUICK = texts, shares_by_position, likelihoods, refusals
SLOW = texts_by_rows, texts_of_families, likelihoods_by_rows, traces
CASES = {case.__name__: case for case in (*QUICK, *SLOW)}

if __name__ == "__main__":
  run_cases(CASES)
