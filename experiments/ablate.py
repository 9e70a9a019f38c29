"""Ablations: retrofits and scores every combination of settings.

    python -m experiments.ablate --checkpoint=checkpoints/smollm2-135m-instruct --data.paths=text.txt \\
      --eval.text=held_out.txt --sweep='dms.window=0,16,64,256 dms.gate=neuron,adapter'

Flags that begin with dms., lora., retrofit., data., eval. or another policy's name can be swept. Several --sweep flags
are a union (experiments/ablation/sweeps.py has the syntax). --sweep_file=experiments/configs/window.txt reads a sweep
from a file; flags on the command line override the file's. A sweep of `eval.` alone reuses one retrofit:
--sweep='eval.threshold=-10,-2,0,2,10'. Baselines decode by the model itself:
--sweep='eval.policy=h2o h2o.budget=256 h2o.window=8,64'.

Every combination is checked before the first run. Each retrofit has a folder OUTPUT/NAME/SWEPT-FINGERPRINT, whose
quality/ holds one file for each score. The same command again skips finished runs and resumes an interrupted one. After
a failed run the others continue; the failure is reported at the end, with exit code 1. Writes
OUTPUT/NAME/{ablation.json, table.md, ablation.png}, and with --eval.positions compression.png.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import shlex
import shutil
import sys
import time
import traceback
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from absl import flags

from dms_jax import checkpoint, disk
from dms_jax.evaluation.text import held_by_position, text_quality
from dms_jax.json_files import read_json
from dms_jax.model import Model
from dms_jax.retrofit import DataConfig
from dms_jax.retrofit.data import Batches, Source
from dms_jax.retrofit.loop import LOG, RUN, STATE, Run, read_log, weights_of
from dms_jax.tokenizer import Tokenizer
from experiments import retrofit
from experiments.ablation import sweeps
from experiments.ablation.report import as_table, axis, draw, rows
from experiments.ablation.trials import SECTIONS, TRAINED, TYPES, Trial, trials
from experiments.common import files, forecast, outputs, program
from experiments.methods.estimate import duration

ERROR = "error.txt"


@dataclasses.dataclass(frozen=True)
class Config:
  """`name` of the ablation; default the sweep file's name, otherwise the fields swept.

  `x` is the plot's axis: a swept field, "tokens" (training tokens), or "run" (the runs' names). Default: the field with
  most values if there is one group, otherwise "run".

  Attributes:
    sweep_file: file of a sweep, as in experiments/configs; the command line overrides it.
    x: axis of the plot: a swept field, "tokens" or "run" (names).
  """

  checkpoint: str = ""
  sweep_file: str = ""
  name: str = ""
  output: str = "runs/ablate"
  x: str = ""


def check_texts(wanted: list[Trial], tokens: Callable[[Trial], np.ndarray]) -> None:
  """Raises ValueError unless every trial's text holds at least one chunk and the retrofit that it names exists."""
  for one in wanted:
    if not one.eval.text:
      raise ValueError("--eval.text is empty: name a held-out text file to score on")
    if not Path(one.eval.text).is_file():
      raise ValueError(f"eval.text={one.eval.text}: no such file")
    if one.eval.retrofit and one.eval.policy == "dms":
      files.check_retrofit("eval.retrofit", one.eval.retrofit, whole=True)
    if len(tokens(one)) < one.eval.length:
      raise ValueError(f"eval.text={one.eval.text}: {len(tokens(one))} tokens, less than eval.length={one.eval.length}")


def check_trained(folder: Path, text: dict[str, str]) -> None:
  """Raises ValueError if the retrofit in `folder`, finished or not, was trained on other text than `text` describes."""
  before = read_json(folder / RUN).get("text") if (folder / RUN).exists() else text
  if before != text:
    raise ValueError(
      f"{folder}: trained on other text, {before}, than its paths hold now, {text}; choose another --name or --output, "
      "or remove the folder to train anew"
    )


def train(one: Trial, base: Model, packer: Batches, tokenizer: Tokenizer) -> None:
  """Trains or resumes the trial's retrofit; then removes the training state."""
  run = Run(base, one.dms, one.lora, one.retrofit, one.data, one.folder, weights_of(base))
  with contextlib.closing(packer):
    last = retrofit.carry_out(run, packer, tokenizer)
  seconds = sum(line["seconds"] for line in read_log(one.folder / LOG))
  about = {"tokens": last["tokens"], "minutes": seconds / 60, "last": last, "environment": program.environment()}
  program.save_json(one.folder / TRAINED, about)
  shutil.rmtree(one.folder / STATE, ignore_errors=True)


def load(one: Trial, base: str, original: Model) -> Model:
  """The model to score: a retrofit with low-rank updates merged, or the original, for another policy."""
  if one.eval.policy != "dms":
    return original
  return checkpoint.load_retrofitted(base, one.retrofit_path, dtype=one.eval.dtype)


