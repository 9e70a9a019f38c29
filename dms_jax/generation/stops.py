"""Stop strings, exact inside a compiled loop: an automaton over bytes, lifted to tokens.

A stop string may begin in the middle of one token and end in the middle of another. The Aho-Corasick automaton of the
stop strings knows, after any bytes, the longest suffix that begins one of them; running every token's bytes from every
state once, on the host, gives `next state[state, token]`, so that one table look-up a step finds the very token that
completes a stop string.
"""

from __future__ import annotations

import dataclasses
from collections import deque
from collections.abc import Sequence

import numpy as np
from jaxtyping import Int

STATES = 32  # token tables are padded to a multiple of this, so that few sets of stop strings need a compilation


@dataclasses.dataclass(frozen=True)
class Automaton:
  """`step` int32 [states, 256]; `depth` [states] bytes of the prefix matched so far; `ends` [states] length in bytes
  of the longest stop string that ends here, 0 for none. State 0 is the start."""

  step: np.ndarray
  depth: np.ndarray
  ends: np.ndarray


def build(stops: Sequence[str]) -> Automaton:
  """The automaton of some stop strings.

  Raises:
    ValueError: an empty stop string.
  """
  if any(not s for s in stops):
    raise ValueError("stop: a stop string is empty")
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
  while queue:  # breadth first: a state's failure link is shallower, hence complete
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

  Vectorised over states and vocabulary, one pass for each byte of the longest token. Ids past `token_bytes` (a padded
  vocabulary) have no bytes.
  """
  lengths = np.zeros(vocab_size, np.int64)
  lengths[: len(token_bytes)] = [len(t) for t in token_bytes]
  order = np.argsort(-lengths, kind="stable")  # longest first: a byte position concerns a prefix of this order
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


def find(automaton: Automaton, data: bytes) -> int | None:
  """Where the stop string that ends first begins (the longest, if several end there); None if there is none."""
  state = 0
  for index, byte in enumerate(data):
    state = automaton.step[state, byte]
    if automaton.ends[state]:
      return index + 1 - int(automaton.ends[state])
  return None


def unsettled(automaton: Automaton, data: bytes) -> int:
  """Bytes at the end of `data` that may yet turn out to begin a stop string."""
  state = 0
  for byte in data[-int(automaton.depth.max()) :]:
    state = automaton.step[state, byte]
  return int(automaton.depth[state])
