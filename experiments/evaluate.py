"""Quality of a checkpoint or retrofit: perplexity, KL from the original, scores on tasks, CR.

    python -m experiments.evaluate --checkpoint=checkpoints/smollm2-135m-instruct --text=wiki.test.raw \\
      --retrofit=experiments/results/retrofit/smollm2-135m-cr4 --lengths=1024,4096

Every quality figure of this project follows one procedure: the whole text in chunks of T tokens, every position but a
chunk's first, hard decisions, KL(original || retrofit) in nats per token. `--retrofit` takes several folders, separated
by commas. Without a retrofit, `--max_tokens=20480 --lengths=1024 --dtype=float32` checks the perplexity of converted
weights.

    python -m experiments.evaluate --checkpoint=checkpoints/smollm2-135m-instruct \\
      --retrofit=experiments/results/retrofit/smollm2-135m-cr4 --tasks=needle,tracking,hellaswag,mmlu,gsm8k \\
      --lengths=1024,2048 --hellaswag.data=hellaswag_val.jsonl --mmlu.data=mmlu --gsm8k.data=test.jsonl --limit=100

The original and each retrofit answer the same samples, chosen by `--seed`. Tables show each score with its standard
error, then its difference from the original's, paired sample by sample. The tasks are RULER's needle and variable
tracking at each length, 10-shot HellaSwag, 5-shot MMLU, and the likelihood of GSM8K's solutions after 5 worked ones.
The achieved CR is measured after everything was read and written. `--chains=8 --temperature=0.6` samples eight texts
for each prompt of a task that writes; the prompt's score is their mean.

Results go to the JSON file `--output`. With tasks its default lies in a folder of runs/evaluate named after the flags.
With a text alone there is no default, and results are only printed. Records of the tasks, one JSON line for each chain,
go to the same name with .jsonl. The same command again resumes a killed run.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np

from dms_jax import DMS, Vanilla, checkpoint
from dms_jax.evaluation.text import text_quality
from dms_jax.model import Model
from dms_jax.tokenizer import Tokenizer
from experiments.common import files, program
from experiments.methods import records, run
from experiments.methods.run import Method
from experiments.methods.summary import Entry, summarise
from experiments.reports import figures_tasks, plots, tables
from experiments.tasks import TASKS, get
from experiments.tasks.base import TasksConfig

ORIGINAL = "original"  # the baseline of every difference
TEXT = "text"  # the name under which a text's quality is summarised


@dataclasses.dataclass(frozen=True)
class Config:
  """`max_tokens` 0 reads the whole text; `thresholds` sweeps the eviction threshold without retraining."""

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
    run.check_names([ORIGINAL, *(self.name(path, at) for path in self.retrofit for at in self.thresholds)])

  def name(self, retrofit: str, threshold: float) -> str:
    """A method's name: the retrofit's path, with the threshold if it is not 0 or one of several."""
    plain = not threshold and len(self.thresholds) == 1
    return str(Path(retrofit)) if plain else f"{Path(retrofit)} at {threshold:.12g}"

  def load(self, retrofit: str) -> Model:
    """A retrofit of the checkpoint."""
    return checkpoint.load_retrofitted(self.checkpoint, retrofit, dtype=self.dtype)


def methods_of(config: Config, original: Model) -> list[Method]:
  """The original, which evicts nothing, and each retrofit at each threshold."""
  never = Vanilla() if original.dms is None else DMS(threshold=math.inf)
  base = checkpoint.fingerprint(config.checkpoint)
  about = lambda path: program.fingerprint([base, checkpoint.fingerprint(path), config.dtype])
  models = {path: config.load(path) for path in config.retrofit}
  if not models and original.dms is not None:  # the checkpoint has gates of its own
    models = {config.checkpoint: original}
  return [
    Method(ORIGINAL, original, never, about(config.checkpoint)),
    *(
      Method(config.name(path, at), model, DMS(threshold=at), about(path))
      for path, model in models.items()
      for at in config.thresholds
    ),
  ]  # fmt: skip


# Text -----------------------------------------------------------------------------------------------------------------


def text_entries(method: str, quality: dict[str, Any]) -> list[Entry]:
  """The results of `text_quality` as summary entries: the original's, and the retrofit's if one was scored.

  A text is scored as one whole, so there are no standard errors; samples are its chunks.
  """
  length, chunks = quality["length"], quality["chunks"]
  before = quality["perplexity_original"]
  entries = [Entry(ORIGINAL, TEXT, length, "perplexity", chunks, before, tokens=length)]
  if "kl" in quality:
    own = dict(achieved_cr=quality.get("achieved_cr", 1.0), tokens=length)
    after = quality["perplexity"]
    entries.append(Entry(method, TEXT, length, "perplexity", chunks, after, difference=after - before, **own))
    entries.append(Entry(method, TEXT, length, "kl", chunks, quality["kl"], **own))
  return entries


def score_text(config: Config, original: Model, tokens: np.ndarray) -> list[Entry]:
  """Scores every retrofit at every length and threshold, and prints a table."""
  entries: dict[tuple, Entry] = {}
  for path in config.retrofit or ("",):
    model = config.load(path) if path else None
    for length in config.lengths:
      for threshold in config.thresholds:
        name = config.name(path, threshold) if path else ORIGINAL
        progress = partial(program.progress, desc=f"{name}, T {length}")
        quality = text_quality(
          original, model, tokens, length, threshold=threshold, batch=config.batch, progress=progress
        )
        found = text_entries(name, quality)
        program.log("  ".join(f"{entry.method}, T {length}: {entry.metric} {entry.mean:.4f}" for entry in found))
        entries |= {(entry.method, entry.length, entry.metric): entry for entry in found}
  found = sorted(entries.values(), key=lambda entry: entry.length)
  print(tables.texts(found, ORIGINAL), flush=True)
  return found


def text_picture(path: Path, entries: list[Entry], title: str) -> str | None:
  """Plots KL, perplexity and compression by length; returns the path written, None for fewer than two points."""
  cells = {(entry.method, entry.length, entry.metric): entry for entry in entries}
  points = sorted(((e.length, e.method) for e in entries if e.metric == "kl"), key=lambda point: point[0])
  short = tables.short_names(list(dict.fromkeys(method for _, method in points)))
  rows = [
    {
      "x": f"{length:,}", "line": short[method], "kl": cells[method, length, "kl"].mean,
      "perplexity_change": (p := cells[method, length, "perplexity"]).difference / (p.mean - p.difference),
      "achieved_cr": p.achieved_cr,
    }
    for length, method in points
  ]  # fmt: skip
  return plots.ablation(path, rows, "T", title) if len(rows) > 1 else None


# Tasks ----------------------------------------------------------------------------------------------------------------


def run_tasks(
  config: Config, methods: list[Method], jobs: list[run.Job], tokenizer: Tokenizer, path: Path,
  save: Callable[[list[Entry]], None],
) -> None:  # fmt: skip
  """Runs every job that the records at `path` do not hold yet, and prints a table for each.

  Args:
    save: called after each job with the summary of all jobs so far.

  Raises:
    ValueError: the records at `path` have other settings.
  """
  done = records.read(path)
  expected = {(m.name, job.task.name, job.length): run.settings_of(job, m) for m in methods for job in jobs}
  records.check_settings(path, done, expected)
  names, entries = [method.name for method in methods], []
  for job in jobs:
    wanted = job.task.name, job.length, job.chains
    same = lambda record, wanted=wanted: (record.task, record.length, record.chains) == wanted
    own = [record for record in done if same(record) and record.method in names]
    for found in run.run(job, methods, tokenizer, batch=config.batch, done=own, progress=program.progress):
      records.append(path, found)
      own += found
    finished = summarise(sorted(own, key=lambda record: names.index(record.method)), ORIGINAL)
    print(f"{tables.scores(finished, ORIGINAL, TASKS)}\n", flush=True)
    entries += finished
    save(entries)


def main() -> None:
  config, chosen = program.read_flags("", Config), program.read_flags("", TasksConfig)
  if not config.text and not chosen.tasks:
    raise ValueError("nothing to evaluate on: give --text=PATH, --tasks=needle,hellaswag,... or both")
  tokenizer = Tokenizer.load(config.checkpoint)
  tokens = np.zeros(0, np.int32)
  if config.text:
    tokens = np.asarray(tokenizer.encode(files.read_text("text", config.text)), np.int32)[: config.max_tokens or None]
  max_positions = checkpoint.read_config(config.checkpoint)[1].max_position_embeddings
  tasks = [program.read_flags(name, get(name)) for name in chosen.tasks]
  jobs = run.prepare(tasks, chosen, config.lengths, tokenizer, max_positions)
  original = checkpoint.load(config.checkpoint, dtype=config.dtype)
  original = original.replace(dms=None) if config.retrofit else original

  result: dict[str, Any] = {"summary": []}
  output = Path(config.output) if config.output else program.results_dir("evaluate") / "evaluate.json" if jobs else None
  title = f"{Path(config.checkpoint).name}, {chosen.limit or 'all'} samples a task and length, bars: standard errors"

  def save(**more) -> None:
    result.update(more)
    if output is not None:
      result["saved"] = str(output)
      about = {"config": program.flag_values(), "environment": program.environment()}
      program.save_json(output, {**about, **result})

  text = []
  if config.text:
    text = score_text(config, original, tokens)
    save(tokens=len(tokens), summary=text)
    if output is not None:
      picture = output.with_name(f"{output.stem}_text.png")
      save(text_picture=text_picture(picture, text, Path(config.text).name))
  if jobs:
    path, picture = output.with_suffix(".jsonl"), output.with_suffix(".png")

    def save_tasks(entries: list[Entry]) -> None:
      drawn = figures_tasks.tasks(picture, entries, ORIGINAL, title)
      save(summary=text + entries, records=str(path), picture=drawn)

    run_tasks(config, methods_of(config, original), jobs, tokenizer, path, save_tasks)
  program.finish(result)


if __name__ == "__main__":
  program.define_flags("", Config)
  program.define_flags("", TasksConfig)
  for name, cls in TASKS.items():
    program.define_flags(name, cls)
  program.run(main)
