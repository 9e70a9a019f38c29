"""Evaluates methods on tasks and texts at budgets, with W chains of L tokens, by flags.

    python -m experiments.evaluate --checkpoint=checkpoints/smollm2-135m-instruct \\
      --retrofit=smollm2-135m-cr4 --methods=vanilla,dms,tova,snapkv,quest --cr=2,4 \\
      --tasks=needle,gsm8k --lengths=1024 --gsm8k.data=test.jsonl --limit=100 --text=wiki.test.raw

`--methods` are names of policies. Policies that read gates run the weights of `--retrofit` (folders separated by
commas; `dms:FOLDER` is for one method). The others run the original weights. Without `--methods` the original
and each retrofit under DMS are compared. A policy's own settings are flags: `--quest.page=32`.

`--cr=2,4,8` and `--budgets=512` (tokens a head) bound each method that has a budget. A CR gives each text a budget of
(prompt + most new tokens) / CR tokens, as in the DMS paper; under `--budget_rule=seen` it is (tokens seen so far) / CR.
DMS has the CR that it was trained for; `dms_budget` is DMS under a budget. `--thresholds` sweeps the eviction threshold
of gates without retraining.

Tasks that write sample W chains of each prompt at `--temperature` and `--top_p`. `--chains=1,4,8` writes 8 and averages
over subsets for 1 and 4. `--max_tokens=512,2048` are L, the most new tokens; each task has a default. Likelihood tasks
score given continuations. `--text` names files whose perplexity and KL(original || method), nats per token, are
measured in chunks of T tokens (`--lengths`), decoded token by token; a chunk's first token is not scored.

Every method answers the same samples, chosen by `--seed`; differences are paired sample by sample. The folder
`--output`, by default one in runs/evaluate named after the flags, holds config.json, records.jsonl (a line a chain or
question), text.jsonl (a line a chunk), traces.jsonl (with `--traces`), summary.json and pictures. The same command
resumes a killed run, chain by chain.

Several devices: --mesh.data=2 --mesh.tensor=4 splits rows and KV heads. `--batch` is rounded up to as many for each row
of devices, and for each device where 4 does not divide the KV heads; so is `--width`, where the chains of a prompt stay
together. --kv_budget_gib is each device's. On several hosts run the same command on each, with --output on a
shared file system and --mesh.coordinator=HOST:PORT --mesh.processes=2 --mesh.process=0 (1, ...). Process 0 writes and
prints; each grades for itself.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import numpy as np
from jax.sharding import Mesh

from dms_jax import DMS, Vanilla, checkpoint, policies
from dms_jax.json_files import read_json
from dms_jax.model import Model
from dms_jax.policies import Policy
from dms_jax.sharding import decoding
from dms_jax.spmd import place
from dms_jax.tokenizer import Tokenizer
from experiments.common import files, forecast, program
from experiments.common import mesh as mesh_flags
from experiments.methods import method as methods_module
from experiments.methods import records, run, summary, trace
from experiments.methods.budgets import fitted
from experiments.methods.estimate import Estimate, duration
from experiments.methods.method import Method
from experiments.methods.records import TEXT, Record
from experiments.methods.score import score_text
from experiments.methods.summary import Entry, summarise
from experiments.reports import figures_tasks, plots, tables
from experiments.tasks import TASKS, get
from experiments.tasks.base import TasksConfig

ORIGINAL = "original"  # the name of the dense method where `--methods` names none
VANILLA = "vanilla"  # its name among `--methods`
CONFIG, RECORDS, TEXTS, SUMMARY = "config.json", "records.jsonl", "text.jsonl", "summary.json"


@dataclasses.dataclass(frozen=True)
class Config:
  """The first `text_tokens` of each text are read; 0: all. `batch` rows are scored together, `width` write together.

  `kv_budget_gib` bounds the cache of rows that write; rows without room wait on the host. The first `traces` prompts
  of each task are traced: which tokens each head holds when the first chain ends, for `experiments.report`.

  Attributes:
    methods: names of policies; without any, the original is compared with each retrofit under DMS.
    retrofit: folders or shipped names, separated by commas; dms:FOLDER is for one method.
    cr: compression ratios that bound each method with a budget, such as 2,4,8.
    budgets: tokens a head that bound each method with a budget, such as 512.
    budget_rule: of a CR: (prompt + most new tokens) / CR ("paper"), or (tokens seen) / CR.
    thresholds: eviction thresholds of gates, swept without retraining.
    text: files whose perplexity and KL (original || method, nats a token) are measured.
    text_tokens: first tokens of each text that are read; 0: all.
    lengths: T, tokens of a text's chunk.
    max_tokens: L, most new tokens, such as 512,2048; each task has a default.
    batch: rows that are scored together.
    traces: first prompts of each task that are traced for experiments.report.
    output: folder of records, summary and pictures; default runs/evaluate/FLAGS.
  """

  checkpoint: str
  methods: tuple[str, ...] = ()
  retrofit: tuple[str, ...] = ()
  cr: tuple[float, ...] = ()
  budgets: tuple[int, ...] = ()
  budget_rule: Literal["paper", "seen"] = "paper"
  thresholds: tuple[float, ...] = ()
  text: tuple[str, ...] = ()
  text_tokens: int = 0
  lengths: tuple[int, ...] = (4096,)
  max_tokens: tuple[int, ...] = ()
  batch: int = 1
  width: int = 8
  kv_budget_gib: float | None = None
  dtype: Literal["bfloat16", "float32"] = "bfloat16"
  traces: int = 0
  output: str = ""

  def __post_init__(self):
    for name, least in (("batch", 1), ("width", 1), ("text_tokens", 0), ("traces", 0)):
      if (value := getattr(self, name)) < least:
        raise ValueError(f"--{name}={value} must be {least} or more")
    for name, least, what in (
      ("lengths", 2, "2 or more tokens"), ("max_tokens", 1, "1 or more tokens"), ("budgets", 1, "1 or more tokens"),
      ("cr", 1, "1 or more, and finite"),
    ):  # fmt: skip
      if wrong := [value for value in getattr(self, name) if not least <= value < math.inf]:
        raise ValueError(f"--{name}={wrong[0]} must be {what}")
      if len(set(getattr(self, name))) < len(getattr(self, name)):
        raise ValueError(f"--{name}={program.spell(getattr(self, name))}: a number twice")
    if any(map(math.isnan, self.thresholds)):
      raise ValueError(f"--thresholds={program.spell(self.thresholds)} must be numbers")
    if self.kv_budget_gib is not None and not 0 < self.kv_budget_gib < math.inf:
      raise ValueError(f"--kv_budget_gib={self.kv_budget_gib} must be a number above 0, or none")
    if Path(self.output).suffix in (".json", ".jsonl"):
      raise ValueError(f"--output={self.output} must be a folder: several files are written into it")
    for name in self.methods:
      methods_module.policy_class(name)
    if not self.methods and (given := [name for name in ("cr", "budgets") if getattr(self, name)]):
      raise ValueError(f"--{given[0]} bounds methods: name them, such as --methods=vanilla,dms,tova,snapkv")
    if not self.methods:
      names = [ORIGINAL, *(self.name(path, at) for path in self.retrofit for at in self.thresholds or (0.0,))]
      methods_module.check_names([Method(name, None) for name in names])

  def name(self, retrofit: str, threshold: float) -> str:
    """A method's name without `--methods`: the retrofit's path, with the threshold if it is one of several."""
    plain = not threshold and len(self.thresholds) < 2
    return str(Path(retrofit)) if plain else f"{Path(retrofit)} at {threshold:.12g}"

  def load(self, retrofit: str, mesh: Mesh | None = None) -> Model:
    """A retrofit of the checkpoint."""
    files.check_retrofit("retrofit", retrofit, whole=True)
    how = dict(dtype=self.dtype, mesh=mesh, rules=decoding)
    return place(checkpoint.load_retrofitted(self.checkpoint, retrofit, **how), mesh)


def methods_of(
  config: Config, original: Model, read: Callable[[str, type[Policy]], Policy] = lambda name, cls: cls()
) -> list[Method]:
  """The methods of `--methods`; without it the original, evicting nothing, and each retrofit at each threshold.

  Args:
    read: makes a policy from its flags.
  """
  base = checkpoint.fingerprint(config.checkpoint)
  about = lambda path: program.fingerprint([base, checkpoint.fingerprint(path), config.dtype])
  pairs = methods_module.split_retrofits(config.retrofit)
  loaded = [(name, path, config.load(path, original.mesh), about(path)) for name, path in pairs]
  if config.methods:
    return methods_module.build(
      config.methods, original, about(config.checkpoint), loaded, read, crs=config.cr, tokens=config.budgets,
      rule=config.budget_rule, thresholds=config.thresholds,
    )  # fmt: skip
  never = Vanilla() if original.dms is None else DMS(threshold=math.inf)
  if not loaded and original.dms is not None:  # the checkpoint has gates of its own
    loaded = [("", config.checkpoint, original, about(config.checkpoint))]
  return [
    Method(ORIGINAL, original, never, about(config.checkpoint)),
    *(
      Method(config.name(path, at), model, DMS(threshold=at), print_)
      for _, path, model, print_ in loaded
      for at in config.thresholds or (0.0,)
    ),
  ]  # fmt: skip


def baseline_of(methods: list[Method]) -> str:
  """The name of the method that the others are compared with: the dense one if there is one, else the first."""
  names = [method.name for method in methods]
  return next((name for name in (ORIGINAL, VANILLA) if name in names), names[0])


def labelled(entries: list[Entry], baseline: str) -> list[Entry]:
  """Entries named by method and budget: tables and figures tell methods apart by name."""
  own = lambda entry: baseline if entry.method == baseline and not entry.budget.keys() - {"threshold"} else entry.label
  return [dataclasses.replace(entry, method=own(entry)) for entry in entries]


# Text -----------------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Texts:
  """The texts of a run in chunks of T tokens, which are scored together.

  Fields:
    chunks: int32 [n, T], text after text.
    places: (name of the text, number of the chunk within it, fingerprint of the text) of each.
  """

  chunks: np.ndarray
  places: list[tuple[str, int, str]]

  @property
  def length(self) -> int:
    return self.chunks.shape[1]

  def settings(self, method: Method) -> dict[tuple, str]:
    """{`Record.cell`: `Record.settings`} of a method's records."""
    return {(*method.key, name, self.length): f"{content}-{method.checkpoint}" for name, _, content in self.places}

  def record(self, method: Method) -> Callable[..., Record]:
    """Makes the record of a chunk."""

    def make(number: int, chain: int, most: int, **found) -> Record:
      name, chunk, content = self.places[number]
      return Record(
        method.name, name, self.length, method.budget, chains=1, max_tokens=most, seed=0, prompt=chunk, chain=chain,
        settings=f"{content}-{method.checkpoint}", **found,
      )  # fmt: skip

    return make

  def missing(self, method: Method, done: list[Record]) -> list[int]:
    """Numbers of the chunks without a record."""
    own = *method.key, self.length
    there = {(r.task, r.prompt) for r in done if (*r.cell[:2], r.length) == own}
    return [number for number, place in enumerate(self.places) if place[:2] not in there]


