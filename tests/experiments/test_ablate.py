"""Ablations: sweeps, combinations checked at once, a whole one killed and resumed."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import types
from pathlib import Path

import numpy as np
import pytest

from dms_jax import checkpoint, policies
from dms_jax import testing as tiny
from dms_jax.evaluation import text as evaluation
from dms_jax.evaluation.text import held_by_position, text_quality
from dms_jax.retrofit import loop
from dms_jax.tokenizer import byte_tokenizer
from experiments import ablate
from experiments.ablation import report as ablation_report
from experiments.ablation import sweeps, trials
from experiments.common import program
from experiments.reports import plots

ROOT = Path(__file__).parents[2]
CONFIGS = sorted((ROOT / "experiments" / "configs").glob("*.txt"))


def defaults(**changed) -> dict:
  """Every flag's default, as a command line without flags leaves them; `a__b` in `changed` is a.b."""

  def flags(prefix: str, config) -> dict:
    found = {}
    for field in dataclasses.fields(config):
      name, value = f"{prefix}.{field.name}", getattr(config, field.name)
      found |= flags(name, value) if dataclasses.is_dataclass(value) else {name: value}
    return found

  whole = {k: v for name, (cls, given) in trials.SECTIONS.items() for k, v in flags(name, cls(**given)).items()}
  return whole | {name.replace("__", "."): value for name, value in changed.items()}


# ------------------------------------------------------------------------------------------------- sweeps in words


def test_a_group_is_a_product_and_groups_are_a_union():
  runs = sweeps.product("dms.window=0,16 dms.gate=neuron,adapter", trials.TYPES)
  assert [tuple(run.values()) for run in runs] == [(0, "neuron"), (0, "adapter"), (16, "neuron"), (16, "adapter")]
  assert sweeps.product(
    "lora.targets=q_proj,k_proj|v_proj eval.window=none,3 data.separate_documents=false", trials.TYPES
  )[1] == {"lora.targets": ("q_proj", "k_proj"), "eval.window": 3, "data.separate_documents": False}
  assert sweeps.product("data.self_text.prefixes='a b.txt',c", trials.TYPES)[0] == {
    "data.self_text.prefixes": "a b.txt"
  }
  assert sweeps.brief(["a/b,c/d", "e"]) == {"a/b,c/d": "b,d", "e": "e"}
  assert sweeps.brief(["a/b", "c/b"]) == {"a/b": "a/b", "c/b": "c/b"}
  whole = defaults()
  said = [{"dms.window": 64}, {"dms.window": 16}, {"dms.gate": "adapter"}]  # the first and last change nothing
  runs = sweeps.unique((each, whole | each) for each in said)
  assert [each for each, _ in runs] == said[:2]
  assert sweeps.varying([each for _, each in runs]) == ["dms.window"]


@pytest.mark.parametrize(
  ("group", "message"),
  [
    ("dms.windw=3", r"--sweep: unknown field 'dms.windw'; did you mean dms.window\?"),
    ("window=3", "unknown field 'window'; "),
    ("dms.window", "'dms.window' is no field=value,value"),
    ("dms.window=1 dms.window=2", "'dms.window=2' comes twice"),
    ("dms.window=1,two", "dms.window=1,two: 'two' is not a whole number"),
    ("dms.gate=lstm", "'lstm' is unknown; there are adapter, neuron, linear, mlp"),
    ("dms.gate='neuron", "--sweep: No closing quotation"),
  ],
)
def test_groups_that_make_no_sense(group, message):
  with pytest.raises(ValueError, match=message):
    sweeps.product(group, trials.TYPES)


