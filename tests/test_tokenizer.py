"""Tokenizers: bytes of tokens, BOS, chat templates, files, damage."""

from __future__ import annotations

import json

import hypothesis
import hypothesis.strategies as st
import pytest
import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors

from dms_jax.tokenizer import Tokenizer, bpe_tokenizer, byte_tokenizer


@hypothesis.given(st.text())
@hypothesis.settings(max_examples=100)
def test_bytes_there_and_back(text):
  tokenizer = byte_tokenizer()
  ids = tokenizer.encode(text)
  assert ids == list(text.encode()) or "<eos>" in text
  assert tokenizer.decode(ids, skip_special=False) == text
  pieces = tokenizer.token_bytes()
  assert b"".join(pieces[i] for i in ids) == text.encode()


def test_byte_tokenizer():
  tokenizer = byte_tokenizer()
  assert tokenizer.vocab_size == 257 == len(tokenizer.token_bytes())
  assert tokenizer.eos_token_ids == (256,)
  assert tokenizer.token_bytes()[:256] == [bytes([b]) for b in range(256)]
  assert tokenizer.encode("a<eos>") == [97, 256]
  assert tokenizer.decode([97, 256]) == "a"
  assert tokenizer.decode([97, 256], skip_special=False) == "a<eos>"
  assert tokenizer.decode([0xE4, 0xBD]) == "\ufffd"  # half a character
  assert not tokenizer.adds_bos and tokenizer.bos_token_id is None


def test_files(tmp_path):
  tokenizer = byte_tokenizer()
  tokenizer.settings["chat_template"] = "{{ messages[0].content }} é"
  tokenizer.save(tmp_path)
  loaded = Tokenizer.load(tmp_path)
  assert loaded.settings == tokenizer.settings
  assert loaded.encode("héllo<eos>") == tokenizer.encode("héllo<eos>")
  (tmp_path / "chat_template.jinja").write_text("from the file of its own")
  assert Tokenizer.load(tmp_path).chat([]) == "from the file of its own"
  (tmp_path / "tokenizer_config.json").unlink()
  assert Tokenizer.load(tmp_path).encode("hi") == [104, 105]
  assert Tokenizer.load(tmp_path).eos_token_ids == ()


def test_special_tokens_of_older_directories(tmp_path):
  """Named in special_tokens_map.json only, plain or with their options."""
  byte_tokenizer().save(tmp_path)
  (tmp_path / "tokenizer_config.json").write_text("{}")
  (tmp_path / "special_tokens_map.json").write_text(json.dumps({"eos_token": {"content": "<eos>", "lstrip": False}}))
  assert Tokenizer.load(tmp_path).eos_token_ids == (256,)


def test_damage_is_named(tmp_path):
  with pytest.raises(ValueError, match=r"no tokenizer\.json"):
    Tokenizer.load(tmp_path / "nowhere")
  byte_tokenizer().save(tmp_path)
  file = tmp_path / "tokenizer.json"
  whole = file.read_bytes()
  for part in (whole[: len(whole) // 2], b"", b"{}", b"\xff\xfe" + whole):
    file.write_bytes(part)
    with pytest.raises(ValueError, match=r"tokenizer\.json: not a tokenizer"):
      Tokenizer.load(tmp_path)
  file.write_bytes(whole)
  (tmp_path / "tokenizer_config.json").write_text('{"eos_token": ')
  with pytest.raises(ValueError, match=r"tokenizer_config\.json: not valid JSON"):
    Tokenizer.load(tmp_path)


def bos_tokenizer(post_processor: bool, **settings) -> Tokenizer:
  backend = byte_tokenizer().backend
  backend.add_special_tokens(["<bos>"])  # 257
  if post_processor:
    backend.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 257)])
  return Tokenizer(backend, {"bos_token": {"content": "<bos>"}, "eos_token": "<eos>", **settings})


