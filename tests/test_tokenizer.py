"""Tokenizers: bytes of tokens, BOS, chat templates, files, damage."""

from __future__ import annotations

import json
import time

import hypothesis
import hypothesis.strategies as st
import pytest
import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors

from dms_jax import chat
from dms_jax.tokenizer import Tokenizer, bpe_tokenizer, byte_tokenizer


@pytest.fixture(scope="module")
def byte_level():
  return byte_tokenizer()


@hypothesis.given(text=st.text())
@hypothesis.settings(max_examples=100)
def test_bytes_there_and_back(byte_level, text):
  tokenizer = byte_level
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


def test_template_arguments():
  template = "{% if enable_thinking is defined and not enable_thinking %}<no>{% endif %}{{ tools }}"
  tokenizer = bos_tokenizer(False, chat_template=template)
  assert tokenizer.chat([]) == "None"
  assert tokenizer.chat([], enable_thinking=False, tools=[1]) == "<no>[1]"
  marked = "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}"
  assert bos_tokenizer(False, chat_template=marked).chat([{"content": "é"}]) == "é"
  plain = "{{ messages | tojson(ensure_ascii=true) }}"
  assert bos_tokenizer(False, chat_template=plain).chat([{"a": "é"}]) == '[{"a": "\\u00e9"}]'


@pytest.mark.parametrize(
  ("template", "says"),
  [
    ("{{ 1 / 0 }}", "division by zero"),
    ("{{ messages[7].content }}", "no element 7"),
    ("{{ raise_exception('no\nway') }}", "refuses these messages: no way"),
    ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "recursion"),
    ("{% for i in range(10**9) %}{% endfor %}", "stopped"),
    ("{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}", "stopped: it ran"),
    ("{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(40) }}", "stopped: it ran"),
    ("{% set n = namespace(s='a') %}{% for i in range(99) %}{% set n.s = n.s ~ n.s %}{% endfor %}", "stopped"),
    ("{% set n = namespace(s='a') %}{% for i in range(99) %}{% set n.s = n.s + n.s %}{% endfor %}", "stopped"),
    ("{{ 'a' * 10**12 }}", "stopped"),
    ("{% set n = namespace(x=1) %}{% for i in range(60) %}{% set n.x = [n.x, n.x] %}{% endfor %}{{ n.x }}", "stopped"),
    ("{% set n = namespace(x=1) %}{% for i in range(60) %}{% set n.x = dict(a=n.x, b=n.x) %}{% endfor %}", "stopped"),
    ("{% set n = namespace(x=1) %}{% for i in range(60) %}{% set n.x = [n.x] * 2 %}{% endfor %}{{ n.x }}", "stopped"),
    ("{{ ('a' * 10**7) | replace('a', 'b' * 1000) }}", "stopped"),
    ("{{ ('a' * 10**7).replace('a', 'b' * 1000) }}", "stopped"),
    ("{{ range(99999) | map('string') | join('x' * 10**7) }}", "stopped"),
    ("{{ '{:{}}'.format('a', 10**10) }}", "stopped"),
    ("{{ '%*d' % (10**10, 1) }}", "stopped"),
    ("{{ ('{0}' * 10**6).format('a' * 10**7) }}", "stopped"),
    ("{{ ('\t' * 10**6).expandtabs(10**6) }}", "stopped"),
    ("{{ [1] | slice(10**7) | list | length }}", "stopped"),
    ("{{ 9**9**9 }}", "stopped"),
    ("{{ 'a' | indent(10**12) }}", "stopped"),
    ("{{ '%999999999d' % 1 }}", "stopped"),
    ("{{ ('%5.9999999f' * 100) % ((1.5,) * 100) }}", "stopped"),
    ("{{ ('{0:{1}}' * 1000).format('a', 4000000) }}", "stopped"),
    ("{{ '{:1>9999999}'.format('a') }}", "stopped"),
    ("{{ ('{1:{0[w]}}' * 3).format({'w': 4000000}, 5) }}", "stopped"),
    ("{{ 5 | round(-4000000) }}", "stopped: it rounds"),
    ("{{ range(99999) | reject('in', range(99999) | list) | list }}", "stopped: it ran"),
    ("{% set n = namespace() %}" + "".join(f"{{% set n.a{i} = 'a' * 4000000 %}}" for i in range(20)), "in all"),
    ("{{ lipsum(10**6) }}", "undefined"),
    ("{% break %}", "not valid: 'break' outside loop"),
  ],
)
def test_templates_that_raise_or_do_not_end(template, says, monkeypatch):
  monkeypatch.setattr(chat, "SECONDS", 0.2)
  with pytest.raises(ValueError, match=says) as error:
    bos_tokenizer(False, chat_template=template).chat([{"content": "x"}])
  assert "\n" not in str(error.value)