def test_sweep_files(tmp_path):
  path = tmp_path / "sweep.txt"
  path.write_text("# What it's for\n\n--dms.window=3 --x=run  # both\n  dms.gate=neuron,adapter\ndms.shift=0\n")
  resolved, groups = sweeps.read_file(path, [*trials.TYPES, "x"])
  assert resolved == {"dms.window": "3", "x": "run"}
  assert [run for group in groups for run in sweeps.product(group, trials.TYPES)] == [
    {"dms.gate": "neuron"},
    {"dms.gate": "adapter"},
    {"dms.shift": 0},
  ]
  for text, message in (("--dms.windw=3", "sweep.txt:1: unknown field 'dms.windw'"), ("--x", "'--x' is no --flag=v")):
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
      sweeps.read_file(path, [*trials.TYPES, "x"])
  with pytest.raises(ValueError, match=r"--sweep_file=.*none.txt"):
    sweeps.read_file(tmp_path / "none.txt", [])


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_sweeps_of_the_repository(path):
  """Each opens with its command, cost and expected result, and every combination in it makes sense."""
  text = path.read_text()
  comments = text[: text.index("\n\n")]
  assert all(line.startswith("#") for line in comments.splitlines())
  order = [
    comments.index(word) for word in ("# Command:  python -m experiments.ablate", "# Cost:", "# Expected: paper")
  ]
  assert order == sorted(order) and f"--sweep_file=experiments/configs/{path.name}" in comments
  resolved, groups = sweeps.read_file(path, [*trials.TYPES, "x"])
  whole = defaults() | {f: program.parse_value(trials.TYPES[f], t) for f, t in resolved.items() if f != "x"}
  runs = [each for group in groups for each in sweeps.product(group, trials.TYPES)]
  wanted = [trials.trial(each, whole | each, "model", Path("runs")) for each in runs]
  assert len({one.result for one in wanted}) == len(wanted) > 1
  for one in wanted:
    assert (ROOT / one.eval.retrofit).is_dir()


# ------------------------------------------------------------------------------------------------ what is refused


@pytest.mark.parametrize(
  ("said", "message"),
  [
    ({"dms.window": -1}, "--sweep: dms.window=-1: dms.window=-1 must be 0 or more"),
    ({"retrofit.trainable": "gates", "dms.gate": "neuron"}, "has no weights of its own"),
    ({"retrofit.trainable": "gates", "lora.rank": 4}, r"'gates' has no low-rank updates for \['lora.rank'\]"),
    ({"eval.length": 1}, "eval.length=1 must be 2 or more"),
    ({"eval.window": -1}, "eval.window=-1 must be 0 or more"),
    ({"eval.length": 8, "eval.positions": 9}, "eval.positions=9 must be at most eval.length=8"),
    ({"eval.checkpoint": "cr9"}, r"'cr9' is none of \['final', 'cr2', .*'cr8'\]"),
    ({"eval.checkpoint": "cr3", "retrofit.schedule.steps": 150}, r"'cr3' is none of \['final', 'cr2'\]"),
    ({"eval.retrofit": "mine", "dms.window": 3}, r"eval.retrofit=mine trains nothing, so \['dms.window'\]"),
    ({"eval.retrofit": "mine", "eval.checkpoint": "cr2"}, "here nothing is trained"),
    ({"eval.policy": "h2o"}, "H2O: give either budget= .tokens. or cr="),
    ({"eval.policy": "vanilla", "eval.budget": 8}, "'vanilla' has no budget for eval.budget=8; these have: "),
    (
      {"eval.policy": "tova", "tova.budget": 8, "h2o.window": 3},
      r"eval.policy=tova, so \['h2o.window'\] change nothing",
    ),
    ({"eval.policy": "tova", "eval.budget": 8, "eval.threshold": 1.0}, "'tova' has no gates"),
    ({"eval.policy": "streamingllm", "eval.budget": 3}, "budget=3 tokens must be more than its sinks=4"),
  ],
)
def test_combinations_that_make_no_sense(said, message):
  with pytest.raises(ValueError, match=message):
    trials.trial(said, defaults() | said, "model", Path("runs"))


def test_what_is_swept_is_not_given_as_a_flag(monkeypatch):
  flags = {flag: types.SimpleNamespace(present=flag == "dms.window") for flag in trials.TYPES}
  monkeypatch.setattr(program, "FLAGS", flags)
  monkeypatch.setattr(program, "flag_values", defaults)
  assert len(trials.trials("model", ["dms.gate=adapter,neuron eval.length=8", "dms.shift=0"], Path("runs"))) == 3
  with pytest.raises(ValueError, match=r"--dms\.window: given as a flag and swept"):
    trials.trials("model", ["dms.window=1,2"], Path("runs"))


