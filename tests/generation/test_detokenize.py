"""Detokenizer: pieces add up to the whole text, for all tokenizers, blocks and stop strings."""

from __future__ import annotations

import dataclasses
import functools
import os

import hypothesis
import hypothesis.strategies as st
import pytest
import tokenizers
from tokenizers import decoders, models

from dms_jax.generation import stops
from dms_jax.generation.detokenize import Detokenizer, boundary
from dms_jax.tokenizer import Tokenizer, byte_tokenizer, clean

BYTES = [f"<0x{b:02X}>" for b in (0x20, 0x61, 0x80, 0xA9, 0xC3, 0xE2, 0x82, 0xAC, 0xF0, 0x9F, 0xFF)]
WORDS = ["▁", "▁▁", "▁a", "a", "b", "é", "▁bé", "a▁", "\n", "�", "ab▁a", *BYTES]
WORD_PIECES = ["[UNK]", "a", "##a", "b", "##é", ".", ",", "##b", "'", "s", "n't", "do", "not", "##.", "�"]


def with_special(backend: tokenizers.Tokenizer, decoder) -> Tokenizer:
  backend.decoder = decoder
  backend.add_special_tokens(["<eos>", "<pad>"])
  return Tokenizer(backend, {"eos_token": "<eos>"})


@functools.cache
def tokenizer(kind: str) -> Tokenizer:
  """Small tokenizers with the decoders of real ones: GPT-2 and Qwen, Llama 2, Gemma, T5, BERT."""
  if kind == "byte-level":
    return byte_tokenizer()
  words = {word: i for i, word in enumerate(WORDS)}
  spaces = decoders.Replace("▁", " ")
  if kind == "llama":
    steps = [spaces, decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    return with_special(tokenizers.Tokenizer(models.BPE(words, [], byte_fallback=True)), decoders.Sequence(steps))
  if kind == "gemma":
    steps = [spaces, decoders.ByteFallback(), decoders.Fuse()]
    return with_special(tokenizers.Tokenizer(models.BPE(words, [], byte_fallback=True)), decoders.Sequence(steps))
  if kind == "metaspace":
    plain = [(word, -1.0) for word in WORDS if word not in BYTES]
    return with_special(tokenizers.Tokenizer(models.Unigram(plain, 0)), decoders.Metaspace())
  pieces = {word: i for i, word in enumerate(WORD_PIECES)}
  return with_special(tokenizers.Tokenizer(models.WordPiece(pieces, unk_token="[UNK]")), decoders.WordPiece())


def cut(tokenizer: Tokenizer, tokens: list[int], reason: str, strings: stops.StopStrings | None) -> str:
  """The text by its definition: that of all tokens, without the stop string that ends first and what follows it."""
  text = tokenizer.decode(tokens)
  if reason != "stop":
    return text
  matcher = strings.matcher()
  matcher.feed(tokens)
  tail = matcher.visible.decode("utf-8", "replace")
  same = next((n for n in range(min(len(text), len(tail))) if text[-1 - n] != tail[-1 - n]), min(len(text), len(tail)))
  return text[: len(text) - same]  # decoders of words drop spaces that stop strings have


@pytest.mark.parametrize("kind", ["byte-level", "llama", "gemma", "metaspace", "wordpiece"])
@hypothesis.settings(max_examples=40 if os.environ.get("DMS_QUICK") else 120)
@hypothesis.given(data=st.data())
def test_pieces_add_up_to_the_text(kind, data):
  own = tokenizer(kind)
  # Few bytes of the byte-level vocabulary, so that characters and stop strings occur.
  ids = [*b"ab .", *"é€😀".encode(), 0xFF, 256] if kind == "byte-level" else list(range(own.vocab_size))
  tokens = data.draw(st.lists(st.sampled_from(ids), max_size=24))
  texts = data.draw(st.lists(st.text("ab é€.", min_size=1, max_size=4), max_size=3))
  strings = stops.StopStrings.create(texts, own)
  reason = data.draw(st.sampled_from(["length", "eos"]))
  if strings is not None:
    matcher = strings.matcher()
    for count, token in enumerate(tokens, start=1):
      matcher.feed([token])
      if matcher.found:
        tokens, reason = tokens[:count], "stop"
        break
  reader, pieces = Detokenizer.create(own, strings), []
  for count in sorted(data.draw(st.lists(st.integers(0, max(len(tokens) - 1, 0)), max_size=12))):
    pieces.append(reader.advance(tokens[:count]))
    assert "".join(pieces) == reader.text
  pieces.append(reader.advance(tokens, reason))
  assert reader.advance(tokens, reason) == ""
  assert "".join(pieces) == reader.text == cut(own, tokens, reason, strings)


def prompt_then(own: Tokenizer, prompt: list[int], tokens: list[int], block: int) -> str:
  reader, text = Detokenizer.create(own, None, prompt), ""
  for end in range(0, len(tokens), block):
    text += reader.advance(tokens[:end])
  return text + reader.advance(tokens, "length")


@pytest.mark.parametrize("kind", ["byte-level", "llama", "gemma", "metaspace", "wordpiece"])
@hypothesis.settings(max_examples=40 if os.environ.get("DMS_QUICK") else 120)
@hypothesis.given(data=st.data())
def test_prompt_and_pieces_are_the_text_of_all_ids(kind, data):
  own = tokenizer(kind)
  ids = [*b"ab .", *"é€😀".encode(), 0xFF, 256] if kind == "byte-level" else list(range(own.vocab_size))
  cleans = kind in ("metaspace", "wordpiece") and data.draw(st.booleans())
  own = dataclasses.replace(own, settings={**own.settings, "clean_up_tokenization_spaces": cleans})
  prompt, tokens = (data.draw(st.lists(st.sampled_from(ids), max_size=14)) for _ in range(2))
  before, both = own.decode(prompt), own.decode(prompt + tokens)
  if both.startswith(before):  # else a character, or a space that is dropped, lies across the border
    assert before + prompt_then(own, prompt, tokens, data.draw(st.integers(1, 5))) == both


def test_the_first_space_after_a_prompt_stays():
  """Llama 2's decoder drops the first space of a text: that of the prompt, not that of the answer."""
  own = tokenizer("llama")
  prompt, answer = [own.backend.token_to_id(piece) for piece in ("▁a", "▁bé")]
  assert own.decode([answer]) == "bé"
  assert prompt_then(own, [prompt], [answer], 1) == " bé" and own.decode([prompt, answer]) == "a bé"


@hypothesis.given(st.text(" .'ntsmvera!,?", max_size=12), st.text(" .'ntsmvera!,?", max_size=12))
def test_texts_are_cleaned_in_parts(first, second):
  end = boundary(first)
  assert clean(first[:end]) + clean(first[end:] + second) == clean(first + second)


@pytest.mark.parametrize(
  ("text", "stop", "want"),
  [("ab<eos>", "b<eos>", "a"), ("ab<eos>cd", "b<eos>c", "a"), ("ab<eos>", "<eos>", "ab"), ("ab", "b", "a")],
)
def test_stop_strings_with_special_tokens_are_cut(text, stop, want):
  own = byte_tokenizer()
  strings = stops.StopStrings.create([stop], own)
  tokens = own.encode(text)
  for block in (1, len(tokens)):
    reader = Detokenizer.create(own, strings)
    for end in range(block, len(tokens), block):
      reader.advance(tokens[:end])
    reader.advance(tokens, "stop")
    assert reader.text == want


@dataclasses.dataclass(frozen=True)
class Counting:
  """Counts the ids that are decoded."""

  backend: Tokenizer
  counts: list[int] = dataclasses.field(default_factory=list)

  def decode(self, ids: list[int]) -> str:
    self.counts.append(len(ids))
    return self.backend.decode(ids)


@pytest.mark.parametrize("block", [1, 7])
def test_the_cost_is_linear(block):
  text = "né … and so on. " * 200
  tokens, counting = byte_tokenizer().encode(text), Counting(byte_tokenizer())
  reader = Detokenizer.create(counting, None)
  for end in range(block, len(tokens), block):
    reader.advance(tokens[:end])
  reader.advance(tokens, "length")
  assert reader.text == text
  assert sum(counting.counts) <= 4 * len(tokens) and max(counting.counts) <= 4 * block + 6


@pytest.mark.parametrize("piece", ["<eos>", "<0x61>", "<0xFF>", "▁", "▁a"])
def test_no_token_makes_windows_grow(piece):
  """Runs of special tokens, of byte tokens and of spaces: the ids that are decoded stay linear."""
  own, seen = tokenizer("llama"), []
  reader = Detokenizer.create(own, None)
  decode = reader.source.decode
  reader.source.decode = lambda ids: seen.append(len(ids)) or decode(ids)
  tokens = [own.backend.token_to_id(piece)] * 400
  for end in range(1, len(tokens)):
    reader.advance(tokens[:end])
  reader.advance(tokens, "length")
  assert reader.text == own.decode(tokens) and sum(seen) <= 8 * len(tokens)


def test_what_may_become_a_stop_string_is_held_back():
  own = byte_tokenizer()
  reader = Detokenizer.create(own, stops.StopStrings.create(["abc", "é!"], own))
  tokens = list(b"xab")
  assert reader.advance(tokens) == "x"
  tokens += "dé".encode()
  assert reader.advance(tokens) == "abd"
  tokens += "?éa".encode()[:-2]  # half of a character
  assert reader.advance(tokens) == "é?"
  tokens += "é!z".encode()[1:]
  assert reader.advance(tokens, "stop") == "" and reader.text == "xabdé?"
