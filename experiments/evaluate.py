"""Quality of a checkpoint or retrofit: perplexity and KL from the original on a text, scores on tasks, achieved CR.

    python -m experiments.evaluate --checkpoint=checkpoints/smollm2-135m-instruct --text=wiki.test.raw \\
      --retrofit=experiments/results/retrofit/smollm2-135m-cr4 --lengths=1024,4096

Procedure of every quality figure of this project: the whole text in chunks of T tokens, every position but a chunk's
first, hard decisions, KL(original || retrofit) in nats per token. `--max_tokens=20480 --lengths=1024 --dtype=float32`
without a retrofit is the perplexity check of the converted weights. `--retrofit` takes several, comma-separated.

    python -m experiments.evaluate --checkpoint=checkpoints/smollm2-135m-instruct \\
      --retrofit=experiments/results/retrofit/smollm2-135m-cr4 --tasks=needle,tracking,hellaswag,mmlu,gsm8k \\
      --lengths=1024,2048 --data.hellaswag=hellaswag_val.jsonl --data.mmlu=mmlu --data.gsm8k=test.jsonl --limit=100

Tasks put the same samples, drawn by `--seed`, to the original and to each retrofit: means with standard errors, and
those of the paired difference original - retrofit. RULER's needle and variable tracking at each length, 10-shot
HellaSwag, 5-shot MMLU, and the likelihood of GSM8K's solutions after 5 worked ones. The achieved CR is that of the
cache at the end of what was read and written. After each task, results, every sample and a picture so far go to
`--output`, by default a folder under runs/evaluate named from the flags.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np

from dms_jax import checkpoint
from dms_jax.evaluation.text import text_quality
from dms_jax.model import Model
from dms_jax.tokenizer import Tokenizer
from experiments.ablation import sweeps
from experiments.common import files, program
from experiments.methods import run as tasks_run
from experiments.reports import plots
from experiments.reports import tasks as report
from experiments.tasks.base import TasksConfig


@dataclasses.dataclass(frozen=True)
class Config:
  """`max_tokens` 0 reads the whole text; `thresholds` sweeps the eviction threshold without retraining.

  `output` is a JSON file; pictures and the tasks' samples go beside it.
  """

  checkpoint: str
  text: str = ""
  retrofit: tuple[str, ...] = ()
  lengths: tuple[int, ...] = (4096,)
  thresholds: tuple[float, ...] = (0.0,)
  max_tokens: int = 0
  batch: int = 1
  dtype: Literal["bfloat16", "float32"] = "bfloat16"
  output: str = ""

  def __post_init__(self):
    for name, least in (("batch", 1), ("max_tokens", 0)):
      if (value := getattr(self, name)) < least:
        raise ValueError(f"--{name}={value} must be {least} or more")
    if short := [length for length in self.lengths if length < 2]:
      raise ValueError(f"--lengths={short[0]} must be 2 or more tokens")
    tasks_run.check_names(["original", *(self.name(path, at) for path in self.retrofit for at in self.thresholds)])

  def name(self, retrofit: str, threshold: float) -> str:
    """A retrofit's in the tasks' results: its path, with the threshold where that is not 0 or there are several."""
    plain = not threshold and len(self.thresholds) == 1
    return str(Path(retrofit)) if plain else f"{Path(retrofit)} at {threshold:.12g}"

  def load(self, retrofit: str) -> Model:
    """A retrofit of the checkpoint."""
    return checkpoint.load_retrofitted(self.checkpoint, retrofit, dtype=self.dtype)


def text_rows(config: Config, original: Model, tokens: np.ndarray) -> list[dict[str, Any]]:
  """The quality of every retrofit at every length and threshold, printed as a table."""
  rows = []
  header = f"{'T':>6} {'retrofit':<28} {'threshold':>9} {'ppl':>8} {'change':>8} {'KL':>8} {'CR at T':>8}"
  print(header)
  for name in config.retrofit or ("",):
    model = config.load(name) if name else None
    for length in config.lengths:
      for threshold in config.thresholds:
        progress = partial(program.progress, desc=f"T {length}")
        row = text_quality(original, model, tokens, length, threshold=threshold, batch=config.batch, progress=progress)
        rows.append({"retrofit": name, "threshold": threshold, **row})
        print(
          f"{length:>6} {Path(name).name or 'original':<28} {threshold:>9.2f} "
          f"{row.get('perplexity', row['perplexity_original']):>8.3f} {row.get('perplexity_change', 0):>+8.2%} "
          f"{row.get('kl', 0):>8.4f} {row.get('achieved_cr', 1):>8.2f}",
          flush=True,
        )
  return rows


def text_picture(config: Config, path: Path, rows: list[dict[str, Any]], title: str) -> str | None:
  """KL, perplexity and compression of retrofits by length; the path written, None where there is nothing to draw."""
  name = lambda row: config.name(row["retrofit"], row["threshold"])
  scored = sorted((row for row in rows if "achieved_cr" in row), key=lambda row: row["length"])
  short = sweeps.brief(map(name, scored))
  shown = [{**row, "x": f"{row['length']:,}", "line": short[name(row)]} for row in scored]
  return plots.ablation(path, shown, "T", title) if len(shown) > 1 else None


def task_rows(
  config: Config,
  original: Model,
  jobs: list[tasks_run.Job],
  tokenizer: Tokenizer,
  save: Callable[[list[dict[str, Any]], list[dict[str, Any]]], None],
) -> None:
  """Carries out every job, printed as a table.

  Args:
    save: called after each job with (a row for each task, length, metric and retrofit, a record for each sample) of all
      jobs so far.
  """
  methods = [tasks_run.Method("original", original, math.inf)]
  models = {path: config.load(path) for path in config.retrofit}
  if not models and original.dms is not None:  # the checkpoint brings its own gates
    models = {config.checkpoint: original}
  for path, model in models.items():
    methods += [tasks_run.Method(config.name(path, at), model, at) for at in config.thresholds]
  rows, samples = [], []
  print(report.HEADER)
  for found, each in tasks_run.run(jobs, methods, tokenizer, batch=config.batch, progress=program.progress):
    rows += found
    samples += each
    print("\n".join(report.line(row) for row in found), flush=True)
    save(rows, samples)


def main() -> None:
  config, tasks = program.read_flags("", Config), program.read_flags("", TasksConfig)
  if not config.text and not tasks.tasks:
    raise ValueError("nothing to evaluate on: give --text=PATH, --tasks=needle,hellaswag,... or both")
  tokenizer = Tokenizer.load(config.checkpoint)
  tokens = np.zeros(0, np.int32)
  if config.text:
    tokens = np.asarray(tokenizer.encode(files.read_text("text", config.text)), np.int32)[: config.max_tokens or None]
  max_positions = checkpoint.read_config(config.checkpoint)[1].max_position_embeddings
  jobs = tasks_run.prepare(tasks, config.lengths, tokenizer, max_positions)
  original = checkpoint.load(config.checkpoint, dtype=config.dtype)
  original = original.replace(dms=None) if config.retrofit else original

  result: dict[str, Any] = {}
  output = Path(config.output) if config.output else program.results_dir("evaluate") / "evaluate.json" if jobs else None
  title = f"{Path(config.checkpoint).name}, {tasks.limit or 'all'} samples a task and length, bars: standard errors"

  def save(**more) -> None:
    result.update(more)
    if output is not None:
      result["saved"] = str(output)
      about = {"config": program.flag_values(), "environment": program.environment()}
      program.save_json(output, {**about, **result})

  def save_tasks(rows: list[dict[str, Any]], samples: list[dict[str, Any]]) -> None:
    kept = report.save_samples(output.with_suffix(".jsonl"), samples)
    save(tasks=rows, samples=kept, picture=report.picture(output.with_suffix(".png"), rows, title))

  if config.text:
    found = text_rows(config, original, tokens)
    save(tokens=len(tokens), quality=found)
    if output is not None:
      path = output.with_name(f"{output.stem}_text.png")
      save(text_picture=text_picture(config, path, found, Path(config.text).name))
  if jobs:
    task_rows(config, original, jobs, tokenizer, save_tasks)
  program.finish(result)


if __name__ == "__main__":
  program.define_flags("", Config)
  program.define_flags("", TasksConfig)
  program.run(main)
