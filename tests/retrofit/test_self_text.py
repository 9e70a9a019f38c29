"""Text that the model writes itself: sources, resumption, training on nothing else."""

from __future__ import annotations

import json

import pytest
import tokenizers

from dms_jax import testing as tiny
from dms_jax.retrofit import DataConfig, SelfTextConfig, self_text
from dms_jax.retrofit.data import load_sources
from dms_jax.tokenizer import Tokenizer, byte_tokenizer


def words(vocabulary: dict[str, int]) -> Tokenizer:
  return Tokenizer(tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="<unk>")))


TEMPLATE = (
  "{% for m in messages %}<{{ m.role }}>{{ m.content }}<eos>{% endfor %}"
  "{% if add_generation_prompt %}<assistant>{% endif %}"
)


@pytest.fixture(scope="module")
def writer():
  """(model, tokenizer with a chat template)."""
  tokenizer = byte_tokenizer()
  tokenizer.settings["chat_template"] = TEMPLATE
  return tiny.model(tiny.config(num_layers=1, d_model=16, d_ff=16, vocab_size=257)), tokenizer


def test_prompts_of_every_source(tmp_path, writer):
  tokenizer = writer[1]
  (tmp_path / "text.txt").write_text("abcdefghij" * 5)
  records = [
    {"question": "why?"},
    {"messages": [{"role": "user", "content": "how?"}, {"role": "assistant", "content": "so"}]},
  ]
  (tmp_path / "chats.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
  texts, chats = str(tmp_path / "text.txt"), str(tmp_path / "chats.jsonl")
  both = self_text.prompts(SelfTextConfig(5, prefixes=texts, questions=chats, prefix_tokens=8), tokenizer)
  assert [len(row) for row in both[:3]] == [8] * 3 and all(bytes(row).decode() in "abcdefghij" * 5 for row in both[:3])
  assert {tokenizer.decode(row, skip_special=False) for row in both[3:]} <= {
    "<user>why?<eos><assistant>",
    "<user>how?<eos><assistant>",
  }
  assert self_text.prompts(SelfTextConfig(3), tokenizer) == ["free", "ask", "free"]
  assert self_text.prompts(SelfTextConfig(2), byte_tokenizer()) == ["free", "free"]  # no template
  assert self_text.user_opening(tokenizer) == "<user>"
  started = self_text.prompts(SelfTextConfig(4, start_tokens=3), tokenizer)
  assert [row if isinstance(row, str) else len(row) for row in started] == [3, "ask", 3, "ask"]
  assert started[0] != started[2] and not {*started[0], *started[2]} & tokenizer.hidden_ids
  assert started == self_text.prompts(SelfTextConfig(4, start_tokens=3), tokenizer)
  assert self_text.whole_words(words({"a": 0, "b": 5, "<unk>": 9})) == [0, 5, 9]  # ids without a token
  with pytest.raises(ValueError, match=r"start_tokens: the tokenizer has no token that is a text by itself"):
    self_text.whole_words(words({"": 0}))
  with pytest.raises(ValueError, match=r"self_text\.start_tokens=3: rows start with prefixes"):
    SelfTextConfig(4, start_tokens=3, questions=chats)


def test_starts_that_are_too_long_leave_nothing(tmp_path):
  model = tiny.model(tiny.config(vocab_size=257, max_position_embeddings=16))
  for tokens, new, needed in ((9, 9, 17), (0, 17, 17)):  # without a start a row has one token
    config = SelfTextConfig(2, start_tokens=tokens, max_new_tokens=new)
    what = f"self_text: rows that start with {tokens or 1} tokens, and max_new_tokens={new}, need {needed} positions"
    with pytest.raises(ValueError, match=what):
      self_text.write(model, byte_tokenizer(), config, tmp_path / "x.jsonl")
  assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
  "fields, content, message",
  [
    ({"prefixes": "x"}, "short", "5 tokens, no more than one prefix"),
    ({"questions": "x"}, '{"title": 1}', "line 1: neither a list `messages` nor a text `question`"),
    ({"questions": "x"}, '{"ti', "line 1: not valid JSON"),
    ({"questions": "x"}, "", "is empty"),
    ({"questions": "x"}, None, "no such file"),
  ],
)
def test_bad_sources_are_named(tmp_path, writer, fields, content, message):
  path = tmp_path / "source"
  if content is not None:
    path.write_text(content)
  with pytest.raises(ValueError, match=message):
    self_text.prompts(SelfTextConfig(2, **dict.fromkeys(fields, str(path))), writer[1])


def test_an_interrupted_writer_goes_on_and_leaves_nothing_behind(tmp_path, writer, monkeypatch):
  """A failure between batches keeps the finished ones; the file equals that of an undisturbed call."""
  model, tokenizer = writer
  config = SelfTextConfig(6, max_new_tokens=12, batch=2)
  sampled = self_text.write(model, tokenizer, config, tmp_path / "whole.jsonl")
  text = (tmp_path / "whole.jsonl").read_text()
  assert len(text.splitlines()) == 6 and 0 < sampled <= 6 * 12 + 3 * 12
  assert json.loads(text.splitlines()[1])["text"].startswith("<user>")

  sample, calls = self_text._sample, []

  def failing(*args):
    calls.append(args)
    if len(calls) == 2:
      raise KeyboardInterrupt
    return sample(*args)

  path = tmp_path / "again.jsonl"
  monkeypatch.setattr(self_text, "_sample", failing)
  with pytest.raises(KeyboardInterrupt):
    self_text.write(model, tokenizer, config, path)
  assert not path.exists() and len(list((tmp_path / "again.jsonl.rows").glob("0*.jsonl"))) == 1
  with pytest.raises(ValueError, match="rows of other settings"):
    self_text.write(model, tokenizer, SelfTextConfig(6, max_new_tokens=12, batch=2, seed=1), path)
  assert self_text.write(model, tokenizer, config, path) == sampled
  assert path.read_text() == text and len(calls) == 4
  assert {p.name for p in tmp_path.iterdir()} == {"whole.jsonl", "again.jsonl"}

  sources = load_sources(DataConfig(self_text=config), tokenizer, {"self_text": path})
  assert [(s.name, int(s.document[-1])) for s in sources] == [("self_text", 6)]


def test_data_settings_that_do_not_fit():
  with pytest.raises(ValueError, match=r"data\.paths is empty.*self_text"):
    load_sources(DataConfig(), byte_tokenizer())
  with pytest.raises(ValueError, match=r"data\.weights has 1 numbers for 2 paths"):
    DataConfig(("a",), (1.0,), self_text=SelfTextConfig(4))
  for wrong in ({"rows": -1}, {"temperature": 0.0}, {"top_p": 1.5}, {"batch": 0}, {"max_new_tokens": 0}):
    with pytest.raises(ValueError, match=f"self_text.{next(iter(wrong))}"):
      SelfTextConfig(**wrong)
