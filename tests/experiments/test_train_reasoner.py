"""The trainer of reasoners: default sizes, card, a stopped run that goes on, and its retrofits."""

from __future__ import annotations

import functools
import json
import re
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

import dms_jax
from dms_jax import checkpoint
from dms_jax import testing as tiny
from dms_jax.config import LoRAConfig, ModelConfig
from dms_jax.params import count_params, param_table
from dms_jax.retrofit import DataConfig, MemoryConfig, RetrofitConfig, ScheduleConfig, loop
from dms_jax.retrofit.loop import Run, train
from dms_jax.retrofit.packing import StreamPacker
from dms_jax.tokenizer import byte_tokenizer
from experiments import retrofit, train_reasoner
from experiments.tasks import get, reasoning
from experiments.tasks.base import TasksConfig

ROOT = Path(__file__).parents[2]


def test_default_settings_and_sizes():
  """7.2 M parameters, 16 x 4,096 tokens a step; a row holds the longest text that a sweep asks for."""
  tokenizer = reasoning.tokenizer()
  shape = train_reasoner.architecture(tokenizer, ModelConfig(**train_reasoner.SHAPE))
  assert shape.vocab_size == len(reasoning.VOCABULARY) and shape.eos_token_ids == tokenizer.eos_token_ids
  assert abs(count_params(param_table(shape)) - (7_131_200 + 320 * shape.vocab_size)) <= 1
  settings = RetrofitConfig(**train_reasoner.DEFAULTS)
  assert (settings.batch_size, settings.seq_len) == (16, 4096) and settings.objective == "lm"
  for family in train_reasoner.FAMILIES:
    prompts = get(family)().prompts(TasksConfig(limit=64), tokenizer, 0, 4096)
    assert max(len(prompt.tokens) for prompt in prompts) + get(family).new_tokens <= settings.seq_len


def test_a_shape_that_cannot_be_names_its_flag(monkeypatch):
  monkeypatch.setattr(train_reasoner.program, "read_flags", lambda prefix, cls: cls(d_ff=0))
  with pytest.raises(ValueError, match=r"^--model\.d_ff=0 must be 1 to"):
    train_reasoner.read_shape()


def test_a_start_that_cannot_be_is_refused(tmp_path, monkeypatch):
  monkeypatch.setattr(train_reasoner.program, "flag_values", lambda changed_only: {"model.d_ff": 8})
  with pytest.raises(ValueError, match=r"^--model\.d_ff: --checkpoint=there decides the shape"):
    train_reasoner.trained("there", reasoning.tokenizer())
  monkeypatch.setattr(train_reasoner.program, "flag_values", lambda changed_only: {})
  shape = ModelConfig(num_layers=1, d_model=16, d_ff=16, num_heads=2, num_kv_heads=1, head_dim=8, vocab_size=257)
  with pytest.raises(ValueError, match=r"--checkpoint=.*cr2 has gates; give a model without"):
    train_reasoner.trained(str(ROOT / "experiments/results/reasoner/cr2"), reasoning.tokenizer())
  checkpoint.save(tmp_path / "other", train_reasoner.untrained(shape, 0), tokenizer=byte_tokenizer())
  reading, reads = checkpoint.read_config, []
  monkeypatch.setattr(checkpoint, "read_config", lambda path: reads.append(path) or reading(path))
  with pytest.raises(ValueError, match=r"other reads other words than these problems"):
    train_reasoner.trained(str(tmp_path / "other"), reasoning.tokenizer())
  assert len(reads) == 1


def test_steps_that_cannot_be_are_refused():
  for each in (train_reasoner, retrofit):
    with pytest.raises(ValueError, match="--stop_after=-1 must be 0 or more"):
      each.Config(output="x", stop_after=-1)


