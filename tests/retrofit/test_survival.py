"""What a retrofit leaves behind when it is stopped, diverges, or the disk is full."""

from __future__ import annotations

import dataclasses
import errno
import json
import math
import os
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dms_jax import checkpoint, disk
from dms_jax import testing as tiny
from dms_jax.config import LoRAConfig
from dms_jax.params import flatten
from dms_jax.retrofit import (
  DataConfig,
  MemoryConfig,
  OptimizerConfig,
  RetrofitConfig,
  SavingConfig,
  ScheduleConfig,
  loop,
)
from dms_jax.retrofit.data import Packer, Source
from dms_jax.retrofit.loop import Preempted, Run, train
from dms_jax.tokenizer import byte_tokenizer
from tests.helpers import changed

pytestmark = pytest.mark.standard_promotion  # optax

MODEL = tiny.config(num_layers=1, d_model=16, d_ff=16, head_dim=8, vocab_size=257)
CONFIG = RetrofitConfig(
  batch_size=2,
  seq_len=16,
  seed=1,
  schedule=ScheduleConfig(steps=7, initial_cr=1.5, final_cr=3.0, steps_per_cr=4),
  optimizer=OptimizerConfig(warmup_steps=0, learning_rate=1e-2),
  memory=MemoryConfig(compute_dtype="float32", loss_chunk=16, vocab_chunk=64),
  saving=SavingConfig(save_every=3),
)


@pytest.fixture(autouse=True, scope="module")
def quick():
  """The same step, compiled four times faster."""
  step = jax.jit(loop.train_step.__wrapped__, static_argnames=("config", "fading"), compiler_options=tiny.QUICK)
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(loop, "train_step", step)
    yield


def a_run(directory, seed: int = 0, gate: str = "adapter", **overrides) -> tuple[Run, Packer]:
  config = changed(CONFIG, **overrides)
  tokens = np.random.default_rng(seed).integers(0, 256, 300).astype(np.int32)
  packer = Packer([Source("text", tokens, np.ones(300, np.int32))], DataConfig(paths=("text",)), config)
  dms = tiny.dms(gate=gate, window=3, scale=10.0, offset=1.0)
  run = Run(tiny.model(MODEL), dms, LoRAConfig(rank=2), config, DataConfig(paths=("text",)), directory)
  return run, packer


def log(directory) -> list[dict]:
  lines = [json.loads(line) for line in (directory / loop.LOG).read_text().splitlines()]
  return [{k: v for k, v in line.items() if k != "seconds"} for line in lines]


def states(directory) -> list[int]:
  return sorted(int(p.name) for p in (directory / loop.STATE).iterdir() if p.name.isdigit())


def leftovers(directory) -> list[str]:
  return [p.name for p in directory.rglob("*") if any(w in p.name for w in (".part", ".partial", "tmp"))]


@pytest.fixture(scope="module")
def whole(tmp_path_factory, quick):
  """An undisturbed run: (directory, its log)."""
  directory = tmp_path_factory.mktemp("whole")
  with jax.numpy_dtype_promotion("standard"):
    train(*a_run(directory))
  return directory, log(directory)


def check_finished(directory, whole) -> None:
  """The interrupted run ends with the log and weights of the undisturbed one, bit-equal, and no temporary files."""
  assert log(directory) == whole[1]
  for name in ("cr2", "cr3", "final"):
    a, b = (
      checkpoint._read_params(d / name, checkpoint.read_config(d / name)[0], table(d / name))
      for d in (directory, whole[0])
    )
    jax.tree.map(np.testing.assert_array_equal, a, b)
  assert not leftovers(directory)


def table(path):
  _, config, dms, lora = checkpoint.read_config(path)
  return {n: s for n, s in checkpoint.param_table(config, dms, lora).items() if s.group != "base"}


def test_what_an_undisturbed_run_writes(whole):
  directory, lines = whole
  assert [line["step"] for line in lines] == list(range(7)) and not leftovers(directory)
  assert states(directory) == [6, 7]  # save_every=3 and the end; keep_states=2
  marked = {line["step"]: np.shape(line["gate_rates"]) for line in lines if "gate_rates" in line}
  assert marked == dict.fromkeys((1, 2, 5, 6), (1, 2))  # cr2, step 3, cr3 and step 6, the end
  for line in lines:
    if "gate_rates" in line:
      assert np.mean(line["gate_rates"]) == pytest.approx(line["gate_rate"], abs=1e-4)


def test_asked_to_stop_it_saves_and_goes_on(tmp_path, whole):
  calls = []
  with pytest.raises(Preempted, match="after step 3"):
    train(*a_run(tmp_path), stop=lambda: len(calls) >= 4 or calls.append(None))
  assert states(tmp_path)[-1] == 4 and len(log(tmp_path)) == 4
  with pytest.raises(Preempted, match="before step 4"):
    train(*a_run(tmp_path), stop=lambda: True)
  train(*a_run(tmp_path))
  check_finished(tmp_path, whole)


