"""The training loop: checkpoints, resume, log. A run killed at any moment resumes from its last complete checkpoint.

The training state is written asynchronously, each process writing its shards, and can be restored on any mesh.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import json
import math
import os
import shutil
import time
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from orbax.checkpoint import v1 as ocp

from dms_jax import checkpoint, disk, formats, processes
from dms_jax.config import DMSConfig, LoRAConfig
from dms_jax.decoder import Model
from dms_jax.json_files import as_text, from_json, is_number, parse_json, read_json, to_json
from dms_jax.params import Params, flatten, join_params, param_table, split_params
from dms_jax.retrofit import distributed, elastic, kvzap
from dms_jax.retrofit.config import DataConfig, RetrofitConfig, check
from dms_jax.retrofit.data import Batches
from dms_jax.retrofit.step import (
  TrainState,
  init_retrofit,
  init_state,
  split_trained,
  train_step,
  trained_model,
  zero_neuron,
)
from dms_jax.sharding import make_mesh, tree_shardings

LOG = "log.jsonl"
RUN = "run.json"
STATE = "state"


class Preempted(Exception):
  """The run was asked to stop and has saved its state; the same command resumes it."""


@dataclasses.dataclass(frozen=True)
class Run:
  """A retrofit of the untouched model `base`, in `directory`: gates, low-rank updates and training settings.

  Without gates (`dms` None) it is the training of `base` itself, under the objective "lm".

  Attributes:
    weights: what tells the base's weights from others (`weights_of`), so that a run goes on from its own alone; "": not
      known.
  """

  base: Model
  dms: DMSConfig | None
  lora: LoRAConfig
  config: RetrofitConfig
  data: DataConfig
  directory: Path
  weights: str = ""

  def settings(self, packer: Batches) -> dict[str, dict | None]:
    """The settings that identify this run, as run.json holds them; the number of workers changes no batch."""
    data = {name: value for name, value in to_json(self.data).items() if name != "workers"}
    return {
      "model": to_json(self.base.config), "dms": to_json(self.dms) if self.dms else None, "lora": to_json(self.lora),
      "retrofit": to_json(self.config), "data": data, "text": as_text(packer.fingerprints()),
      **({"weights": self.weights} if self.weights else {}),
    }  # fmt: skip


def weights_of(model: Model) -> str:
  """A fingerprint of a model's weights: CRC-32 of the first values of the arrays outside its layers and in layer 0.

  The same for stacked and listed layers, and for a checkpoint that was written anew, whose files differ
  (`checkpoint.fingerprint`). "" where a process does not hold all of them.
  """
  layers = model.params["layers"]
  params = {**model.params, "layers": layers[0] if isinstance(layers, list) else layers}
  if not all(x.is_fully_addressable for x in jax.tree.leaves(params)):
    return ""
  crc = 0
  for name, x in sorted(flatten(jax.device_get(_first_values(params, isinstance(layers, list)))).items()):
    crc = zlib.crc32(x.tobytes(), zlib.crc32(name.encode(), crc))
  return f"{crc:08x}"


@partial(jax.jit, static_argnames="listed")
def _first_values(params: Params, listed: bool) -> Params:
  """At most 256 values of each array, by one program: of the layers, which are that of layer 0 if `listed`, in it."""
  layers = params["layers"] if listed else jax.tree.map(lambda x: x[0], params["layers"])
  return jax.tree.map(lambda x: x[:8].reshape(-1)[:256], {**params, "layers": layers})


def prepare(
  base: Model, dms: DMSConfig | None, lora: LoRAConfig, config: RetrofitConfig
) -> tuple[Model, Model, Params]:
  """(student without the trained parameters, teacher, trained parameters).

  Frozen weights are cast to the compute dtype. Trained parameters start as stored, or freshly initialised where the
  base has none.

  Raises:
    ValueError: the settings are inconsistent (`config.check`).
  """
  check(dms, lora, config)
  dtype = jnp.dtype(config.memory.compute_dtype)
  cast = lambda params: jax.tree.map(lambda x: x.astype(dtype), params)
  table = param_table(base.config)
  base = base.stacked()  # `load` may give a list of layers
  params = split_params(base.params, lambda path: path in table)[0]
  base = base.replace(params=params, dms=None, lora=None, holds_updates=False)  # whatever it is made of, it is the base
  student = base.replace(dms=dms, lora=lora if config.trainable == "lora" else None)
  fresh = init_retrofit(student, jax.random.key(config.seed), jnp.float32)
  student = student.replace(params=join_params(student.params, fresh))
  trained, frozen = split_trained(student, config.trainable)
  teacher = base.replace(params=cast(base.params))
  if config.trainable == "all":
    return student.replace(params=cast(frozen)), teacher, trained
  return student.replace(params=join_params(cast(frozen), teacher.params)), teacher, trained  # one copy serves both


def _claim_directory(directory: Path, settings: dict[str, dict | None]) -> None:
  """Writes run.json, or checks that an existing one has the same settings; that of a run without a step is replaced."""
  path = directory / RUN
  if not path.exists():
    directory.mkdir(parents=True, exist_ok=True)
    disk.write_text(path, json.dumps({**formats.stamp("run"), **settings}, indent=1))
    return
  found = read_json(path)
  formats.check("run", found, path)
  # of an earlier version: with today's fields
  for name, cls in (("retrofit", RetrofitConfig), ("dms", DMSConfig), ("data", DataConfig)):
    if settings[name] is not None:
      found[name] = to_json(from_json(cls, found.get(name) or {}, f"{path}: {name}"))
  found.setdefault("weights", settings.get("weights"))
  if differ := _differences(found, settings):
    if _begun(directory):
      raise ValueError(f"{directory} holds a run with other settings ({'; '.join(differ)}); choose another --output")
    disk.write_text(path, json.dumps({**formats.stamp("run"), **settings}, indent=1))


def _begun(directory: Path) -> bool:
  """Whether a run there has made a step: its log has a line, or there is a state or a checkpoint."""
  log = directory / LOG
  return (
    (log.exists() and log.stat().st_size > 0)
    or any((directory / STATE).glob("[0-9]*"))
    or ((directory / "final").exists())
  )


def _differences(found: Any, settings: dict, prefix: str = "") -> list[str]:
  """Every field of the nested `settings` that is missing or different in `found`, with both values."""
  lines = []
  for name, now in settings.items():
    there = found.get(name) if isinstance(found, dict) else None
    if isinstance(now, dict):
      lines += _differences(there, now, f"{prefix}{name}.")
    elif there != now:
      lines.append(f"{prefix}{name}: {there!r} there, {now!r} now")
  return lines


def _bytes_to_write(run: Run, trained: Params, names: list[str]) -> int:
  """About the bytes that a run will add to its directory: states, of which one more than are kept, and checkpoints.

  Args:
    names: of all checkpoints of the run.
  """
  directory = Path(run.directory)
  missing = [name for name in names if not (directory / name / "config.json").exists()]
  if not missing:
    return 0
  config, table = run.config, param_table(run.base.config)
  size = _nbytes(jax.eval_shape(partial(init_state, config), trained))
  there = sum(path.name.isdigit() for path in (directory / STATE).glob("*"))
  updates = checkpoint.nbytes(table, config.memory.compute_dtype) if config.whole_model else _nbytes(trained)
  return max(config.saving.keep_states + 1 - there, 1) * size + len(missing) * updates


def _nbytes(tree: Any) -> int:
  return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))


def _trim_log(path: Path, step: int) -> None:
  """Drops the lines of steps that will be repeated, and a line cut short by a kill."""
  if not path.exists():
    return
  kept = []
  for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
    with contextlib.suppress(ValueError):
      if _step(line, str(path))["step"] < step:
        kept.append(line + "\n")
  disk.write_text(path, "".join(kept))


def _step(line: str, where: str) -> dict:
  """A line of a log, which is of one step; a ValueError names `where` if it is none."""
  values = parse_json(line, where)
  if not is_number(values.get("step"), int):
    raise ValueError(f"{where}: no line of a retrofit's log: it needs a whole number 'step'")
  return values


def read_log(path: Path, killed: bool = False) -> list[dict]:
  """The lines of log.jsonl, one a step; none if it is missing.

  Args:
    killed: the run may have been killed as it wrote: a last line without an end is left out.

  Raises:
    ValueError: a line is none of a log; names the file and line.
  """
  text = path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""
  lines = (text[: text.rfind("\n") + 1] if killed else text).splitlines()
  return [_step(line, f"{path}:{number}") for number, line in enumerate(lines, 1)]


@contextlib.contextmanager
def _writing(directory: Path) -> Iterator[None]:
  """Turns the errors of a full disk into one clear OSError, and removes half-written checkpoints."""
  try:
    yield
  except Exception as error:
    if not _disk_is_full(error):
      raise
    for _ in range(20):  # Orbax's threads may still be writing
      half_written = list((directory / STATE).glob("*.orbax-checkpoint-tmp*"))
      for half in half_written:
        shutil.rmtree(half, ignore_errors=True)
      time.sleep(0.1 if half_written else 0.0)
    raise OSError(
      errno.ENOSPC,
      f"{directory}: the disk is full; the last whole checkpoint is kept; free some space and run the command again",
    ) from error


def _disk_is_full(error: BaseException | None) -> bool:
  """Whether `error` or its cause is a full disk or quota; Orbax's own errors say so only in their message."""
  while error is not None:
    if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT):
      return True
    if any(message in str(error) for message in ("No space left on device", "Disk quota exceeded")):
      return True
    if isinstance(error, BaseExceptionGroup) and any(map(_disk_is_full, error.exceptions)):
      return True
    error = error.__cause__ or error.__context__
  return False


