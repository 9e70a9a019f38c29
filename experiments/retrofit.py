"""Retrofits a model with eviction gates, and optionally with low-rank updates or new weights.

    python -m experiments.retrofit --checkpoint=checkpoints/smollm2-135m-instruct --output=runs/retrofit/mine \\
      --data.paths=text.txt,chats.jsonl --retrofit.schedule.steps=400 --retrofit.schedule.final_cr=4

Without a data set the model samples its own: --data.self_text.rows=256. --data.recall_text.rows=1024 adds made-up
documents whose end asks for what their middle said. A reasoner trained by
experiments.train_reasoner reads problems of its families: --data.families=countdown,grids. A run trains for one CR; the
ramp takes retrofit.schedule.steps_per_cr steps a unit, and the rest has flags of its own:
--retrofit.schedule.final_cr=4 --retrofit.schedule.steps=0 --retrofit.schedule.hold_steps=20
--retrofit.optimizer.decay_steps=60. --crs=2,4,8 makes such a run for each of these CRs. One run for all of a range:
--dms.elastic=1.5,12 --dms.scale=25 --retrofit.schedule.final_cr=12 --retrofit.loss.counts=held, with --lora.by_cr the
updates of each row grow with its CR, from none at CR 1; at one CR it is behind
a run for this CR: on SmolLM2 its KL is about 1.1 times as high at CR 4, up to 1.4 times at CR 8. The paper's recipe:
--dms.gate=neuron --retrofit.trainable=all --retrofit.schedule.fade_steps=2000. Low-rank updates of other projections:
--lora.rank=16 --lora.targets=q_proj,k_proj,v_proj,o_proj,gate_proj,up_proj,down_proj.

The gates of other methods, for the policies of the same name:
  --retrofit.objective=trimkv --retrofit.trainable=gates --retrofit.loss.kind=forward_kl --retrofit.trimkv.capacity=512
  --retrofit.objective=kvzap --retrofit.trainable=gates --retrofit.seq_len=1024 --dms.window=128
  --retrofit.objective=dmc --retrofit.loss.kind=lm --dms.window=0

The same command resumes an interrupted run from its last checkpoint with the same numbers. On SIGINT (Ctrl-C) and
SIGTERM the run saves its state after the step and exits with 130 and 143. It writes OUTPUT/{run.json, log.jsonl,
state/, cr2/, cr3/, ..., final/, log.png}; each crN and final is a retrofit for `dms_jax.load(checkpoint,
retrofit=...)`, or a whole model (--retrofit.saving.export). --benchmark times steps instead: see
experiments/bench/retrofit_step.py.

Several devices: --mesh.data=4 --mesh.tensor=2 (fully sharded data parallelism, tensor parallelism). Several hosts with
OUTPUT on a shared file system: the same command on each, with --mesh.coordinator=HOST:PORT --mesh.processes=2
--mesh.process=0 (1, ...), or --mesh.coordinator=auto on Cloud TPU, Slurm and Open MPI. A run may resume with other mesh
flags.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import importlib.util
import os
import signal
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from dms_jax import checkpoint, processes
from dms_jax.config import DMSConfig, LoRAConfig
from dms_jax.model import Model
from dms_jax.retrofit import DataConfig, RetrofitConfig, distributed, recall_text, self_text
from dms_jax.retrofit.config import check
from dms_jax.retrofit.data import Batches, Packer, Source, documents, load_sources
from dms_jax.retrofit.distributed import MeshConfig
from dms_jax.retrofit.loop import LOG, Preempted, Run, read_log, train, weights_of
from dms_jax.retrofit.packing import FIRST, StreamPacker, WholePacker
from dms_jax.tokenizer import Tokenizer
from experiments.bench import retrofit_step as retrofit_benchmark
from experiments.common import forecast, program, stopping
from experiments.common.mesh import locked_by_first
from experiments.reports import plots

# The configs of a retrofit by flag prefix, with defaults that differ from the dataclass's.
SECTIONS: dict[str, tuple[type, dict]] = {
  "dms": (DMSConfig, {"window": 64}),
  "lora": (LoRAConfig, {"rank": 16}),
  "retrofit": (RetrofitConfig, {}),
  "data": (DataConfig, {}),
}
DETERMINISTIC = ("--xla_gpu_deterministic_ops=true", "--xla_gpu_exclude_nondeterministic_ops=true")


@dataclasses.dataclass(frozen=True)
class Config:
  """Input, output and mode. The run stops after `stop_after` steps in total, as if interrupted; 0: at its end.

  `crs` makes several runs, OUTPUT/cr2, OUTPUT/cr4, ..., one for each final CR; they share one compilation.
  `tensorboard` also writes OUTPUT/tensorboard (needs tensorboardX). `deterministic` restricts XLA to GPU operations
  with a fixed order of summation, so that a resumed run is bit-equal on a GPU too, but slower. CPUs and TPUs always
  use a fixed order. `benchmark` times `benchmark_steps` steps of the shape `preset` with random weights, without
  checkpoint, output or data; `against_flex` also times such a step in PyTorch with FlexAttention.

  Attributes:
    crs: final CRs of several runs, OUTPUT/cr2, OUTPUT/cr4, ....
    deterministic: a fixed order of sums on GPUs too: bit-equal when resumed, slower.
    benchmark: time steps with random weights instead, without data or output.
    preset: shape of the model that --benchmark times.
    benchmark_steps: steps that --benchmark times.
  """

  checkpoint: str = ""
  output: str = ""
  crs: tuple[float, ...] = ()
  stop_after: int = 0
  tensorboard: bool = False
  deterministic: bool = False
  benchmark: bool = False
  preset: str = "llama-3.2-1b"
  benchmark_steps: int = 10
  against_flex: bool = False

  def __post_init__(self):
    if self.stop_after < 0:
      raise ValueError(f"--stop_after={self.stop_after} must be 0 or more")
    if not self.benchmark and not (self.checkpoint and self.output):
      raise ValueError("give --checkpoint=FOLDER of a model and --output=FOLDER of the run, or --benchmark")


def gates_of(settings: RetrofitConfig, values: Mapping[str, Any] | None = None) -> DMSConfig:
  """The gates' config for `settings.objective`, from the flags --dms.* (or from `values`, by flag).

  Raises:
    ValueError: a value is refused, or --dms.objective names another objective.
  """
  names = [field.name for field in dataclasses.fields(DMSConfig)]
  given = {f"dms.{n}": program.FLAGS[f"dms.{n}"].value if values is None else values[f"dms.{n}"] for n in names}
  if given["dms.objective"] not in (settings.objective, "dms"):
    raise ValueError(f"--dms.objective={given['dms.objective']}: give --retrofit.objective instead, which decides it")
  return program.read_flags("dms", DMSConfig, given | {"dms.objective": settings.objective})


def asked_to_stop() -> contextlib.AbstractContextManager[Callable[[], bool]]:
  """A context that yields a function, which tells whether SIGINT or SIGTERM asked the run to save and end.

  With several processes JAX handles SIGTERM, and all stop after the same step; SIGINT to one of them does the same.
  """
  several = jax.process_count() > 1
  return stopping.saving(functools.partial(os.kill, os.getpid(), signal.SIGTERM) if several else None)


def scalars(folder: Path) -> Callable[[dict], None]:
  """Writes the numbers of log lines for TensorBoard."""
  from tensorboardX import SummaryWriter

  writers: list[SummaryWriter] = []

  def write(line: dict) -> None:
    if not writers:
      writers.append(SummaryWriter(str(folder), purge_step=line["step"]))  # drops later steps of an interrupted run
    for name, value in line.items():
      if name != "step" and isinstance(value, int | float):
        writers[0].add_scalar(name, value, line["step"])
    writers[0].flush()

  return write


def prepare_process(deterministic: bool) -> None:
  """Before anything asks for a device: XLA's flags of a `deterministic` run."""
  if deterministic:
    os.environ["XLA_FLAGS"] = " ".join([os.environ.get("XLA_FLAGS", ""), *DETERMINISTIC]).strip()


