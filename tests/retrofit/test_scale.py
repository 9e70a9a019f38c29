"""A retrofit on eight simulated devices and in two processes: losses and memory."""

from __future__ import annotations

import json
import math
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dms_jax import checkpoint
from dms_jax import testing as tiny
from dms_jax.config import DMSConfig, LoRAConfig
from dms_jax.families import PRESETS
from dms_jax.model import Model
from dms_jax.params import abstract_params, param_table
from dms_jax.retrofit import RetrofitConfig
from dms_jax.retrofit.distributed import MeshConfig, create_mesh
from dms_jax.retrofit.loop import prepare
from dms_jax.retrofit.step import init_state
from dms_jax.sharding import tree_shardings
from dms_jax.tokenizer import byte_tokenizer
from tests.programs import finished, meeting, on_devices

ROOT = Path(__file__).parents[2]
# Sums over rows, vocabulary and width are taken in another order. Float32 rounding is 1e-7 of a loss, and grows to 2e-5
# of a gradient's norm after four steps, because AdamW divides small gradients by equally small moments.
TOLERANCE = dict(rtol=1e-3, atol=1e-6)

RETROFIT = """
import dataclasses, json, sys
from pathlib import Path
import jax, numpy as np
from dms_jax.config import LoRAConfig
from dms_jax.retrofit import (
  DataConfig, MemoryConfig, OptimizerConfig, RetrofitConfig, SavingConfig, ScheduleConfig, distributed, loop,
)
from dms_jax.retrofit.data import Packer, Source
from dms_jax.sharding import make_mesh
from dms_jax import testing as tiny

assert jax.device_count() == 8
folder, trainable = Path(sys.argv[1]), sys.argv[2]
config = RetrofitConfig(
  trainable=trainable, batch_size=16, microbatches=2, seq_len=16,
  schedule=ScheduleConfig(steps=4, initial_cr=1.5, final_cr=2.0, steps_per_cr=8),
  optimizer=OptimizerConfig(warmup_steps=0, learning_rate=1e-2),
  memory=MemoryConfig(compute_dtype="float32", remat=True, loss_chunk=16, vocab_chunk=32),
  saving=SavingConfig(save_every=2, ema_decay=0.9),
)
tokens = np.random.default_rng(0).integers(0, 128, 300).astype(np.int32)
data = DataConfig(paths=("text",))
packer = Packer([Source("text", tokens, 1 + np.arange(300, dtype=np.int32) // 40)], data, config)
base = tiny.model(tiny.config(num_layers=2, d_model=32, d_ff=32, head_dim=8, vocab_size=128))
dms = tiny.dms(window=3, scale=10.0, offset=1.0)
quick = jax.jit(
  loop.train_step.__wrapped__, static_argnames=("config", "fading"), donate_argnames=("state",),
  compiler_options=tiny.QUICK,
)
sizes = {}

def step(state, student, teacher, batch, *rest):
  # Nothing is replicated that could be sharded: bytes of the step's arguments on each device, as compiled.
  mesh = jax.sharding.get_abstract_mesh()
  if (which := tuple(mesh.shape.values())) not in sizes:
    whole = sum(x.nbytes for x in jax.tree.leaves((state, student, teacher, batch)))
    compiled = quick.lower(state, student, teacher, batch, *rest).compile()
    sizes[which] = compiled.memory_analysis().argument_size_in_bytes * mesh.size / whole
  return quick(state, student, teacher, batch, *rest)

loop.train_step = step

def train(name, mesh, **kwargs):
  run = loop.Run(base, dms, LoRAConfig(rank=8), config, data, folder / name)
  with jax.numpy_dtype_promotion("standard"):
    loop.train(run, packer, mesh=mesh, **kwargs)
  return [json.loads(line) for line in (folder / name / "log.jsonl").read_text().splitlines()]

one = train("one", None)
train("mesh", make_mesh(data=4, tensor=2), stop_after=2)
many = train("mesh", make_mesh(data=8))  # resumes on another mesh
assert [line["step"] for line in many] == [0, 1, 2, 3]
for a, b in zip(one, many, strict=True):
  for name in ("loss", "kl", "compression_loss", "grad_norm", "gate_rate", "achieved_cr", "target_cr"):
    np.testing.assert_allclose(b[name], a[name], rtol=1e-4, atol=1e-6, err_msg=f"{name}, step {a['step']}")
# Vectors are split over "data" only; scalars and the key are replicated.
assert sizes[4, 2] < 1.1 and sizes[8, 1] < 1.01, sizes
print("equal")
"""