def test_what_templates_format():
  template = "{{ '{:>4} {:.1f}'.format('a', 2.5) }} {{ '%-2s|%04.1f' % ('a', 2.5) }} {{ 'Of 20240101: %s' % 'x' }}"
  written = bos_tokenizer(
    False,
    chat_template=template + " {{ 2.345 | round(2) }} {{ messages | map(attribute='content') | map('trim') | join }}",
  )
  assert written.chat([{"content": " a "}, {"content": "b"}]) == "   a 2.5 a |02.5 Of 20240101: x 2.35 ab"
  long = [{"content": "x" * 3 * chat.CHARACTERS}]  # bounds grow with what there is to write
  assert len(bos_tokenizer(False, chat_template="{{ messages[0].content * 3 }}").chat(long)) == 9 * chat.CHARACTERS


def test_settings_of_other_types_are_refused(tmp_path):
  byte_tokenizer().save(tmp_path)
  for settings, says in (
    ({"bos_token": 5}, "bos_token=5"), ({"chat_template": 5}, "chat_template"),
    ({"chat_template": [5]}, "chat_template"),
    ({"added_tokens_decoder": [1]}, "added_tokens_decoder"), ({"added_tokens_decoder": {"1": {}}}, "is no token"),
    ({"extra_special_tokens": 7}, "extra_special_tokens"), ({"x": "\ud800"}, "surrogate"),
  ):  # fmt: skip
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    with pytest.raises(ValueError, match=says):
      Tokenizer.load(tmp_path)


def test_text_and_ids_that_are_none():
  with pytest.raises(ValueError, match="character 1 of the text is half of a surrogate pair"):
    byte_tokenizer().encode("a\ud800b")
  with pytest.raises(ValueError, match="ids"):
    byte_tokenizer().decode([-1])


def test_blocks_of_truncation_and_padding_do_not_act(tmp_path):
  backend = byte_tokenizer().backend
  backend.enable_truncation(2)
  backend.enable_padding(length=9, pad_id=256, pad_token="<eos>")
  backend.save(str(tmp_path / "tokenizer.json"))
  assert Tokenizer.load(tmp_path).encode("abcd") == list(b"abcd")


def test_tokens_that_only_the_settings_name(tmp_path):
  """Special tokens of tokenizer_config.json get the next ids; ids and texts know them."""
  byte_tokenizer().save(tmp_path)
  values = {"eos_token": "<eos>", "bos_token": "<s>", "added_tokens_decoder": {"257": {"content": "<x>"}}}
  (tmp_path / "tokenizer_config.json").write_text(json.dumps(values))
  tokenizer = Tokenizer.load(tmp_path)
  assert tokenizer.encode("a<x><s>") == [97, 257, 258] and tokenizer.bos_token_id == 258
  assert tokenizer.decode([97, 257, 258]) == "a<x>"


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


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    (dict(normalizer={"type": "Replace", "pattern": {"String": "a"}, "content": "a" * 1001}), "1000 times longer"),
    (
      dict(normalizer={"type": "Sequence", "normalizers": [
        {"type": "Replace", "pattern": {"String": "a"}, "content": "a" * 10}] * 12}),
      "1000 times longer",
    ),
    (dict(added_tokens=[{"id": 2**32 - 1, "content": "x", "special": True, "single_word": False, "lstrip": False,
                         "rstrip": False, "normalized": False}]), "is no token|id .* in a vocabulary|not a tokenizer"),
    (dict(pre_tokenizer={"type": "Split", "pattern": {"Regex": "(?<x>\\g<x>)"}, "behavior": "Isolated",
                         "invert": False}), "never ending recursion"),
  ],
)  # fmt: skip
def test_tokenizers_that_would_not_end_are_refused(tmp_path, changes, message):
  values = json.loads(byte_tokenizer().backend.to_str())
  (tmp_path / "tokenizer.json").write_text(json.dumps({**values, **changes}))
  if "added_tokens" in changes:  # the library gives it the next id
    assert Tokenizer.load(tmp_path).vocab_size <= 2**16
    return
  with pytest.raises(ValueError, match=message) as caught:
    Tokenizer.load(tmp_path)
  assert str(tmp_path / "tokenizer.json") in str(caught.value)


@pytest.mark.parametrize("index", [2**31, 2**32 - 1])
def test_an_absurd_id_is_refused_at_once(tmp_path, index):
  """The library needs seconds and gigabytes to count up to it, which is not asked of it."""
  values = json.loads(byte_tokenizer().backend.to_str())
  values["model"]["vocab"]["a"] = index
  (tmp_path / "tokenizer.json").write_text(json.dumps(values))
  start = time.process_time()
  with pytest.raises(
    ValueError, match=rf"tokenizer\.json: id {index} in a vocabulary of 257 tokens; the file is damaged"
  ):
    Tokenizer.load(tmp_path)
  assert time.process_time() - start < 2


def test_a_pattern_that_backtracks_for_ever_is_given_up(tmp_path):
  values = json.loads(byte_tokenizer().backend.to_str())
  values["pre_tokenizer"] = {"type": "Split", "pattern": {"Regex": "(a+)+$"}, "behavior": "Isolated", "invert": False}
  (tmp_path / "tokenizer.json").write_text(json.dumps(values))
  tokenizer = Tokenizer.load(tmp_path)
  assert len(tokenizer.encode("aaa")) == 3
  with pytest.raises(ValueError, match="the tokenizer fails on this text"):
    tokenizer.encode("a" * 2000 + "!")
