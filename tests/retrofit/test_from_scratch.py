"""Training from scratch: masked loss, resumption, a loss that falls, a checkpoint that generates."""

from __future__ import annotations

import dataclasses
import json
import random

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tokenizers
from tokenizers import models, pre_tokenizers, processors

import dms_jax
from dms_jax import checkpoint
from dms_jax import testing as tiny
from dms_jax.config import LoRAConfig, ModelConfig
from dms_jax.layers import look_up
from dms_jax.model import Model, forward, unembed
from dms_jax.params import init_params, param_table
from dms_jax.retrofit import (
  DataConfig,
  LossConfig,
  MemoryConfig,
  OptimizerConfig,
  RetrofitConfig,
  SavingConfig,
  ScheduleConfig,
  loop,
)
from dms_jax.retrofit.config import check
from dms_jax.retrofit.loop import Run, train
from dms_jax.retrofit.packing import StreamPacker
from dms_jax.retrofit.step import lm_loss
from dms_jax.tokenizer import Tokenizer
from tests.helpers import changed

pytestmark = pytest.mark.standard_promotion  # optax

WORDS = ("<eos>", "<bos>", *map(str, range(10)), "?", "is")
CONFIG = RetrofitConfig(
  objective="lm",
  trainable="all",
  batch_size=4,
  seq_len=48,
  schedule=ScheduleConfig(steps=40),
  optimizer=OptimizerConfig(1e-2, 4, -1, 0.03, beta2=0.98, weight_decay=0.1),
  loss=LossConfig("lm"),
  memory=MemoryConfig(compute_dtype="float32", loss_chunk=64),
  saving=SavingConfig(save_every=15),
)
DATA = DataConfig(families=("echo",), workers=0)


def echo(seed: int, start: int, count: int):
  """A prompt of digits, whose trace repeats them."""
  for number in range(start, start + count):
    rng = random.Random(f"{seed} {number}")
    digits = " ".join(str(rng.randrange(10)) for _ in range(rng.randint(1, 4)))
    yield f"{digits} ?", f"is {digits} <eos>"


def words() -> Tokenizer:
  backend = tokenizers.Tokenizer(models.WordLevel({w: i for i, w in enumerate(WORDS)}, unk_token="<eos>"))
  backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
  backend.add_special_tokens(["<eos>", "<bos>"])
  start = ("<bos>", WORDS.index("<bos>"))
  backend.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[start])
  return Tokenizer(backend, {"eos_token": "<eos>", "bos_token": "<bos>"})


def model() -> Model:
  config = ModelConfig(
    num_layers=2, d_model=32, d_ff=48, num_heads=4, num_kv_heads=2, head_dim=16, vocab_size=len(WORDS),
    eos_token_ids=words().eos_token_ids,
  )  # fmt: skip
  return Model(init_params(param_table(config), jax.random.key(3)), config)


def a_run(directory, **overrides) -> tuple[Run, StreamPacker]:
  config = changed(CONFIG, **overrides)
  run = Run(model(), None, LoRAConfig(), config, DATA, directory)
  return run, StreamPacker(echo, words(), DATA, config)


def log(directory) -> list[dict]:
  lines = [json.loads(line) for line in (directory / loop.LOG).read_text().splitlines()]
  return [{k: v for k, v in line.items() if k != "seconds"} for line in lines]


@pytest.fixture(autouse=True, scope="module")
def quick():
  """The same step, compiled faster."""
  step = jax.jit(loop.train_step.__wrapped__, static_argnames=("fading",), compiler_options=tiny.QUICK)
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(loop, "train_step", step)
    yield


@pytest.fixture(scope="module")
def whole(tmp_path_factory, quick):
  directory = tmp_path_factory.mktemp("whole")
  with jax.numpy_dtype_promotion("standard"):
    train(*a_run(directory), words())
  return directory


def test_the_loss_counts_traces_alone():
  """Against numpy, float64: -log p of every token of the mask, given its document; the end word counts too."""
  run, packer = a_run("unused")
  batch = jax.tree.map(jnp.asarray, packer.batch(2))
  assert 0 < batch.loss_mask.sum() < (batch.segment_ids > 0).sum()
  loss, metrics = jax.jit(lm_loss, compiler_options=tiny.QUICK)(run.base, batch, run.config)
  logits = np.asarray(unembed(run.base, forward(run.base, batch.tokens, segment_ids=batch.segment_ids)[0]), np.float64)
  logp = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
  batch, surprises, ends = jax.tree.map(np.asarray, batch), [], 0
  for b, t in np.argwhere(batch.loss_mask):
    assert batch.segment_ids[b, t] == batch.segment_ids[b, t - 1] > 0  # a prompt comes before
    surprises.append(-logp[b, t - 1, batch.tokens[b, t]])
    ends += batch.tokens[b, t] == 0
  assert ends == sum(row.max() for row in batch.segment_ids)
  np.testing.assert_allclose(loss, np.mean(surprises), rtol=1e-5)
  assert set(metrics) == {"nll"}