def score(one: Trial, original: Model, model: Model, tokens: np.ndarray) -> dict[str, Any]:
  """The scores of one trial. Its numbers, such as the threshold, are traced, so that trials share a compilation."""
  evaluation = one.eval
  eviction = {"threshold": evaluation.threshold, "window": evaluation.window}
  progress = functools.partial(program.progress, desc=f"scoring T {evaluation.length}")
  result = text_quality(
    original, model, tokens, evaluation.length, batch=evaluation.batch, policy=one.baseline, progress=progress,
    **eviction,
  )  # fmt: skip
  del result["by_chunk"]
  result |= {"tokens_scored": result["chunks"] * (evaluation.length - 1), "text_crc32": crc(tokens)}
  if evaluation.positions:
    progress = functools.partial(program.progress, desc="compression by position")
    where, held = held_by_position(
      model, tokens, evaluation.length, evaluation.positions, progress=progress, **eviction
    )
    result |= {"positions": where, "held_by_position": held.round(5)}
  return result | {"environment": program.environment()}


def crc(tokens: np.ndarray) -> str:
  """Checksum of a text's tokens."""
  return f"{zlib.crc32(np.ascontiguousarray(tokens).tobytes()):08x}"


def fingerprint(one: Trial) -> str | None:
  """Fingerprint of the retrofit to score; None before it is trained, and for other policies."""
  there = one.eval.policy == "dms" and one.retrofit_path.is_dir()
  return checkpoint.fingerprint(one.retrofit_path) if there else None


def finished(one: Trial, tokens: np.ndarray) -> dict[str, Any] | None:
  """The trial's saved result for this text and the retrofit's current content; None without one."""
  result = read_json(one.result) if one.result.exists() else {}
  found = result.get("text_crc32"), result.get("retrofit_crc32")
  return result if found == (crc(tokens), fingerprint(one)) else None


@contextlib.contextmanager
def noted(failed: dict[str, str], names: list[str], folder: Path) -> Iterator[None]:
  """Records an error as the result of the trials `names`, so that the other runs continue."""
  try:
    yield
  except Exception as error:
    if outputs.is_full(error):  # every run would fail
      raise
    failed |= dict.fromkeys(names, f"{type(error).__name__}: {' '.join(str(error).split())[:500]}")
    program.log(f"  failed: {failed[names[0]]}")
    folder.mkdir(parents=True, exist_ok=True)
    disk.write_text(folder / ERROR, traceback.format_exc())


def run_all(wanted: list[Trial], config: Config, root: Path) -> tuple[dict[str, dict], dict[str, str]]:
  """(results, errors) of trials by name.

  Raises:
    ValueError: an input is missing; it is raised before the first run.
    Stopped: SIGINT or SIGTERM came; the run's state is saved.
  """
  tokenizer = Tokenizer.load(config.checkpoint)
  base = functools.cache(lambda: checkpoint.load(config.checkpoint))
  original = functools.cache(lambda dtype: checkpoint.load(config.checkpoint, dtype=dtype).replace(dms=None))

  @functools.cache
  def read(text: str, most: int) -> np.ndarray:
    return np.asarray(tokenizer.encode(files.read_text("eval.text", text)), np.int32)[: most or None]

  @functools.cache
  def sources(data: DataConfig, dtype: str) -> list[Source]:
    return retrofit.texts(base, tokenizer, data, dtype, root / f"self_text-{program.fingerprint([data, dtype])}")

  def packer(one: Trial) -> Batches:
    if one.data.families:
      return retrofit.generated(one.data, tokenizer, one.retrofit)
    return retrofit.rows(sources(one.data, one.retrofit.memory.compute_dtype), one.data, one.retrofit)

  tokens = lambda one: read(one.eval.text, one.eval.max_tokens)
  check_texts(wanted, tokens)
  for one in {one.folder: one for one in wanted if one.eval.trained}.values():
    check_trained(one.folder, packer(one).fingerprints())
  results = {one.name: found for one in wanted if (found := finished(one, tokens(one))) is not None}
  todo = [one for one in wanted if one.name not in results]
  to_train = {one.folder: one for one in todo if one.eval.trained and not (one.folder / TRAINED).exists()}
  took = ""
  if to_train and forecast.on_cpu():
    seconds = sum(
      one.retrofit.schedule.steps * forecast.step_seconds(base().config, one.dms, one.lora, one.retrofit)
      for one in to_train.values()
    )
    took = f", about {duration(seconds)} of steps on this CPU"
  program.log(f"{root}: {len(wanted)} runs, {len(results)} of them finished; {len(to_train)} retrofits to train{took}")

  failed: dict[str, str] = {}
  start, before = time.perf_counter(), len(results)

  def announce(one: Trial, what: str) -> None:
    done = len(results) + len(failed)
    each = (time.perf_counter() - start) / max(done - before, 1) / 60
    left = f", about {each * (len(wanted) - done):.1f} min left" if done > before else ""
    program.log(f"[{done + 1}/{len(wanted)}{left}] {what} {one.name}")

  for folder in dict.fromkeys(one.folder for one in todo):
    members = [one for one in todo if one.folder == folder]
    (folder / ERROR).unlink(missing_ok=True)
    if folder in to_train:
      announce(one := to_train[folder], "training")
      with noted(failed, [each.name for each in members], folder):
        train(one, base(), packer(one), tokenizer)
    model, loaded = None, None
    for one in members:
      if one.name in failed:
        continue
      announce(one, "scoring")
      with noted(failed, [one.name], folder):
        if loaded != (wants := (one.retrofit_path, one.eval.dtype, fingerprint(one))):
          model, loaded = load(one, config.checkpoint, original(one.eval.dtype)), wants
        found = score(one, original(one.eval.dtype), model, tokens(one))
        program.save_json(one.result, {"settings": one.whole, "retrofit_crc32": wants[-1], **found})
        results[one.name] = read_json(one.result)
  return results, failed