def test_folders_are_named_from_what_varies(tmp_path):
  one = lambda said, base="model": trials.trial(said, defaults() | said, base, tmp_path)
  first = one({"dms.window": 3, "eval.threshold": 2.0})
  assert first.folder.name.startswith("dms.window=3-") and first.result.name.startswith("eval.threshold=2.0-")
  other = one({"dms.window": 3, "eval.threshold": 5.0})
  assert other.folder == first.folder and other.result != first.result
  assert one({"dms.window": 3}, "another").folder != first.folder
  first.folder.mkdir()
  again = one({"dms.gate": "adapter", "dms.window": 3})  # the same settings in other words find the same retrofit
  assert again.folder == first.folder and one({"dms.gate": "neuron", "dms.window": 3}).folder != first.folder
  ready = one({"eval.retrofit": "results/mine", "eval.threshold": 2.0})
  assert ready.folder.name.startswith("retrofit=mine-") and ready.retrofit_path == Path("results/mine")


def test_what_was_trained_on_other_text_is_refused(tmp_path):
  text = {"a.txt": "9 tokens, CRC-32 00000001"}
  ablate.check_trained(tmp_path / "not_begun", text)
  (tmp_path / "run.json").write_text(json.dumps({"text": text}))
  ablate.check_trained(tmp_path, dict(text))
  with pytest.raises(
    ValueError, match=f"{tmp_path}: trained on other text, .*00000001.* now, .*00000002.*choose anoth"
  ):
    ablate.check_trained(tmp_path, {"a.txt": "9 tokens, CRC-32 00000002"})


def test_a_retrofit_is_tied_to_the_weights_of_its_base(tmp_path, monkeypatch):
  """Its folder follows from the path alone, which may hold another model once an interrupted run goes on."""
  runs = []
  monkeypatch.setattr(ablate.retrofit, "carry_out", lambda run, *rest: runs.append(run) or {"tokens": 0})
  one = trials.trial({}, defaults(eval__text="held_out.txt"), "model", tmp_path)
  for seed in (0, 0, 1):
    ablate.train(one, tiny.model(seed=seed), contextlib.ExitStack(), byte_tokenizer())
  first, again, other = (run.weights for run in runs)
  assert first == again == loop.weights_of(tiny.model(seed=0)) != other


def test_a_score_is_of_one_text_and_one_retrofit(tmp_path):
  tokens = np.arange(9, dtype=np.int32)
  said = {"eval.retrofit": str(tmp_path / "mine")}
  one = trials.trial(said, defaults() | said, "model", tmp_path)
  retrofit = tiny.model(gates=tiny.dms())
  checkpoint.save(tmp_path / "mine", retrofit, groups=("gate", "lora"))
  assert ablate.finished(one, tokens) is None
  score = {"text_crc32": ablate.crc(tokens), "retrofit_crc32": ablate.fingerprint(one), "kl": 0.5}
  program.save_json(one.result, score)
  assert ablate.finished(one, tokens) == score
  assert ablate.finished(one, tokens + 1) is None
  again = tiny.model(gates=tiny.dms(), seed=5)
  checkpoint.save(tmp_path / "mine", again, groups=("gate", "lora"))
  assert ablate.finished(one, tokens) is None
  baseline = trials.trial({}, defaults(eval__policy="vanilla"), "model", tmp_path)
  assert ablate.fingerprint(baseline) is None


# ------------------------------------------------------------------------------------------------------ the figures


