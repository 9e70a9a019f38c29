"""Tasks: the scorer against plain numpy, what is paired with what, and the program."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from dms_jax import masks
from dms_jax import testing as tiny
from dms_jax.evaluation import likelihood
from dms_jax.model import Eviction, forward, unembed
from dms_jax.tokenizer import byte_tokenizer
from experiments import evaluate
from experiments.common import program
from experiments.methods import run
from experiments.reports import plots
from experiments.reports import tasks as report
from experiments.tasks import TASKS
from experiments.tasks.base import DataConfig, Question, ShotsConfig, TasksConfig
from tests.experiments.test_tasks import SIX_LINES, write_gsm8k, write_mmlu
from tests.helpers import save_checkpoints

ROOT = Path(__file__).parents[2]


class Words:
  """Cuts texts into words with the space before each, numbered as they first come."""

  def __init__(self):
    self.ids: dict[str, int] = {}

  def encode(self, text: str) -> list[int]:
    return [self.ids.setdefault(piece, len(self.ids)) for piece in re.findall(r" ?\S+|\s", text)]


def test_rows_of_a_question():
  words = Words()
  rows, spans = likelihood.rows_of(Question("a b\nAnswer:", ("A", "B")), words)
  (row,) = rows  # letters share the row that ends with the context
  assert row.tokens.tolist() == words.encode("a b\nAnswer:")
  assert row.positions.tolist() == [3, 3] and row.targets.tolist() == [words.ids[" A"], words.ids[" B"]]
  assert [(r, row.targets[part].tolist()) for r, part in spans] == [(0, [words.ids[" A"]]), (0, [words.ids[" B"]])]

  rows, spans = likelihood.rows_of(Question("a b ", ("c d", "e")), words)  # a space at the end belongs to what follows
  assert [r.tokens.tolist()[:2] for r in rows] == [words.encode("a b")] * 2 and [r for r, _ in spans] == [0, 1]
  assert all(r.tokens[r.positions + 1].tolist() == r.targets.tolist() == r.tokens[2:].tolist() for r in rows)
  with pytest.raises(ValueError, match="nothing to score"):
    likelihood.rows_of(Question("", ("c d", "e")), words)


@pytest.fixture(scope="module")
def models():
  cfg = tiny.config(vocab_size=257, max_position_embeddings=4096)
  original, gated = tiny.model(cfg), tiny.model(cfg, tiny.dms(scale=1.0, offset=0.0), seed=0)
  return original, gated


def test_scorer_equals_plain_numpy(models, monkeypatch):
  monkeypatch.setattr(likelihood, "BUCKET", 24)
  rng = np.random.default_rng(0)
  rows = []
  for length, scored in ((20, 5), (31, 17)):
    tokens = rng.integers(0, 257, length).astype(np.int32)
    rows.append(
      likelihood.Passage(tokens, np.arange(length - scored - 1, length - 1, dtype=np.int32), tokens[-scored:])
    )
  rows.append(likelihood.Passage(rows[0].tokens, np.array([19, 19], np.int32), np.array([3, 5], np.int32)))
  out = likelihood.score([(models[0], None), (models[1], 0.3)], rows, batch=3)
  for model, threshold, scored in ((models[0], None, out[0]), (models[1], 0.3, out[1])):
    for row, result in zip(rows, scored, strict=True):
      eviction = None if threshold is None else Eviction(threshold=threshold)
      hidden, z = forward(model, jnp.asarray(row.tokens)[None], eviction=eviction)
      logits = np.asarray(unembed(model, hidden), np.float64)[0]
      logits -= logits.max(axis=-1, keepdims=True)
      log_p = logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))
      np.testing.assert_allclose(result.logprobs, log_p[row.positions, row.targets], atol=2e-5)  # float32 sums
      if threshold is None:
        assert result.held is None
        continue
      held = np.zeros(z.shape[:1] + z.shape[2:3], int)  # the last W + 1, and of the others those not evicted
      for j in range(len(row.tokens)):
        held += ~((j < len(row.tokens) - 6) & (np.asarray(z)[:, 0, :, min(j + 1, len(row.tokens) - 1)] > threshold))
      np.testing.assert_array_equal(result.held, held)
  assert out[1][1].held.sum() < 0.9 * out[1][1].held.size * 31  # something was evicted


def test_held_tokens_of_padded_rows_are_those_of_the_rows_alone():
  evicted = np.random.default_rng(0).random((2, 3, 2, 19)) < 0.6
  lengths = np.array([19, 11, 3])
  padded = masks.held_tokens(jnp.asarray(evicted), 4, jnp.asarray(lengths)[:, None])
  for b, length in enumerate(lengths):
    np.testing.assert_array_equal(padded[:, b], masks.held_tokens(jnp.asarray(evicted[:, b, :, :length]), 4))


def test_scores_of_a_question():
  question = Question("", ("a long ending", "short"), answer=0)
  logprobs = [np.array([-2.0, -4.0, -3.0]), np.array([-8.0])]  # per character the first is likelier
  scored = likelihood.scores(question, logprobs)
  assert (scored["acc"], scored["acc_norm"], scored["answer_loglik"]) == (0.0, 100.0, -3.0)


def test_pairs_and_their_standard_errors():
  before, after = np.array([100.0, 0.0, 100.0, 100.0]), np.array([100.0, 0.0, 0.0, 100.0])
  held = np.full((2, 4, 3), 5)
  outcomes = [
    run.Outcome({"score": before}, None, np.full(4, 20), [{}] * 4),
    run.Outcome({"score": after}, held, np.full(4, 20), [{}] * 4),
  ]
  methods = [run.Method("original", None), run.Method("folder/r at 0.5", None, 0.5)]
  (row,) = run.compare(run.Job(TASKS["needle"], 128, []), methods, outcomes)
  assert row["original"] == 75 and row["score"] == 50 and row["difference"] == 25 and row["achieved_cr"] == 4
  assert row["original_se"] == pytest.approx(25) and row["score_se"] == pytest.approx(28.8675, abs=1e-4)
  assert row["difference_se"] == pytest.approx(25) and row["original_at_least_60"] is True
  assert "75.0 +- 25.0   yes r at 0.5" in report.line(row) and report.line(row).endswith("4.00")
  (alone,) = run.compare(run.Job(TASKS["mmlu"], None, []), methods[:1], outcomes[:1])
  assert "score" not in alone and "original_at_least_60" not in alone and report.line(alone).startswith("mmlu")


# All of it ------------------------------------------------------------------------------------------------------------


def test_every_contender_gets_the_same_samples_and_gates_act(models, tmp_path):
  tokenizer = byte_tokenizer()
  config = TasksConfig(
    tasks=("gsm8k",),
    limit=3,
    data=DataConfig(gsm8k=str(write_gsm8k(tmp_path / "g.jsonl", 9))),
    shots=ShotsConfig(gsm8k=2),
  )
  jobs = run.prepare(config, (512,), tokenizer, 4096)
  methods = [
    run.Method("original", models[1], np.inf),
    run.Method("never", models[1], np.inf),
    run.Method("gates", models[1], 0.0),
  ]
  ((rows, samples),) = run.run(jobs, methods, tokenizer, batch=2)
  never, gates = rows
  assert never["difference"] == 0 == never["difference_se"] and never["achieved_cr"] == 1
  assert gates["achieved_cr"] > 1.2 and gates["difference"] != 0 and gates["samples"] == 3
  assert [s["original"] for s in samples] == [s["never"] for s in samples]
  assert gates["score"] == pytest.approx(np.mean([s["gates"]["answer_loglik"] for s in samples]))


def test_too_many_shots_for_the_context(tmp_path):
  path = write_gsm8k(tmp_path / "g.jsonl", 120)
  config = TasksConfig(tasks=("gsm8k",), limit=1, data=DataConfig(gsm8k=str(path)), shots=ShotsConfig(gsm8k=110))
  with pytest.raises(ValueError, match=r"--shots.gsm8k: a question with its shots has \d+ tokens; the model's context"):
    run.prepare(config, (), byte_tokenizer(), 4096)


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
  return save_checkpoints(tmp_path_factory.mktemp("checkpoints"))


def test_a_retrofit_may_be_a_whole_model(checkpoints):
  base, retrofit = map(str, checkpoints)
  config = evaluate.Config(checkpoint=base)
  assert config.load(retrofit).dms is not None and config.load(base).dms is None


def test_every_model_has_a_name_of_its_own(models, tmp_path):
  config = evaluate.Config(checkpoint="base", retrofit=("folder/r/",), thresholds=(0.0, 0.5))
  names = [config.name("folder/r/", at) for at in config.thresholds]
  assert names == ["folder/r at 0", "folder/r at 0.5"]
  assert evaluate.Config(checkpoint="base", retrofit=("r",)).name("r", 0.0) == "r"
  for wrong in ({"retrofit": ("r", "./r")}, {"retrofit": ("original",)}, {"retrofit": ("task",)},
                {"retrofit": ("r",), "thresholds": (1.0, 1.0)}):  # fmt: skip
    with pytest.raises(ValueError, match=r"--retrofit, --thresholds: .* would be the name of several things"):
      evaluate.Config(checkpoint="base", **wrong)

  data = DataConfig(gsm8k=str(write_gsm8k(tmp_path / "g.jsonl", 2)))
  jobs = run.prepare(TasksConfig(tasks=("gsm8k",), data=data, shots=ShotsConfig(gsm8k=0)), (), byte_tokenizer(), 4096)
  methods = [
    run.Method("original", models[0]),
    *(run.Method(n, models[1], at) for n, at in zip(names, (0.0, 1e4), strict=True)),
  ]
  ((rows, samples),) = run.run(jobs, methods, byte_tokenizer(), batch=2)
  assert [row["retrofit"] for row in rows] == names and report.label(rows[1]) == "r at 0.5"
  for row in rows:  # each keeps its own samples
    assert row["score"] == pytest.approx(np.mean([s[row["retrofit"]]["answer_loglik"] for s in samples]))
  assert rows[0]["score"] != rows[1]["score"]
  with pytest.raises(ValueError, match=r"\['original'\] would be the name"):
    next(run.run(jobs, methods[:1] * 2, byte_tokenizer()))


def test_the_picture_of_a_text_tells_retrofits_of_one_folder_name_apart(tmp_path, monkeypatch):
  drawn = []
  monkeypatch.setattr(plots, "ablation", lambda path, rows, x, title: drawn.extend(rows) or str(path))
  row = {"threshold": 0.0, "length": 8, "achieved_cr": 2.0}
  rows = [{**row, "retrofit": name} for name in ("a/final", "b/final")]
  config = evaluate.Config("model", retrofit=("a/final", "b/final"))
  assert evaluate.text_picture(config, tmp_path / "x.png", rows, "title") == str(tmp_path / "x.png")
  assert [row["line"] for row in drawn] == ["a/final", "b/final"]
  assert evaluate.text_picture(config, tmp_path / "x.png", rows[:1], "title") is None


def test_settings_of_the_program_that_cannot_be():
  for wrong, message in (
    ({"batch": 0}, "--batch=0 must be 1 or more"),
    ({"max_tokens": -1}, "--max_tokens=-1 must be 0 or more"),
    ({"lengths": (64, 1)}, "--lengths=1 must be 2 or more"),
  ):
    with pytest.raises(ValueError, match=message):
      evaluate.Config(checkpoint="base", **wrong)
  assert program.describe(program.flag_types("", evaluate.Config)["dtype"]) == "bfloat16 | float32"


def test_a_killed_run_keeps_its_finished_tasks(checkpoints, tmp_path, monkeypatch):
  data = DataConfig(gsm8k=str(write_gsm8k(tmp_path / "g.jsonl", 2)))
  base, output = str(checkpoints[0]), tmp_path / "o" / "e.json"
  settings = {
    evaluate.Config: evaluate.Config(checkpoint=base, lengths=(600,), output=str(output)),
    TasksConfig: TasksConfig(tasks=("gsm8k", "needle"), limit=1, data=data, shots=ShotsConfig(gsm8k=0)),
  }

  def killed(jobs, methods, *_, **__):
    outcome = run.Outcome({"answer_loglik": np.array([-1.0])}, None, np.array([9]), [{}])
    yield run.compare(jobs[0], methods, [outcome]), [{"task": "gsm8k", "number": 0}]
    raise KeyboardInterrupt

  monkeypatch.setattr(program, "read_flags", lambda prefix, cls: settings[cls])
  monkeypatch.setattr(run, "run", killed)
  with pytest.raises(KeyboardInterrupt):
    evaluate.main()
  saved = json.loads(output.read_text())
  assert [row["original"] for row in saved["tasks"]] == [-1.0]
  assert json.loads(output.with_suffix(".jsonl").read_text()) == {"task": "gsm8k", "number": 0}
  assert all(not path.name.startswith(".") for path in output.parent.iterdir())
  assert output.with_suffix(".png").exists() == (plots.pyplot() is not None)

  (tmp_path / "latin").write_bytes(b"caf\xe9")
  settings[evaluate.Config] = evaluate.Config(checkpoint=base, text=str(tmp_path / "latin"))
  with pytest.raises(ValueError, match=r"--text=\S+latin: not UTF-8"):
    evaluate.main()


def test_the_program(tmp_path, checkpoints):
  base, retrofit = checkpoints
  (tmp_path / "h.txt").write_text(SIX_LINES)
  command = [
    sys.executable, "-m", "experiments.evaluate", f"--checkpoint={base}", f"--retrofit={retrofit}", "--batch=2",
    "--dtype=float32", "--tasks=needle,hellaswag,mmlu", "--limit=2", "--lengths=600", "--shots.hellaswag=1",
    "--shots.mmlu=1", f"--data.hellaswag={tmp_path / 'h.txt'}", f"--data.mmlu={write_mmlu(tmp_path / 'mmlu')}",
  ]  # fmt: skip
  env = {**os.environ, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
  done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=300, cwd=tmp_path)
  assert done.returncode == 0, done.stderr
  result = json.loads(done.stdout.splitlines()[-1])
  rows = {(row["task"], row["metric"]): row for row in result["tasks"]}
  assert set(rows) == {
    ("needle", "score"), ("hellaswag", "acc"), ("hellaswag", "acc_norm"), ("hellaswag", "answer_loglik"),
    ("mmlu", "acc"), ("mmlu", "answer_loglik"),
  }  # fmt: skip
  needle_row = rows["needle", "score"]
  assert needle_row["length"] == 600 and needle_row["original_at_least_60"] is False
  assert all(row["samples"] == 2 and row["achieved_cr"] > 1.05 for row in rows.values())
  saved = json.loads((tmp_path / result["saved"]).read_text())
  assert saved["tasks"] == result["tasks"] and saved["config"]["limit"] == 2
  assert re.fullmatch(r"runs/evaluate/checkpoint=base,.*-[0-9a-f]{8}/evaluate.json", result["saved"])
  samples = [json.loads(line) for line in (tmp_path / result["samples"]).read_text().splitlines()]
  assert len(samples) == 6 and samples[0]["task"] == "needle" and set(samples[0]["original"]) == {"score", "text"}
  assert sum("needle" in line and "600" in line for line in done.stdout.splitlines()[:-1]) == 1
  if plots.pyplot() is not None:
    assert (tmp_path / result["picture"]).read_bytes().startswith(b"\x89PNG")

  refused = subprocess.run(
    [*command, "--data.hellaswag=none"], env=env, capture_output=True, text=True, timeout=300, cwd=tmp_path
  )
  assert refused.returncode == 1 and "error: --data.hellaswag=none: nothing there" in refused.stderr
  assert "Traceback" not in refused.stderr