BENCHMARK = """
from dms_jax.config import LoRAConfig
from dms_jax.retrofit import MemoryConfig, RetrofitConfig
from dms_jax.sharding import make_mesh
from experiments.bench import retrofit_step as retrofit_benchmark
from dms_jax import testing as tiny
settings = RetrofitConfig(trainable="all", batch_size=4, seq_len=16, memory=MemoryConfig(compute_dtype="float32"))
run = lambda mesh: retrofit_benchmark.benchmark(tiny.config(), tiny.dms(), LoRAConfig(), settings, 2, mesh)
result = run(make_mesh(data=2, tensor=2))
assert result["devices"] == 4 and result["one_device"]["devices"] == 1
rate = result["tokens_per_second"] / 4 / result["one_device"]["tokens_per_second"]
assert result["scaling_efficiency"] == rate
assert "scaling efficiency" in retrofit_benchmark.table("tiny", settings, result)
assert "one_device" not in run(make_mesh())
print("equal")
"""


def on_eight_devices(program: str, *args) -> None:
  done = subprocess.run(
    [sys.executable, "-c", program, *map(str, args)], cwd=ROOT, env=on_devices(8), capture_output=True, text=True,
    timeout=500,
  )  # fmt: skip
  assert done.returncode == 0 and "equal" in done.stdout, done.stderr


@pytest.mark.parametrize("trainable", ["all", pytest.param("lora", marks=pytest.mark.slow)])
def test_eight_devices_train_as_one_and_resume_on_another_mesh(tmp_path, trainable):
  on_eight_devices(RETROFIT, tmp_path, trainable)


@pytest.mark.slow
def test_benchmark_compares_a_mesh_with_one_device():
  on_eight_devices(BENCHMARK)


@pytest.mark.parametrize("data, tensor", [(8, 1), (4, 2), (2, 4)])
@pytest.mark.parametrize("trainable", ["all", "lora"])
@pytest.mark.parametrize("preset", ["smollm2-135m", "llama-3.1-8b", "qwen3-8b"])
def test_real_models_are_split_into_eighths(preset, trainable, data, tensor):
  """Weights, their moments and the teacher: each device holds an eighth, within 1 % for vectors and scalars."""
  config, dms, lora = RetrofitConfig(trainable=trainable), DMSConfig(), LoRAConfig(rank=16)
  base = Model(abstract_params(param_table(PRESETS[preset]), jnp.bfloat16), PRESETS[preset])
  student, teacher, trained = jax.eval_shape(partial(prepare, dms=dms, lora=lora, config=config), base)
  tree = jax.eval_shape(partial(init_state, config), trained), student, teacher
  mesh = jax.sharding.AbstractMesh((data, tensor), ("data", "tensor"))
  places = jax.tree.leaves(tree_shardings(tree, mesh, param_table(student.config, student.dms, student.lora)))
  size = lambda x, shape: math.prod(shape) * x.dtype.itemsize
  leaves = jax.tree.leaves(tree)
  whole = sum(size(x, x.shape) for x in leaves)
  part = sum(size(x, place.shard_shape(x.shape)) for x, place in zip(leaves, places, strict=True))
  assert whole / 8 <= part < 1.01 * whole / 8


@pytest.mark.parametrize(
  "flags, message",
  [
    (dict(data=0), "mesh.data=0 must be at least 1"),
    (dict(processes=2), "mesh.processes without a mesh.coordinator"),
    (dict(coordinator="auto", process=0), "mesh.process without a mesh.coordinator"),
    (dict(coordinator="here"), "mesh.coordinator='here' is neither host:port nor 'auto'"),
    (dict(coordinator="here:1"), "needs mesh.processes"),
    (dict(coordinator="here:1", processes=2, process=2), "mesh.process=2 must lie between 0 and mesh.processes=2"),
  ],
)
def test_flags_that_do_not_go_together(flags, message):
  with pytest.raises(ValueError, match=message):
    MeshConfig(**flags)


