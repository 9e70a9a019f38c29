"""Tools of the training program: FLOPs, the step benchmark, plots of a log, signals, TensorBoard."""

from __future__ import annotations

import json
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dms_jax import testing as tiny
from dms_jax.config import DMSConfig, LoRAConfig
from dms_jax.families import PRESETS
from dms_jax.model import forward, unembed
from dms_jax.retrofit import MemoryConfig, RetrofitConfig
from dms_jax.retrofit.cost import peak_flops, step_flops
from experiments import retrofit
from experiments.bench import retrofit_step as retrofit_benchmark
from experiments.reports import plots
from tests.helpers import changed

ALL = RetrofitConfig(trainable="all", batch_size=2, seq_len=4096)


def test_flops_of_a_known_model():
  """Llama-3.2-1B by hand: 1,235,814,400 parameters, 67,584 of them in norms, the embedding being the head."""
  n, attention = 1_235_814_400 - 67_584, 2 * 4096 * 32 * 64 * 16
  gates = 16 * 8 * 2048
  config, tokens = PRESETS["llama-3.2-1b"], 2 * 4096
  flops = step_flops(config, DMSConfig(), None, ALL)
  assert flops.tokens == tokens
  assert flops.student == tokens * (6 * n + 6 * gates + 3 * attention)
  assert flops.teacher == tokens * (2 * n + attention) and flops.total == flops.student + flops.teacher
  frozen = step_flops(config, DMSConfig(), None, changed(ALL, trainable="gates"))
  assert flops.student - frozen.student == tokens * 2 * n  # no gradient of frozen weights
  assert step_flops(config, DMSConfig("neuron"), None, changed(ALL, loss__kind="lm")).teacher == 0
  assert step_flops(PRESETS["qwen3-8b"], DMSConfig("neuron"), None, ALL).student > flops.student
  rank = step_flops(config, DMSConfig(), LoRAConfig(1), changed(ALL, trainable="lora"))
  updates = 16 * (2048 + 2048 + 2 * (2048 + 512) + 2048 + 2048)
  assert rank.student - frozen.student == tokens * 6 * updates


def test_flops_agree_with_the_compiler():
  """XLA's own count of a forward pass, whose attention here is not halved by causality; within 10 %."""
  cfg = tiny.config(num_layers=1, d_model=64, d_ff=256, num_heads=4, num_kv_heads=2, head_dim=16, vocab_size=512)
  retro = RetrofitConfig(trainable="all", batch_size=1, seq_len=64)
  run = jax.jit(lambda m, t: unembed(m, forward(m, t)[0]))
  counted = run.lower(tiny.model(cfg), jnp.zeros((1, 64), jnp.int32)).compile().cost_analysis()
  counted = (counted[0] if isinstance(counted, list) else counted)["flops"]
  assert counted == pytest.approx(step_flops(cfg, DMSConfig("neuron"), None, retro).teacher, rel=0.1)


def test_peaks():
  assert peak_flops("NVIDIA H100 80GB HBM3", "bfloat16") == 989.4e12
  assert peak_flops("NVIDIA H100 80GB HBM3", "float32") is None and peak_flops("cpu", "bfloat16") is None


@pytest.mark.standard_promotion  # optax
def test_benchmark(monkeypatch):
  config = RetrofitConfig(seq_len=16, batch_size=2, memory=MemoryConfig(compute_dtype="float32", loss_chunk=16))
  cfg = tiny.config(num_layers=1, d_model=16, d_ff=16, head_dim=8, vocab_size=31)
  step = retrofit_benchmark.train_step.__wrapped__
  quick = jax.jit(step, static_argnames=("config", "fading"), compiler_options=tiny.QUICK)
  monkeypatch.setattr(retrofit_benchmark, "train_step", quick)
  result = retrofit_benchmark.benchmark(cfg, DMSConfig(window=3), LoRAConfig(2), config, 2)
  assert result["utilisation"] is None and len(result["step_seconds_all"]) == 2
  assert result["tokens_per_second"] == pytest.approx(32 / result["step_seconds"])
  assert result["flops"]["student"] > result["flops"]["teacher"] > 0
  table = retrofit_benchmark.table("tiny", config, result)
  assert "utilisation             not known" in table and "tiny, lora trained" in table
  monkeypatch.setattr(retrofit_benchmark, "peak_flops", lambda kind, dtype: 1e9)
  known = retrofit_benchmark.benchmark(cfg, DMSConfig(window=3), LoRAConfig(2), config, 1)
  assert (
    known["utilisation"] == pytest.approx(sum(known["flops"].values()) / known["step_seconds"] / 1e9)
    and known["utilisation"] > known["utilisation_student"]
  )
  found = {"flex": {"tokens_per_second": known["tokens_per_second"] / 4}, "flex_blocks": {"skipped": "no GPU"}}
  table = retrofit_benchmark.table("tiny", config, known | found)
  assert "ours 4.0x" in table and "tokens/s, flex_blocks   no GPU" in table
  with pytest.raises(ValueError, match=r"against_flex.*adapter gates"):
    retrofit_benchmark.flex_steps(cfg, DMSConfig("neuron"), LoRAConfig(2), config, 1)
  with pytest.raises(ValueError, match=r"benchmark_steps=0"):
    retrofit_benchmark.benchmark(cfg, DMSConfig(), LoRAConfig(2), config, 0)
  with pytest.raises(ValueError, match=r"--preset='gpt-5' is not one of \['gemma"):
    retrofit_benchmark.preset("gpt-5")


