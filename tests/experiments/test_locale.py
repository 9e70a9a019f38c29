"""Programs under LC_ALL=C: UTF-8 texts, requests, tokenizers and paths give the same results."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import tokenizers

import dms_jax
from tests.experiments import processes

pytestmark = [pytest.mark.slow, pytest.mark.timeout(0)]
# Without the last two, Python reads UTF-8 there, too.
C = {"LC_ALL": "C", "LANG": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
UTF_8 = {"LC_ALL": "C.UTF-8", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
WORDS = "Straße ☃ 漢字 naïve 🙂 Ω ŝ — „ja“".split()


@pytest.fixture(scope="module")
def inputs(tmp_path_factory) -> Path:
  """Inputs whose folder, text, prompts and tokens are no ASCII."""
  folder = tmp_path_factory.mktemp("locale") / "Größe ☃"
  folder.mkdir()
  processes.save_inputs(folder)
  text = " ".join(f"{WORDS[i % 9]} {WORDS[i * i % 7]} {i % 10}" for i in range(2000))
  (folder / "text.txt").write_text(text, encoding="utf-8")
  requests = [{"prompt": f"{word} {i}", "max_new_tokens": 12} for i, word in enumerate(WORDS)]
  lines = "".join(json.dumps(each, ensure_ascii=False) + "\n" for each in requests)
  (folder / "requests.jsonl").write_text(lines, encoding="utf-8")
  # Tokens are characters themselves, as in a tokenizer of SentencePiece; those of a byte-level one are ASCII's size.
  made = tokenizers.Tokenizer(tokenizers.models.BPE(unk_token="<unk>"))
  made.train_from_iterator([text], tokenizers.trainers.BpeTrainer(vocab_size=200, special_tokens=["<unk>", "<ende☃>"]))
  made.save(str(folder / "base" / "tokenizer.json"))
  assert not (folder / "base" / "tokenizer.json").read_bytes().isascii()
  return folder


@pytest.mark.parametrize("name", ["retrofit", "generate", "evaluate"])
def test_the_same_results_as_under_utf_8(inputs, tmp_path, name):
  kind = ".jsonl" if processes.is_file(name) else ""
  expected, _, _ = processes.whole_run(name, inputs, tmp_path / f"größe☃{kind}", **UTF_8)
  output = tmp_path / f"straße☃{kind}"
  processes.whole_run(name, inputs, output, **C)
  processes.same(output, expected)
  if name == "retrofit":
    _, tokenizer = dms_jax.load(inputs / "base", retrofit=output / "final")
    assert tokenizer.decode(tokenizer.encode("Straße ☃ 漢字"))
