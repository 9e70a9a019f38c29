"""Layers that slide beside layers whose tokens a policy evicts: each holds exactly its window."""

from __future__ import annotations

import dataclasses
import os

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest

from dms_jax import policies
from dms_jax.cache.host import offload_row, restore_row
from tests.cache_driver import KINDS, ROWS, TWO_KINDS, Shape, Text, inputs, run, schedule, step
from tests.helpers import check_pages


@pytest.mark.parametrize("kind", KINDS)
@hypothesis.settings(max_examples=2 if os.environ.get("DMS_QUICK") else 6)
@hypothesis.given(shape=TWO_KINDS, seeds=st.lists(st.integers(0, 2**31), min_size=4, max_size=4))
def test_cache_is_mask(kind, shape, seeds):
  """As in `test_cache.py`, over random windows of both kinds; a sliding layer ignores the decisions."""
  for seed in seeds:
    rng = np.random.default_rng(seed)
    run(kind, shape, Text.draw(shape, rng), schedule(rng, shape))


# windows of the ring and of the sliding layer: as large, one apart, whole pages apart; longer than the text
WINDOWS = [(0, 1), (3, 3), (3, 4), (4, 12), (2, 40)]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("window", "slides"), WINDOWS)
@pytest.mark.parametrize("shift", [0, 1])
def test_windows_of_both_kinds(kind, window, slides, shift):
  shape = Shape(window, shift, heads=2, group=2, chunk=8, length=30, slides=slides)
  rng = np.random.default_rng(slides)
  run(kind, shape, Text.draw(shape, rng, 0.6), schedule(rng, shape))


def test_pages_of_a_sliding_layer_are_those_of_its_window():
  """Whatever the length of the text, a head owns the pages of V - W slots; its pages are free for others before."""
  shape = Shape(2, 1, heads=2, group=1, chunk=8, length=60, slides=9)
  text, every = Text.draw(shape, np.random.default_rng(0), 0.0), np.full(ROWS, 1)
  cache = run("paged", shape, text, [(8, 8 * every)] * 7 + [(1, every)] * 4)
  check_pages(cache)
  owned = np.asarray(cache.table.owned)
  assert (owned[0] == -(-7 // 4)).all() and (owned[1] == -(-(60 - 3) // 4)).all()
  assert cache.row_pages(60) == 2 * (2 + 15)


def test_rings_are_no_longer_than_the_sliding_window():
  with pytest.raises(ValueError, match="window=7 must be at most 5, which sliding layers hold"):
    Shape(7, 1, heads=1, group=1, chunk=2, length=18, slides=5).create("paged")


def test_a_stored_row_has_the_tokens_of_the_sliding_window():
  shape = Shape(2, 1, heads=2, group=1, chunk=8, length=18, slides=9)
  text, every = Text.draw(shape, np.random.default_rng(0)), np.full(ROWS, 1)
  cache = run("paged", shape, text, [(8, 8 * every)] * 2)
  stored = offload_row(cache, 1)
  assert restore_row(shape.create("contiguous"), 2, stored)[1]
  with pytest.raises(ValueError, match=r"tokens of sliding layers \[6\] does not fit a cache with \[7\]"):
    restore_row(shape.create("paged"), 2, stored.replace(archived=np.minimum(stored.archived, 6)))


@pytest.mark.parametrize("kind", ["contiguous", "paged"])
def test_tokens_that_a_row_can_take(kind):
  """What `free_tokens` promises is accepted; a sliding layer with all the slots of its window asks for no more."""
  shape = Shape(2, 1, heads=2, group=1, chunk=8, length=60, slides=9)
  text, policy, start = Text.draw(shape, np.random.default_rng(0), 0.0), policies.DMS(window=2), np.zeros(ROWS, int)
  cache = shape.create(kind, 24)
  for _ in range(6):
    lengths = np.minimum(np.asarray(cache.free_tokens(policy)), 8)
    *_, stalled, cache = step(cache, policy, *inputs(text, start, lengths, 8))
    assert not np.asarray(stalled).any()
    start = start + lengths
  if kind == "contiguous":
    assert (start == 24).all() and not np.asarray(cache.free_tokens(policy)).any()
  evict_all = dataclasses.replace(text, evict=np.ones_like(text.evict))
  small, start = shape.create(kind, 10 if kind == "contiguous" else 12), np.zeros(ROWS, int)
  for _ in range(40):  # nothing is ever lacking where the other layer evicts all
    assert (np.asarray(small.free_tokens(policy)) > 0).all()
    *_, stalled, small = step(small, policy, *inputs(evict_all, start, np.full(ROWS, 1), 1))
    assert not np.asarray(stalled).any()
    start = start + 1