@pytest.mark.standard_promotion  # optax
@pytest.mark.parametrize("objective", ["trimkv", "dmc"])
def test_benchmark_of_another_objective(objective):
  memory = MemoryConfig(compute_dtype="float32", loss_chunk=16)
  config = RetrofitConfig(objective=objective, trainable="gates", seq_len=16, batch_size=2, memory=memory)
  cfg = tiny.config(num_layers=1, d_model=16, d_ff=16, head_dim=8, vocab_size=31)
  result = retrofit_benchmark.benchmark(cfg, DMSConfig(objective=objective, window=3), LoRAConfig(), config, 1)
  assert np.isfinite(result["loss"]) and result["step_seconds"] > 0


DMS_LINE = {"target_cr": 2.0, "achieved_cr": 1.0, "gate_rate": 0.5, "compression_loss": 0.1}
KVZAP_LINE = {"loss": 3.0, "mse": 3.0, "explained": -4.0, "score": -9.0, "threshold_cr2": -8.0, "grad_norm": 1.0}


@pytest.mark.parametrize(
  ("lines", "titles"),
  [
    ([{"kl": 0.1, **DMS_LINE}] * 3, ["loss", "compression", "gates"]),
    ([{"nll": 0.0, **DMS_LINE}, {"nll": None, **DMS_LINE, "achieved_cr": None}], ["loss", "compression", "gates"]),
    ([KVZAP_LINE] * 2, ["loss", "gates"]),
    ([{"kl": 0.1, "nll": 2.0, "capacity_loss": 3.0, "retention": 0.9}] * 2, ["loss", "gates"]),
    ([{"loss": 0.1}], []), ([], []),
  ],
)  # fmt: skip
@pytest.mark.parametrize("heads", [False, True])
def test_picture_of_a_log(tmp_path, monkeypatch, lines, titles, heads):
  """Only what the objective logs is drawn: with and without heads, and with a diverged step."""
  plt = pytest.importorskip("matplotlib.pyplot")
  rates = {"gate_rates": [[0.1, 0.9], [0.5, 0.5], [0.2, 1.0]]} if heads else {}
  (tmp_path / "log.jsonl").write_text(
    "".join(json.dumps({"step": i, **line, **rates}) + "\n" for i, line in enumerate(lines))
  )
  drawn = []
  monkeypatch.setattr(plt, "close", drawn.append)
  picture = tmp_path / "log.png"
  assert plots.training(picture, tmp_path / "log.jsonl") == (str(picture) if titles else None)
  if titles:
    axes = [axis for axis in drawn[0].axes if axis.lines]
    assert [axis.get_title() for axis in axes] == titles and all(axis.get_legend() for axis in axes)
    assert all(np.isfinite(line.get_ydata()).any() for axis in axes for line in axis.lines)
    assert len(drawn[0].axes) == len(titles) + 3 * heads  # two maps and their scale
    assert picture.read_bytes()[:4] == b"\x89PNG" and len(list(tmp_path.iterdir())) == 2
    monkeypatch.undo()
    plt.close(drawn[0])


def test_tensorboard_gets_the_numbers_and_forgets_what_an_interrupted_run_wrote_beyond(monkeypatch, tmp_path):
  written = []

  class SummaryWriter:
    def __init__(self, folder, purge_step):
      written.append((folder, purge_step))

    def add_scalar(self, *args):
      written.append(args)

    def flush(self):
      pass

  monkeypatch.setitem(sys.modules, "tensorboardX", types.SimpleNamespace(SummaryWriter=SummaryWriter))
  write = retrofit.scalars(tmp_path)
  write({"step": 3, "loss": 0.5, "kl": None, "gate_rates": [[0.5]]})
  write({"step": 4, "loss": 0.25})
  assert written == [(str(tmp_path), 3), ("loss", 0.5, 3), ("loss", 0.25, 4)]
