"""Reads prompts into a cache chunk by chunk, for every kind of cache."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np
from jaxtyping import Int


@dataclasses.dataclass(frozen=True)
class Chunk:
  """The next tokens of each row, right-padded, int32. Row b takes `lengths[b]` of `tokens[b]`, those from `start[b]` of
  its prompt on; `remaining[b]` tokens of its prompt come after them."""

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

  A chunk that no row has space for is halved: a chunk claims slots as if it evicted nothing, so a smaller one asks for
  fewer. Where `fitting` allows no row a token, single tokens are read, which know what they displace.

  Args:
    ids: each row's tokens, int32.
    chunk: tokens that a row takes at once; all chunks but those of single tokens have this width.
    feed: takes a chunk into the caller's cache; returns which rows had no space and took nothing, bool [B].
    fitting: called before each chunk with the tokens [B] that rows would take; returns how many of them [B] surely find
      space. It may enlarge the cache.
    enlarge: called after a chunk of which no row took a token, with the tokens [B] refused; true: try them again.

  Returns:
    Tokens read of each row, int [B]: less than all of them where not even single tokens find space.
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
