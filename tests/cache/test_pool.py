"""The page allocator against a model in plain Python, over random sequences of operations."""

from __future__ import annotations

import collections

import hypothesis
import hypothesis.stateful as stateful
import hypothesis.strategies as st
import jax
import numpy as np
import pytest

from dms_jax.cache import pool as pools

PAGES, ASKED = 12, 6
take, share, give_back = (jax.jit(f) for f in (pools.take, pools.share, pools.give_back))


def padded(pages, size=ASKED, none=10**6):
  return np.array([*pages, *[none] * (size - len(pages))], np.int32)


class Allocator(stateful.RuleBasedStateMachine):
  """`owners` is the model: how many hold each page. Pages past the end stand for no page."""

  def __init__(self):
    super().__init__()
    self.pool = pools.Pool.create(PAGES)
    self.owners = collections.Counter()

  @stateful.rule(wanted=st.lists(st.booleans(), min_size=ASKED, max_size=ASKED))
  def take(self, wanted):
    free = self.pool.pages - len(self.owners)
    self.pool, pages = take(self.pool, np.array(wanted))
    pages = np.asarray(pages)
    given = pages[pages < self.pool.pages].tolist()
    assert len(given) == min(sum(wanted), free) == len(set(given))
    assert not set(given) & set(self.owners), "a page was handed out twice"
    assert all(w for w, page in zip(wanted, pages, strict=True) if page < self.pool.pages)
    first = [i for i, w in enumerate(wanted) if w][: len(given)]
    assert all(pages[i] < self.pool.pages for i in first), "pages go to those who ask first"
    self.owners.update(given)

  @stateful.precondition(lambda self: self.owners)
  @stateful.rule(data=st.data())
  def share(self, data):
    chosen = data.draw(st.lists(st.sampled_from(sorted(self.owners)), max_size=ASKED))
    self.pool = share(self.pool, padded(chosen))
    self.owners.update(chosen)

  @stateful.precondition(lambda self: self.owners)
  @stateful.rule(data=st.data())
  def give_back(self, data):
    held = sorted(self.owners.elements())
    places = data.draw(st.lists(st.integers(0, len(held) - 1), unique=True, max_size=ASKED))
    chosen = [held[i] for i in places]
    self.pool = give_back(self.pool, padded(chosen))
    self.owners -= collections.Counter(chosen)

  @stateful.precondition(lambda self: self.pool.pages == PAGES)
  @stateful.rule()
  def grow(self):
    self.pool = self.pool.grow(PAGES + 5)

  @stateful.invariant()
  def nothing_is_lost(self):
    count = int(self.pool.count)
    free = np.asarray(self.pool.free)[:count].tolist()
    assert sorted(free + list(self.owners)) == list(range(self.pool.pages))
    np.testing.assert_array_equal(self.pool.owners, [self.owners[page] for page in range(self.pool.pages)])


TestAllocator = Allocator.TestCase
TestAllocator.settings = hypothesis.settings(max_examples=60, stateful_step_count=30)


def test_a_pool_does_not_shrink():
  with pytest.raises(ValueError, match="cannot shrink a pool of 12 pages to 11"):
    pools.Pool.create(PAGES).grow(11)
