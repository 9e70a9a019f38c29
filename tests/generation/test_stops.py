"""Stop strings: the automaton and its lift to tokens, against plain searching."""

from __future__ import annotations

import numpy as np
import pytest

from dms_jax.generation import stops


def first_end(data: bytes, words: list[bytes]) -> tuple[int, int] | None:
  """(begin, end) of the occurrence that ends first, the longest of those."""
  found = [(end, -len(w)) for w in words for end in range(len(w), len(data) + 1) if data[end - len(w) : end] == w]
  if not found:
    return None
  end, minus = min(found)
  return end + minus, end


def random_cases(count: int):
  rng = np.random.default_rng(0)
  for _ in range(count):
    words = ["".join(rng.choice(list("abé"), rng.integers(1, 5))) for _ in range(rng.integers(1, 5))]
    data = "".join(rng.choice(list("abé"), rng.integers(0, 14))).encode()
    yield words, data


def test_a_matcher_is_plain_searching():
  for words, data in random_cases(500):
    automaton = stops.build(words)
    encoded = [w.encode() for w in words]
    hit = first_end(data, encoded)
    matcher = stops.Matcher(automaton, [bytes([b]) for b in range(256)])
    matcher.feed(data[:5])
    matcher.feed(data[5:])
    found = len(data) - len(matcher.tail) if matcher.found else None
    assert found == (None if hit is None else hit[0]), (words, data)
    if hit is None:
      longest = max(
        n for n in range(len(data) + 1) if n == 0 or any(w.startswith(data[len(data) - n :]) for w in encoded)
      )
      assert matcher.tail == data[len(data) - longest :], (words, data)


def test_token_table_stops_at_the_token_that_completes_a_stop_string():
  rng = np.random.default_rng(1)
  vocab = [b"", *(bytes(rng.choice(list(b"abc"), rng.integers(1, 5)).tolist()) for _ in range(38))]
  hits = 0
  for _ in range(60):
    words = ["".join(rng.choice(list("abc"), rng.integers(1, 7))) for _ in range(rng.integers(1, 4))]
    table = stops.token_table(stops.build(words), vocab, len(vocab) + 3)  # three ids without a piece
    assert table.shape[0] % stops.STATES == 0
    for _ in range(20):
      state, data = 0, b""
      for token in rng.integers(0, len(vocab) + 3, 8):
        data += vocab[token] if token < len(vocab) else b""
        state = int(table[state, token])
        assert (state < 0) == any(w.encode() in data for w in words), (words, data)
        if state < 0:
          hits += 1
          break
  assert hits > 200


def test_characters_of_several_bytes_split_over_tokens():
  pieces = [bytes([b]) for b in range(256)]
  table = stops.token_table(stops.build(["né"]), pieces, 256)
  state = 0
  for byte in "canné".encode()[:-1]:
    state = int(table[state, byte])
    assert state >= 0
  assert table[state, "é".encode()[-1]] == -1


def test_an_empty_stop_string_is_refused():
  with pytest.raises(ValueError, match="empty"):
    stops.build(["ok", ""])