@pytest.mark.parametrize(("window", "eviction"), [(0, "delayed"), (3, "immediate")])
def test_compression_by_position(window, eviction):
  """What is held at a position is what a text that ends there holds, decisions being causal."""
  model = tiny.model(gates=tiny.dms(window=window, eviction=eviction))
  original, tokens = model.replace(dms=None), np.asarray(tiny.tokens(model.config, 2, 24)).reshape(-1)
  where, held = held_by_position(model, tokens, 24, 3, threshold=0.5)
  assert where.tolist() == [8, 16, 24] and held.shape == (3, 2, 2)
  whole = text_quality(original, model, tokens, 24, threshold=0.5)
  assert 1 / held[-1].mean() == pytest.approx(whole["achieved_cr"])
  np.testing.assert_allclose(held[-1] * 24, whole["held_per_head"])
  head = np.concatenate([tokens[:16], tokens[24:40]])
  np.testing.assert_allclose(held[1] * 16, text_quality(original, model, head, 16, threshold=0.5)["held_per_head"])
  with pytest.raises(ValueError, match="25 positions of chunks of 24 tokens"):
    held_by_position(model, tokens, 24, 25)


def test_baselines_decode_the_text():
  """Under the gates' own policy the cache agrees with the mask; a baseline stays within its budget."""
  model = tiny.model(gates=tiny.dms())
  original, tokens = model.replace(dms=None), np.asarray(tiny.tokens(model.config, 1, 40))[0]
  masked, cached = (text_quality(original, model, tokens, 20, policy=policy) for policy in (None, policies.DMS()))
  for name in ("kl", "perplexity", "achieved_cr"):
    assert cached[name] == pytest.approx(masked[name], rel=1e-4), name  # sums in another order, float32
  said = {"eval.length": 40, "eval.policy": "h2o", "eval.budget": 8}
  one = trials.trial(said, defaults() | said, "model", Path("runs"))
  own = trials.trial({"h2o.window": 3}, defaults() | said | {"h2o.window": 3}, "model", Path("runs"))
  assert own.folder == one.folder and own.baseline.window == 3 and own.baseline.budget == one.baseline.budget == 8
  assert own.result.name.startswith("h2o.window=3-") and own.result != one.result
  assert one.folder.name.startswith("policy=h2o-") and ablate.load(one, "model", original) is original
  baseline = ablate.score(one, original, original, tokens)
  assert baseline["achieved_cr"] == 5.0 and baseline["kl"] > 0
  assert baseline["reads_cr"] == pytest.approx(40 * 41 / 2 / (8 * 9 / 2 + 32 * 8))


def test_thresholds_share_a_compilation():
  model = tiny.model(gates=tiny.dms())
  original, tokens = model.replace(dms=None), np.asarray(tiny.tokens(model.config, 1, 40))[0]
  figures, compiled = [], []
  for threshold in (-1e4, 0.0, 2.0, 1e4):
    said = {"eval.threshold": threshold, "eval.length": 40, "eval.retrofit": "mine"}
    one = trials.trial(said, defaults() | said, "model", Path("runs"))
    figures.append(ablate.score(one, original, model, tokens))
    compiled.append(evaluation._score._cache_size())
  assert len(set(compiled)) == 1, "a threshold compiled anew"
  cr = [figure["achieved_cr"] for figure in figures]
  assert cr == sorted(cr, reverse=True) and cr[0] == pytest.approx(40 / 6) and cr[-1] == 1.0
  assert figures[-1]["tokens_scored"] == 39 and figures[-1]["text_crc32"] == figures[0]["text_crc32"]


ROWS = [
  {
    "run": f"dms.window={w} retrofit.steps={s}", "tokens": s * 64, "kl": 0.01 * w + 0.1, "perplexity_change": 0.01,
    "settings": {"dms.window": str(w), "retrofit.schedule.steps": str(s), "dms.gate": g}, "achieved_cr": 2.0 + w,
  }
  for g in ("adapter", "neuron") for w, s in ((16, 8), (3, 4))
]  # fmt: skip


@pytest.mark.parametrize(
  ("x", "places", "lines"),
  [
    ("dms.window", ["3", "3", "16", "16"], {"dms.gate=adapter", "dms.gate=neuron"}),  # steps follow from the window
    ("tokens", [256, 256, 512, 512], {"dms.gate=adapter", "dms.gate=neuron"}),
    ("run", ["window=16\nsteps=8", "window=3\nsteps=4"] * 2, {""}),
  ],
)
def test_points_and_picture(tmp_path, x, places, lines):
  points = ablation_report.points(ROWS, x)
  assert [point["x"] for point in points] == places and {point["line"] for point in points} == lines
  assert ablation_report.axis(ROWS) in ("dms.window", "retrofit.schedule.steps")
  pytest.importorskip("matplotlib")
  assert plots.ablation(tmp_path / "a.png", points, x, "title") == str(tmp_path / "a.png")
  assert (tmp_path / "a.png").read_bytes()[:4] == b"\x89PNG"


