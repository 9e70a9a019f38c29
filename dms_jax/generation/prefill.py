"""Reads prompts into a cache chunk by chunk, for every kind of cache."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np
from jaxtyping import Int


@dataclasses.dataclass(frozen=True)
class Chunk:
  """The next prompt tokens of each row, right-padded, int32.

  Row b reads the first `lengths[b]` of `tokens[b]`. They begin at token `start[b]` of its prompt, and `remaining[b]`
  tokens of the prompt come after them.
  """

  tokens: Int[np.ndarray, "B T"]
  lengths: Int[np.ndarray, "B"]
  start: Int[np.ndarray, "B"]
  remaining: Int[np.ndarray, "B"]


def read_prompts(
  ids: Sequence[Int[np.ndarray, "_"]],
  chunk: int,
  feed: Callable[[Chunk], np.ndarray],
  *,
  fitting: Callable[[np.ndarray], np.ndarray] = lambda lengths: lengths,
  enlarge: Callable[[np.ndarray], bool] = lambda lengths: False,
) -> Int[np.ndarray, "B"]:
  """Reads all prompts, each row from its own start.

  A chunk claims slots as if it evicted nothing. If no row has space for a chunk, its size is halved, so that it claims
  fewer slots. If `fitting` allows no row any token, each row reads one token, whose evictions are known.

  Args:
    ids: each row's tokens, int32.
    chunk: most tokens that a row reads at once; every chunk has this width, except chunks of single tokens.
    feed: reads a chunk into the caller's cache; returns which rows had no space and read nothing, bool [B].
    fitting: called before each chunk with the tokens [B] that rows would read; returns how many of them [B] surely find
      space. It may enlarge the cache.
    enlarge: called with the tokens [B] of a chunk that every row refused; true: try the same tokens again.

  Returns:
    Tokens read of each row, int [B]; fewer than its prompt has if not even single tokens found space.
  """
  total, done = np.array([len(row) for row in ids]), np.zeros(len(ids), np.int64)
  size = chunk
  while (done < total).any():
    width, take = chunk, fitting(np.minimum(total - done, size))
    if not take.any():
      width, take = 1, np.minimum(total - done, 1)
    tokens = np.zeros((len(ids), width), np.int32)
    for row, (first, count) in enumerate(zip(done, take, strict=True)):
      tokens[row, :count] = ids[row][first : first + count]
    start, remaining, lengths = (x.astype(np.int32) for x in (done, total - done - take, take))
    took = np.where(feed(Chunk(tokens, lengths, start, remaining)), 0, take)
    done += took
    if took.any() or enlarge(take):
      continue
    if take.max() == 1:
      break
    size = int(take.max()) // 2
  return done