def say(message: str) -> None:
  """Logs a line, on process 0 only."""
  if processes.leads():
    program.log(message)


def own_text(
  base: Callable[[], Model], tokenizer: Tokenizer, data: DataConfig, dtype: str, output: Path
) -> Path | None:
  """OUTPUT/self_text.jsonl, sampled from `base` on one device if it is missing; None if `data` asks for none."""
  path = output / "self_text.jsonl"
  if not data.self_text.rows:
    return None
  with processes.together():
    if not path.exists():
      model = base()
      params = distributed.gathered(model.params)
      if processes.leads():
        params = jax.device_put(params, jax.local_devices()[0])
        model = model.replace(params=jax.tree.map(lambda x: x.astype(jnp.dtype(dtype)), params))
        progress = lambda items: program.progress(items, desc="sampling text")
        self_text.write(model, tokenizer, data.self_text, path, progress=progress)
  return path


def texts(base: Callable[[], Model], tokenizer: Tokenizer, data: DataConfig, dtype: str, folder: Path) -> list[Source]:
  """All text of `data`, tokenized; `folder` keeps what the model `base()` sampled and what was made up."""
  written = {}
  if (path := own_text(base, tokenizer, data, dtype, folder)) is not None:
    written["self_text"] = path
  if data.recall_text.rows:
    written["recall_text"] = folder / "recall_text.jsonl"
    with processes.together():
      if processes.leads():
        own = [] if path is None else [text for _, text in documents(path, tokenizer, data.fields)]
        progress = lambda items: program.progress(items, desc="making documents")
        recall_text.write(tokenizer, data.recall_text, written["recall_text"], filler=own, progress=progress)
  say("reading and tokenizing text")
  with processes.together():
    sources = load_sources(data, tokenizer, written)
  for source in sources:
    say(f"  {source.name}: {len(source.tokens):,} tokens in {source.document[-1]:,} documents")
  return sources


