"""Policies without a cache: the registry, single hooks, open windows, capacities, refused numbers."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dms_jax import policies
from dms_jax import testing as tiny
from dms_jax.model import check_policy
from dms_jax.policies.budget import largest

NAMES = {
  "dmc", "dms", "expectedattention", "h2o", "keydiff", "kvzap", "quest", "random", "rkv", "snapkv", "streamingllm",
  "tova", "triattention", "trimkv", "vanilla", "vase",
}  # fmt: skip


def test_registry():
  assert policies.get("DMS") is policies.get("dms") is policies.DMS
  assert policies.REGISTRY.keys() == NAMES
  with pytest.raises(ValueError, match=re.escape(f"unknown policy 'h3o'; there are {sorted(NAMES)}")):
    policies.get("h3o")


def test_every_policy_is_compared_with_plain_numpy():
  """Each is a case of a test that compares attention, tokens held and reads in every cache, in rows that pause."""
  compared = set()
  for name in ("test_policies.py", "test_prompts.py", "test_trained.py"):
    for node in ast.parse((Path(__file__).parent / name).read_text()).body:
      if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) in ("CASES", "MERGES"):
        compared |= {each.attr.lower() for each in ast.walk(node.value) if isinstance(each, ast.Attribute)}
  assert compared >= NAMES


def positions(*shape):
  return jnp.broadcast_to(jnp.arange(shape[-1]), shape)


def test_dms_compares_with_its_threshold():
  logits = jnp.array([[[-1.0, 0.0, 0.5, 3.0]]])
  for threshold, expected in ((0.0, [0, 0, 1, 1]), (0.5, [0, 0, 0, 1]), (-2.0, [1, 1, 1, 1])):
    evict = policies.DMS(threshold=threshold).decide(logits, 0, positions(1, 1, 4))
    np.testing.assert_array_equal(evict[0, 0], np.array(expected, bool))


def test_vanilla_keeps_everything_with_and_without_gates():
  for logits in (None, jnp.full((1, 2, 3), 9.0)):
    assert not policies.Vanilla().decide(logits, 0, positions(1, 2, 3)).any()
  assert not policies.Vanilla.evicts and not policies.Vanilla.uses_gates
  assert policies.DMS.evicts and policies.DMS.uses_gates


def test_streaming_evicts_all_but_its_sinks():
  evict = policies.StreamingLLM(window=3, sinks=2).decide(None, 0, positions(1, 1, 4))
  np.testing.assert_array_equal(evict[0, 0], [False, False, True, True])


def leaving(**changes):
  """One layer, row and head; the tokens 9 and 4 in an archive of three slots, the last one dead."""
  given = (
    dict(
      evicted=False,
      tokens=20,
      archived=2,
      live=[True, True, False],
      score=0.5,
      scores=[0.7, 0.3, jnp.nan],
      positions=[9.0, 4.0, 17.0],
    )
    | changes
  )
  array = {
    name: jnp.asarray(value).reshape((1, 1, 1, -1) if name in ("live", "scores", "positions") else (1, 1, 1))
    for name, value in given.items()
  }
  stats = {"score": array.pop("score"), "position": jnp.full((1, 1, 1), 17.0)}
  archive_stats = {"score": array.pop("scores"), "position": array.pop("positions")}
  return policies.Leaving(**{**array, "tokens": array["tokens"][0]}, stats=stats, archive_stats=archive_stats)


def test_retire_appends_what_was_not_evicted():
  for evicted in (True, False):
    retired = policies.DMS(window=1).retire(leaving(evicted=evicted))
    assert bool(retired.keep) == (not evicted) and retired.slot is None


@pytest.mark.parametrize(
  ("budget", "score", "keep", "slot"),
  [(5, 0.1, True, -1), (4, 0.5, True, 1), (4, 0.3, False, 1), (4, 0.2, False, 1), (9, 0.0, True, -1)],
)
def test_a_full_archive_gives_up_its_least(budget, score, keep, slot):
  """W = 1: `budget` - 2 tokens are archived; a tie is lost by the one that leaves."""
  retired = policies.TOVA(window=1, budget=budget).retire(leaving(score=score))
  assert (retired.keep.item(), retired.slot.item()) == (keep, slot)


def test_of_equal_scores_the_later_token_goes():
  """In whatever slot it is; in a cut as in a decode step."""
  for positions, slot in (([9.0, 4.0, 17.0], 0), ([4.0, 9.0, 17.0], 1)):
    retired = policies.TOVA(window=1, budget=4).retire(leaving(scores=[0.3, 0.3, jnp.nan], positions=positions))
    assert (retired.keep.item(), retired.slot.item()) == (True, slot)
  position = jnp.array([[[7.0, 2.0, 5.0, 3.0, jnp.nan]]])
  scores, live = jnp.array([[[1.0, 1.0, 1.0, 2.0, 9.0]]]), jnp.array([[[True, True, True, True, False]]])
  kept = largest(scores, live, jnp.array([3]), position)
  np.testing.assert_array_equal(kept[0, 0], [False, True, True, True, False])
  np.testing.assert_array_equal(largest(scores, live, jnp.array([2]))[0, 0], [True, False, False, True, False])


def test_an_archive_without_slots_forgets():
  empty = leaving(archived=0, live=jnp.zeros(0, bool), scores=jnp.zeros(0), positions=jnp.zeros(0))
  for score in (0.5, jnp.inf):
    retired = policies.H2O(window=1, budget=2).retire(
      empty.replace(stats={**empty.stats, "score": jnp.full((1, 1, 1), score)})
    )
    assert not retired.keep.any()


def test_numbers_are_leaves_and_the_window_is_a_shape():
  policy = policies.DMS(window=8, threshold=0.5)
  assert jax.tree.leaves(policy) == [0.5]
  assert jax.tree.structure(policy) == jax.tree.structure(policies.DMS(window=8, threshold=3.0))
  assert jax.tree.structure(policy) != jax.tree.structure(policies.DMS(window=9, threshold=0.5))
  assert jax.tree.leaves(policies.H2O(window=8, budget=64)) == [64]
  assert jax.tree.leaves(policies.Quest(cr=4.0)) == [4.0, 2]
  with pytest.raises(AttributeError):
    policy.threshold = 1.0


@pytest.mark.parametrize(
  ("policy", "window"),
  [
    (policies.H2O(budget=64), 31), (policies.H2O(budget=64, window=7), 7), (policies.H2O(cr=4.0, window=7), 7),
    (policies.H2O(cr=4.0), 0), (policies.H2O(budget=np.int32(9)), 4), (policies.VaSE(cr=4.0), 63),
    (policies.TOVA(budget=64), 0), (policies.Random(cr=2.0), 0), (policies.StreamingLLM(budget=64), 59),
    (policies.StreamingLLM(window=9, sinks=0), 9), (policies.Quest(budget=64), 15), (policies.Quest(cr=8.0, page=4), 3),
    (policies.Vanilla(), 0), (policies.DMS(), 5),
  ],
)  # fmt: skip
def test_open_windows_are_filled_in(policy, window):
  resolved = check_policy(tiny.model(gates=tiny.dms()), policy)
  assert resolved.window == window
  again = (
    check_policy(tiny.model(gates=tiny.dms()), resolved) if not isinstance(policy, policies.StreamingLLM) else resolved
  )
  assert again == resolved


@pytest.mark.parametrize(
  ("policy", "message"),
  [
    (policies.H2O(), "H2O: give either budget="), (policies.TOVA(budget=8, cr=2.0), "TOVA: give either budget="),
    (policies.H2O(cr=0.5), "cr=0.5 must be 1"), (policies.H2O(budget=4, window=9), "budget=4 tokens must be 10"),
    (policies.KeyDiff(cr=float("nan")), "cr=nan must be a finite"), (policies.TOVA(budget=9.7), "must be whole"),
    (policies.SnapKV(budget="9"), "=9 tokens must be a finite"), (policies.TOVA(budget=2**40), "whole, and"),
    (policies.TOVA(budget=9, window=2.5), "window=2.5 must"), (policies.SnapKV(budget=99, pool=3.0), "pool=3.0 must"),
    (policies.H2O(budget=np.array([8, 0])), "must be 1 or more"),
    (policies.RKV(budget=9, buffer=0), "buffer=0 must be a whole"),
    (policies.RKV(budget=9, pool=4), "pool=4 must be an odd"),
    (policies.RKV(budget=9, importance=1.5), "importance=1.5 must be from"),
    (policies.VaSE(budget=80, large=2.0), "large=2.0 must be"), (policies.VaSE(budget=8), "budget=8 tokens must be 64"),
    (policies.TriAttention(budget=8), "give calibration=FILE"),
    (policies.TriAttention(calibration="none.npz"), "no such file"),
    (policies.ExpectedAttention(budget=8, future=0), "future=0 must be a whole number"),
    (policies.ExpectedAttention(budget=8, future=2**31 - 1), "future=2147483647 must be a whole number, from 1 to 107"),
    (policies.RKV(budget=9, buffer=2**30), "buffer=1073741824 must be a whole number, from 1 to 1073741823"),
    (policies.Random(budget=9, seed=2**31), "Random: seed=2147483648 must be at most 2147483647"),
    (policies.Random(budget=9, seed=np.array([1, 2**33])), "seed=.* must be at most 2147483647"),
    (policies.Random(budget=9, seed=2**70), "must be at most 2147483647"),
    (policies.Quest(cr=2.0, page=2.5), "page=2.5 must be 1 or more slots, a whole"),
    (policies.TOVA(budget=0), "budget=0 tokens must be 1"), (policies.Random(cr=0.5), "cr=0.5 must be 1"),
    (policies.StreamingLLM(), "give either window="), (policies.StreamingLLM(budget=4), "more than its sinks=4"),
    (policies.StreamingLLM(window=1, sinks=-1), "sinks=-1 must be a whole"),
    (policies.StreamingLLM(budget=9, sinks=2.5), "sinks=2.5 must be a whole"),
    (policies.StreamingLLM(budget=9.5), "budget=9.5 and sinks=4 must each be one whole number"),
    (policies.VaSE(budget=66), "VaSE: sinks=4 must be 2 or fewer: a budget of 66 tokens"),
    (policies.VaSE(budget=90, large=0.02), "VaSE: sinks=4 must be 1 or fewer: a budget of 90"),
    (policies.ExpectedAttention(budget=9, window=5), "ExpectedAttention: sinks=4 must be 3 or fewer"),
    (policies.Random(budget=9, sinks=9), "Random: sinks=9 must be 8 or fewer: a budget of 9 tokens has no more places"),
    (policies.Random(budget=9, sinks=-1), "Random: sinks=-1 must be a whole number"),
    (policies.Quest(budget=20), "budget=20 tokens must be 32"),
    (policies.Quest(cr=2.0, window=3), "whole pages of 16"), (policies.Quest(cr=2.0, page=0), "page=0"),
    (policies.TOVA(budget=4, window=-1), "window=-1"), (policies.DMS(), "needs eviction gates"),
  ],
)  # fmt: skip
def test_numbers_that_make_no_sense(policy, message):
  with pytest.raises(ValueError, match=message):
    check_policy(tiny.model(), policy)


@pytest.mark.parametrize(
  "policy",
  [
    policies.H2O(budget=20, window=7),
    policies.TOVA(cr=3.3),
    policies.Random(cr=1.0, window=4),
    policies.RKV(budget=20, buffer=7, exact_prefill=True),
    policies.RKV(cr=3.3, buffer=5, exact_prefill=True),
    policies.StreamingLLM(window=6, sinks=3),
    policies.StreamingLLM(window=2, cr=3.3, sinks=3, by_position=True),
    policies.Vanilla(),
  ],
)
def test_reach_is_the_inverse_of_capacity(policy):
  """What `reach` promises fits: for ever where the need does not grow; of a ratio at most two tokens are missed."""
  tokens = jnp.arange(1, 400)
  need = np.asarray(policy.capacity(tokens))
  assert (need <= tokens).all() and (np.diff(need) >= 0).all()
  for slots in range(policy.window + 1, 60):
    reach = int(policy.reach(slots))
    fits = int(np.asarray(tokens)[need <= slots].max())
    assert reach >= slots and (fits == 399 if reach >= 399 else fits - 2 <= reach <= fits)