def read_texts(config: Config, tokenizer: Tokenizer, max_positions: int) -> list[Texts]:
  """The texts of `--text` at every length; a shorter last chunk is dropped. None without a text.

  Raises:
    ValueError: no such text, it is shorter than a chunk, or two have one name.
  """
  if config.text and (longest := max(config.lengths)) > max_positions:
    raise ValueError(f"--lengths={longest}: the model's context is {max_positions} tokens")
  names = [TEXT] if len(config.text) == 1 else [f"{TEXT} {Path(path).stem}" for path in config.text]
  if twice := sorted({name for name in names if names.count(name) > 1}):
    raise ValueError(f"--text: several files would be called {twice[0]!r} in the results; rename one")
  read = {}
  for name, path in zip(names, config.text, strict=True):
    read[name] = np.asarray(tokenizer.encode(files.read_text("text", path)), np.int32)[: config.text_tokens or None]
    if len(read[name]) < longest:
      raise ValueError(f"--text={path} has {len(read[name])} tokens, less than a chunk of --lengths={longest}")
  found = []
  for length in config.lengths if read else ():
    parts = {name: tokens[: len(tokens) // length * length].reshape(-1, length) for name, tokens in read.items()}
    about = {name: program.fingerprint(tokens) for name, tokens in read.items()}
    places = [(name, chunk, about[name]) for name, part in parts.items() for chunk in range(len(part))]
    found.append(Texts(np.concatenate(list(parts.values())), places))
  return found


def text_picture(path: Path, entries: list[Entry], title: str) -> str | None:
  """Plots KL, perplexity and CR by length; the path written, or None if there are fewer than two points."""
  cells = {(entry.method, entry.length, entry.metric): entry for entry in entries}
  points = sorted(((e.length, e.method) for e in entries if e.metric == "kl"), key=lambda point: point[0])
  points = [point for point in points if cells[point[1], point[0], "perplexity"].difference is not None]
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


def levels_picture(path: Path, entries: list[Entry]) -> str | None:
  """Plots KL against achieved CR at the largest T, if one method is read at three CRs or more; the path written.

  Such a method is a curve for each text, any other a mark.
  """
  longest = max((entry.length or 0 for entry in entries), default=0)
  found = [e for e in entries if (e.metric, e.length) == ("kl", longest) and e.mean > 0]
  at = {
    name: {e.budget["cr"] for e in found if e.method == name and "cr" in e.budget}
    for name in dict.fromkeys(e.method for e in found)
  }
  ranged = [name for name, crs in at.items() if len(crs) > 2]
  if len(ranged) != 1:
    return None
  rows = [
    {**dataclasses.asdict(e), "text": e.task.removeprefix(f"{TEXT} "), "standard_error": e.standard_error or 0.0}
    for e in found
    if e.method == ranged[0] or not at[e.method]
  ]
  return plots.levels(path, rows, ranged[0])


# The run --------------------------------------------------------------------------------------------------------------


class Evaluation:
  """One folder of results: what is there, what is missing, and the summary of both."""

  def __init__(self, config: Config, chosen: TasksConfig, folder: Path, methods: list[Method], jobs: list[run.Job],
               texts: list[Texts], original: Model, tokenizer: Tokenizer):  # fmt: skip
    """Reads the records that exist.

    Raises:
      ValueError: they were made with other settings.
    """
    self.config, self.chosen, self.folder, self.methods = config, chosen, folder, methods
    self.jobs, self.texts, self.original, self.tokenizer = jobs, texts, original, tokenizer
    self.baseline, self.estimate = baseline_of(methods), Estimate(0)
    self.speed: float | None = None  # of the last run
    with contextlib.suppress(ValueError, TypeError, OverflowError):  # a summary can be written anew
      self.speed = float(read_json(folder / SUMMARY).get("tokens_per_s"))
    self.task_records = records.read(folder / RECORDS)
    self.text_records = records.read(folder / TEXTS)
    expected = {
      (*m.key, job.task.name, job.length): run.settings_of(job, m) for m in methods for job in jobs
    }  # fmt: skip
    records.check_settings(folder / RECORDS, self.task_records, expected)
    for text in texts:
      for method in methods:
        records.check_settings(folder / TEXTS, self.text_records, text.settings(method))

  def plan(self) -> int:
    """Checks every method on every task, logs what there is to do, and returns the work in tokens."""
    work = chains = there = 0
    for method in self.methods:
      for text in self.texts:
        if remark := fitted(method.model, method.policy, method.given, [text.length])[1]:
          program.log(f"{method.label} on text {text.length}: {remark}")
        work += text.length * len(text.missing(method, self.text_records))
      for job in self.jobs:
        if remark := run.check(job, method):
          program.log(f"{method.label} on {job.name}: {remark}")
        left = run.missing(job, method, self.task_records)
        count = len({(prompt, chain) for prompt, chain, _ in left})
        chains, there = chains + count, there + len(job.asked) * job.chains - count
        work += sum(job.work(method, prompt, most) for prompt, _, most in left)
    time = ""
    if work and self.speed:
      time = f", about {duration(work / self.speed)} at the speed of the last run"
    elif work and (seconds := forecast.reading_seconds(self.original, work, self.config.batch)):
      time = f", about {duration(seconds)} on this CPU"
    texts = len(self.config.text) * len(self.texts)
    cells = len(self.methods) * (len(self.jobs) + texts)
    program.log(
      f"{len(self.methods)} methods x {len(self.jobs)} tasks and {texts} texts = {cells} cells: "
      f"{chains:,} chains and questions to do ({there:,} are there), up to {work:,} tokens{time}; results in "
      f"{self.folder}"
    )
    return work

  def _of_methods(self, found: list[Record]) -> list[Record]:
    """The records of this run's methods, in the order of the methods."""
    order = {method.key: number for number, method in enumerate(self.methods)}
    return sorted((r for r in found if r.cell[:2] in order), key=lambda record: order[record.cell[:2]])

  def entries(self, found: list[Record]) -> list[Entry]:
    """The summary of records."""
    return summarise(self._of_methods(found), self.baseline, self.chosen.chains)

  def of_job(self, job: run.Job) -> list[Record]:
    """The records of one job."""
    own = job.task.name, job.length, job.chains, job.seed
    return [
      r for r in self.task_records if (r.task, r.length, r.chains, r.seed) == own and r.max_tokens in job.max_tokens
    ]

  def run(self) -> None:
    """Makes all missing records, prints a table for each text and task, and saves the summary after each."""
    self.estimate = estimate = Estimate(self.plan())
    for text in self.texts:
      for method in self.methods:
        wanted = text.missing(method, self.text_records)
        parts = score_text(
          self.original, method, text.chunks, wanted, text.record(method), batch=self.config.batch,
          tick=lambda n, method=method, text=text: estimate.tick(f"text {text.length}, {method.label}", n),
        )  # fmt: skip
        for found in parts if wanted else ():
          records.append(self.folder / TEXTS, found)
          self.text_records += found
          estimate.add(text.length * len(found))
    if self.texts:
      shown = labelled(self.text_entries(), self.baseline)
      print(f"{tables.texts(shown)}\n", flush=True)
      self.save()
    by_key = {method.key: method for method in self.methods}
    memory = None if self.config.kv_budget_gib is None else int(self.config.kv_budget_gib * 2**30)
    for job in self.jobs:
      parts = run.run(
        job, self.methods, self.tokenizer, batch=self.config.batch, width=self.config.width, memory=memory,
        done=self.of_job(job), tick=estimate.tick,
      )  # fmt: skip
      for found in parts:
        records.append(self.folder / RECORDS, found)
        self.task_records += found
        estimate.add(sum(job.work(by_key[r.cell[:2]], r.prompt, r.max_tokens) for r in found))
      for method in self.methods if self.config.traces else ():
        trace.add(self.folder / trace.FILE, job, method, self.tokenizer, self.of_job(job), self.config.traces)
      shown = labelled(self.entries(self.of_job(job)), self.baseline)
      print(f"{tables.scores(shown, self.baseline, TASKS)}\n", flush=True)
      self.save()

  def text_entries(self) -> list[Entry]:
    """The summary of the texts of this run, by length."""
    wanted = {(name, text.length) for text in self.texts for name, _, _ in text.places}
    found = self.entries([record for record in self.text_records if (record.task, record.length) in wanted])
    return sorted(found, key=lambda entry: entry.length)

  def save(self) -> dict[str, Any]:
    """Writes the summary and the pictures; returns the summary."""
    text = self.text_entries()
    tasks = [entry for job in self.jobs for entry in self.entries(self.of_job(job))]
    margins = []
    for job in self.jobs:
      own = [entry for entry in tasks if (entry.task, entry.length) == (job.task.name, job.length)]
      where = {"task": job.task.name, "length": job.length}
      best = getattr(job.task, "best_of_all", False)
      margins += [{**where, **each} for each in summary.margins(own, self.baseline, best)]
    result = {
      "folder": str(self.folder), "baseline": self.baseline, "summary": text + tasks, "margins": margins,
      "pictures": self._pictures(text, tasks), "tokens_per_s": self.estimate.speed or self.speed,
    }  # fmt: skip
    program.save_json(self.folder / SUMMARY, result)
    return result

  def _pictures(self, text: list[Entry], tasks: list[Entry]) -> list[str]:
    name = Path(self.config.checkpoint).name
    title = f"{name}, {self.chosen.limit or 'all'} samples a task and length, bars: standard errors"
    drawn = []
    if text:
      shown = labelled(text, self.baseline)
      for name in dict.fromkeys(entry.task for entry in shown):
        own = [entry for entry in shown if entry.task == name]
        drawn.append(text_picture(self.folder / f"{name.replace(' ', '-')}.png", own, name))
      drawn.append(levels_picture(self.folder / "levels.png", text))
    plain = [entry for entry in tasks if "@" not in entry.metric and entry.max_tokens in (0, *self._last())]
    if plain:
      drawn.append(figures_tasks.tasks(self.folder / "tasks.png", labelled(plain, self.baseline), self.baseline, title))
    return [path for path in drawn if path]

  def _last(self) -> set[int]:
    """The largest L of each task."""
    return {max(job.max_tokens) for job in self.jobs}


def main() -> None:
  config, chosen = program.read_flags("", Config), program.read_flags("", TasksConfig)
  if not config.text and not chosen.tasks:
    raise ValueError("nothing to evaluate on: give --text=PATH, --tasks=needle,hellaswag,... or both")
  if idle := methods_module.idle_flags(program.flag_values(changed_only=True), config.methods, chosen.tasks):
    program.log(f"note: {', '.join(idle)}: set what is none of --methods and --tasks, and change nothing")
  folder = Path(config.output) if config.output else program.results_dir("evaluate")
  mesh = mesh_flags.read()
  with mesh_flags.written_alone(folder) as folder:
    files.check_checkpoint("checkpoint", config.checkpoint)
    tokenizer = Tokenizer.load(config.checkpoint)
    max_positions = checkpoint.read_config(config.checkpoint)[1].max_position_embeddings
    tasks = [program.read_flags(name, get(name)) for name in chosen.tasks]
    jobs = run.prepare(tasks, chosen, config.lengths, tokenizer, max_positions, config.max_tokens)
    texts = read_texts(config, tokenizer, max_positions)
    original = checkpoint.load(config.checkpoint, dtype=config.dtype, mesh=mesh, rules=decoding)
    original = place(original.replace(dms=None) if config.retrofit else original, mesh)
    methods = methods_of(config, original, program.read_flags)
    evaluation = Evaluation(config, chosen, folder, methods, jobs, texts, original, tokenizer)
    program.save_json(folder / CONFIG, {"config": program.flag_values(), "environment": program.environment()})
    evaluation.run()
    program.finish(evaluation.save())


if __name__ == "__main__":
  program.define_flags("", Config)
  program.define_flags("", TasksConfig)
  for kind in (TASKS, policies.REGISTRY):
    for name, cls in kind.items():
      program.define_flags(name, cls)
  mesh_flags.define()
  program.run(main)