def export(
  run: Run,
  student: Model,
  state: TrainState,
  path: Path,
  tokenizer=None,
  calibrated: Callable[[Model], Model] = lambda model: model,
  **metadata,
) -> None:
  """Writes the trained parameters as a checkpoint: a retrofit, or the whole model (`SavingConfig.export`).

  Gates are float32; low-rank updates and trained weights have the compute dtype. Updates are merged in float32, into
  the weights as stored.

  Args:
    calibrated: sets the thresholds of the exported gates.
  """
  if (path / "config.json").exists():  # a resumed run reaches this step again, with the same numbers
    return
  config = run.config
  trained = state.trained if state.ema is None else state.ema
  if config.whole_model and config.trainable != "all":
    model = student.replace(params=join_params(student.params, run.base.params, trained)).merged()
  else:
    model = trained_model(student, trained, jnp.dtype(config.memory.compute_dtype))
  model = calibrated(model)
  groups = ("base", "gate", "lora") if config.whole_model else ("gate", "lora")
  with processes.together():
    checkpoint.save(path, model, tokenizer if config.whole_model else None, groups=groups, metadata=metadata)


def train(
  run: Run,
  packer: Batches,
  tokenizer=None,
  *,
  mesh: Mesh | None = None,
  report: Callable[[dict], Any] = lambda line: None,
  saved: Callable[[int], Any] = lambda step: None,
  progress: Callable[[Sequence], Iterable] = iter,
  stop: Callable[[], bool] = lambda: False,
  log_every: int = 10,
  log_seconds: float = 5.0,
  stop_after: int | None = None,
) -> dict:
  """Trains `run` to its end, resuming from the last checkpoint in its directory if there is one.

  Writes into `run.directory`: run.json (settings), log.jsonl (one line a step), state/ (the latest training states,
  Orbax), and cr2/, cr3/, ... and final/: a usable checkpoint whenever the target reaches a whole CR (if
  `saving.snapshots`), and at the end. Objectives without a target CR (`RetrofitConfig.ramps`), and
  gates for a range of ratios, write final/ alone.

  Args:
    mesh: the devices to train on (`distributed.create_mesh`); default one device. Every process must call; only process
      0 calls `report` and `saved`.
    report: called with every line of the log.
    saved: called with the number of steps done, after each save of the state has started.
    progress: iterates over the batches of the last calibration, and may show how far it is.
    stop: called before the first step and after every step; if it returns true, the run saves and raises `Preempted`.
      Several processes stop by `distributed.preempted`.
    log_every: most steps between fetches of metrics from the device; fewer where they take more than `log_seconds`.
    stop_after: stop after this many steps in total, with a checkpoint, as if interrupted.

  Returns:
    The last line of the log.

  Raises:
    ValueError: the directory holds a run with other settings, the settings are inconsistent, or the disk has not the
      room that the run will take.
    FloatingPointError: the loss or its gradient is not finite, or the loss is above its bound. Earlier checkpoints are
      kept, and the log ends with that step.
    OSError: the disk is full; the last complete checkpoint is kept.
    Preempted: `stop` returned true.
  """
  config, directory, leads = run.config, Path(run.directory), processes.leads()
  mesh = mesh or make_mesh(devices=jax.local_devices())
  places = tree_shardings(run.base.params, mesh, param_table(run.base.config))
  run = dataclasses.replace(run, base=run.base.replace(params=jax.device_put(run.base.params, places)))
  student, teacher, trained = prepare(run.base, run.dms, run.lora, config)
  settings = run.settings(packer)
  # Gates for a range of ratios serve all of it only at the end.
  snapshots = config.ramps and config.saving.snapshots and not (run.dms and run.dms.elastic)
  ranged = run.dms is not None and run.dms.levels is not None and run.dms.levels.ranged
  crs = range(2, math.floor(config.schedule.final_cr) + 1) if snapshots else ()
  usable = {config.schedule.step_of_cr(cr): cr for cr in crs}
  with _writing(directory), processes.together():
    if leads:
      disk.check_room(directory, _bytes_to_write(run, trained, [f"cr{cr}" for cr in crs] + ["final"]))
      _claim_directory(directory, settings)
  state = distributed.place_state(config, student, trained, mesh)
  key = jax.random.fold_in(jax.random.key(config.seed), 1)
  frame = None
  if config.objective == "kvzap":
    frame = kvzap.frame(tokenizer, config, run.base.config.max_position_embeddings)

  def write(name: str, done: int) -> None:
    about = {"step": done, "retrofit": settings["retrofit"], "data": settings["data"]}
    export(run, student, state, directory / name, tokenizer, calibrated if ranged else lambda model: model, **about)

  def calibrated(model: Model) -> Model:
    steps = range(config.schedule.steps, config.schedule.steps + config.saving.calibration)
    with jax.set_mesh(mesh):
      return elastic.calibrated(model, [distributed.feed(packer, step, mesh) for step in steps], config, progress)

  with _writing(directory), _states(directory, config) as checkpointer:
    if checkpointer.latest is not None:
      abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state)
      state = checkpointer.load(checkpointer.latest.step, abstract)
    first = int(state.step)
    with processes.together():
      if leads:
        _trim_log(directory / LOG, first)
    last = config.schedule.steps if stop_after is None else min(stop_after, config.schedule.steps)
    line, pending, clock = (read_log(directory / LOG) or [{}])[-1], [], time.perf_counter()
    every = 1  # the first step compiles, and says when it is done
    if first < last and stop():
      raise Preempted(f"stopped before step {first}; nothing is lost, and the same command goes on")
    with open(directory / LOG if leads else os.devnull, "a", encoding="utf-8") as log:
      for step in range(first, last):
        if config.schedule.zero_neuron and step == config.schedule.fade_steps:
          state = zero_neuron(student, state)
        fading = step < config.schedule.fade_steps
        batch = distributed.feed(packer, step, mesh)
        with jax.set_mesh(mesh):
          state, metrics = train_step(state, student, teacher, batch, key, config, fading, frame)
        pending.append((step, metrics))
        done = step + 1
        kept = done % config.saving.save_every == 0 or done in usable or done == config.schedule.steps
        stopping = (stop() or distributed.preempted(done)) and done < last
        saves = done % config.saving.save_every == 0 or done == last or stopping
        if saves or kept or len(pending) >= every:
          values = jax.device_get([m for _, m in pending])
          seconds = (time.perf_counter() - clock) / len(pending)
          every = max(1, min(log_every, int(log_seconds / max(seconds, 1e-9))))
          with processes.together():
            for (at, _), value in zip(pending, values, strict=True):
              line = _line(config, at, seconds, value | packer.notes(at), heads=kept and at == step)
              log.write(json.dumps(line) + "\n")
              _check_finite(config, line, directory)
              if leads:
                report(line)
            log.flush()
          pending = []
          if done in usable:  # before the state is saved: a run resumed from it would never write this checkpoint
            write(f"cr{usable[done]}", done)
          if saves:
            checkpointer.wait()  # for the previous save; raises its errors
            checkpointer.save_async(done, state, force=True, overwrite=True)
            if leads:
              saved(done)
          clock = time.perf_counter()
        if stopping:
          checkpointer.wait()
          raise Preempted(f"stopped after step {step} and saved; the same command goes on")
    if last == config.schedule.steps:
      write("final", last)
  return line


