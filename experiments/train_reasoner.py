"""Trains a small reasoner, from scratch or further, on problems with search traces.

    python -m experiments.train_reasoner --output=runs/reasoner
    python -m experiments.train_reasoner --output=runs/small --model.num_layers=4 --model.d_model=256 \\
      --model.d_ff=704 --model.num_heads=4

A Llama of 7.2 M parameters reads 330 M tokens of generated problems (--data.families), each a prompt and a trace that
searches and then answers; the loss counts traces alone. Rows of --retrofit.seq_len tokens hold whole documents that do
not see each other; a document longer than a row is left out, and counted. Worker processes make them ahead of the
device (--data.workers). No part of a test problem is among them.

--checkpoint goes on from the weights of such a model in place of random ones: longer rows after short ones, as in
--checkpoint=runs/reasoner/final --retrofit.seq_len=8192 --retrofit.optimizer.learning_rate=5e-4.

The training is a retrofit's without gates, with the same flags and the same loop: the same command resumes a killed run
from its last checkpoint with the same numbers (--deterministic: on a GPU bit by bit). On SIGINT (Ctrl-C) and SIGTERM
the run saves its state after the step and exits with 130 and 143. It writes OUTPUT/{run.json, log.jsonl, log.png,
state/, final/}; final/ is a checkpoint for `dms_jax.load` with its tokenizer, a card (README.md) and the log.
experiments.retrofit then retrofits it on the same problems, with the same --data.families.
"""

from __future__ import annotations

import contextlib
import dataclasses
import shutil
import statistics
from pathlib import Path
from typing import Any

import jax

from dms_jax import checkpoint
from dms_jax.config import LoRAConfig, ModelConfig
from dms_jax.disk import write_text
from dms_jax.model import Model
from dms_jax.params import count_params, init_params, param_table
from dms_jax.retrofit import (
  DataConfig,
  LossConfig,
  MemoryConfig,
  OptimizerConfig,
  RetrofitConfig,
  SavingConfig,
  ScheduleConfig,
)
from dms_jax.retrofit.config import check
from dms_jax.retrofit.cost import step_flops
from dms_jax.retrofit.loop import LOG, Run, read_log, weights_of
from dms_jax.tokenizer import Tokenizer
from experiments import retrofit
from experiments.common import program
from experiments.reports import tables

FAMILIES = ("countdown", "grids", "programs", "graphs")
DEFAULTS: dict[str, Any] = {
  "objective": "lm",
  "trainable": "all",
  "batch_size": 16,
  "seq_len": 4096,  # the longest trace that a model is asked for, 3,840 tokens, with its prompt
  "schedule": ScheduleConfig(steps=5000),
  "optimizer": OptimizerConfig(1.5e-3, 150, -1, 0.03, beta2=0.98, weight_decay=0.1),
  "loss": LossConfig("lm"),
  "memory": MemoryConfig(loss_chunk=65536),
  "saving": SavingConfig(save_every=1000),
}
SHAPE: dict[str, Any] = {  # 7.2 M parameters
  "num_layers": 6,
  "d_model": 320,
  "d_ff": 896,
  "num_heads": 6,
  "num_kv_heads": 2,
  "head_dim": 64,
  "max_position_embeddings": 16384,
}
LOG_LINES = 500  # of the log in the checkpoint
LAST = 100  # steps whose mean loss the card states


@dataclasses.dataclass(frozen=True)
class Config:
  """Output and mode. The run stops after `stop_after` steps in total, as if interrupted; 0: at its end.

  `deterministic` restricts XLA to GPU operations with a fixed order of summation.

  Attributes:
    checkpoint: a reasoner whose weights the training starts from; none: random weights.
  """

  checkpoint: str = ""
  output: str = ""
  stop_after: int = 0
  deterministic: bool = False

  def __post_init__(self):
    if self.stop_after < 0:
      raise ValueError(f"--stop_after={self.stop_after} must be 0 or more")


def architecture(tokenizer: Tokenizer, shape: ModelConfig) -> ModelConfig:
  """`shape` with the vocabulary and the end words of the problems."""
  return dataclasses.replace(shape, vocab_size=tokenizer.vocab_size, eos_token_ids=tokenizer.eos_token_ids)


def read_shape() -> ModelConfig:
  """The flags --model.*, all of `ModelConfig` but those that follow from the vocabulary.

  Raises:
    ValueError: `ModelConfig` refuses a value; names the flag.
  """
  try:
    return program.read_flags("model", ModelConfig)
  except ValueError as error:
    raise ValueError(f"--model.{error}") from None


def untrained(config: ModelConfig, seed: int) -> Model:
  """A model with random weights, normal with standard deviation 0.02, float32."""
  return Model(init_params(param_table(config), jax.random.fold_in(jax.random.key(seed), 2)), config)


def trained(folder: str, tokenizer: Tokenizer) -> Model:
  """The reasoner in `folder`, float32.

  Raises:
    ValueError: it is damaged, is a retrofit, or has gates or another tokenizer; or --model.* is given, which the
      checkpoint decides.
  """
  shape = [name for name in program.flag_values(changed_only=True) if name.startswith("model.")]
  if shape:
    raise ValueError(f"--{shape[0]}: --checkpoint={folder} decides the shape; leave it out")
  stored = checkpoint.Stored.of(folder)
  if stored.dms is not None:
    raise ValueError(f"--checkpoint={folder} has gates; give a model without")
  model = checkpoint.load(stored, dtype="float32")
  if Tokenizer.load(folder).backend.to_str() != tokenizer.backend.to_str():
    raise ValueError(f"--checkpoint={folder} reads other words than these problems; give a model of this program")
  return model