def read_sweep_file(path: str) -> list[str]:
  """The groups of a sweep file; its other lines set flags that the command line does not set.

  Raises:
    ValueError: there is no such file, or a line cannot be parsed; names it.
  """
  own = [flag for flag in program.flag_values() if flag not in ("sweep", "sweep_file")]
  resolved, groups = sweeps.read_file(path, own)
  for flag, text in resolved.items():
    if not program.FLAGS[flag].present:
      try:
        program.FLAGS[flag].value = program.FLAGS[flag].parser.parse(text)
      except ValueError as error:
        raise ValueError(f"{path}: --{flag}={text}: {error}") from None
  return groups


def main() -> None:
  start = time.perf_counter()
  file = program.FLAGS.sweep_file
  groups = (read_sweep_file(file) if file else []) + program.FLAGS.sweep
  config = program.read_flags("", Config)
  if not config.checkpoint:
    raise ValueError("give --checkpoint=FOLDER of a model")
  swept = list(dict.fromkeys(flag for group in groups for each in sweeps.product(group, TYPES) for flag in each))
  if not swept and not file:
    raise ValueError("nothing to sweep: give --sweep='field=value,value ...' or --sweep_file=FILE")
  root = Path(config.output) / (config.name or (Path(file).stem if file else ",".join(swept)[:80]))
  wanted = trials(config.checkpoint, groups, root)
  if config.x not in ("", "tokens", "run", *(varying := sweeps.varying([one.whole for one in wanted]))):
    raise ValueError(f"--x={config.x} is neither what varies, {varying}, nor 'tokens' or 'run'")
  if config.x == "tokens" and not all(one.eval.trained for one in wanted):
    raise ValueError("--x=tokens: nothing is trained under eval.retrofit or another eval.policy")
  with outputs.locked("output", root):
    carry_out(config, wanted, groups, root, start)


def carry_out(config: Config, wanted: list[Trial], groups: list[str], root: Path, start: float) -> None:
  """Runs the trials, and writes and prints what came of them; exits with 1 if one failed."""
  results, failed = run_all(wanted, config, root)
  found, shown, pictures = rows(wanted, results), "", []
  command = f"python -m experiments.ablate {shlex.join(sys.argv[1:])}"
  if found:
    lengths = ", ".join(f"{length:,}" for length in sorted({row["length"] for row in found}))
    title = f"{root.name}: {Path(config.checkpoint).name}, T {lengths}"
    x = config.x or (axis(found) if len(groups) == 1 else "run")
    shown, pictures = as_table(found), draw(found, x, title, root)
    print(f"\n{shown}\n", flush=True)
    disk.write_text(root / "table.md", f"{shown}\n\n    {command}\n")
  if failed:
    lines = "\n".join(f"  {name}: {error}" for name, error in failed.items())
    program.log(f"{len(failed)} of {len(wanted)} runs failed (traceback in each folder's error.txt):\n{lines}")
  line = {
    "command": command,
    "runs": found,
    "failed": failed,
    "pictures": pictures,
    "seconds": round(time.perf_counter() - start, 1),
  }
  saved = {"config": program.flag_values(), "environment": program.environment(), **line}
  program.log(f"wrote {program.save_json(root / 'ablation.json', saved)}")
  for row in found:  # the data of plots stays in ablation.json
    for key in ("held_per_head", "positions", "held_by_position", "environment"):
      row.pop(key, None)
  program.finish(line)
  if failed:
    sys.exit(1)


if __name__ == "__main__":
  flags.DEFINE_multi_string("sweep", [], "a group of combinations, 'field=value,value ...'; several are a union")
  program.define_flags("", Config)
  for section, (kind, defaults) in SECTIONS.items():
    program.define_flags(section, kind, **defaults)
  program.run(main)