@pytest.mark.standard_promotion  # optax
def test_the_card_and_the_log_of_a_checkpoint(tmp_path, monkeypatch):
  settings = RetrofitConfig(**{
    **train_reasoner.DEFAULTS, "batch_size": 2, "seq_len": 256, "schedule": ScheduleConfig(steps=5),
    "memory": MemoryConfig(compute_dtype="float32"),
  })  # fmt: skip
  step = jax.jit(loop.train_step.__wrapped__, static_argnames=("fading",), compiler_options=tiny.QUICK)
  monkeypatch.setattr(loop, "train_step", step)
  monkeypatch.setattr(train_reasoner, "LOG_LINES", 2)
  tokenizer, data = reasoning.tokenizer(), DataConfig(families=("countdown",), workers=0)
  shape = ModelConfig(num_layers=1, d_model=16, d_ff=16, num_heads=2, num_kv_heads=1, head_dim=8)
  base = train_reasoner.untrained(train_reasoner.architecture(tokenizer, shape), 0)
  run = Run(base, None, LoRAConfig(), settings, data, tmp_path)
  documents = functools.partial(reasoning.documents, data.families, longest=256)
  train(run, StreamPacker(documents, tokenizer, data, settings), tokenizer)
  monkeypatch.setattr(train_reasoner.program, "flag_values", lambda changed_only: {"output": "x"})
  train_reasoner.write_card(run, tokenizer)
  card = (tmp_path / "final" / "README.md").read_text()
  (left_out,) = re.findall(r"left out, longer than a row *\| *(\d+) ", card)
  lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
  assert int(left_out) == sum(line["left_out"] for line in lines) > 0
  assert "| 5 x 2 x 256 " in card and "| countdown " in card and "train_reasoner \\\n  --output=x" in card
  assert [json.loads(line)["step"] for line in (tmp_path / "final" / "log.jsonl").read_text().splitlines()] == [0, 2, 4]
  model, tokenizer = dms_jax.load(tmp_path / "final")
  assert model.config == run.base.config and tokenizer.vocab_size == model.config.vocab_size


def run(program: str, *flags: str) -> dict:
  """The last line of a program's output."""
  command = [sys.executable, "-m", f"experiments.{program}", *flags]
  done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
  assert done.returncode == 0, done.stderr
  return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.slow
def test_a_stopped_training_goes_on_and_is_retrofitted(tmp_path):
  flags = [
    "--data.families=countdown", "--retrofit.batch_size=2", "--retrofit.seq_len=256", "--model.num_layers=1",
    "--model.d_model=32", "--model.d_ff=32", "--model.num_heads=2", "--model.num_kv_heads=1", "--model.head_dim=16",
    "--retrofit.schedule.steps=8", "--retrofit.optimizer.warmup_steps=2", "--retrofit.memory.compute_dtype=float32",
  ]  # fmt: skip
  whole = run("train_reasoner", *flags, f"--output={tmp_path / 'whole'}", "--data.workers=0")
  assert run("train_reasoner", *flags, f"--output={tmp_path / 'two'}", "--stop_after=3")["last"]["step"] == 2
  assert not (tmp_path / "two" / "final").exists()
  with open(tmp_path / "two" / loop.LOG, "a", encoding="utf-8") as log:
    log.write('{"step": 3, "lo')  # a kill as it wrote
  again = run("train_reasoner", *flags, f"--output={tmp_path / 'two'}")
  number = lambda last: {name: value for name, value in last.items() if name != "seconds"}
  assert number(again["last"]) == number(whole["last"])
  base = tmp_path / "two" / "final"
  assert {p.name for p in base.iterdir()} >= {"config.json", "params", "tokenizer.json", "README.md", "log.jsonl"}
  runs = run(
    "retrofit", f"--checkpoint={base}", f"--output={tmp_path}", "--crs=2,3", "--data.families=countdown",
    "--dms.window=4",
    "--retrofit.trainable=all", "--retrofit.loss.kind=forward_kl", "--retrofit.batch_size=2", "--retrofit.seq_len=256",
    "--retrofit.schedule.steps_per_cr=2", "--retrofit.schedule.steps=0", "--retrofit.schedule.hold_steps=1",
    "--retrofit.optimizer.decay_steps=3", "--retrofit.saving.snapshots=false",
  )["runs"]  # fmt: skip
  assert {name: (last["step"], last["target_cr"]) for name, last in runs.items()} == {"cr2": (5, 2.0), "cr3": (7, 3.0)}
  assert runs["cr3"]["filled"] > 0.8
  model, tokenizer = dms_jax.load(tmp_path / "cr3" / "final")
  assert model.dms.window == 4 and np.isfinite(model.params["embed"].astype("float32")).all()
  further = [flag for flag in flags if not flag.startswith("--model.")]
  longer = run(
    "train_reasoner", *further, f"--checkpoint={base}", "--retrofit.seq_len=512", f"--output={tmp_path / 'longer'}",
    "--data.workers=0",
  )["last"]  # fmt: skip
  assert longer["nll"] < whole["last"]["nll"] + 0.1 and longer["tokens"] == 2 * whole["last"]["tokens"]
  assert f"from the weights of `{base}`" in (tmp_path / "longer" / "final" / "README.md").read_text()
  assert tokenizer.encode("countdown") and (tmp_path / "cr2" / "final").exists()
  assert not (tmp_path / "cr3" / "cr2").exists()
