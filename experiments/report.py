"""Writes results as an HTML page and pictures: scores, frontiers, retention by head, traces.

    python -m experiments.report --runs=runs/evaluate/a,runs/evaluate/b --output=runs/report/a-b

`--runs` are folders that `experiments.evaluate` wrote: records.jsonl or text.jsonl, and if present config.json,
summary.json and traces.jsonl. OUTPUT/index.html holds everything it shows and loads nothing. Its tables give scores
first, then differences from `--baseline`, paired problem by problem. Its charts plot a task's score against KV reads,
peak tokens and seconds, or tokens held if nothing was written, and a text's KL against tokens held and KV reads, with
each method's Pareto frontier. Tables give the margins between frontiers. PNGs show the charts where matplotlib is
installed. OUTPUT/report.json has the margins.
"""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

from dms_jax import disk
from experiments.common import outputs, program
from experiments.reports import figures_report, page, results, runs, styles
from experiments.tasks import TASKS


@dataclasses.dataclass(frozen=True)
class Config:
  """`baseline`: the method that others are compared with; "": vanilla, else original, else the first.

  `prompts`: prompts of each task whose chains are shown. `log_margins`: margins in report.json are means over log cost;
  those of the page are means over cost.

  Attributes:
    title: of the page.
    runs: folders that experiments.evaluate wrote, separated by commas.
  """

  runs: tuple[str, ...]
  output: str
  baseline: str = ""
  title: str = ""
  prompts: int = 2
  log_margins: bool = False

  def __post_init__(self):
    if not self.runs:
      raise ValueError("--runs=DIR,DIR,... is needed: folders that experiments.evaluate wrote")
    if not self.output:
      raise ValueError("--output=FOLDER is needed: the page and pictures go there")
    if Path(self.output).suffix in (".html", ".png", ".json") or Path(self.output).is_file():
      raise ValueError(f"--output={self.output} must be a folder: a page and pictures are written into it")
    if self.prompts < 0:
      raise ValueError(f"--prompts={self.prompts} must be 0 or more")
    if twice := sorted({run for run in self.runs if self.runs.count(run) > 1}):
      raise ValueError(f"--runs: {twice[0]} is listed twice")


def write_text(path: Path, text: str) -> str:
  """Writes a text file atomically; makes the folder."""
  with disk.whole(path) as part:
    part.write_text(text, encoding="utf-8")
  return str(path)


def margins(found: results.Results, log: bool) -> list[dict]:
  """Each method's margin over the baseline, by model, task and cost; None where frontiers share no interval."""
  return [
    {"model": panel.model, "task": panel.name, "metric": panel.metric, "method": method, "cost": axis,
     "margin": panel.margin(axis, method, found.baseline, log)}
    for panel in found.panels
    for method in dict.fromkeys(point.setting.method for point in panel.points)
    if method != found.baseline
    for axis in panel.axes()
  ]  # fmt: skip


def write(found: results.Results, config: Config, output: Path) -> list[str]:
  """Writes the page and the pictures; returns their paths."""
  look = styles.styles(found.methods, found.baseline)
  html = page.render(found, TASKS, config.title, config.prompts)
  written: list[str | None] = [write_text(output / "index.html", html)]
  for panel in [*found.panels, *filter(None, (text.divergence() for text in found.texts))]:
    name = re.sub(r"[^A-Za-z0-9]+", "-", f"{panel.model}-{panel.task}-{panel.length or ''}").strip("-")
    chance = TASKS[panel.task].chance.get(panel.metric) if panel.task in TASKS else None
    picture = output / f"tradeoff-{name}.png"
    written.append(figures_report.tradeoff(picture, panel, look, chance, f"{panel.model}, {panel.name}"))
  title = "Share of a chain's tokens that each KV head holds at the end"
  maps = [each for each in page.retention(found) if page.uneven(each[2])]
  written.append(figures_report.retention(output / "retention.png", maps, title))
  return [path for path in written if path]


def main() -> None:
  config = program.read_flags("", Config)
  try:
    found = results.collect([runs.load(Path(folder)) for folder in config.runs], config.baseline)
  except OSError as error:
    raise ValueError(f"--runs: {error.filename} cannot be read ({error.strerror})") from None
  if found.warnings:
    more = f" and {len(found.warnings) - 3} more" if len(found.warnings) > 3 else ""
    program.log(f"warning: {'; '.join(found.warnings[:3])}{more}; such scores mean nothing, try --dtype=float32")
  with outputs.locked("output", config.output, goes_on=False) as output:
    try:
      written = write(found, config, output)
      result = {
        "written": written, "baseline": found.baseline, "methods": found.methods,
        "records": sum(len(run.records) + len(run.texts) for run in found.runs), "warnings": found.warnings,
        "margins": margins(found, config.log_margins),
      }  # fmt: skip
      program.save_json(output / "report.json", {"config": program.flag_values(), **result})
    except (OSError, disk.NoFileError) as error:
      raise ValueError(f"--output={output}: cannot be written ({error}); name another folder, or make room") from None
  program.finish(result)


if __name__ == "__main__":
  program.define_flags("", Config)
  program.run(main)
