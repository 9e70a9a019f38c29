"""Stop strings, exact inside a compiled loop: an automaton over bytes, lifted to tokens.

A stop string may begin in the middle of one token and end in the middle of another. The state of the Aho-Corasick
automaton is the longest suffix of the bytes so far that is a prefix of a stop string. The host runs the bytes of every
token from every state once, which gives the table `next state[state, token]`. One look-up a step then finds the token
that completes a stop string.

On the host a `Matcher` follows the same automaton and tells where a stop string begins in the text.
"""

from __future__ import annotations

import dataclasses
import operator
from collections import deque
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Array, Int

from dms_jax.decoder import Model

STATES = 32  # token tables are padded to a multiple of this, so that few sets of stop strings need a compilation


@dataclasses.dataclass(frozen=True)
class Automaton:
  """The automaton of some stop strings; state 0 is the start.

  `step` int32 [states, 256]: the next state by byte. `depth` [states]: bytes of the matched prefix. `ends` [states]:
  bytes of the longest stop string that ends in the state, 0 for none.
  """

  step: np.ndarray
  depth: np.ndarray
  ends: np.ndarray


def build(stops: Sequence[str]) -> Automaton:
  """The automaton of some stop strings.

  Raises:
    ValueError: an empty stop string, or one with half of a surrogate pair.
  """
  if any(not s for s in stops):
    raise ValueError("stop: a stop string is empty")
  if halves := [s for s in stops if any("\ud800" <= ch <= "\udfff" for ch in s)]:
    raise ValueError(f"stop={halves[0]!r}: half of a surrogate pair, which is no character")
  children: list[dict[int, int]] = [{}]
  depth, ends = [0], [0]
  for stop in stops:
    state, data = 0, stop.encode()
    for byte in data:
      if byte not in children[state]:
        children[state][byte] = len(children)
        children.append({})
        depth.append(depth[state] + 1)
        ends.append(0)
      state = children[state][byte]
    ends[state] = len(data)
  step = np.zeros((len(children), 256), np.int32)
  fail = [0] * len(children)
  queue = deque([0])
  while queue:  # breadth first: a state's failure link is shallower, so it is complete already
    state = queue.popleft()
    if state:
      step[state] = step[fail[state]]
      ends[state] = max(ends[state], ends[fail[state]])
    for byte, child in children[state].items():
      fail[child] = step[state, byte] if state else 0
      step[state, byte] = child
      queue.append(child)
  return Automaton(step, np.array(depth, np.int32), np.array(ends, np.int32))


