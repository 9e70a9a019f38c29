"""Bad prompts, keys and numbers are refused in one line; logits that are not finite are reported."""

from __future__ import annotations

import inspect

import jax.numpy as jnp
import numpy as np
import pytest

import dms_jax
from dms_jax import model as models
from dms_jax import testing as tiny
from dms_jax.generation.prompts import prompt_ids
from dms_jax.policies import DMS, StreamingLLM

MODEL = tiny.model(tiny.config(num_layers=1, max_position_embeddings=32))
# Without the checks of types that only tests have.
check, generate, check_policy = map(inspect.unwrap, (prompt_ids, dms_jax.generate, models.check_policy))


@pytest.mark.parametrize(
  "prompts",
  [
    [[[1, 2], [3, 4]]], [[[1, 2], [3]]], [[1.5, 2.0]], np.array([[1.0, 2.0]]), [[2**32 + 5]], [[2**70]], [[-1]],
    [[97]],  [[True, False]], b"ab", {1: 2}, np.zeros((1, 2, 3), int), [["a"]],
  ],
)  # fmt: skip
def test_what_is_no_prompt_is_refused(prompts):
  with pytest.raises(ValueError, match="prompts") as error:
    check(MODEL, prompts, None, None, None)
  assert "\n" not in str(error.value)


def test_prompts_of_any_whole_numbers():
  for prompts in ([1, 2], [[1, 2]], np.array([[1, 2]], np.uint64), np.array([1, 2], np.int8), jnp.array([[1, 2]])):
    (row,) = check(MODEL, prompts, None, None, None)
    assert row.tolist() == [1, 2] and row.dtype == np.int32


@pytest.mark.parametrize(
  ("arguments", "says"),
  [
    (dict(decode_block=0), "decode_block=0"), (dict(capacity=0), "capacity=0"), (dict(eos=[97]), "eos"),
    (dict(eos=[2**32]), "eos"), (dict(policy=StreamingLLM(window=10**6, budget=10**7)), "window"),
    (dict(stop="x"), "tokenizer"),
    (dict(continue_from="chat"), "continue_from='chat' must be"), (dict(stream=5), "stream=5 must be a function"),
  ],
)  # fmt: skip
def test_arguments_out_of_range(arguments, says):
  with pytest.raises(ValueError, match=says):
    generate(MODEL, [[1, 2]], max_new_tokens=1, **arguments)


@pytest.mark.parametrize("policy", ["dms", DMS, 5, [DMS()]])
def test_what_is_no_policy(policy):
  with pytest.raises(ValueError, match=r"policy=.* must be a policy, such as dms_jax\.DMS\(\)"):
    check_policy(MODEL, policy)


def test_a_threshold_that_is_no_number():
  for threshold in (float("nan"), np.float32("nan"), "0", None):
    with pytest.raises(ValueError, match="threshold"):
      DMS(threshold=threshold).resolved(5)


def test_a_prompt_of_the_whole_context():
  """The last token is sampled and not read, so 32 tokens leave place for one."""
  out = dms_jax.generate(MODEL, [list(range(32))], max_new_tokens=1, eos=False)
  longer = tiny.model(tiny.config(num_layers=1, max_position_embeddings=64))
  assert out.tokens == dms_jax.generate(longer, [list(range(32))], max_new_tokens=1, eos=False).tokens
  with pytest.raises(ValueError, match="need 33 positions"):
    dms_jax.generate(MODEL, [list(range(32))], max_new_tokens=2)
  generator = dms_jax.Generator(MODEL, width=1, eos=False)
  ticket = generator.submit(list(range(32)), max_new_tokens=1)
  list(generator.run())
  assert generator.results[ticket].tokens == out.tokens


def test_logits_that_are_not_finite():
  broken = MODEL.replace(params={**MODEL.params, "final_norm": MODEL.params["final_norm"] * np.nan})
  with pytest.raises(ValueError, match="logits are not finite"):
    dms_jax.generate(broken, [[1, 2]], max_new_tokens=3)
  generator = dms_jax.Generator(broken, width=1)
  ticket = generator.submit([1, 2], max_new_tokens=3)
  with pytest.warns(RuntimeWarning, match="logits are not finite"):
    list(generator.run())
  assert generator.results[ticket].finish_reason == ["nan"] and generator.results[ticket].tokens == [[]]