@pytest.mark.parametrize("loss", [math.nan, 1e9])
def test_an_exploding_loss_ends_with_the_step_and_the_state(tmp_path, whole, monkeypatch, loss):
  step = loop.train_step

  def exploding(state, *args):
    at = int(state.step)
    state, metrics = step(state, *args)
    return state, metrics if at < 4 else metrics | {"loss": jnp.float32(loss)}

  with monkeypatch.context() as patch:
    patch.setattr(loop, "train_step", exploding)
    with pytest.raises(FloatingPointError, match=r"step 4: loss (not finite|1e\+09).*loss.bound=100.*state"):
      train(*a_run(tmp_path))
  assert states(tmp_path) == [3]
  last = log(tmp_path)[-1]
  assert last["step"] == 4 and last["loss"] == (None if math.isnan(loss) else 1e9)
  train(*a_run(tmp_path))  # resumes from step 3
  check_finished(tmp_path, whole)


@pytest.mark.parametrize("victim", ["state", "export", "log"])
def test_a_full_disk_is_a_clear_error_and_the_last_checkpoint_stays(tmp_path, whole, monkeypatch, victim):
  full = OSError(errno.ENOSPC, "No space left on device")
  with monkeypatch.context() as patch:
    if victim == "state":
      rename = os.rename  # the last thing that the writing threads do

      def rename_or_fail(source, target):
        if "/state/" in str(source) and Path(target).name == "6":
          raise RuntimeError("worker failed") from ValueError("writing chunk: No space left on device")
        return rename(source, target)

      patch.setattr(os, "rename", rename_or_fail)
    elif victim == "export":
      fingerprints = checkpoint._fingerprints

      def fail_at_cr3(directory):
        if "cr3" in str(directory):
          raise full
        return fingerprints(directory)

      patch.setattr(checkpoint, "_fingerprints", fail_at_cr3)
    else:
      patch.setattr(loop, "_line", lambda config, step, *rest, **kw: (_ for _ in ()).throw(full) if step > 4 else {
        "step": step, "loss": 0.0, "grad_norm": 0.0})  # fmt: skip
    with pytest.raises(OSError, match=r"the disk is full; the last whole checkpoint is kept") as caught:
      train(*a_run(tmp_path))
  assert caught.value.errno == errno.ENOSPC
  assert states(tmp_path)[0] == 3 and not leftovers(tmp_path)
  if victim != "log":
    train(*a_run(tmp_path))
    check_finished(tmp_path, whole)


def test_other_errors_stay_what_they_are(tmp_path):
  with pytest.raises(KeyError), loop._writing(tmp_path):
    raise KeyError("unrelated")


def test_a_run_of_version_0_1_goes_on(tmp_path, whole):
  """Its run.json had no sections: the same settings are recognised, others named."""
  train(*a_run(tmp_path), stop_after=4)
  settings = json.loads((tmp_path / loop.RUN).read_text())
  flat = settings["retrofit"]
  for section in [name for name, value in flat.items() if isinstance(value, dict)]:
    names = {("loss", "kind"): "loss", ("loss", "bound"): "loss_bound"}
    fields = flat.pop(section).items()
    flat |= {names.get((section, name), name): value for name, value in fields}
  (tmp_path / loop.RUN).write_text(json.dumps(settings))
  with pytest.raises(ValueError, match=r"retrofit\.schedule\.final_cr: 3\.0 there, 3\.5 now\)"):
    train(*a_run(tmp_path, schedule__final_cr=3.5))
  train(*a_run(tmp_path))
  check_finished(tmp_path, whole)


def test_a_run_of_a_newer_version_is_refused(tmp_path):
  train(*a_run(tmp_path), stop_after=1)
  settings = json.loads((tmp_path / loop.RUN).read_text())
  assert settings["format"] == 2 and settings["version"]
  (tmp_path / loop.RUN).write_text(json.dumps({**settings, "format": 3, "version": "9.0"}))
  with pytest.raises(ValueError, match=r"run\.json: written by dms_jax 9\.0, schema 3; this version reads up to 2"):
    train(*a_run(tmp_path))


def test_a_run_goes_on_from_its_own_weights_alone(tmp_path):
  """Random ones, other ones, and those of an earlier version's run, which are not known."""
  run, packer = a_run(tmp_path)
  claim = lambda weights: loop._claim_directory(tmp_path, dataclasses.replace(run, weights=weights).settings(packer))
  other = run.base.replace(params={**run.base.params, "embed": run.base.params["embed"] + 1})
  assert loop.weights_of(run.base) == loop.weights_of(run.base.unstacked()) != loop.weights_of(other)
  claim("")
  claim(loop.weights_of(run.base))
  (tmp_path / loop.RUN).unlink()
  for _ in range(2):
    claim(loop.weights_of(run.base))
  (tmp_path / loop.LOG).write_text('{"step": 0}\n')
  for weights in ("random", loop.weights_of(other)):
    with pytest.raises(ValueError, match=f"weights: '[0-9a-f]{{8}}' there, '{weights}' now"):
      claim(weights)