def token_table(automaton: Automaton, token_bytes: Sequence[bytes], vocab_size: int) -> Int[np.ndarray, "states V"]:
  """Next state of each (state, token), or -1 where a stop string ends inside the token.

  The computation is vectorised over states and vocabulary, with one pass for each byte position of the longest token.
  Ids past `token_bytes` (a padded vocabulary) have no bytes.
  """
  lengths = np.zeros(vocab_size, np.int64)
  lengths[: len(token_bytes)] = [len(t) for t in token_bytes]
  order = np.argsort(-lengths, kind="stable")  # longest first: the tokens with a given byte position are a prefix
  flat = np.frombuffer(b"".join(token_bytes), np.uint8)
  starts = np.zeros(vocab_size, np.int64)
  starts[1 : len(token_bytes)] = np.cumsum(lengths[: len(token_bytes) - 1])
  states = len(automaton.step)
  current = np.repeat(np.arange(states, dtype=np.int32)[:, None], vocab_size, axis=1)
  matched = np.zeros((states, vocab_size), bool)
  for position in range(int(lengths.max(initial=0))):
    count = int(np.searchsorted(-lengths[order], -position, side="left"))
    byte = flat[starts[order[:count]] + position]
    current[:, :count] = automaton.step[current[:, :count], byte]
    matched[:, :count] |= automaton.ends[current[:, :count]] > 0
  table = np.zeros((-(-states // STATES) * STATES, vocab_size), np.int16 if states < 2**15 else np.int32)
  table[:states, order] = np.where(matched, -1, current)
  return table


@dataclasses.dataclass
class Matcher:
  """Follows the bytes of one row through the automaton.

  `found`: whether a stop string has ended. `tail`: before that, the last bytes that may begin a stop string; after it,
  all bytes from the start of the stop string that ended first (the longest, if several ended there).
  """

  automaton: Automaton
  pieces: Sequence[bytes]  # bytes of each token id
  hidden: frozenset[int] = frozenset()  # ids of special tokens, whose bytes match, but are in no text
  tail: bytes = b""
  found: bool = False
  _state: int = 0
  _shown: bytes = b""  # for each byte of the tail, 1 if it is in the text

  @property
  def visible(self) -> bytes:
    """The bytes of the tail that are in the text."""
    return self.tail if all(self._shown) else bytes(b for b, shown in zip(self.tail, self._shown, strict=True) if shown)

  def feed(self, tokens: Sequence[int]) -> None:
    """Takes the row's next tokens; ids past `pieces` have no bytes."""
    for token in tokens:
      self._feed(self.pieces[token] if token < len(self.pieces) else b"", token not in self.hidden)

  def _feed(self, data: bytes, shown: bool = True) -> None:
    before, self.tail = len(self.tail), self.tail + data
    self._shown += bytes([shown]) * len(data)
    if self.found:
      return
    for index, byte in enumerate(data, start=1):
      self._state = int(self.automaton.step[self._state, byte])
      if length := int(self.automaton.ends[self._state]):
        self.found = True
        self._cut(before + index - length)
        return
    self._cut(len(self.tail) - int(self.automaton.depth[self._state]))

  def _cut(self, start: int) -> None:
    self.tail, self._shown = self.tail[start:], self._shown[start:]


@dataclasses.dataclass(frozen=True)
class StopStrings:
  """The stop strings of a call, for the host."""

  automaton: Automaton
  pieces: Sequence[bytes]
  hidden: frozenset[int] = frozenset()

  @classmethod
  def create(cls, texts: str | Sequence[str], tokenizer: Any) -> StopStrings | None:
    """The stop strings `texts`; None if there are none.

    Raises:
      ValueError: an empty text, something else than texts, or no tokenizer.
    """
    if not isinstance(texts, str | list | tuple) or not all(isinstance(text, str) for text in texts):
      raise ValueError(f"stop={texts!r:.80} must be a text or a list of texts")
    texts = (texts,) if isinstance(texts, str) else tuple(texts)
    if not texts:
      return None
    if tokenizer is None:
      raise ValueError("stop: stop strings need a tokenizer; pass tokenizer=")
    return cls(build(texts), tokenizer.token_bytes(), getattr(tokenizer, "hidden_ids", frozenset()))

  def matcher(self) -> Matcher:
    """The matcher of a new row."""
    return Matcher(self.automaton, self.pieces, self.hidden)


@struct.dataclass
class StopCriteria:
  """What ends a row, as arrays for compiled code: token ids `eos`, and the stop strings' `token_table` or None."""

  eos: Int[Array, "ids"]
  table: Int[Array, "states V"] | None = None


def stop_criteria(model: Model, tokenizer: Any, strings: StopStrings | None, eos: bool | Sequence[int]) -> StopCriteria:
  """The criteria of a call.

  Args:
    eos: ids that end a row; true: the end tokens of the tokenizer and the model's config; false: none.

  Raises:
    ValueError: ids that are no whole numbers, or outside the vocabulary.
  """
  size = model.config.vocab_size
  if isinstance(eos, bool | np.bool_):
    ids = set(model.config.eos_token_ids) | set(getattr(tokenizer, "eos_token_ids", ())) if eos else set()
  else:
    try:
      ids = {operator.index(one) for one in eos}
    except TypeError:
      raise ValueError(f"eos={eos!r:.80} must be true, false, or a list of token ids") from None
    if outside := sorted(one for one in ids if not 0 <= one < size):
      raise ValueError(f"eos={outside}: outside the vocabulary, 0..{size - 1}")
  table = None
  if strings is not None:
    table = jnp.asarray(token_table(strings.automaton, strings.pieces[:size], size))
  return StopCriteria(np.array(sorted(ids), np.int32), table)
