"""What a `Generator` records while the device works: tokens, texts, usage, how chains ended.

Texts come from a tokenizer that may raise, and an interrupt may come at any time. Records therefore wait in order until
they are written whole, and writing one again changes nothing.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import warnings
from collections.abc import Iterable, Sequence

from jaxtyping import Array

from dms_jax.generation.decode import NOT_FINITE, NOT_FINITE_ADVICE, Emitted
from dms_jax.generation.results import ChainUsage
from dms_jax.generation.rows import Chain
from dms_jax.generation.together import account
from dms_jax.processes import fetch

News = tuple[int, int, list[int], str]  # ticket, chain, new tokens, new text


@dataclasses.dataclass(eq=False, slots=True)
class Entry:
  """What a block has brought one chain.

  Attributes:
    used: tokens held and keys read by each step; None for tokens that no step made.
    reason: why the chain ended, or "running".
    before, blocks: tokens and blocks of the chain's result before.
  """

  chain: Chain
  tokens: list[int]
  logprobs: list[float]
  used: tuple | None
  reason: str
  before: int
  blocks: int
  _written: bool = False
  _shown: int | None = None  # characters of the text before
  _news: News | None = None

  def record(self, stream: bool, news: collections.deque[News]) -> None:
    """Writes the entry into the chain's result, and its news; again after an error or an interrupt.

    Raises:
      Exception: the tokenizer's. Tokens and usage are written then, and later entries of the chain wait.
    """
    chain, result, index = self.chain, self.chain.result, self.chain.index
    if not self._written:
      count, usage = len(self.tokens), result.usage[index]
      result.tokens[index][self.before : self.before + count] = self.tokens
      result.logprobs[index][self.before : self.before + count] = self.logprobs
      if self.used is not None:
        usage.steps[self.blocks : self.blocks + 1] = [self.used]
      if self.reason != "running":
        usage.join()
      self._written = True
    if chain.failed is not None and chain.failed[0] is not self:
      raise chain.failed[1]
    try:
      text = "" if chain.silent else self._text(stream)
    except Exception as error:
      error.add_note(f"ticket {chain.ticket}, chain {index}: no text; cancel({chain.ticket}) lets the others go on")
      chain.failed = self, error
      raise
    chain.failed = None
    if self._news is None and not chain.silent and (self.tokens or text or self.reason != "running"):
      self._news = chain.ticket, index, self.tokens, text
    if self._news is not None and not (news and news[-1] is self._news):
      news.append(self._news)
    if self.reason != "running" and result.finish_reason[index] == "running" and not chain.silent:
      result.finish_reason[index] = self.reason
      if self.reason == "nan":
        where = f"ticket {chain.ticket}, chain {index}"
        warnings.warn(f"{where}: {NOT_FINITE}; {NOT_FINITE_ADVICE}", RuntimeWarning, stacklevel=2)

  def _text(self, stream: bool) -> str:
    """The new text; with `stream` false all of it at the chain's end."""
    chain, result, index = self.chain, self.chain.result, self.chain.index
    if result.text is None or (not stream and self.reason == "running"):
      return ""
    if self._shown is None:
      self._shown = len(result.text[index])
    # While it works it is out of reach: if it raises, the next one begins with the first token.
    detokenizer, chain.detokenizer = chain.detokenizer or chain.new_detokenizer(), None
    detokenizer.advance(result.tokens[index], self.reason)
    result.text[index], chain.detokenizer = detokenizer.text, detokenizer
    return result.text[index][self._shown :]


