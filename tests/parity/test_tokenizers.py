"""Tokenizers of every kind against transformers: ids and texts, whatever their files say."""

from __future__ import annotations

import json
import warnings

import hypothesis
import hypothesis.strategies as st
import pytest
import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors

from dms_jax.tokenizer import Tokenizer, _char_of_byte

KINDS = ("byte-level", "llama", "gemma", "unigram", "metaspace-bpe", "wordpiece", "wordlevel")
BYTES = [f"<0x{b:02X}>" for b in range(256)]
PIECES = ["▁", "a", "b", "s", "n", "t", "'", ".", ",", "!", "▁a", "▁b", "ab", "▁ab", "é", "▁é", "n't", "▁."]


def backend(kind: str) -> tokenizers.Tokenizer:
  """A small tokenizer: GPT-2's kind, Llama 2's, Gemma's, T5's, Mistral's, BERT's, and whole words."""
  merges = [("▁", "a"), ("▁", "b"), ("a", "b"), ("▁a", "b"), ("▁", "é")]
  if kind == "byte-level":
    vocab = {ch: b for b, ch in enumerate(_char_of_byte())} | {"Ġa": 256, "ab": 257}
    own = tokenizers.Tokenizer(models.BPE(vocab, [("Ġ", "a"), ("a", "b")]))
    own.pre_tokenizer, own.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    return own
  if kind == "unigram":
    plain = [("<unk>", 0.0), *((piece, -1.0 - len(piece) / 9) for piece in PIECES)]
    own = tokenizers.Tokenizer(models.Unigram(plain, 0))
    own.pre_tokenizer, own.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    return own
  if kind == "wordpiece":
    words = ["[UNK]", "a", "##a", "b", "##b", "é", ".", ",", "!", "'", "n", "s", "t", "##s"]
    own = tokenizers.Tokenizer(models.WordPiece({w: i for i, w in enumerate(words)}, unk_token="[UNK]"))
    own.pre_tokenizer, own.decoder = pre_tokenizers.BertPreTokenizer(), decoders.WordPiece()
    return own
  if kind == "wordlevel":
    own = tokenizers.Tokenizer(models.WordLevel({w: i for i, w in enumerate(["<unk>", "a", "ab", ".", "'"])}, "<unk>"))
    own.pre_tokenizer = pre_tokenizers.Whitespace()
    return own
  words = {word: i for i, word in enumerate(["<unk>", *BYTES, *PIECES])}
  merges = [pair for pair in merges if "".join(pair) in words]
  own = tokenizers.Tokenizer(models.BPE(words, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
  spaces = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
  if kind == "metaspace-bpe":
    own.pre_tokenizer, own.decoder = pre_tokenizers.Metaspace(prepend_scheme="first", split=False), decoders.Metaspace()
  elif kind == "gemma":
    own.normalizer, own.decoder = normalizers.Replace(" ", "▁"), decoders.Sequence(spaces)
  else:
    own.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    own.decoder = decoders.Sequence([*spaces, decoders.Strip(" ", 1, 0)])
  return own


NAMES = ("<bos>", "<eos>", "<pad>", "<x>", "<y>", "ab!")
tokens = st.sampled_from(NAMES)
added = st.fixed_dictionaries(
  {
    "content": tokens, "special": st.booleans(), "normalized": st.booleans(), "lstrip": st.booleans(),
    "rstrip": st.booleans(), "single_word": st.just(False),
  }
)  # fmt: skip
named = st.one_of(tokens, st.builds(lambda t: {"content": t, "lstrip": False, "__type": "AddedToken"}, tokens))


@st.composite
def folders(draw):
  """The content of the files of one directory."""
  own = backend(draw(st.sampled_from(KINDS)))
  inside = draw(st.lists(added, max_size=3, unique_by=lambda t: t["content"]))
  own.add_tokens([tokenizers.AddedToken(**token) for token in inside])
  if (start := own.token_to_id("<bos>")) is not None and draw(st.booleans()):
    own.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", start)])
  if draw(st.booleans()):
    own.enable_truncation(draw(st.integers(1, 3)))
  if draw(st.booleans()):
    own.enable_padding(length=7)
  optional = {
    "bos_token": named, "eos_token": named, "pad_token": named, "image_token": tokens,
    "add_bos_token": st.sampled_from([True, False]), "add_eos_token": st.booleans(),
    "clean_up_tokenization_spaces": st.booleans(), "split_special_tokens": st.booleans(),
    "additional_special_tokens": st.lists(tokens, max_size=2, unique=True), "model_max_length": st.integers(1, 3),
    "add_prefix_space": st.booleans(), "padding_side": st.sampled_from(["left", "right"]),
    "clean_up_tokenization_spaces_for_bpe_even_though_it_will_corrupt_output": st.booleans(),
  }  # fmt: skip
  settings = draw(st.fixed_dictionaries({}, optional=optional))
  new = draw(st.lists(added, max_size=3, unique_by=lambda t: t["content"]))
  size = own.get_vocab_size()
  ids = [own.token_to_id(token["content"]) for token in new]
  ids = [size + ids[:i].count(None) if one is None else one for i, one in enumerate(ids)]
  files = {"tokenizer.json": json.loads(own.to_str())}
  if draw(st.booleans()):
    settings["added_tokens_decoder"] = {str(i): token for i, token in zip(ids, new, strict=True)}
  elif draw(st.booleans()):
    files["added_tokens.json"] = {token["content"]: i for i, token in zip(ids, new, strict=True)}
  files["tokenizer_config.json"] = {"tokenizer_class": "PreTrainedTokenizerFast", **settings}
  if draw(st.booleans()):
    files["special_tokens_map.json"] = draw(
      st.fixed_dictionaries({}, optional={"bos_token": tokens, "eos_token": tokens})
    )
  return files


@hypothesis.settings(max_examples=150, deadline=None, suppress_health_check=list(hypothesis.HealthCheck))
@hypothesis.given(files=folders(), data=st.data())
def test_ids_and_texts(transformers, tmp_path_factory, files, data):
  folder = tmp_path_factory.mktemp("tokenizer")
  for name, values in files.items():
    (folder / name).write_text(json.dumps(values), encoding="utf-8")
  try:
    with warnings.catch_warnings():
      warnings.simplefilter("ignore")
      theirs = transformers.PreTrainedTokenizerFast.from_pretrained(folder)
  except Exception:  # such as a BOS that is to be added and not named
    hypothesis.reject()
  ours = Tokenizer.load(folder)
  ours.save(folder)
  for own in (ours, Tokenizer.load(folder)):
    assert own.backend.get_vocab() == theirs.get_vocab()
    text = data.draw(st.lists(st.sampled_from(["a", "b", " ", "é", "😀", "n't", " .", "'", *NAMES]), max_size=8))
    text = "".join(text)
    plain = theirs(text, add_special_tokens=False)["input_ids"]
    assert own.encode(text, continues=True) == plain
    whole = theirs(text)["input_ids"]
    if not own.prefix_ids or plain[:1] != own.prefix_ids[:1]:  # one that the text has is not doubled
      assert own.encode(text) == whole
    ids = data.draw(st.lists(st.integers(0, len(theirs) - 1), max_size=8))
    for skip in (True, False):
      assert own.decode(ids, skip_special=skip) == theirs.decode(ids, skip_special_tokens=skip)
    assert own.eos_token_ids == (() if theirs.eos_token_id is None else (theirs.eos_token_id,))
    assert own.bos_token_id == theirs.bos_token_id


TEMPLATES = [
  "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}",
  "{{ messages | tojson(ensure_ascii=True, indent=2) }}{{ messages | tojson(separators=(',', ':'), sort_keys=True) }}",
  "{% if enable_thinking is defined and not enable_thinking %}<no>{% endif %}{{ bos_token }}{{ image_token }}",
  "{% for m in messages %}{% if loop.index > 1 %}{% break %}{% endif %}{{ m.role ~ ': ' ~ m['content'] | trim }}"
  "{% endfor %}{% if add_generation_prompt %}>{% endif %}",
  "{% macro f(x) %}<{{ x }}>{% endmacro %}{% set ns = namespace(n='') %}{% for m in messages %}"
  "{% set ns.n = ns.n + f(m.content) %}{% endfor %}{{ ns.n }}{{ tools is none }}",
]


@pytest.mark.parametrize("template", TEMPLATES)
def test_chat_templates(transformers, tmp_path, template):
  names = {"bos_token": "<bos>", "eos_token": "<eos>", "image_token": "<x>", "chat_template": template}
  backend("byte-level").save(str(tmp_path / "tokenizer.json"))
  (tmp_path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", **names}))
  theirs, ours = transformers.PreTrainedTokenizerFast.from_pretrained(tmp_path), Tokenizer.load(tmp_path)
  messages = [{"role": "user", "content": " é<b> "}, {"role": "assistant", "content": "x"}]
  for arguments in ({}, {"enable_thinking": False}, {"bos_token": "B"}):
    for prompt in (True, False):
      want = theirs.apply_chat_template(messages, tokenize=False, add_generation_prompt=prompt, **arguments)
      assert ours.chat(messages, add_generation_prompt=prompt, **arguments) == want