def rows(sources: list[Source], data: DataConfig, settings: RetrofitConfig) -> Packer:
  """The rows of `sources`: slices, or whole documents."""
  if not data.whole_documents:
    return Packer(sources, data, settings)
  packer = WholePacker(sources, data, settings)
  if packer.left_out:
    shown = [f"number {number} of {name} ({size:,})" for name, number, size in packer.left_out[:3]]
    more = ", ..." if len(packer.left_out) > len(shown) else ""
    say(f"  {len(packer.left_out):,} documents are left out, longer than a row of {settings.seq_len:,} tokens: "
        f"{', '.join(shown)}{more}")  # fmt: skip
  return packer


def generated(data: DataConfig, tokenizer: Tokenizer, settings: RetrofitConfig) -> StreamPacker:
  """Rows of problems of `data.families`, made as training goes on.

  Raises:
    ValueError: a family is unknown, or the tokenizer lacks words of its problems.
  """
  from experiments.tasks import reasoning  # all tasks, of which other runs need none

  documents = functools.partial(reasoning.documents, data.families, longest=settings.seq_len)
  reasoning.check_families("--data.families", data.families, tokenizer)
  packer = StreamPacker(documents, tokenizer, data, settings)
  sizes = packer.sizes()
  mean = f"{sum(sizes) / len(sizes):,.0f} tokens a document, " if sizes else ""
  say(f"  {','.join(data.families)}: {mean}{packer.workers} processes make them; {FIRST - len(sizes)} of the first "
      f"{FIRST} are longer than a row of {settings.seq_len:,} tokens: such are left out")  # fmt: skip
  return packer


def carry_out(
  run: Run,
  packer: Batches,
  tokenizer: Tokenizer,
  *,
  mesh: Mesh | None = None,
  board: Callable[[dict], None] = lambda line: None,
  stop_after: int | None = None,
) -> dict:
  """Trains or resumes `run`, logs its progress and plots DIRECTORY/log.png; returns the last line of its log.

  Raises:
    Stopped: SIGINT or SIGTERM came; the state is saved. Other errors are those of `train`.
  """
  settings, shown = run.config, [time.perf_counter()]

  def report(line: dict) -> None:
    board(line)
    if time.perf_counter() - shown[0] > 5:
      shown[0] = time.perf_counter()
      left = (settings.schedule.steps - line["step"] - 1) * line["seconds"]
      crs = f", CR {line['achieved_cr']:.2f} (target {line['target_cr']:.2f})" if "target_cr" in line else ""
      program.log(
        f"step {line['step']}/{settings.schedule.steps}: loss {line['loss']:.4f}{crs}, "
        f"{line['seconds'] * 1e3:.0f} ms a step, {left / 60:.1f} min left"
      )

  ahead = settings.schedule.steps - len(read_log(run.directory / LOG, killed=True))
  if stop_after is not None:
    ahead = min(ahead, stop_after)
  if estimate := forecast.retrofit_line(run.base.config, run.dms, run.lora, settings, ahead):
    say(f"{run.directory}: {estimate}")
  drawing = plots.pyplot() is not None
  draw = lambda step: plots.training(run.directory / "log.png", run.directory / LOG) if drawing else None
  try:
    with asked_to_stop() as stop:
      last = train(
        run, packer, tokenizer, mesh=mesh, report=report, saved=draw, stop=stop, stop_after=stop_after,
        progress=functools.partial(program.progress, desc="measuring thresholds"),
      )  # fmt: skip
  except Preempted as reason:
    raise stopping.Stopped(f"{run.directory}: {reason}") from None
  if processes.leads():
    draw(settings.schedule.steps)
  return last


