"""Incremental detokenization: the time that a token takes does not grow with the text."""

from __future__ import annotations

import codecs
import dataclasses
import itertools
from collections.abc import Sequence
from typing import Any

from dms_jax.generation.stops import Matcher, StopStrings
from dms_jax.tokenizer import clean

REPLACEMENT = "\ufffd"  # the decoder's text for bytes that are not a whole UTF-8 character
LONGEST = 1024  # tokens of the prompt that are looked at
CONTEXT = 4  # tokens of the prompt, or bytes; no UTF-8 character has more bytes


class _Bytes:
  """Texts that are the bytes of their tokens, such as those of GPT-2 and Qwen."""

  whole = True  # all text is out but an incomplete character

  def __init__(self, pieces: Sequence[bytes], context: Sequence[int]):
    self.pieces = pieces
    self.decoder = codecs.getincrementaldecoder("utf-8")("replace")
    before = b"".join(map(self._bytes, context[-8 * CONTEXT :]))[-CONTEXT:]
    while before and before[0] & 0xC0 == 0x80:  # the rest of a character
      before = before[1:]
    self.decoder.decode(before)
    self.owed = REPLACEMENT if self.decoder.getstate()[0] else ""

  def _bytes(self, token: int) -> bytes:
    return self.pieces[token] if token < len(self.pieces) else b""

  def __call__(self, tokens: Sequence[int], running: bool) -> str:
    return self.decoder.decode(b"".join(map(self._bytes, tokens)), not running)


class _Windows:
  """Texts from any decoder.

  A decoder may treat the first token of a text differently. Tokens are therefore decoded in a window that begins with
  tokens of known text: the special treatment changes only that text, and the text after it is new. A run of byte tokens
  is decoded once it has ended, as later bytes may change its text. Special tokens have no text and enter no window.
  """

  def __init__(self, tokenizer: Any, context: Sequence[int]):
    self.decode = getattr(tokenizer, "raw_text", tokenizer.decode)
    self.hidden = getattr(tokenizer, "hidden_ids", frozenset())
    self.fallback = getattr(tokenizer, "fallback_ids", frozenset()) - self.hidden
    self.completes = not self.fallback  # a token may complete a character that another has begun
    self.window, self.run = self._last(context), []
    while self.window and self.window[-1] in self.fallback:
      self.run.insert(0, self.window.pop())
    self.known = len(self.window)  # tokens whose text was known when the window began
    both = self.decode([*self.window, *self.run])
    self.shown = len(self._final(self.decode(self.window)))  # characters of the window's text that are out
    self.owed = both[self.shown :]

  @property
  def whole(self) -> bool:
    """Whether all tokens are decoded."""
    return not self.run

  def _final(self, text: str) -> str:
    return text.rstrip(REPLACEMENT) if self.completes else text

  def _last(self, context: Sequence[int]) -> list[int]:
    """The last tokens of a prompt, as many as decide how the next one is decoded."""
    found: list[int] = []
    for token in reversed(context):
      if token in self.hidden:
        continue
      count = len(found)
      if count >= CONTEXT and count & (count - 1) == 0 and found[-1] not in self.fallback:
        text = self.decode(found[::-1])
        if text and text[0] != REPLACEMENT:
          break
      found.append(token)
    return found[::-1]

  def __call__(self, tokens: Sequence[int], running: bool) -> str:
    before = len(self.window)
    self.run += [token for token in tokens if token not in self.hidden]
    bytes_at_end = itertools.takewhile(self.fallback.__contains__, reversed(self.run)) if running else ()
    end = len(self.run) - sum(1 for _ in bytes_at_end)
    self.window, self.run = self.window + self.run[:end], self.run[end:]
    if running and len(self.window) == before:
      return ""
    text = self.decode(self.window)
    if not running:
      return text[self.shown :]
    whole = self._final(text)
    piece, self.shown = whole[self.shown :], max(self.shown, len(whole))
    if whole == text and len(self.window) > self.known:  # the window moves on where a character ends
      recent = self.window[self.known :]
      if (shown := len(self.decode(recent))) or piece:
        self.window, self.known, self.shown = recent, len(recent), shown
    return piece


