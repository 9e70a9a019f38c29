"""The reader of prompts: chunks, what comes after them, and what happens where space is lacking."""

from __future__ import annotations

import numpy as np
import pytest

from dms_jax.generation.prefill import read_prompts


class Space:
  """A cache of `slots` tokens a row that keeps them all; records what it was fed."""

  def __init__(self, rows: int, slots: int):
    self.rows, self.slots, self.chunks = [[] for _ in range(rows)], slots, []

  def feed(self, part):
    self.chunks.append(part)
    stalled = np.array(
      [len(row) + length > self.slots for row, length in zip(self.rows, part.lengths, strict=True)]
    ) & (part.lengths > 0)
    for row, length, tokens, refused in zip(self.rows, part.lengths, part.tokens, stalled, strict=True):
      row += [] if refused else tokens[:length].tolist()
    return stalled


IDS = [np.arange(start, start + length, dtype=np.int32) for start, length in ((0, 11), (100, 3), (200, 4))]


def test_each_row_is_read_from_its_own_start():
  space = Space(3, 99)
  read = read_prompts(IDS, 4, space.feed)
  assert read.tolist() == [11, 3, 4] and space.rows == [row.tolist() for row in IDS]
  assert [part.lengths.tolist() for part in space.chunks] == [[4, 3, 4], [4, 0, 0], [3, 0, 0]]
  assert [part.remaining.tolist() for part in space.chunks] == [[7, 0, 0], [3, 0, 0], [0, 0, 0]]
  assert [part.start.tolist() for part in space.chunks] == [[0, 0, 0], [4, 3, 4], [8, 3, 4]]
  assert all(part.tokens.shape == (3, 4) and part.tokens.dtype == np.int32 for part in space.chunks)
  assert (space.chunks[0].tokens[1] == [100, 101, 102, 0]).all()


def test_a_chunk_without_space_is_halved():
  space = Space(1, 11)
  read = read_prompts([np.arange(20)], 8, space.feed)
  assert read.tolist() == [11]
  assert [part.lengths.tolist() for part in space.chunks] == [[8], [8], [4], [2], [2], [1], [1]]
  assert all(part.tokens.shape == (1, 8) for part in space.chunks)


def test_an_enlarged_cache_is_asked_again():
  space, asked = Space(1, 6), []

  def enlarge(lengths):
    asked.append(lengths.tolist())
    space.slots += 5
    return True

  assert read_prompts([np.arange(20)], 8, space.feed, enlarge=enlarge).tolist() == [20]
  assert len(asked) == 3 and all(part.lengths[0] in (8, 4) for part in space.chunks)


@pytest.mark.parametrize("slots", [9, 20])
def test_single_tokens_are_read_where_none_surely_fits(slots):
  space = Space(2, slots)
  fitting = lambda lengths: np.minimum(lengths, [max(6 - len(row), 0) for row in space.rows])  # a cautious guess
  read = read_prompts([np.arange(12), np.arange(3)], 4, space.feed, fitting=fitting)
  assert read.tolist() == [min(12, slots), 3]
  assert [part.tokens.shape[1] for part in space.chunks][:3] == [4, 4, 1]