def for_cr(settings: RetrofitConfig, cr: float) -> RetrofitConfig:
  """`settings` with another final CR, and as many steps as its ramp, hold and decay take."""
  return dataclasses.replace(settings, schedule=dataclasses.replace(settings.schedule, final_cr=cr, steps=0))


def main() -> None:
  config = program.read_flags("", Config)
  settings, data = program.read_flags("retrofit", RetrofitConfig), program.read_flags("data", DataConfig)
  dms, lora = None if settings.objective == "lm" else gates_of(settings), program.read_flags("lora", LoRAConfig)
  devices = program.read_flags("mesh", MeshConfig)
  prepare_process(config.deterministic)
  if settings.objective == "lm":
    raise ValueError("--retrofit.objective=lm trains a model without gates: that is experiments.train_reasoner")
  if settings.trainable != "lora" and (
    given := [f"--lora.{f.name}" for f in dataclasses.fields(LoRAConfig) if program.FLAGS[f"lora.{f.name}"].present]
  ):
    raise ValueError(f"{', '.join(given)}: retrofit.trainable={settings.trainable!r} has no low-rank updates")
  check(dms, lora, settings)
  if config.benchmark and settings.objective == "kvzap":
    raise ValueError("--benchmark times steps of retrofit.objective=dms, dmc or trimkv, not of kvzap")
  if config.against_flex and settings.objective != "dms":
    raise ValueError(f"--against_flex: the step in PyTorch is that of retrofit.objective=dms, not {settings.objective}")
  if config.against_flex and not config.benchmark:
    raise ValueError("--against_flex is a part of --benchmark: give both")
  flex = {}
  if config.against_flex:  # before JAX takes the device's memory
    shape = retrofit_benchmark.preset(config.preset)
    size = devices.data * devices.tensor
    flex = retrofit_benchmark.flex_steps(shape, dms, lora, settings, config.benchmark_steps, size)
  distributed.initialize(devices)
  mesh = distributed.create_mesh(devices, settings)
  if config.benchmark:
    shape = retrofit_benchmark.preset(config.preset)
    result = retrofit_benchmark.benchmark(shape, dms, lora, settings, config.benchmark_steps, mesh) | flex
    if processes.leads():
      print(retrofit_benchmark.table(config.preset, settings, result))
      program.finish(result)
    return
  if config.crs and not settings.ramps:
    raise ValueError(f"--crs: retrofit.objective={settings.objective} has no target CR")
  if config.tensorboard and importlib.util.find_spec("tensorboardX") is None:
    raise ValueError("--tensorboard needs tensorboardX: pip install 'dms_jax[tensorboard]'")
  output, start = Path(config.output), time.perf_counter()
  runs = {output / f"cr{cr:g}": for_cr(settings, cr) for cr in config.crs} or {output: settings}
  lasts = {}
  with locked_by_first(output):
    base = checkpoint.load(config.checkpoint, mesh=mesh)
    tokenizer, weights = Tokenizer.load(config.checkpoint), weights_of(base)
    if data.families:
      packer = generated(data, tokenizer, settings)
    else:
      packer = rows(texts(lambda: base, tokenizer, data, settings.memory.compute_dtype, output), data, settings)
    with contextlib.closing(packer):
      for directory, schedule in runs.items():
        if config.crs:
          say(f"{directory}: {schedule.schedule.steps} steps")
        board = scalars(directory / "tensorboard") if config.tensorboard and processes.leads() else lambda line: None
        run = Run(base, dms, lora, schedule, data, directory, weights)
        with locked_by_first(directory) if config.crs else contextlib.nullcontext():
          lasts[directory.name] = carry_out(
            run, packer, tokenizer, mesh=mesh, board=board, stop_after=config.stop_after or None
          )
  if not processes.leads():
    return
  minutes = (time.perf_counter() - start) / 60
  about = {"output": str(output), "minutes": minutes, "device": jax.devices()[0].device_kind}
  program.finish(about | ({"runs": lasts} if config.crs else {"last": lasts[output.name]}))


if __name__ == "__main__":
  program.define_flags("", Config)
  for name, (cls, defaults) in SECTIONS.items():
    program.define_flags(name, cls, **defaults)
  program.define_flags("mesh", MeshConfig)
  program.run(main)
