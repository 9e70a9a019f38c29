"""Token ids to text, piece by piece: each token is decoded a fixed number of times."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from dms_jax.generation.stops import Matcher, StopStrings

REPLACEMENT = "\ufffd"  # what bytes become that are no character, or not a whole one yet


@dataclasses.dataclass
class Detokenizer:
  """The text of one row while it is generated.

  Text is handed out once it is final. Characters that later tokens may complete, and what may become a stop string, are
  held back. The pieces add up to the text of all tokens, cut before the stop string that ended the row.

  Tokens are decoded in a window that begins with tokens whose text is known, since a decoder may treat the first token
  of a text differently: that changes the known text alone, and what exceeds it is new.

  Attributes:
    tokenizer: has `decode(ids)`, and may have `fallback_ids` (see `Tokenizer.fallback_ids`).
    stop: follows the stop strings through this row; None: there are none.
    text: all that has been handed out.
  """

  tokenizer: Any
  stop: Matcher | None = None
  text: str = ""
  _held: str = ""  # decoded and held back: it may belong to a stop string
  _window: tuple[int, int] = (0, 0)  # the window's first token, and the first whose text was new when it began
  _shown: int = 0  # characters of the window's text that were decoded in earlier calls
  _seen: int = 0  # tokens of earlier calls
  _ended: bool = False

  @classmethod
  def create(cls, tokenizer: Any, strings: StopStrings | None) -> Detokenizer | None:
    """That of a row that begins; None without a tokenizer."""
    return None if tokenizer is None else cls(tokenizer, None if strings is None else strings.matcher())

  def advance(self, tokens: Sequence[int], reason: str = "running") -> str:
    """The text that has become final.

    Args:
      tokens: all generated tokens of the row, those of earlier calls included.
      reason: why the row ended, or "running". At the end nothing is held back but the stop string.
    """
    running = reason == "running"
    if self._ended or (running and len(tokens) == self._seen):
      return ""
    end = self._final(tokens) if running else len(tokens)
    self._held += self._decoded(tokens, end, running)
    keep = len(self._held)
    if self.stop is not None:
      self.stop.feed(tokens[self._seen :])
      keep -= self._stop_length(reason, whole=end == len(tokens))
    piece, self._held = self._held[:keep], self._held[keep:]
    self.text += piece
    self._seen, self._ended = len(tokens), not running
    return piece

  def _final(self, tokens: Sequence[int]) -> int:
    """How many tokens have text that later tokens cannot change: those before a run of byte tokens at the end."""
    fallback, end = getattr(self.tokenizer, "fallback_ids", ()), len(tokens)
    while fallback and end > self._window[1] and tokens[end - 1] in fallback:
      end -= 1
    return end

  def _decoded(self, tokens: Sequence[int], end: int, running: bool) -> str:
    """What tokens up to `end` add to the text of earlier calls, without an incomplete character if `running`."""
    first, new = self._window
    text = self.tokenizer.decode(list(tokens[first:end]))
    whole = text.rstrip(REPLACEMENT) if running else text
    piece, self._shown = whole[self._shown :], max(self._shown, len(whole))
    if piece and whole == text:  # the window moves on where a character ends
      self._window, self._shown = (new, end), len(self.tokenizer.decode(list(tokens[new:end])))
    return piece

  def _stop_length(self, reason: str, whole: bool) -> int:
    """How many characters at the end of the held text belong to a stop string, or may (where the row is running).

    `whole`: all tokens are decoded.
    """
    if reason == "stop":
      tail = self.stop.tail.decode("utf-8", "replace")
      return len(tail) if self._held.endswith(tail) else 0
    if reason != "running" or not self.stop.tail:
      return 0
    if not whole:
      return len(self._held)
    tail = self.stop.tail.decode("utf-8", "ignore").rstrip(REPLACEMENT)
    return next(n for n in range(len(tail), -1, -1) if self._held.endswith(tail[len(tail) - n :]))