@dataclasses.dataclass
class Detokenizer:
  """The text of one row while it is generated.

  `advance` returns text once it is final. It holds back incomplete characters, and text that may become a stop string.
  The pieces add up to the text of all tokens, cut before the stop string that ended the row. After the prompt's text
  they are the text of prompt and tokens together: a decoder that drops the first space of a text drops the prompt's.

  Attributes:
    source: decodes tokens, those of a call after those of earlier calls.
    cleans: whether spaces before punctuation go (`tokenizer.clean`).
    stop: matches stop strings in this row; None: there are none.
  """

  source: _Bytes | _Windows
  cleans: bool = False
  stop: Matcher | None = None
  _pieces: list[str] = dataclasses.field(default_factory=list)  # returned so far
  _raw: str = ""  # text whose spaces are undecided
  _held: str = ""  # text held back, which may belong to a stop string
  _seen: int = 0  # tokens passed in earlier calls
  _ended: bool = False

  @classmethod
  def create(cls, tokenizer: Any, strings: StopStrings | None, context: Any = ()) -> Detokenizer | None:
    """The detokenizer of a new row; None without a tokenizer.

    Args:
      tokenizer: has `decode(ids)`, and may have `byte_pieces`, `hidden_ids`, `fallback_ids` and `cleans` of
        `Tokenizer`.
      context: ids of the tokens before those to be decoded, a sequence or an array.
    """
    if tokenizer is None:
      return None
    context, pieces = [int(token) for token in context[-LONGEST:]], getattr(tokenizer, "byte_pieces", None)
    source = _Windows(tokenizer, context) if pieces is None else _Bytes(pieces, context)
    return cls(source, getattr(tokenizer, "cleans", False), None if strings is None else strings.matcher())

  @property
  def text(self) -> str:
    """All text returned so far."""
    self._pieces = ["".join(self._pieces)]
    return self._pieces[0]

  def advance(self, tokens: Sequence[int], reason: str = "running") -> str:
    """Returns the text that has become final.

    Args:
      tokens: all generated tokens of the row, those of earlier calls included.
      reason: why the row ended, or "running". At the end only the stop string is held back.
    """
    running = reason == "running"
    if self._ended or (running and len(tokens) == self._seen):
      return ""
    new = tokens[self._seen :]
    self._held += self._decoded(new, running)
    keep = len(self._held)
    if self.stop is not None:
      self.stop.feed(new)
      keep -= self._stop_length(reason)
    piece, self._held = self._held[:keep], self._held[keep:]
    self._pieces.append(piece)
    self._seen, self._ended = len(tokens), not running
    return piece

  def _decoded(self, tokens: Sequence[int], running: bool) -> str:
    """The text that `tokens` add to those of earlier calls; if `running`, without text that may still change."""
    text, owed = self.source(tokens, running), self.source.owed
    if text and owed:  # the prompt's text ends with it already, unless the character has become whole
      text, self.source.owed = text.removeprefix(owed), ""
    if not self.cleans:
      return text
    self._raw += text
    end = boundary(self._raw) if running else len(self._raw)
    text, self._raw = self._raw[:end], self._raw[end:]
    return clean(text)

  def _stop_length(self, reason: str) -> int:
    """Number of characters at the end of the held text that belong to a stop string, or may if the row is running."""
    tail = self.stop.visible
    if reason == "stop":  # where the decoder drops spaces, the text has fewer than the stop string
      text = tail.decode("utf-8", "replace")
      pairs = zip(reversed(self._held), reversed(text), strict=False)
      return sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))
    if reason != "running" or not tail:
      return 0
    if self._raw or not self.source.whole:
      return len(self._held)
    text = tail.decode("utf-8", "ignore").rstrip(REPLACEMENT)
    return next(n for n in range(len(text), -1, -1) if self._held.endswith(text[len(text) - n :]))


def boundary(text: str) -> int:
  """The end of the part of a text that `clean` treats alike whatever follows: before a space, after most characters."""
  for index in range(len(text) - 1, 0, -1):
    if text[index] == " " and text[index - 1] not in " 'n":
      return index
  return 0
