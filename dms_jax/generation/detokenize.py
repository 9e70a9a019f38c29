"""Incremental detokenization: each token is decoded a fixed number of times."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from dms_jax.generation.stops import Matcher, StopStrings

REPLACEMENT = "\ufffd"  # the decoder's text for bytes that are not a whole UTF-8 character


@dataclasses.dataclass
class Detokenizer:
  """The text of one row while it is generated.

  `advance` returns text once it is final. It holds back incomplete characters, and text that may become a stop string.
  The pieces add up to the text of all tokens, cut before the stop string that ended the row.

  A decoder may treat the first token of a text differently. Tokens are therefore decoded in a window that begins with
  tokens of known text: the special treatment changes only that text, and the text after it is new.

  Attributes:
    tokenizer: has `decode(ids)`, and may have `fallback_ids` (see `Tokenizer.fallback_ids`).
    stop: matches stop strings in this row; None: there are none.
    text: all text returned so far.
  """

  tokenizer: Any
  stop: Matcher | None = None
  text: str = ""
  _held: str = ""  # decoded text held back, which may belong to a stop string
  _window: tuple[int, int] = (0, 0)  # first token of the window; first token of unknown text when it began
  _shown: int = 0  # characters of the window's text that were decoded in earlier calls
  _seen: int = 0  # tokens passed in earlier calls
  _ended: bool = False

  @classmethod
  def create(cls, tokenizer: Any, strings: StopStrings | None) -> Detokenizer | None:
    """The detokenizer of a new row; None without a tokenizer."""
    return None if tokenizer is None else cls(tokenizer, None if strings is None else strings.matcher())

  def advance(self, tokens: Sequence[int], reason: str = "running") -> str:
    """Returns the text that has become final.

    Args:
      tokens: all generated tokens of the row, those of earlier calls included.
      reason: why the row ended, or "running". At the end only the stop string is held back.
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
    """Number of tokens whose text is final: all but a run of byte tokens at the end."""
    fallback, end = getattr(self.tokenizer, "fallback_ids", ()), len(tokens)
    while fallback and end > self._window[1] and tokens[end - 1] in fallback:
      end -= 1
    return end

  def _decoded(self, tokens: Sequence[int], end: int, running: bool) -> str:
    """The text that tokens up to `end` add to earlier calls; if `running`, without an incomplete last character."""
    first, new = self._window
    text = self.tokenizer.decode(list(tokens[first:end]))
    whole = text.rstrip(REPLACEMENT) if running else text
    piece, self._shown = whole[self._shown :], max(self._shown, len(whole))
    if piece and whole == text:  # the window moves on where a character ends
      self._window, self._shown = (new, end), len(self.tokenizer.decode(list(tokens[new:end])))
    return piece

  def _stop_length(self, reason: str, whole: bool) -> int:
    """Number of characters at the end of the held text that belong to a stop string, or may if the row is running.

    `whole`: whether all tokens are decoded.
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
