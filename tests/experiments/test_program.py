"""Programs: flags from dataclasses, errors in one line, results that are whole or absent, progress."""

from __future__ import annotations

import configparser
import dataclasses
import json
import os
import re
import runpy
import subprocess
import sys
import textwrap
import types
import warnings
from pathlib import Path
from typing import Literal

import numpy as np
import pytest

from dms_jax import checkpoint, compilation, shipped
from dms_jax import testing as tiny
from dms_jax.convert import sources
from experiments import generate
from experiments.common import program, usage
from experiments.common.files import check_checkpoint, check_retrofit
from tests.helpers import save_checkpoints

ROOT = Path(__file__).parents[2]
PROGRAMS = sorted(p.stem for p in (ROOT / "experiments").glob("*.py") if "\nif __name__ == " in p.read_text())

TOY = """
  import dataclasses
  from pathlib import Path
  from typing import Literal

  from dms_jax.config import DMSConfig, LoRAConfig
  from experiments.common import program

  @dataclasses.dataclass(frozen=True)
  class Config:
    '''Of a toy.

    Attributes:
      output: where results go.
    '''

    output: Path
    text: str = ""
    method: str | None = dataclasses.field(default=None, metadata={"choices": ("h2o", "tova")})
    steps: int | None = None
    rate: float = 0.5
    kind: Literal["one", "two"] = "one"
    sizes: tuple[int, ...] = (1, 2)
    fast: bool = False
    lora: LoRAConfig = LoRAConfig(rank=3)

  def main():
    config, dms = program.read_flags("", Config), program.read_flags("dms", DMSConfig)
    if config.text == "missing":
      Path("no/such/file").read_text()
    if config.text == "large":
      raise RuntimeError("RESOURCE_EXHAUSTED: Out of memory while trying to allocate 48.00GiB with allocator GPU_0_bfc")
    if config.text == "bug":
      raise KeyError("a bug is not the user's mistake")
    program.finish({"config_": config, "dms": dms})

  if __name__ == "__main__":
    program.define_flags("", Config)
    program.define_flags("dms", DMSConfig, window=64)
    program.run(main)
"""


@dataclasses.dataclass(frozen=True)
class _Base:
  """A base. The `size` of it; `place` counts from 0. Nothing about the third.

  Attributes:
    rate, share: in tokens
      a second.
    kept: by the base.
  """

  size: int = 0
  place: int = 0
  rate: int = 0
  share: int = 0
  kept: int = 0
  seed: int = 0
  unsaid: int = 0


@dataclasses.dataclass(frozen=True)
class _Derived(_Base):
  """`size`: its own. Another `kept` in a sentence loses to the line."""


def test_help_is_what_docstrings_say():
  expected = {
    "size": "its own.", "place": "place counts from 0.", "rate": "in tokens a second.", "share": "in tokens a second.",
    "kept": "by the base.", "seed": "of all random choices.", "unsaid": "",
  }  # fmt: skip
  assert {name: program.help_text(_Derived, name) for name in expected} == expected
  assert program.help_text(_Base, "size") == "The size of it."


def documented(name: str) -> dict[str, Path]:
  """Flags that documents give the program, and the document."""
  named = [ROOT / name for name in ("README.md", "WORKSPACE.md", "HOW_IT_WORKS.md")]
  documents = [*named, *(ROOT / "colab").glob("*.md"), *(ROOT / "experiments" / "results").rglob("*.md")]
  command, found = re.compile(rf"experiments\.{name}((?:[\s\\]+--[^\s`]+)+)"), {}
  for path in documents:
    for flags in command.findall(path.read_text()):
      found |= dict.fromkeys(re.findall(r"--([\w.]+)", flags), path)
  return found