def test_a_line_that_a_kill_cut_short_stops_nothing(tmp_path):
  log = tmp_path / loop.LOG
  assert loop.read_log(log, killed=True) == []
  for whole in ("", '{"step": 0}\n', '{"step": 0}\n{"step": 1}\n'):
    log.write_text(whole + '{"step": 2, "lo')
    assert [line["step"] for line in loop.read_log(log, killed=True)] == list(range(whole.count("\n")))
    with pytest.raises(ValueError, match=rf"log\.jsonl:{whole.count(chr(10)) + 1}: not valid JSON"):
      loop.read_log(log)


def test_a_run_without_a_step_gives_way_to_another(tmp_path):
  """One that ended before its first step, as by a row in which no document fits, leaves nothing to go on from."""
  run, packer = a_run(tmp_path)
  of = lambda weights: dataclasses.replace(run, weights=weights).settings(packer)
  loop._claim_directory(tmp_path, of("one"))
  (tmp_path / loop.LOG).touch()
  loop._claim_directory(tmp_path, of("two"))
  assert json.loads((tmp_path / loop.RUN).read_text())["weights"] == "two"
  (tmp_path / loop.STATE / "3").mkdir(parents=True)
  with pytest.raises(ValueError, match=r"holds a run with other settings \(weights: 'two' there, 'one' now"):
    loop._claim_directory(tmp_path, of("one"))


def test_another_text_is_refused(tmp_path, whole):
  with pytest.raises(ValueError, match=r"text\.text: '300 tokens, CRC-32 \w+' there"):
    train(*a_run(whole[0], seed=5))


@pytest.mark.parametrize("trainable", ["lora", "all"])
def test_whole_models_hold_what_the_retrofit_adds(tmp_path, trainable):
  """`export` model: loads by itself, updates merged, and equals the base with the retrofit put on top."""
  whole_model = dict(saving__export="model") if trainable == "lora" else {}
  run, packer = a_run(tmp_path / "model", schedule__steps=2, trainable=trainable, **whole_model)
  train(run, packer, byte_tokenizer())
  model = checkpoint.load(tmp_path / "model" / "final")
  assert model.lora is None and model.dms == run.dms and (tmp_path / "model" / "final" / "tokenizer.json").exists()
  if trainable == "lora":
    train(*a_run(tmp_path / "apart", schedule__steps=2))
    checkpoint.save(tmp_path / "base", run.base)
    apart = checkpoint.load(tmp_path / "base", retrofit=tmp_path / "apart" / "final", merge=False)
    assert apart.lora.rank == 2
    jax.tree.map(np.testing.assert_array_equal, apart.merged().params, model.params)
  else:
    assert np.any(flatten(model.params)["embed"] != run.base.params["embed"])


def test_the_neuron_is_zeroed_between_the_phases(tmp_path):
  lines = {}
  for zero in (False, True):
    settings = dict(
      gate="neuron", trainable="all", schedule__fade_steps=2, schedule__steps=4, schedule__zero_neuron=zero
    )
    train(*a_run(tmp_path / str(zero), **settings), stop_after=2)  # a checkpoint right at the border
    train(*a_run(tmp_path / str(zero), **settings))
    lines[zero] = log(tmp_path / str(zero))
  assert lines[True][:2] == lines[False][:2]
  assert lines[True][2]["gate_rate"] == 0.0 < lines[False][2]["gate_rate"]


def test_keep_states_and_save_every_count(tmp_path):
  train(*a_run(tmp_path, saving__save_every=1, saving__keep_states=4, schedule__steps=6))
  assert states(tmp_path) == [3, 4, 5, 6]


def test_a_disk_without_room_for_states_and_checkpoints_is_refused_before_the_run(tmp_path, whole, monkeypatch):
  run, packer = a_run(tmp_path / "run")
  usage, checked = shutil.disk_usage(tmp_path), []
  check = disk.check_room
  monkeypatch.setattr(disk, "check_room", lambda path, size: checked.append(size) or check(path, size))
  monkeypatch.setattr(shutil, "disk_usage", lambda place: usage._replace(free=0))
  with pytest.raises(ValueError, match=r"run: about \S+ MB will be written, and the disk has 0.0 MB free; make room"):
    train(run, packer)
  assert not (tmp_path / "run").exists()
  trained = 4 * sum(math.prod(spec.shape) for spec in table(whole[0] / "final").values())  # float32
  assert checked == [checked[0]] and 3 * 3 * trained < checked[0] < 3 * 3 * trained + 3 * trained + 1000
  train(*a_run(whole[0]))  # a finished run writes nothing more
  assert checked[1:] == [0]