def test_rows_and_devices_that_do_not_fit_name_their_flags(monkeypatch):
  with pytest.raises(ValueError, match=r"mesh.data=64 x mesh.tensor=2 needs 128 devices; there are \d+"):
    create_mesh(MeshConfig(data=64, tensor=2), RetrofitConfig(batch_size=64))
  monkeypatch.setattr(jax, "devices", lambda: list(np.repeat(np.array(jax.local_devices()[:1]), 4)))
  with pytest.raises(ValueError, match=r"mesh.data=4 does not divide the 3 rows at once of retrofit.batch_size=6 in 2"):
    create_mesh(MeshConfig(data=4), RetrofitConfig(batch_size=6, microbatches=2))


# ------------------------------------------------------------------------------------------------- two processes


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
  folder = tmp_path_factory.mktemp("scale")
  tokenizer = byte_tokenizer()
  checkpoint.save(folder / "model", tiny.model(tiny.config(vocab_size=tokenizer.vocab_size)), tokenizer)
  (folder / "text.txt").write_text(" ".join(f"{i} and {i * i % 97} make {i + i * i % 97}." for i in range(200)))
  return folder


def start(inputs: Path, output: Path, *flags: str, devices: int = 1) -> subprocess.Popen:
  command = [
    sys.executable, "-m", "experiments.retrofit", f"--checkpoint={inputs / 'model'}", f"--output={output}",
    f"--data.paths={inputs / 'text.txt'}", "--retrofit.seq_len=32", "--dms.window=3", "--lora.rank=2",
    "--retrofit.schedule.final_cr=2", "--retrofit.schedule.steps_per_cr=4", "--retrofit.optimizer.learning_rate=0.001",
    "--retrofit.saving.save_every=3", "--retrofit.batch_size=4", "--retrofit.memory.compute_dtype=float32", *flags,
  ]  # fmt: skip
  return subprocess.Popen(
    command, cwd=ROOT, env=on_devices(devices), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
  )


def start_two(inputs: Path, output: Path, *flags: str) -> list[subprocess.Popen]:
  """Two processes of two devices each, with a coordinator at a free port."""
  return [start(inputs, output, "--mesh.data=2", "--mesh.tensor=2", *meet, *flags, devices=2) for meet in meeting()]


def log(output: Path) -> list[dict]:
  return [json.loads(line) for line in (output / "log.jsonl").read_text().splitlines()]


@pytest.mark.slow
def test_two_processes_train_as_one_which_resumes_alone(inputs):
  """Four devices in two processes up to step 4, then one device: log and weights equal those of one process."""
  one, two = inputs / "one", inputs / "two"
  [(code, _, errors)] = finished(start(inputs, one, "--retrofit.schedule.steps=8"))
  assert code == 0, errors
  outcomes = finished(*start_two(inputs, two, "--retrofit.schedule.steps=8", "--stop_after=4"))
  assert [code for code, *_ in outcomes] == [0, 0], outcomes
  assert [f'"output": "{two}"' in out for _, out, _ in outcomes] == [True, False]  # process 0 speaks for both
  assert len(log(two)) == 4 and (two / "cr2" / "config.json").exists()
  [(code, _, errors)] = finished(start(inputs, two, "--retrofit.schedule.steps=8"))
  assert code == 0, errors
  for a, b in zip(log(one), log(two), strict=True):
    for name in ("step", "tokens", "loss", "kl", "grad_norm", "gate_rate", "achieved_cr"):
      np.testing.assert_allclose(b[name], a[name], **TOLERANCE, err_msg=f"{name}, step {a['step']}")
  for name in ("cr2", "final"):
    a, b = (checkpoint.load(inputs / "model", retrofit=run / name, merge=False).params["layers"] for run in (one, two))
    # Where a gradient is mostly rounding, AdamW's step may have another sign: one step apart at most.
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-3, atol=1e-3), a, b)


@pytest.mark.slow
def test_sigterm_to_one_process_stops_both_after_the_same_step(inputs):
  output = inputs / "terminated"
  processes = start_two(inputs, output, "--retrofit.schedule.steps=100000", "--retrofit.saving.save_every=100000")
  path = output / "log.jsonl"
  end = time.monotonic() + 300
  while all(p.poll() is None for p in processes) and not (path.exists() and path.stat().st_size):
    if time.monotonic() > end:
      break
    time.sleep(0.05)
  processes[1].send_signal(signal.SIGTERM)
  outcomes = finished(*processes)
  steps = len(log(output))
  assert [code for code, *_ in outcomes] == [143, 143], outcomes
  assert f"stopped after step {steps - 1} and saved" in outcomes[0][2]
  assert [p.name for p in (output / "state").iterdir() if p.name.isdigit()] == [str(steps)]