@dataclasses.dataclass(eq=False)
class Flight:
  """A decode block that was started, or tokens that no block made.

  Attributes:
    chains: that of each row.
    emitted, spent: its tokens, and tokens held and keys read by each step [steps, B], on the device; None for none.
    outcome: (reason [B], tokens held, pages in use, pages free), on the device.
    over: the reason of each chain that ended, by row.
  """

  chains: list[Chain | None]
  emitted: Emitted | None
  spent: tuple[Array, Array] | None
  outcome: tuple = ()
  over: dict[int, str] = dataclasses.field(default_factory=dict)
  _entries: collections.deque[Entry] | None = None  # to be written
  _failing: list[Entry] = dataclasses.field(default_factory=list)

  @property
  def recorded(self) -> bool:
    """Whether all of it is written."""
    return self._entries is not None and not self._entries and not self._failing

  def record(self, stream: bool, news: collections.deque[News]) -> Exception | None:
    """Writes what is not written yet; waits for the block. Returns the first error of a tokenizer.

    Args:
      stream: texts come piece by piece, not once their chain has ended.
      news: those of the chains are appended.
    """
    if self._entries is None:
      self._entries = self._made()
    elif self._failing:
      self._entries, self._failing = collections.deque([*self._failing, *self._entries]), []
    failed = None
    while self._entries:
      try:
        self._entries[0].record(stream, news)
      except Exception as error:
        failed = failed or error
        self._failing.append(self._entries[0])
      self._entries.popleft()
    return failed

  def _made(self) -> collections.deque[Entry]:
    """The entries of the chains that have new tokens or have ended."""
    entries: collections.deque[Entry] = collections.deque()

    def add(row: int, tokens: list[int], logprobs: list[float], used: tuple | None) -> None:
      chain = self.chains[row]
      result, index = chain.result, chain.index
      before, blocks = len(result.tokens[index]), len(result.usage[index].steps)
      entries.append(Entry(chain, tokens, logprobs, used, self.over.get(row, "running"), before, blocks))

    rows: list[int] = []
    if self.emitted is not None:
      emitted, spent = fetch((self.emitted, self.spent))
      counts = emitted.valid.sum(axis=0)  # the valid steps of a row are its first
      rows = [row for row in counts.nonzero()[0].tolist() if self.chains[row] is not None]
      tokens, logprobs = (x.T[rows].tolist() for x in (emitted.tokens, emitted.logprobs))
      held, reads = (None, None) if spent is None else (x.T[rows] for x in spent)
      for place, (row, count) in enumerate(zip(rows, counts[rows].tolist(), strict=True)):
        used = None if held is None else (held[place, :count], reads[place, :count])
        add(row, tokens[place][:count], logprobs[place][:count], used)
    there = set(rows)
    for row in self.over:
      if row not in there:
        add(row, [], [], None)
    return entries


@dataclasses.dataclass(eq=False)
class Begun:
  """Requests that have begun.

  Attributes:
    groups: their chains, each request's with the usage of its prompt.
    pending: what reading their prompts returned, for `account`.
    first: their first tokens.
  """

  groups: list[tuple[list[Chain], ChainUsage]]
  pending: list | None
  first: Flight

  @property
  def chains(self) -> Sequence[Chain | None]:
    """The chain of each row."""
    return self.first.chains

  @property
  def recorded(self) -> bool:
    """Whether all of it is written."""
    return self.pending is None and self.first.recorded

  def record(self, stream: bool, news: collections.deque[News]) -> Exception | None:
    """See `Flight.record`."""
    if self.pending is not None:
      for usage in (prompt.usage for prompts, *_ in self.pending for prompt in prompts):
        usage.prompt_held = usage.prompt_peak = usage.prompt_reads = 0
      account(self.pending)
      for group, usage in self.groups:
        for chain in group:
          chain.result.usage[chain.index] = dataclasses.replace(usage, steps=[])
      self.pending = None
    return self.first.record(stream, news)


def cancel(chains: Iterable[Chain]) -> None:
  """Ends chains with reason "cancelled", with the texts of their tokens so far, or as much as the tokenizer can say."""
  for chain in chains:
    result, index = chain.result, chain.index
    if result.finish_reason[index] != "running":
      continue
    if result.text is not None and result.tokens[index]:
      with contextlib.suppress(Exception):
        detokenizer, chain.detokenizer = chain.detokenizer or chain.new_detokenizer(), None
        detokenizer.advance(result.tokens[index], "cancelled")
        result.text[index] = detokenizer.text
    result.finish_reason[index] = "cancelled"
    result.usage[index].join()