def test_picture_of_compression(tmp_path):
  pytest.importorskip("matplotlib")
  held = np.linspace(1.0, 0.2, 4 * 3 * 2).reshape(4, 3, 2)
  runs = [{"name": name, "positions": np.arange(1, 5) * 8, "held": held} for name in ("", ", a=b")]
  plots.compression(tmp_path / "c.png", runs, "title")
  assert (tmp_path / "c.png").read_bytes()[:4] == b"\x89PNG"


def test_picture_of_levels(tmp_path):
  pytest.importorskip("matplotlib")
  row = lambda method, text, cr, kl: {
    "method": method,
    "text": text,
    "achieved_cr": cr,
    "mean": kl,
    "standard_error": kl / 9,
  }
  rows = [{**row("elastic", text, cr, 0.01 * cr), "budget": {"cr": cr}} for text in "ab" for cr in (2.0, 1.5, 4.0)]
  plots.levels(tmp_path / "l.png", [*rows, row("cr 3", "a", 3.1, 0.03)], "elastic")
  assert (tmp_path / "l.png").read_bytes()[:4] == b"\x89PNG"


# ------------------------------------------------------------------------------------------------------- a whole one

# Without matplotlib, whose pictures take longer than these runs; and ends itself with SIGKILL when it begins to write a
# path that holds a word.
PROGRAM = """
import os, runpy, signal, sys
word = sys.argv[1]
def hook(event, args):
  if event in ("os.rename", "os.mkdir") and word and word in str(args[0]) and "window=4" in str(args[0]):
    os.kill(os.getpid(), signal.SIGKILL)
sys.argv = sys.argv[1:]
sys.modules["matplotlib"] = None
sys.addaudithook(hook)
runpy.run_module("experiments.ablate", run_name="__main__", alter_sys=True)
"""


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
  folder = tmp_path_factory.mktemp("ablate")
  tokenizer = byte_tokenizer()
  base = tiny.model(tiny.config(num_layers=1, vocab_size=tokenizer.vocab_size))
  checkpoint.save(folder / "model", base, tokenizer)
  (folder / "text.txt").write_text(" ".join(f"{i} and {i * i % 97} make {i + i * i % 97}." for i in range(100)))
  (folder / "held_out.txt").write_text("seven and nine make sixteen. " * 8)
  (folder / "sweep.txt").write_text(
    "--retrofit.seq_len=16 --retrofit.schedule.steps=6 --retrofit.schedule.final_cr=1.5\n"
    "--retrofit.schedule.steps_per_cr=8 --retrofit.saving.save_every=3 --retrofit.optimizer.learning_rate=0.1\n"
    "--retrofit.memory.compute_dtype=float32 --lora.rank=2 --eval.length=32 --eval.dtype=float32\n"
    "dms.window=2,4 eval.threshold=0,1e4\n"
    f"eval.retrofit={folder / 'broken'}  # noticed when it is loaded\n"
  )
  retrofit = tiny.model(base.config, tiny.dms())
  checkpoint.save(folder / "broken", retrofit, groups=("gate", "lora"))
  shutil.rmtree(folder / "broken" / "params")
  return folder


def run(folder: Path, *flags: str, killed_at: str = "") -> subprocess.CompletedProcess:
  flags = (
    f"--checkpoint={folder / 'model'}", f"--sweep_file={folder / 'sweep.txt'}", f"--data.paths={folder / 'text.txt'}",
    f"--eval.text={folder / 'held_out.txt'}", f"--output={folder / 'runs'}", *flags,
  )  # fmt: skip
  quick = " ".join(f"--{name}={value}".lower() for name, value in tiny.QUICK.items())
  return subprocess.run(
    [sys.executable, "-c", PROGRAM, killed_at, *flags], cwd=ROOT, env={**os.environ, "XLA_FLAGS": quick},
    capture_output=True, text=True, timeout=300,
  )  # fmt: skip