@pytest.mark.parametrize(
  ("post_processor", "settings", "adds"),
  [
    (True, {}, True),  # Llama 3: the post-processor says so
    (False, {}, False),  # SmolLM2: a BOS exists and is not used
    (False, {"add_bos_token": True}, True),  # R1 distillations: the settings say so
    (True, {"add_bos_token": False}, False),
    (True, {"add_bos_token": None}, True),
  ],
)
def test_bos_only_where_the_model_has_it(post_processor, settings, adds):
  tokenizer = bos_tokenizer(post_processor, **settings)
  assert tokenizer.adds_bos == adds
  assert tokenizer.encode("hi") == [257] * adds + [104, 105]
  assert tokenizer.encode("") == [257] * adds
  assert tokenizer.encode("<bos>hi") == [257, 104, 105]  # a chat template's own is not doubled


TEMPLATE = """\
{%- for message in messages %}
    {%- if message.role == 'tool' %}
        {{- raise_exception('no tools here') }}
    {%- endif %}
    {{- bos_token if loop.first }}<{{ message['role'] }}>
{{ message['content'] | trim }}<eos>
{% endfor %}
{%- if add_generation_prompt %}
<assistant>
{% endif %}
"""


def test_chat_template():
  tokenizer = bos_tokenizer(True, chat_template=TEMPLATE)
  chat = [{"role": "user", "content": " hi "}, {"role": "assistant", "content": "é"}]
  assert tokenizer.chat(chat, add_generation_prompt=False) == "<bos><user>\nhi<eos>\n<assistant>\né<eos>\n"
  assert tokenizer.chat(chat[:1]) == "<bos><user>\nhi<eos>\n<assistant>\n"
  with pytest.raises(ValueError, match="no tools here"):
    tokenizer.chat([{"role": "tool", "content": "x"}])
  with pytest.raises(ValueError, match="refuses these messages"):
    bos_tokenizer(True, chat_template="{{ 'a' + messages[0].content }}").chat([{"content": None}])


def test_chat_template_of_several():
  named = [{"name": "tool_use", "template": "tools"}, {"name": "default", "template": "{{ messages | tojson }}"}]
  assert bos_tokenizer(False, chat_template=named).chat([{"role": "é"}]) == '[{"role": "é"}]'


def test_chat_template_missing_or_broken():
  with pytest.raises(ValueError, match="no chat template"):
    byte_tokenizer().chat([{"role": "user", "content": "hi"}])
  with pytest.raises(ValueError, match="chat template"):
    bos_tokenizer(False, chat_template="{% for %}").chat([])


def test_chat_template_is_sandboxed():
  escape = "{{ messages.__class__.__mro__[1].__subclasses__() }}"
  with pytest.raises(ValueError, match="refuses"):
    bos_tokenizer(False, chat_template=escape).chat([])


def test_bytes_of_sentencepiece_tokens():
  """Llama 2's kind: spaces as U+2581, unknown bytes as <0xXX> tokens."""
  pieces = ["<unk>", "<s>", "</s>", *(f"<0x{b:02X}>" for b in range(256)), "▁", "h", "i", "▁h", "▁hi"]
  vocab = {piece: i for i, piece in enumerate(pieces)}
  merges = [("▁", "h"), ("▁h", "i")]
  backend = tokenizers.Tokenizer(
    models.BPE(vocab=vocab, merges=merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True)
  )
  backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
  backend.decoder = decoders.Sequence(
    [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
  )
  backend.add_special_tokens(["<unk>", "<s>", "</s>"])
  tokenizer = Tokenizer(backend, {"bos_token": "<s>", "eos_token": "</s>", "add_bos_token": True})
  text = "hi hé\n</s>"
  ids = tokenizer.encode(text)
  found = tokenizer.token_bytes()
  assert ids[0] == 1 and ids[-1] == 2
  assert b"".join(found[i] for i in ids[1:]) == (" " + text).encode()  # the first space is the normalizer's
  assert tokenizer.decode(ids) == text.removesuffix("</s>")


def test_unused_ids_have_no_bytes():
  vocab = {"a": 0, "b": 5}
  backend = bpe_tokenizer(vocab, [], pre_tokenizers.ByteLevel(add_prefix_space=False))
  assert Tokenizer(backend).token_bytes() == [b"a", b"", b"", b"", b"", b"b"]
