"""The training loop: checkpoints, resume, log. A run killed at any moment goes on from its last whole checkpoint."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from orbax.checkpoint import v1 as ocp

from dms_jax import checkpoint
from dms_jax.config import DMSConfig, LoRAConfig, read_json, to_json
from dms_jax.model import Model
from dms_jax.params import Params, join_params, param_table, split_params
from dms_jax.retrofit import schedule
from dms_jax.retrofit.config import DataConfig, RetrofitConfig
from dms_jax.retrofit.data import Packer
from dms_jax.retrofit.step import TrainState, init_retrofit, init_state, split_trained, train_step

LOG = "log.jsonl"
RUN = "run.json"


@dataclasses.dataclass(frozen=True)
class Run:
  """A retrofit to carry out on the untouched model `base`, in `directory`: the gates, the updates and how to train."""

  base: Model
  dms: DMSConfig
  lora: LoRAConfig
  config: RetrofitConfig
  data: DataConfig
  directory: Path


def prepare(base: Model, dms: DMSConfig, lora: LoRAConfig, config: RetrofitConfig) -> tuple[Model, Model, Params]:
  """(student without what is trained, teacher, what is trained).

  Frozen weights are in the compute dtype; what is trained starts as stored, or fresh where the base has none.
  """
  dtype = jnp.dtype(config.compute_dtype)
  cast = lambda params: jax.tree.map(lambda x: x.astype(dtype), params)
  table = param_table(base.config)
  base = base.replace(params=split_params(base.params, lambda path: path in table)[0], dms=None, lora=None)
  student = base.replace(dms=dms, lora=lora if lora.rank and config.trainable == "lora" else None)
  fresh = init_retrofit(student, jax.random.key(config.seed), jnp.float32)
  student = student.replace(params=join_params(student.params, fresh))
  trained, frozen = split_trained(student, config.trainable)
  teacher = base.replace(params=cast(base.params))
  if config.trainable == "all":
    return student.replace(params=cast(frozen)), teacher, trained
  return student.replace(params=join_params(cast(frozen), teacher.params)), teacher, trained  # one copy serves both


def _claim_directory(directory: Path, settings: dict) -> None:
  """Writes run.json, or checks that the run found there has the same settings."""
  path = directory / RUN
  if not path.exists():
    directory.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    part.write_text(json.dumps(settings, indent=1))
    os.replace(part, path)
    return
  found = read_json(path)
  differ = [
    f"{section}.{name}: {found.get(section, {}).get(name)!r} there, {value!r} now"
    for section, values in settings.items()
    for name, value in values.items()
    if found.get(section, {}).get(name) != value
  ]
  if differ:
    raise ValueError(f"{directory} holds a run with other settings ({'; '.join(differ)}); choose another --output")


def _trim_log(path: Path, step: int) -> None:
  """Drops lines of steps that will be taken again, and a line cut short by a kill."""
  if not path.exists():
    return
  kept = []
  for line in path.read_text().splitlines():
    try:
      if json.loads(line)["step"] < step:
        kept.append(line + "\n")
    except (json.JSONDecodeError, KeyError):
      continue
  part = path.with_suffix(".part")
  part.write_text("".join(kept))
  os.replace(part, path)


def _last_line(path: Path) -> dict:
  lines = path.read_text().splitlines() if path.exists() else []
  return json.loads(lines[-1]) if lines else {}


def export(student: Model, state: TrainState, config: RetrofitConfig, path: Path, tokenizer=None, **metadata) -> None:
  """Writes what was trained, in the compute dtype, as a checkpoint; without the base unless that was trained too."""
  if (path / "config.json").exists():  # a resumed run comes by again, with the same numbers
    return
  trained = state.trained if state.ema is None else state.ema
  dtype = jnp.dtype(config.compute_dtype)
  model = student.replace(params=join_params(student.params, jax.tree.map(lambda x: x.astype(dtype), trained)))
  groups = ("base", "gate", "lora") if config.trainable == "all" else ("gate", "lora")
  checkpoint.save(path, model, tokenizer if config.trainable == "all" else None, groups=groups, metadata=metadata)


def train(
  run: Run,
  packer: Packer,
  tokenizer=None,
  *,
  report: Callable[[dict], Any] = lambda line: None,
  log_every: int = 10,
  stop_after: int | None = None,
) -> dict:
  """Trains `run` to its end, or on from where its directory's last checkpoint left it.

  Writes into `run.directory`: run.json (settings), log.jsonl (a line a step), state/ (the last checkpoints, Orbax), and
  cr2/, cr3/, ... and final/: a usable retrofit when the target reaches each whole CR, and at the end.

  Args:
    report: called with every line logged; for progress bars.
    log_every: steps between fetches of metrics from the device.
    stop_after: leave after this many steps in all, with a checkpoint, as if interrupted.

  Returns:
    The last line of the log.

  Raises:
    ValueError: the directory holds a run with other settings.
    FloatingPointError: the loss or its gradient is not finite; the last checkpoint is kept.
  """
  config, directory = run.config, Path(run.directory)
  settings = {
    "model": to_json(run.base.config), "dms": to_json(run.dms), "lora": to_json(run.lora), "retrofit": to_json(config),
    "data": to_json(run.data),
  }  # fmt: skip
  _claim_directory(directory, settings)
  student, teacher, trained = prepare(run.base, run.dms, run.lora, config)
  state = init_state(config, trained)
  key = jax.random.fold_in(jax.random.key(config.seed), 1)
  usable = {schedule.step_of_cr(config, cr): cr for cr in range(2, math.floor(config.final_cr) + 1)}

  keep = ocp.training.preservation_policies.LatestN(config.keep_states)
  with ocp.training.Checkpointer(directory.absolute() / "state", preservation_policy=keep) as checkpointer:
    if checkpointer.latest is not None:
      abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), state)
      state = jax.tree.map(jnp.asarray, checkpointer.load(checkpointer.latest.step, abstract))
    first = int(state.step)
    _trim_log(directory / LOG, first)
    last = config.steps if stop_after is None else min(stop_after, config.steps)
    line, pending, clock = _last_line(directory / LOG), [], time.perf_counter()
    with open(directory / LOG, "a") as log:
      for step in range(first, last):
        state, metrics = train_step(state, student, teacher, packer.batch(step), key, config)
        pending.append((step, metrics))
        done = step + 1
        saves = done % config.save_every == 0 or done == last
        if saves or done in usable or len(pending) >= log_every:
          values = jax.device_get([m for _, m in pending])
          seconds = (time.perf_counter() - clock) / len(pending)
          for (at, _), value in zip(pending, values, strict=True):
            line = {"step": at, "tokens": (at + 1) * config.batch_size * config.seq_len, "seconds": round(seconds, 4)}
            line |= {name: float(x) for name, x in value.items()}
            if not math.isfinite(line["loss"] + line["grad_norm"]):
              raise FloatingPointError(
                f"step {at}: loss {line['loss']}, gradient norm {line['grad_norm']}; the last checkpoint before it is "
                f"kept in {directory / 'state'}: lower retrofit.learning_rate and start again in another --output"
              )
            log.write(json.dumps(line) + "\n")
            report(line)
          log.flush()
          pending = []
          if done in usable:  # before the state: a run that resumes past this step would never write it
            export(
              student,
              state,
              config,
              directory / f"cr{usable[done]}",
              tokenizer,
              step=done,
              retrofit=settings["retrofit"],
              data=settings["data"],
            )
          if saves:
            checkpointer.save(done, state, overwrite=True)
          clock = time.perf_counter()
    if last == config.steps:
      export(
        student,
        state,
        config,
        directory / "final",
        tokenizer,
        step=last,
        retrofit=settings["retrofit"],
        data=settings["data"],
      )
  return line
