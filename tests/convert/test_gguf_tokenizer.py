"""Tokenizers of GGUF files: byte-level BPE, SentencePiece's BPE against plain Python, refusals."""

from __future__ import annotations

import itertools
import json
import re

import numpy as np
import pytest

from dms_jax.convert import convert, gguf
from dms_jax.tokenizer import Tokenizer
from tests.convert.gguf_files import BOS, EOS, EOT, FAMILIES, LARGE, OTHERS, TOKENS, USER, write


def tokenizer_of(tmp_path, pre: str, **metadata) -> Tokenizer:
  write(tmp_path / f"{pre}.gguf", FAMILIES["llama"], pre=pre, **metadata)
  return Tokenizer.load(convert(str(tmp_path / f"{pre}.gguf"), tmp_path / pre))


def spelled(tokenizer: Tokenizer, text: str) -> list[str]:
  pieces = tokenizer.token_bytes()
  return [pieces[i].decode("utf-8", "replace") for i in tokenizer.encode(text)]


def test_pre_tokenizers(tmp_path):
  """Digits are split singly (SmolLM, Qwen) or in threes (Llama 3); contractions and line ends; NFC for Qwen only."""
  smollm, qwen, llama = (tokenizer_of(tmp_path, pre) for pre in ("smollm", "qwen2", "llama-bpe"))
  assert spelled(smollm, "12345 the") == ["1", "2", "3", "4", "5", " t", "he"]
  assert spelled(qwen, "12345 the") == ["1", "2", "3", "4", "5", " t", "he"]
  assert spelled(llama, "12345 the") == ["<bos>", "123", "4", "5", " t", "he"]
  cut = lambda t, text: [text[a:b] for _, (a, b) in t.backend.pre_tokenizer.pre_tokenize_str(text)]
  assert cut(smollm, "I'VE a\n\nb") == ["I", "'", "VE", " a", "\n", "\n", "b"]
  assert cut(qwen, "I'VE a\n\nb") == cut(llama, "I'VE a\n\nb") == ["I", "'VE", " a", "\n\n", "b"]
  assert cut(qwen, "x=(1)") == ["x", "=(", "1", ")"]
  gpt2, neox, o200k, tekken = (tokenizer_of(tmp_path, pre) for pre in ("gpt-2", "olmo", "gpt-4o", "tekken"))
  assert spelled(gpt2, "12345 the") == spelled(neox, "12345 the") == ["1234", "5", " t", "he"]
  assert cut(gpt2, "I've 'VE x=(1)\n\nb") == ["I", "'ve", " '", "VE", " x", "=(", "1", ")", "\n", "\n", "b"]
  assert cut(o200k, "HelloWorld's XMLFile 1234 a/\n") == ["Hello", "World's", " XMLFile", " ", "123", "4", " a", "/\n"]
  assert cut(tekken, "HelloWorld's 12") == ["Hello", "World", "'s", " ", "1", "2"]
  assert spelled(tekken, "12") == ["<bos>", "1", "2"]
  assert neox.encode("e\u0301") == neox.encode("é") and gpt2.encode("e\u0301") != gpt2.encode("é")
  assert qwen.encode("e\u0301") == qwen.encode("é") and smollm.encode("e\u0301") != smollm.encode("é")


def test_special_tokens(tmp_path):
  tokenizer = tokenizer_of(tmp_path, "smollm", tokenizer__chat_template="{{ messages[0].content }}<eos>")
  assert tokenizer.encode("a<user><eos>") == [97, USER, EOS]  # never a BOS, though there is one
  assert tokenizer.decode([97, USER, EOS]) == "a<user>"  # user-defined tokens are text, control tokens are not
  assert tokenizer.eos_token_ids == (EOS,) and tokenizer.bos_token_id == BOS
  assert tokenizer.chat([{"role": "user", "content": "hi"}]) == "hi<eos>"
  assert tokenizer.token_bytes()[:256] == [bytes([b]) for b in range(256)]
  asked = tokenizer_of(tmp_path, "qwen2", tokenizer__ggml__add_bos_token=True)
  assert asked.encode("a") == [BOS, 97]
  assert json.loads((tmp_path / "qwen2" / "tokenizer_config.json").read_text())["add_bos_token"] is True
  assert asked.backend.encode("a").ids == [BOS, 97]  # for readers of tokenizer.json alone


def sentencepiece(seed: int) -> dict[str, list]:
  """A vocabulary of SentencePiece's BPE, as llama.cpp writes it: specials, bytes, characters and random merges."""
  rng = np.random.default_rng(seed)
  pieces = [*"▁abcés.'"]
  while len(pieces) < 60:
    new = "".join(rng.choice(pieces, 2))
    if new not in pieces and len(new) < 9:
      pieces.append(new)
  special = ["<unk>", "<bos>", "<eos>"]
  own = [*special, *(f"<0x{b:02X}>" for b in range(256)), *pieces, "<user>", "  ", "[PAD]"]
  scores = [0.0] * 259 + [-float(i) for i in range(len(pieces))] + [-1000.0] * 3
  return {"tokens": own, "scores": scores, "token_type": [2, 3, 3] + [6] * 256 + [1] * len(pieces) + [4, 4, 5]}