def card(run: Run, tokenizer: Tokenizer, lines: list[dict]) -> str:
  """The text of the checkpoint's README.md, from the run's settings and its log `lines`."""
  model, settings = run.base.config, run.config
  last, flags = lines[-1], program.flag_values(changed_only=True)
  command = " \\\n  ".join(
    ["python -m experiments.train_reasoner", *(f"--{n}={program.spell(v)}" for n, v in flags.items())]
  )
  loss = statistics.fmean(line["nll"] for line in lines[-LAST:])
  filled = statistics.fmean(line["filled"] for line in lines if "filled" in line) if "filled" in last else 1.0
  start = f"from the weights of `{flags['checkpoint']}`" if flags.get("checkpoint") else "from scratch"
  rows = [
    ("parameters", f"{count_params(param_table(model)):,}, {settings.memory.compute_dtype}"),
    ("layers, width, feed-forward", f"{model.num_layers}, {model.d_model}, {model.d_ff}"),
    ("query heads, KV heads, head size", f"{model.num_heads}, {model.num_kv_heads}, {model.head_dim}"),
    ("vocabulary", f"{tokenizer.vocab_size} words"),
    ("problems", ", ".join(run.data.families or run.data.paths)),
    ("steps x rows x tokens", f"{settings.schedule.steps:,} x {settings.batch_size} x {settings.seq_len:,}"),
    ("tokens read, padding included", f"{last['tokens']:,}"),
    ("share of a row that is no padding", f"{filled:.3f}"),
    ("documents left out, longer than a row", f"{sum(line.get('left_out', 0) for line in lines):,}"),
    (f"loss, nats per trace token, mean of the last {min(LAST, len(lines))} steps", f"{loss:.4f}"),
    ("seconds of steps", f"{sum(line['seconds'] for line in lines):,.0f}"),
    ("device", f"{jax.devices()[0].device_kind}, jax {jax.__version__}"),
    ("seed", str(settings.seed)),
  ]
  return f"""# A small reasoner

A decoder of the {model.family} family, trained {start} on generated problems with search traces. The
loss counted traces alone. No part of a test problem was in training: a hash of each part tells them apart.

```python
import dms_jax
model, tokenizer = dms_jax.load("FOLDER")
```

{tables.markdown(["", "value"], rows)}

```
{command}
```

`log.jsonl` holds one step in {stride(len(lines))}; `log.png` shows all of them. All settings are in `config.json`.
"""


def stride(steps: int) -> int:
  """Steps from one line of the checkpoint's log to the next."""
  return max(1, steps // LOG_LINES)


def write_card(run: Run, tokenizer: Tokenizer) -> None:
  """Adds README.md, log.jsonl and log.png to the checkpoint."""
  folder = run.directory / "final"
  written = (run.directory / LOG).read_text(encoding="utf-8").splitlines()
  kept = [
    line for number, line in enumerate(written) if not number % stride(len(written)) or number == len(written) - 1
  ]
  write_text(folder / LOG, "\n".join(kept) + "\n")
  write_text(folder / "README.md", card(run, tokenizer, read_log(run.directory / LOG)))
  if (picture := run.directory / "log.png").exists():
    shutil.copyfile(picture, folder / picture.name)


def main() -> None:
  config, shape = program.read_flags("", Config), read_shape()
  settings, data = program.read_flags("retrofit", RetrofitConfig), program.read_flags("data", DataConfig)
  if not config.output:
    raise ValueError("give --output=FOLDER of the run")
  check(None, LoRAConfig(), settings)
  if data.self_text.rows:
    raise ValueError("--data.self_text: an untrained model has nothing to say; give --data.families or --data.paths")
  if not data.families and not data.whole_documents:
    raise ValueError("give --data.families, or --data.paths of documents with --data.whole_documents")
  retrofit.prepare_process(config.deterministic)
  from experiments.tasks import reasoning  # all tasks, which take a while to import

  tokenizer = reasoning.tokenizer()
  start = trained(config.checkpoint, tokenizer) if config.checkpoint else None
  model = architecture(tokenizer, shape) if start is None else start.config
  if settings.seq_len > model.max_position_embeddings:
    flag = "--model." if start is None else f"--checkpoint={config.checkpoint}: "
    raise ValueError(
      f"--retrofit.seq_len={settings.seq_len} is more than {flag}max_position_embeddings="
      f"{model.max_position_embeddings}"
    )
  base, weights = (untrained(model, settings.seed), "random") if start is None else (start, weights_of(start))
  output = Path(config.output)
  if data.families:
    packer = retrofit.generated(data, tokenizer, settings)
  else:
    packer = retrofit.rows(
      retrofit.texts(lambda: base, tokenizer, data, settings.memory.compute_dtype, output), data, settings
    )
  run = Run(base, None, LoRAConfig(), settings, data, output, weights)
  flops = step_flops(model, None, None, settings)
  program.log(
    f"{count_params(param_table(model)):,} parameters, {settings.schedule.steps:,} steps of {flops.tokens:,} "
    f"tokens, {flops.total * settings.schedule.steps:.2e} FLOPs; the time left follows after the first steps"
  )
  with contextlib.closing(packer):
    last = retrofit.carry_out(run, packer, tokenizer, stop_after=config.stop_after or None)
  if last["step"] + 1 == settings.schedule.steps:
    write_card(run, tokenizer)
  program.finish({"output": str(output), "last": last})


if __name__ == "__main__":
  program.define_flags("", Config)
  program.define_flags("model", ModelConfig, **SHAPE)
  program.define_flags("retrofit", RetrofitConfig, **DEFAULTS)
  program.define_flags("data", DataConfig, families=FAMILIES)
  program.run(main, writes="folder", goes_on=True)
