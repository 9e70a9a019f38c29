"""Sweeps W chains, L tokens and CR over methods and tasks; frontiers and margins as in the paper.

    python -m experiments.hyperscale --checkpoint=CHECKPOINT --retrofit=4:runs/retrofit/cr4,8:runs/retrofit/cr8 \\
      --methods=vanilla,dms,streamingllm,prompt_window,tova,quest --cr=2,4,8 --tasks=countdown,grids \\
      --max_tokens=240,480,960,1920 --width=2048 --output=runs/hyperscale/seed0

Hyper-scaling (arXiv 2506.05345) is a claim about equal cost: a compressed cache pays for more and longer chains. The
program writes `--chains` W chains of every problem at every L of `--max_tokens` under each method, takes scores for
fewer chains from subsets, and compares the Pareto frontiers of all (W, L, CR) of two methods by their mean distance.

`--retrofit` are retrofits of the checkpoint with the CR that each was trained for, CR:FOLDER. One for a range of CRs
is listed once for each CR at which it is read. NAME=CR:FOLDER is a retrofit of another kind, such as another window; it
makes the method "dms NAME". The methods with a budget hold (prompt + L) / CR tokens a head, for each L anew, at every
CR of `--cr`. `prompt_window` is StreamingLLM whose sinks are the whole prompt. TriAttention needs
`--triattention.calibration=FILE`. Quest selects pages in every layer, as the paper names none that reads all of them;
--quest.dense_layers=2 keeps two whole, as Quest's authors do with models of 32. Tasks are those of
`experiments.evaluate` whose answers are right or wrong: chains vote by their answers, or the best counts where a
program or solution is verified.

The folder `--output` holds config.json, records.jsonl (as of `experiments.evaluate`, without most texts), cells.npz
(what the analysis needs of them), traces.jsonl, times.jsonl, summary.json, index.html and pictures. The same command
resumes a killed run, chain by chain. cells.npz, config.json, traces.jsonl and texts.jsonl are the short form: the
analysis needs no more. `--timed` measures seconds of a chain in the largest batch that fits
`--kv_budget_gib`, as a third axis of costs. It times `--timed_cells` cells of each method and interpolates the others;
`experiments/hyperscaling/timing.py` states the rule. Records do not depend on that memory, so they may be made without
it first, and times measured by a second call, for which the short form is enough.

Several devices: --mesh.data=2 --mesh.tensor=4, as of `experiments.evaluate`; `--timed` is of one device.

Several model seeds are several runs. `--sets=runs/hyperscale/seed0,runs/hyperscale/seed1 --output=FOLDER`, without a
checkpoint, analyses them together, `--methods` and `--tasks` some of them. A set may be made in parts, methods or tasks
apart, say on several GPUs: it is then the folder of its parts' outputs. A sweep without vanilla is a part: it writes
its cells and no margins.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from jax.sharding import Mesh

from dms_jax import checkpoint, disk, policies
from dms_jax.sharding import decoding
from dms_jax.spmd import place
from dms_jax.tokenizer import Tokenizer
from experiments.common import files, program
from experiments.common import mesh as mesh_flags
from experiments.hyperscaling import analysis, cells, page, pictures, tables
from experiments.hyperscaling import methods as methods_module
from experiments.hyperscaling.sweep import Limits, Sweeping
from experiments.methods import run
from experiments.methods.method import idle_flags
from experiments.reports import figures_report, styles
from experiments.tasks import TASKS, get
from experiments.tasks.base import TasksConfig, WritingTask

CONFIG, SUMMARY, PAGE = "config.json", "summary.json", "index.html"
WIDTHS = (1, 2, 3, 4, 5, 6, 7, 8)


@dataclasses.dataclass(frozen=True)
class Config:
  """A sweep, or an analysis of sweeps.

  Attributes:
    methods: vanilla, dms, prompt_window, and names of policies with a budget.
    retrofit: CR:FOLDER or NAME=CR:FOLDER of each retrofit.
    max_tokens: L, the most new tokens of a chain; none: each task's own.
    width: most rows that write together; fewer where the cache memory is too small.
    kv_budget_gib: cache memory of the rows that write; rows without room wait on the host.
    timed: measure the seconds of a chain in the largest batch that fits --kv_budget_gib.
    timed_cells: cells of each method that are timed; the others' seconds are interpolated. 0: all.
    dtype: of the weights and the cache.
    traces: of each task, problems whose first chain keeps its text and is traced.
    resamples: of the bootstrap.
    sets: folders of finished sweeps, one a model seed, or of a sweep's parts.
    title: of the page.
    output: folder of the results; "": one in runs/hyperscale named after the flags.
    checkpoint: folder of the model.
    cr: of the methods with a budget, which hold (prompt + L) / CR tokens a head.
    compare_cr: CR at which DMS is compared with dense at equal L and W, and traced.
  """

  checkpoint: str = ""
  methods: tuple[str, ...] = methods_module.DEFAULT
  retrofit: tuple[str, ...] = ()
  cr: tuple[float, ...] = (2.0, 3.0, 4.0, 6.0, 8.0, 12.0, 16.0, 24.0, 32.0)
  max_tokens: tuple[int, ...] = ()
  compare_cr: float = 8.0
  width: int = 64
  kv_budget_gib: float | None = None
  timed: bool = False
  timed_cells: int = 3
  dtype: Literal["bfloat16", "float32"] = "bfloat16"
  traces: int = 1
  resamples: int = 2000
  sets: tuple[str, ...] = ()
  title: str = ""
  output: str = ""

  def __post_init__(self):
    if bool(self.checkpoint) == bool(self.sets):
      raise ValueError("give either --checkpoint=FOLDER, to make a sweep, or --sets=FOLDER,FOLDER, to analyse sweeps")
    if self.sets and not self.output:
      raise ValueError("--output=FOLDER is needed with --sets: the analysis goes there")
    places = [Path(folder).resolve() for folder in self.sets]
    if twice := [folder for folder, place in zip(self.sets, places, strict=True) if places.count(place) > 1]:
      raise ValueError(f"--sets: {twice[0]} is listed twice")
    for name, least in (("width", 1), ("traces", 0), ("resamples", 100), ("timed_cells", 0)):
      if (value := getattr(self, name)) < least:
        raise ValueError(f"--{name}={value} must be {least} or more")
    if wrong := [cr for cr in (*self.cr, self.compare_cr) if not 1 < cr < math.inf]:
      raise ValueError(f"--cr, --compare_cr: {wrong[0]:g} must be above 1, and finite")
    if wrong := [most for most in self.max_tokens if most < 2]:
      raise ValueError(f"--max_tokens={wrong[0]} must be 2 or more tokens")
    for name in ("cr", "max_tokens"):
      if len(set(getattr(self, name))) < len(getattr(self, name)):
        raise ValueError(f"--{name}={program.spell(getattr(self, name))}: a number twice")
    if self.kv_budget_gib is not None and not 0 < self.kv_budget_gib < math.inf:
      raise ValueError(f"--kv_budget_gib={self.kv_budget_gib} must be a number above 0, or none")
    if self.timed_cells == 1:
      raise ValueError("--timed_cells=1 must be 2 or more, or 0 for all: the other cells lie between timed ones")
    if self.timed and self.kv_budget_gib is None:
      raise ValueError("--timed needs --kv_budget_gib: the cache memory that all batches share")
    if self.checkpoint:
      methods_module.check(self.methods, self.retrofit, self.cr)


def check_tasks(tasks: Sequence[Any]) -> None:
  """Raises ValueError if a task is none that a model writes and that has right answers."""
  if not tasks:
    raise ValueError("--tasks=NAME,NAME is needed: the families of problems")
  for task in tasks:
    if not isinstance(task, WritingTask) or task.sized or "accuracy" not in task.metrics:
      raise ValueError(f"--tasks={task.name}: a sweep needs tasks whose written answers are right or wrong")


def make(config: Config, chosen: TasksConfig, folder: Path, mesh: Mesh | None) -> dict[str, Any]:
  """Makes the records, traces and times of one sweep that its folder lacks; returns what was made."""
  tasks = [program.read_flags(name, get(name)) for name in chosen.tasks]
  check_tasks(tasks)
  files.check_checkpoint("checkpoint", config.checkpoint)
  for _, _, retrofit in methods_module.split(config.retrofit):
    files.check_retrofit("retrofit", retrofit, whole=True)
  for remark in methods_module.mislabelled(config.retrofit):
    program.log(remark)
  if idle := idle_flags(program.flag_values(changed_only=True), config.methods, chosen.tasks):
    program.log(f"note: {', '.join(idle)}: set what is none of --methods and --tasks, and change nothing")
  tokenizer = Tokenizer.load(config.checkpoint)
  most = checkpoint.read_config(config.checkpoint)[1].max_position_embeddings
  jobs = run.prepare(tasks, chosen, (), tokenizer, most, config.max_tokens)
  original = checkpoint.load(config.checkpoint, dtype=config.dtype, mesh=mesh, rules=decoding)
  original = place(original.replace(dms=None), mesh)
  found = methods_module.build(
    config.methods, config.checkpoint, original, config.retrofit, config.cr, config.dtype, program.read_flags
  )
  memory = None if config.kv_budget_gib is None else int(config.kv_budget_gib * 2**30)
  limits = Limits(config.width, memory, config.traces, config.compare_cr)
  sweeping = Sweeping(folder, jobs, found, tokenizer, limits)
  about = {"config": program.flag_values(), "environment": program.environment()}
  model = program.fingerprint([checkpoint.fingerprint(config.checkpoint), config.dtype])
  made: dict[str, Any] = {}
  if sweeping.short is not None:
    if not config.timed:
      raise ValueError(f"--output={folder} holds cells without records, to which none are added: give another folder")
    if sweeping.short.model not in ("", model):
      raise ValueError(f"--output={folder} holds cells of another --checkpoint or --dtype")
  else:
    program.save_json(folder / CONFIG, {**about, "model": model})
    made = sweeping.run()
  if config.timed:
    sweeping.time(config.kv_budget_gib, config.timed_cells)
  return made


def analyse(config: Config, sweeps: Sequence[cells.Sweep], widths: Sequence[int], folder: Path) -> dict[str, Any]:
  """Writes the page and pictures of sweeps that are seeds of one another; returns the summary."""
  remarks: list[str] = []
  found = []
  for task in sweeps[0].tasks:
    vote = not (task in TASKS and getattr(TASKS[task], "best_of_all", False))
    each, notes = analysis.family(sweeps, task, widths, vote)
    found.append(each)
    remarks.extend(notes)
  if lacking := sorted({task for sweep in sweeps for task in sweep.tasks} - set(sweeps[0].tasks)):
    remarks.append(f"{', '.join(lacking)}: left out, as some seeds lack them")
  for remark in remarks:
    program.log(remark)
  made = analysis.margins(found, config.resamples)
  path = Path(str(sweeps[0].config.get("checkpoint") or sweeps[0].folder))
  name = path.parent.name if path.name == "final" and path.parent.name else path.name
  panels = [analysis.panel(each, name) for each in found]
  names = list(dict.fromkeys(method for each in found for method in each.methods))
  look = styles.styles(methods_module.styled(names), methods_module.DENSE)
  print(f"{tables.headline(panels)}\n\n{tables.LEGEND}\n")
  for axis in panels[0].axes():
    for table in filter(None, (tables.margins(made, axis, "linear", "frontier", look), tables.ways(made, axis, look))):
      print(f"{table.caption}\n{tables.plain(table)}\n", flush=True)
  written: list[str | None] = []
  for scale, ends in itertools.product(analysis.SCALES, analysis.ENDS):
    picture = folder / f"margins-{scale}{'' if ends == 'frontier' else f'-{ends}'}.png"
    written.append(pictures.margins(picture, made, scale, ends, name))
  html = page.render(
    sweeps, found, panels, made, compare_cr=config.compare_cr, resamples=config.resamples, title=config.title,
    prompts=config.traces, picture=Path(written[0]) if written[0] else None,
  )  # fmt: skip
  with disk.whole(folder / PAGE) as part:
    part.write_text(html, encoding="utf-8")
  written.append(str(folder / PAGE))
  for panel in panels:
    picture = folder / f"frontiers-{re.sub(r'[^A-Za-z0-9]+', '-', panel.task)}.png"
    shown, chance = page.uncrowded(panel), TASKS[panel.task].chance.get("accuracy") if panel.task in TASKS else None
    written.append(figures_report.tradeoff(picture, shown, look, chance, f"{name}, {panel.name}"))
  result = {
    "folder": str(folder), "seeds": [str(sweep.folder) for sweep in sweeps], "written": [*filter(None, written)],
    "remarks": remarks, **analysis.to_json(panels, made),
  }  # fmt: skip
  program.save_json(folder / SUMMARY, {"config": program.flag_values(), "environment": program.environment(), **result})
  return result


def main() -> None:
  config, chosen = program.read_flags("", Config), program.read_flags("", TasksConfig)
  if config.checkpoint and config.timed and mesh_flags.asked():
    raise ValueError("--mesh: times are of one device: give --notimed, or leave out the mesh")
  folder = Path(config.output) if config.output else program.results_dir("hyperscale")
  made: dict[str, Any] = {}
  mesh = mesh_flags.read()
  with mesh_flags.written_alone(folder) as folder:
    if config.checkpoint:
      made = make(config, chosen, folder, mesh)
    read = [cells.read(Path(each)) for each in config.sets or (str(folder),)]
    for remark in [remark for _, remarks in read for remark in remarks]:
      program.log(remark)
    sweeps = [sweep for sweep, _ in read]
    cells.check_seeds(sweeps)
    if not config.checkpoint:
      methods = config.methods if "methods" in program.flag_values(changed_only=True) else ()
      sweeps = [cells.only(sweep, chosen.tasks, methods) for sweep in sweeps]
    if not all(sweep.cells for sweep in sweeps):
      raise ValueError(f"--sets: {next(s.folder for s in sweeps if not s.cells)} holds no complete cell")
    if config.checkpoint and (folder / cells.RECORDS).exists():
      cells.save_short(folder, sweeps[0].cells)
    if lacking := next(
      (sweep for sweep in sweeps if methods_module.DENSE not in {key[1] for key in sweep.cells}), None
    ):
      if not config.checkpoint:
        what = f"--sets: {lacking.folder} has no {methods_module.DENSE}, over which margins are"
        raise ValueError(f"{what}: add it to --methods, or give a folder of parts with a sweep of it")
      program.log(
        f"a part of a sweep, without {methods_module.DENSE}: with all parts in one folder, "
        "--sets=FOLDER --output=FOLDER compares them"
      )
      program.finish({"folder": str(folder), **made})
      return
    fewest = min(cell.chains for sweep in sweeps for cell in sweep.cells.values())
    widths = [width for width in chosen.chains if width <= fewest]
    if not widths:
      raise ValueError(f"--chains={program.spell(chosen.chains)}: the records have {fewest} chains of a problem")
    result = analyse(config, sweeps, widths, folder)
    means = [m for m in result["margins"] if (m.task, m.scale, m.ends) == ("", "linear", "frontier")]
    short = {"folder": result["folder"], "written": result["written"], "margins": means}
    program.finish({**short, **made})


if __name__ == "__main__":
  program.define_flags("", Config)
  program.define_flags("", TasksConfig, chains=WIDTHS, temperature=0.8)
  for kind in (TASKS, policies.REGISTRY):
    for name, cls in kind.items():
      program.define_flags(name, cls, **methods_module.SETTINGS.get(name, {}))
  mesh_flags.define()
  program.run(main)