@pytest.mark.slow
def test_killed_resumed_and_one_fails(inputs, tmp_path):
  killed = run(inputs, killed_at="state/6")
  assert killed.returncode == -signal.SIGKILL, killed.stderr
  root = inputs / "runs" / "sweep"
  scores = {path: path.stat().st_mtime_ns for path in root.rglob("quality/*.json")}
  (log,) = root.glob("dms.window=4-*/log.jsonl")
  before = log.read_text().splitlines()
  assert len(scores) == 2 and before and not (log.parent / "final").exists()

  done = run(inputs)
  assert done.returncode == 1, done.stderr
  assert "sweep: 5 runs, 2 of them finished; 1 retrofits to train" in done.stderr
  assert "1 of 5 runs failed" in done.stderr and "Traceback" not in done.stderr
  assert {path: path.stat().st_mtime_ns for path in scores} == scores  # read back, not scored again
  assert log.read_text().splitlines()[:3] == before[:3]  # went on after the checkpoint of step 3
  assert len(log.read_text().splitlines()) == 6 and not (log.parent / "state").exists()

  line = json.loads(done.stdout.splitlines()[-1])
  assert line["config"]["dms.window"] == 64 and line["config"]["retrofit.schedule.steps"] == 6
  (error,) = line["failed"].values()
  assert list(line["failed"]) == [f"eval.retrofit={inputs / 'broken'}"]
  assert error.startswith("ValueError: ") and "params: damaged" in error
  assert next(root.glob("retrofit=broken-*/error.txt")).read_text().startswith("Traceback")
  assert [r["settings"] for r in line["runs"]] == [
    {"dms.window": w, "eval.retrofit": "", "eval.threshold": t} for w in ("2", "4") for t in ("0.0", "10000.0")
  ]
  first = line["runs"][0]
  assert first["tokens"] == 6 * 2 * 16 and first["length"] == 32 and line["runs"][1]["achieved_cr"] == 1.0

  original = checkpoint.load(inputs / "model")
  retrofit = checkpoint.load(inputs / "model", retrofit=Path(first["folder"]) / "final")
  tokens = byte_tokenizer().encode((inputs / "held_out.txt").read_text())
  again = text_quality(original, retrofit, np.asarray(tokens, np.int32), 32)
  for name in ("kl", "perplexity", "achieved_cr"):
    assert first[name] == pytest.approx(again[name], rel=1e-3, abs=1e-7), name  # float32, compiled otherwise

  table = (root / "table.md").read_text().splitlines()
  assert table[0].split("|")[1:4] == [f" {n} " for n in ("dms.window", "eval.retrofit", "eval.threshold")]
  assert len([row for row in table if row.startswith("|")]) == 2 + 4 and table[0] in done.stdout
  saved = json.loads((root / "ablation.json").read_text())
  assert len(saved["runs"]) == 4 and "held_per_head" in saved["runs"][0] and "python -m" in saved["command"]
  assert line["pictures"] == []  # matplotlib is optional

  with (inputs / "text.txt").open("a") as text:
    text.write(" And so on.")
  stale = run(inputs)
  assert stale.returncode == 1 and "Traceback" not in stale.stderr
  assert "dms.window=2" in stale.stderr and ": trained on other text, " in stale.stderr
  pytest.importorskip("matplotlib")
  assert ablation_report.draw(saved["runs"], "run", "title", tmp_path) == [str(tmp_path / "ablation.png")]


def test_a_wrong_value_fails_before_the_first_run(inputs):
  refused = run(inputs, "--name=wrong", "--sweep=dms.shift=1,2")
  assert refused.returncode == 1 and "Traceback" not in refused.stderr
  assert "error: --sweep: dms.shift=2: dms.shift=2 must be 1" in refused.stderr
  assert not (inputs / "runs" / "wrong").exists()