def joined_by_score(vocab: dict[str, list], text: str, prefixed: bool) -> list[int]:
  """The ids of a text by llama.cpp's llm_tokenizer_spm and its split at special tokens, written out plainly."""
  ids = {token: index for index, token in enumerate(vocab["tokens"])}
  added = [token for token, kind in zip(vocab["tokens"], vocab["token_type"], strict=True) if kind in (2, 3, 4)]
  joins = {t: s for t, s, kind in zip(vocab["tokens"], vocab["scores"], vocab["token_type"], strict=True) if kind == 1}
  out = []
  for part in re.split("(" + "|".join(map(re.escape, sorted(added, key=len, reverse=True))) + ")", text):
    if part in added:
      out.append(ids[part])
      continue
    symbols = list((" " * prefixed + part if part else "").replace(" ", "▁"))
    while True:
      pairs = [(-joins[a + b], i) for i, (a, b) in enumerate(itertools.pairwise(symbols)) if a + b in joins]
      if not pairs:
        break
      _, at = min(pairs)
      symbols[at : at + 2] = [symbols[at] + symbols[at + 1]]
    for symbol in symbols:
      out += [ids[symbol]] if symbol in ids else [ids[f"<0x{byte:02X}>"] for byte in symbol.encode()]
  return out


@pytest.mark.parametrize("prefixed", [True, False], ids=["llama", "gemma"])
def test_sentencepiece(tmp_path, prefixed):
  rng = np.random.default_rng(0)
  for seed in range(4):
    vocab = sentencepiece(seed)
    settings = {} if prefixed else dict(tokenizer__ggml__add_space_prefix=False)  # llama.cpp's default is true
    write(tmp_path / "m.gguf", LARGE, vocabulary=vocab, **settings)
    tokenizer = gguf.read(tmp_path / "m.gguf")[2]
    tokenizer.save(tmp_path)
    again = Tokenizer.load(tmp_path)
    for _ in range(60):
      text = "".join(rng.choice([*"abcés.' ", " ", "  ", "日", "🙂", "<user>", "<eos>", "<unk>"], rng.integers(1, 14)))
      want = joined_by_score(vocab, text, prefixed)
      for own in (tokenizer, again):
        assert own.encode(text) == [1, *want]
        assert own.encode(text, continues=True) == want
      plain = text.replace("<eos>", "").replace("<unk>", "")
      if not prefixed:
        assert tokenizer.decode(want) == plain
    assert tokenizer.decode(tokenizer.encode("ab 日 c")) == "ab 日 c"
    assert tokenizer.bos_token_id == 1 and tokenizer.eos_token_ids == (2,)


def test_sentencepiece_refused(tmp_path):
  """What the merges of BPE cannot say, and what a damaged file says."""
  vocab = sentencepiece(0)
  first = vocab["token_type"].index(1)
  last = len(vocab["tokens"]) - 4
  changed = lambda name, index, value: {**vocab, name: [*vocab[name][:index], value, *vocab[name][index + 1 :]]}
  for other, message in (
    (changed("scores", first, -7.25), r"SentencePiece's unigram model \(the score of '▁' is -7.25\) is not supported"),
    (changed("scores", last, vocab["scores"][last - 1]), "in which tokens have the same score"),
    (changed("tokens", last, "xyz"), "a SentencePiece tokenizer with 'xyz' and without 'x' is not supported"),
    (changed("tokens", last, "a" * 2000), "a token of 2000 characters; the file is damaged"),
    (changed("scores", last, float("nan")), "scores for 322 tokens; the file is damaged"),
    ({**vocab, "scores": vocab["scores"][1:]}, "321 scores for 322 tokens; the file is damaged"),
    ({**vocab, "token_type": vocab["token_type"][1:]}, "321 token types for 322 tokens; the file is damaged"),
  ):
    write(tmp_path / "m.gguf", LARGE, vocabulary=other)
    with pytest.raises(ValueError, match=message):
      gguf.read(tmp_path / "m.gguf")


def test_another_tokenizer(tmp_path):
  """A file whose tokenizer is not supported converts with the model's own."""
  write(tmp_path / "m.gguf", FAMILIES["llama"], pre="falcon")
  tokenizer_of(tmp_path, "gpt-2")
  convert(str(tmp_path / "m.gguf"), tmp_path / "ours", tokenizer=str(tmp_path / "gpt-2"))
  assert Tokenizer.load(tmp_path / "ours").encode("the") == Tokenizer.load(tmp_path / "gpt-2").encode("the")


def test_ends_known_by_text(tmp_path):
  """Gemma's files may name <eos> alone; llama.cpp knows <end_of_turn> by its text."""
  write(tmp_path / "m.gguf", OTHERS["gemma3"], vocabulary={"tokens": [*TOKENS[:-1], "<end_of_turn>"]})
  assert gguf.read(tmp_path / "m.gguf")[0].eos_token_ids == (EOS, EOT)


def test_special_ids_of_minus_one(tmp_path):
  """Some files write -1, in 32 bits, for a special token that the model lacks."""
  absent = {f"tokenizer__ggml__{name}_token_id": 2**32 - 1 for name in ("padding", "unknown", "eot")}
  tokenizer = tokenizer_of(tmp_path, "deepseek-r1-qwen", tokenizer__ggml__add_bos_token=True, **absent)
  assert "pad_token" not in tokenizer.settings and "unk_token" not in tokenizer.settings
  assert spelled(tokenizer, "12 the") == ["<bos>", "1", "2", " t", "he"]  # digits as Qwen2 splits them
  assert tokenizer.encode("e\u0301", continues=True) == tokenizer.encode("é", continues=True)