@pytest.mark.parametrize("name", PROGRAMS)
def test_every_flag_says_what_it_does(name, monkeypatch):
  """A line or a sentence of a docstring, no name of a field alone. Commands of documents name no other flags."""
  texts = {}
  monkeypatch.setattr(sys, "argv", [name])
  monkeypatch.setattr(program, "run", lambda main, **_: None)
  monkeypatch.setattr(program.flags, "DEFINE_boolean", lambda flag, default, text: texts.update({flag: text}))
  define = lambda parser, flag, default, text, serializer: texts.update({flag: text})
  monkeypatch.setattr(program.flags, "DEFINE", define)
  monkeypatch.setattr(program.flags, "mark_flag_as_required", lambda flag: None)
  with warnings.catch_warnings():
    warnings.simplefilter("ignore", RuntimeWarning)  # the program is imported already
    runpy.run_module(f"experiments.{name}", run_name="__main__", alter_sys=True)
  assert texts
  assert not [flag for flag, text in texts.items() if len(text.removesuffix(" (required)").split()) < 2]
  assert not {flag: path for flag, path in documented(name).items() if flag not in texts}


# Forks itself for each line of JSON that it reads, a program's arguments, so that JAX is imported once.
FORKS = """
import gc, json, os, runpy, sys, warnings
from experiments.common import program
gc.freeze()  # else a child's last collection copies all pages of memory
warnings.filterwarnings("ignore", category=RuntimeWarning, message=".*fork")
for line in sys.stdin:
  child = os.fork()
  if not child:
    for name, number in (("stdout", 1), ("stderr", 2)):
      os.dup2(os.open(name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    sys.argv = ["toy_program", *json.loads(line)]
    runpy.run_module("toy_program", run_name="__main__", alter_sys=True)
    sys.exit()
  print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
  """Runs a program made of the flags above; returns the finished process."""
  folder = tmp_path_factory.mktemp("toy")
  (folder / "toy_program.py").write_text(textwrap.dedent(TOY))
  env = {**os.environ, "PYTHONPATH": f"{folder}{os.pathsep}{ROOT}"}

  def run(*arguments):
    forks.stdin.write(json.dumps(arguments) + "\n")
    forks.stdin.flush()
    code = int(forks.stdout.readline())
    said = ((folder / name).read_text() for name in ("stdout", "stderr"))
    return subprocess.CompletedProcess(arguments, code, *said)

  command = [sys.executable, "-c", FORKS]
  with subprocess.Popen(
    command, env=env, cwd=folder, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE
  ) as forks:
    yield run


def test_flags_reach_the_dataclasses_and_the_last_line_is_json(toy):
  done = toy(
    "--output=a/b", "--steps=7", "--rate=2", "--kind=two", "--sizes=4,5", "--fast", "--method=TOVA",
    "--lora.rank=8",
    "--lora.targets=q_proj", "--dms.window=16", "--dms.gate=neuron",
  )  # fmt: skip
  assert done.returncode == 0, done.stderr
  line = json.loads(done.stdout.splitlines()[-1])
  assert line["config_"] == {
    "output": "a/b", "text": "", "method": "tova", "steps": 7, "rate": 2.0, "kind": "two", "sizes": [4, 5],
    "fast": True, "lora": {"rank": 8, "scale": 2.0, "targets": ["q_proj"], "by_cr": False},
  }  # fmt: skip
  assert line["dms"]["window"] == 16 and line["dms"]["gate"] == "neuron" and line["dms"]["shift"] == 1
  assert line["config"]["dms.window"] == 16 and line["config"]["lora.rank"] == 8
  assert line["environment"]["jax"] and not {"profile", "compiled"} & line["config"].keys()


@pytest.mark.parametrize(
  ("message", "line"),
  [
    ("Failed to allocate request for 2.0GiB (2147483648B) on device ordinal 0", " (2.0GiB more were asked for)"),
    ("Ran out of memory in memory space hbm. Used 20.1G of 15.48G hbm.", ""),
  ],
)
def test_a_device_without_memory_is_one_line_with_the_flags_of_it(monkeypatch, message, line):
  flags = {"width": types.SimpleNamespace(value=2048), "batch": types.SimpleNamespace(value=None)}
  monkeypatch.setattr(program, "FLAGS", flags)
  found = program.out_of_memory(RuntimeError(f"RESOURCE_EXHAUSTED: {message}"))
  assert found == f"the device is out of memory{line}; give less of --width=2048"
  assert program.out_of_memory(RuntimeError("RESOURCE_EXHAUSTED: Error writing")) is None


def test_defaults_are_the_dataclass_s_unless_overridden(toy):
  line = json.loads(toy("--output=x").stdout.splitlines()[-1])
  assert line["config_"]["steps"] is None and line["config_"]["lora"]["rank"] == 3
  assert line["dms"]["window"] == 64


@pytest.mark.parametrize(
  ("arguments", "message"),
  [
    (["--output=x", "--dms.windw=3"], "error: there is no flag --dms.windw; did you mean --dms.window?"),
    (["--output=x", "--dms.window=many"], "flag --dms.window=many: 'many' is not a whole number"),
    (["--output=x", "--kind=three"], "flag --kind=three: 'three' is unknown; there are one, two"),
    (["--output=x", "--kind=tow"], "flag --kind=tow: 'tow' is unknown; did you mean 'two'? there are one, two"),
    (["--output=x", "--method=H3O"], "flag --method=H3O: 'H3O' is unknown; did you mean 'h2o'? there are h2o, tova"),
    (["--output=x", "--window=3"], "error: there is no flag --window; did you mean --dms.window"),
    (["--output=x", "--fast=maybe"], "flag --fast=maybe: 'maybe' is not true or false"),
    (["--output=x", "--dms.window=-1"], "error: dms.window=-1 must be 0 or more tokens"),
    (["--output=x", "--nofast=3"], "error: --nofast=3 does not take an argument"),
    (["--output_dir=x"], "error: there is no flag --output_dir; did you mean --output?"),
    (["--output=x", "--ganularity=layer"], "error: there is no flag --ganularity; did you mean --dms.granularity?"),
    (["--output=x", "stray"], "error: unexpected argument(s) ['stray']"),
    (["--output=x", "--text=missing"], "error: [Errno 2] No such file or directory: 'no/such/file'"),
    (["--output=x", "--text=large"], "error: the device is out of memory (48.00GiB more were asked for)  (--debug"),
    ([], "error: --output is needed: where results go"),
  ],
)
def test_bad_input_is_one_line_and_exit_code_1(toy, arguments, message):
  done = toy(*arguments)
  assert done.returncode == 1
  assert message in done.stderr
  assert "Traceback" not in done.stderr


def test_settings_in_errors_are_named_by_their_flags(monkeypatch):
  monkeypatch.setattr(program, "FLAGS", {"rkv.pool", "h2o.budget", "triattention.calibration"})
  for message, shown in (
    ("RKV: pool=4 must be odd", "--rkv.pool=4 must be odd"),
    ("TriAttention: give calibration=FILE, which", "give --triattention.calibration=FILE, which"),
    ("H2O: give either budget= (tokens) or cr=", "give either --h2o.budget= (tokens) or cr="),
    ("RKV: importance=2 must be", "RKV: importance=2 must be"),
    ("--budgets=8: H2O: budget=8 tokens", "--budgets=8: H2O: budget=8 tokens"),
    ("no such file: x=1", "no such file: x=1"),
  ):
    assert program.by_flag(message) == shown


def test_a_bug_keeps_its_traceback_and_debug_shows_any(toy):
  assert "Traceback" in toy("--output=x", "--text=bug").stderr
  done = toy("--output=x", "--text=missing", "--debug")
  assert done.returncode == 1 and "Traceback" in done.stderr


def test_tables_and_commands_of_a_docstring_keep_their_lines():
  kept = "| a | b |\n| --- | --- |\n\nFor example:\n  --x=1\n  --y=2"
  assert usage._wrapped(f"One\nsentence.\n\n{kept}", 80) == f"One sentence.\n\n{kept}"


def test_help_lists_the_program_s_flags(toy):
  text = toy("--help").stdout
  assert toy("--help=yes").stdout == text
  for flag in ("--output=...", "--dms.window=64", "--lora.rank=3", "--profile=none", "--debug=false", "--sizes=1,2"):
    assert flag in text
  words = " ".join(text.split())
  assert "--lora.rank=3 rank 0 means no updates." in words
  assert "adapter | neuron" in words and "h2o | tova" in words
  assert words.index("Flags, as --name=value:") < words.index("lora: ") < words.index("dms: ")


def test_profile_writes_a_trace(toy, tmp_path):
  assert toy("--output=x", f"--profile={tmp_path}", "--compiled=none").returncode == 0
  assert list(tmp_path.rglob("*.xplane.pb"))


def test_annotations_without_a_spelling_are_refused():
  @dataclasses.dataclass
  class Config:
    either: int | str = 0

  with pytest.raises(TypeError, match="no flag can be made of"):
    program.define_flags("refused", Config)
  with pytest.raises(TypeError, match="has no field"):
    program.define_flags("refused", Config, neither=1)


def test_optional_values_parse_both_ways():
  assert program.parse_value(int | None, "none") is None
  assert program.parse_value(int | None, "3") == 3
  assert program.parse_value(Literal[1, 2], "2") == 2
  assert program.parse_value(tuple[float, ...], "1, 2.5,") == (1.0, 2.5)
  with pytest.raises(ValueError, match="true or false"):
    program.parse_value(bool, "maybe")
  with pytest.raises(ValueError, match="'nan' is not a number"):
    program.parse_value(float | None, "nan")


@dataclasses.dataclass(frozen=True)
class RunConfig:
  model: str = "m"
  steps: int = 10


def test_results_dir_is_named_from_the_config(tmp_path):
  default = program.results_dir("retrofit", RunConfig(), tmp_path)
  other = program.results_dir("retrofit", RunConfig("checkpoints/big", 20), tmp_path)
  assert not default.exists() and default.name.startswith("default-")
  assert other.name.startswith("model=big,steps=20-")
  assert other == program.results_dir("retrofit", RunConfig("checkpoints/big", 20), tmp_path)
  assert other != program.results_dir("retrofit", RunConfig("elsewhere/big", 20), tmp_path)


def test_save_json_writes_whole_files_only(tmp_path):
  path = program.save_json(tmp_path / "new" / "a.json", {"x": np.float32(0.5), "y": np.arange(2), "z": float("inf")})
  assert json.loads(path.read_text()) == {"x": 0.5, "y": [0, 1], "z": None}

  class Unprintable:
    def __str__(self):
      raise RuntimeError("cannot be written")

  with pytest.raises(RuntimeError):
    program.save_json(path, {"x": Unprintable()})
  assert json.loads(path.read_text())["x"] == 0.5
  assert [p.name for p in path.parent.iterdir()] == ["a.json"]


def test_progress_yields_everything_and_says_how_far(capsys):
  assert list(program.progress([1, 2, 3], desc="reading", every=0.0)) == [1, 2, 3]
  lines = capsys.readouterr().err.splitlines()
  assert lines[0].startswith("reading: 1/3") and lines[-1].startswith("reading: 3/3, 0 s left")


SPY = """
import atexit, sys
loaded = lambda: [name for name in ("jax", "numpy", "flax") if name in sys.modules]
atexit.register(lambda: print("LOADED", loaded(), file=sys.stderr))
"""


WRONG = {
  "--debg": "error: there is no flag --debg; did you mean --debug?\n",
  "--no_such_flag=1": "error: there is no flag --no_such_flag; --help lists all\n",
  "--debug=perhaps": "error: flag --debug=perhaps: 'perhaps' is not true or false\n",
}


@pytest.fixture
def answer(tmp_path):
  """(exit code, output, errors) of a program, which answers without JAX: by the child that `experiments.common.early`
  forks."""
  (tmp_path / "sitecustomize.py").write_text(SPY)
  env = {**os.environ, "PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"}

  def run(name, *flags):
    command = [sys.executable, "-m", f"experiments.{name}", *flags]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=120)
    said, loaded = done.stderr.rsplit("LOADED ", 1)
    assert loaded.strip() == "[]" and "Traceback" not in said, said
    return done.returncode, done.stdout, said

  return run


@pytest.mark.parametrize("name", PROGRAMS)
def test_every_program_answers_help_before_it_imports_jax(name, answer):
  code, page, said = answer(name, "--help")
  assert code == 0 and "--profile" in page and f"experiments.{name}" in page and not said


@pytest.mark.parametrize("name", PROGRAMS)
def test_every_program_names_a_wrong_flag_before_it_imports_jax(name, answer):
  assert answer(name, "--debg") == (1, "", WRONG["--debg"])


@pytest.mark.parametrize("name", ["demo", *(pytest.param(n, marks=pytest.mark.slow) for n in PROGRAMS if n != "demo")])
def test_every_kind_of_wrong_flag_is_named(name, answer):
  for flag, error in WRONG.items():
    assert answer(name, flag) == (1, "", error)


@pytest.mark.parametrize(
  ("name", "flags", "error"),
  [
    ("generate", ["--checkpoint={root}/colb", "--prompt=x"], "--checkpoint={root}/colb: no such folder; did you mean"),
    ("evaluate", ["--checkpoint=.", "--text={root}/LICENSE,{root}/none"], "--text={root}/none: nothing there"),
    ("bench_start", ["--checkpoint=.", "--retrofit=smollm2-135m-cr3"], "--retrofit=smollm2-135m-cr3: no such folder"),
    ("retrofit", ["--data.paths={root}/dms_jax/*.py,{root}/n*/*.txt"], "--data.paths={root}/n*/*.txt: nothing there"),
    ("generate", ["--policy=H2O", "--budget=9"], "there is no flag --budget; did you mean --h2o.budget?"),
    ("retrofit", ["--lr=1"], "there is no flag --lr; did you mean --retrofit.optimizer.learning_rate?"),
    ("retrofit", ["--checkpoint=."], "give --checkpoint=FOLDER of a model and --output=FOLDER of the run, or"),
    ("retrofit", ["--benchmark", "--dms.window=-1"], "dms.window=-1 must be 0 or more tokens"),
    ("retrofit", ["--lora.targets=q_pro"], "flag --lora.targets=q_pro: 'q_pro' is unknown; did you mean 'q_proj'?"),
    ("report", ["stray"], "--runs is needed: folders that experiments.evaluate wrote"),
  ],
)  # fmt: skip
def test_a_wrong_value_is_named_before_jax_is_imported(name, flags, error, answer):
  code, page, said = answer(name, *(flag.format(root=ROOT) for flag in flags))
  assert (code, page, said.count("\n")) == (1, "", 1) and said.startswith("error: " + error.format(root=ROOT)), said


def test_every_program_is_a_console_script_that_answers_early(tmp_path):
  setup = configparser.ConfigParser()
  setup.read(ROOT / "setup.cfg")
  lines = setup["options.entry_points"]["console_scripts"].split("\n")
  assert [line for line in lines if line] == [
    f"dms-{name.replace('_', '-')} = experiments.common.scripts:{name}" for name in PROGRAMS
  ]
  script = tmp_path / "dms-report"
  script.write_text(f"import sys\n{SPY}\nfrom experiments.common.scripts import report\nsys.exit(report())\n")
  for flag, code, said in (
    ("--help", 0, ""),
    ("--outptu=x", 1, "error: there is no flag --outptu; did you mean --output?"),
  ):
    done = subprocess.run(
      [sys.executable, str(script), flag], env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True,
      timeout=120,
    )  # fmt: skip
    assert done.returncode == code and done.stderr.startswith(said) and "LOADED []" in done.stderr, done.stderr


def test_a_shipped_retrofit_is_found_by_name(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  assert {"smollm2-135m-cr4", "smollm2-135m-cr8", "smollm2-135m-elastic-by-cr"} <= set(shipped.names())
  assert shipped.find("smollm2-135m-cr4") == shipped.FOLDER / "smollm2-135m-cr4"
  check_retrofit("retrofit", "smollm2-135m-cr4")
  assert checkpoint.fingerprint("smollm2-135m-cr4") == checkpoint.fingerprint(shipped.FOLDER / "smollm2-135m-cr4")
  with pytest.raises(ValueError, match=r"--retrofit=smollm2-135m-cr5: .*; shipped are smollm2-135m-cr4, "):
    check_retrofit("retrofit", "smollm2-135m-cr5")
  (tmp_path / "smollm2-135m-cr4").mkdir()  # a folder here comes first
  assert shipped.find("smollm2-135m-cr4") == Path("smollm2-135m-cr4")


def test_a_user_without_a_home_folder(monkeypatch, tmp_path):
  """As in containers: programs compile anew and say so, downloads ask for a folder; a closed input holds no turn."""
  kept, said = [], []
  monkeypatch.setattr(compilation.jax.config, "update", lambda name, value: kept.append(value))
  for name in ("JAX_COMPILATION_CACHE_DIR", "DMS_CACHE"):
    monkeypatch.delenv(name, raising=False)
  monkeypatch.setenv("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
  for home, there in ((tmp_path, True), ("/proc", False), ("/dev/null", False)):
    monkeypatch.setenv("HOME", str(home))
    folder = Path(home, ".cache", "dms_jax", "xla")
    assert compilation.keep(say=said.append) == (folder if there else None)
    assert kept.pop() == (str(folder) if there else None)
    assert bool(said) != there
  said.clear()

  def nobody(path):
    raise RuntimeError("Could not determine home directory.")

  monkeypatch.setattr(Path, "expanduser", nobody)
  assert compilation.keep(say=said.append) is None and "no home folder" in said[0] and not kept
  monkeypatch.setattr(Path, "home", lambda: nobody(None))
  with pytest.raises(ValueError, match="no home folder for downloads: set DMS_CACHE"):
    sources.cache_dir()
  monkeypatch.setattr(sys, "stdin", None)
  assert list(generate.user_turns()) == []


def test_a_folder_of_another_kind_is_refused_by_its_flag(tmp_path):
  base, retrofit = save_checkpoints(tmp_path)
  gated = tmp_path / "whole"
  checkpoint.save(gated, tiny.model(gates=tiny.dms()))
  (tmp_path / "run" / "final").mkdir(parents=True)
  for name in ("config.json", "params"):
    (tmp_path / "run" / "final" / name).symlink_to(retrofit / name)
  check_retrofit("retrofit", None)
  check_retrofit("retrofit", retrofit)
  check_retrofit("retrofit", gated, whole=True)
  for folder, whole, message in (
    (tmp_path / "nowhere", True, r"nowhere: not a retrofit, .* \(.*nowhere: no such checkpoint directory\)$"),
    (tmp_path / "run", False, r"run: not a retrofit, .*no such file.*; the retrofit of this run is .*run/final$"),
    (base, True, "base: a model without gates, not a retrofit; give it as --checkpoint, or leave --retrofit out"),
    (gated, False, "whole: a whole model, not a retrofit"),
  ):
    with pytest.raises(ValueError, match=f"--retrofit=.*{message}") as error:
      check_retrofit("retrofit", folder, whole)
    assert "\n" not in str(error.value)
  check_checkpoint("checkpoint", gated)
  for folder, message in (
    (tmp_path, r": not a checkpoint, a folder that experiments.convert_weights writes \(.*no such file.*\)$"),
    (retrofit, ": a retrofit; give it as --retrofit, and its base model as --checkpoint"),
  ):
    with pytest.raises(ValueError, match=f"--checkpoint={folder}{message}") as error:
      check_checkpoint("checkpoint", folder)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ("evaluate", "generate", "hyperscale", "retrofit"))
def test_help_has_one_line_a_flag(name):
  """What a flag does fits the rest of its line, 120 columns wide, wherever its own name leaves room for it."""
  command = [sys.executable, "-m", f"experiments.{name}", "--help"]
  done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "COLUMNS": "120"}, cwd=ROOT)
  assert done.returncode == 0 and done.stderr == ""
  flags = re.split(r"\n  --", done.stdout.split("Flags, as --name=value:")[1])[1:]
  long = []
  for flag in flags:
    default, *text = re.split(r"\s{2,}", flag.split("\n\n")[0].strip(), maxsplit=1)
    told = re.sub(r" \([^()]* \| [^()]*\)$| \(required\)$", "", " ".join(" ".join(text).split()))  # without its choices
    if len(told) > 86:
      long.append((default, told))
  assert not long, long


@pytest.mark.parametrize("columns", [80, 120])
def test_help_fits_its_terminal(columns):
  """Commands keep their lines, so that they can be copied."""
  command, env = [sys.executable, "-m", "experiments.demo", "--help"], {**os.environ, "COLUMNS": str(columns)}
  lines = subprocess.run(command, capture_output=True, text=True, env=env, cwd=ROOT).stdout.splitlines()
  assert lines[0].startswith("The demo: ") and lines[2].startswith("    python -m experiments.demo --checkpoint=")
  assert columns - 20 < max(map(len, lines)) <= columns


def test_help_ends_quietly_where_its_reader_has_gone():
  command = f"{sys.executable} -m experiments.generate --help | head -n 1"
  done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, cwd=ROOT)
  assert done.stdout.startswith("Generates text") and done.stderr == ""