@contextlib.contextmanager
def _states(directory: Path, config: RetrofitConfig) -> Iterator[ocp.training.Checkpointer]:
  """The checkpoints of the training state; the context ends when the last one is written."""
  keep = ocp.training.preservation_policies.LatestN(config.saving.keep_states)
  with (
    disk.plain_name(directory) as plain,
    ocp.training.Checkpointer(plain / STATE, preservation_policy=keep, cleanup_tmp_directories=True) as checkpointer,
  ):
    yield checkpointer


def _line(config: RetrofitConfig, step: int, seconds: float, values: dict, heads: bool) -> dict:
  """A line of the log; `heads` adds the gate rate of each head, [L][K]. Numbers that are not finite become null."""
  line = {"step": step, "tokens": (step + 1) * config.batch_size * config.seq_len, "seconds": round(seconds, 4)}
  rates = values.get("gate_rates")
  plain = lambda x: x if isinstance(x, int) else float(x) if math.isfinite(x) else None
  line |= {n: plain(x) for n, x in values.items() if n != "gate_rates"}
  if heads and rates is not None:
    line["gate_rates"] = [[round(float(x), 4) for x in row] for row in rates]
  return line


def _check_finite(config: RetrofitConfig, line: dict, directory: Path) -> None:
  loss, norm = line["loss"], line["grad_norm"]
  if loss is not None and norm is not None and loss <= config.loss.bound:
    return
  show = lambda x: "not finite" if x is None else f"{x:.4g}"
  raise FloatingPointError(
    f"step {line['step']}: loss {show(loss)}, gradient norm {show(norm)}; retrofit.loss.bound={config.loss.bound:g}. "
    f"The last checkpoint before it is kept in {directory / STATE}; "
    "lower retrofit.optimizer.learning_rate in another --output"
  )