@pytest.mark.parametrize("few", [0, 1024])
def test_gradient_of_the_embedding(few, monkeypatch):
  """By a matrix product and by a scatter: the sum of each token's gradients."""
  monkeypatch.setattr("dms_jax.layers.FEW_WORDS", few)
  rng = np.random.default_rng(0)
  tokens, out = rng.integers(0, 7, (3, 20)), rng.normal(size=(3, 20, 5))
  table = jnp.asarray(rng.normal(size=(7, 5)), jnp.float32)
  found, pull = jax.vjp(lambda table: look_up(table, jnp.asarray(tokens, jnp.int32)), table)
  expected = np.zeros((7, 5))
  np.add.at(expected, tokens, out)
  np.testing.assert_array_equal(found, np.asarray(table)[tokens])
  np.testing.assert_allclose(pull(jnp.asarray(out, jnp.float32))[0], expected, rtol=1e-5, atol=1e-5)


def test_the_loss_falls(whole):
  lines = log(whole)
  assert [line["step"] for line in lines] == list(range(40))
  first, last = (np.mean([line["nll"] for line in part]) for part in (lines[:3], lines[-3:]))
  assert first == pytest.approx(np.log(len(WORDS)), rel=0.1) and last < 0.75 * first
  assert all(line["filled"] > 0.8 and line["left_out"] == 0 for line in lines)
  assert lines[0]["learning_rate"] == pytest.approx(1e-2 / 4) and lines[-1]["learning_rate"] < 0.06 * 1e-2
  assert not {"target_cr", "gate_rate", "compression_loss"} & set(lines[-1])
  assert {p.name for p in whole.iterdir()} >= {"run.json", "log.jsonl", "state", "final"}
  assert not list(whole.glob("cr*"))


def test_a_stopped_run_goes_on_with_the_same_numbers(whole, tmp_path):
  train(*a_run(tmp_path), words(), stop_after=22)
  (tmp_path / "state" / "22").rename(tmp_path / "lost")  # as if killed before it was written: from step 15 on
  run, packer = a_run(tmp_path)
  more_workers = dataclasses.replace(run, data=dataclasses.replace(DATA, workers=3))  # of data, not of this packer
  train(more_workers, packer, words())
  assert log(tmp_path) == log(whole)
  got, want = (checkpoint.load(directory / "final").params for directory in (tmp_path, whole))
  jax.tree.map(np.testing.assert_array_equal, got, want)
  with pytest.raises(ValueError, match=r"dms\.|retrofit\.seed: 0 there, 1 now"):
    train(*a_run(tmp_path, seed=1), words())


def test_the_checkpoint_loads_and_generates(whole, tmp_path):
  loaded, tokenizer = dms_jax.load(whole / "final")
  assert loaded.dms is None and tokenizer.encode("3 ?") == [1, 5, 12]
  out = dms_jax.generate(loaded, ["3 4 ?"], max_new_tokens=6)
  written = out.text[0].split()
  assert written[0] == "is" and set(written) <= set(WORDS)
  checkpoint.save(tmp_path / "bare", loaded.stacked())
  bare, nothing = dms_jax.load(tmp_path / "bare")
  assert nothing is None and bare.tokenizer is None
  again = dms_jax.generate(bare, [[1, 5, 6, 12]], max_new_tokens=6)
  np.testing.assert_array_equal(again.tokens[0], out.tokens[0])
  with pytest.raises(ValueError, match=r"strings need a tokenizer, and this model brings none"):
    dms_jax.generate(bare, ["3 ?"], max_new_tokens=2)


def test_a_model_without_gates_has_one_objective():
  check(None, LoRAConfig(), CONFIG)
  for wrong in ({"objective": "dms"}, {"trainable": "lora"}, {"loss__kind": "reverse_kl"}):
    with pytest.raises(ValueError, match=f"not with retrofit.{next(iter(wrong)).replace('__', '.')}="):
      check(None, LoRAConfig(), changed(CONFIG, **wrong))
  with pytest.raises(ValueError, match="not with gates"):
    check(tiny.dms(), LoRAConfig(), CONFIG)


def test_words_have_their_space():
  """Words are joined by spaces when decoded, so stop strings are found across words."""
  tokenizer = words()
  pieces = tokenizer.token_bytes()
  assert pieces[:3] == [b"<eos>", b"<bos>", b" 0"]
  ids = tokenizer.encode("3 ? is 3")
  assert b"".join(pieces[i] for i in ids[1:]).decode() == " " + tokenizer.decode(ids)
