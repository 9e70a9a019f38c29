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
from dms_jax.policies import DMS, H2O, Vanilla
from dms_jax.tokenizer import Tokenizer, byte_tokenizer
from experiments import evaluate
from experiments.common import program
from experiments.methods import records, run
from experiments.methods.records import Record
from experiments.methods.summary import summarise
from experiments.reports import plots
from experiments.tasks.base import Question, TasksConfig
from experiments.tasks.gsm8k import GSM8K
from experiments.tasks.needle import Needle
from tests.helpers import SIX_LINES, save_checkpoints, write_gsm8k, write_mmlu

ROOT = Path(__file__).parents[2]


class Words(Tokenizer):
  """Cuts texts into words with the space before each, numbered as they first come."""

  def __init__(self):
    object.__setattr__(self, "ids", {})  # a tokenizer is frozen

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


# All of it ------------------------------------------------------------------------------------------------------------


def summary(job, methods, tokenizer, **settings):
  """(summary entries by method and metric, records by method) of one job."""
  found = [record for part in run.run(job, methods, tokenizer, **settings) for record in part]
  entries = {(entry.method, entry.metric): entry for entry in summarise(found, "original")}
  return entries, {m.name: [record for record in found if record.method == m.name] for m in methods}


def test_every_method_gets_the_same_samples_and_gates_act(models, tmp_path):
  tokenizer = byte_tokenizer()
  task = GSM8K(str(write_gsm8k(tmp_path / "g.jsonl", 9)), shots=2)
  (job,) = run.prepare([task], TasksConfig(limit=3), (512,), tokenizer, 4096)
  methods = [
    run.Method("original", models[1], DMS(threshold=np.inf)),
    run.Method("never", models[1], DMS(threshold=np.inf)),
    run.Method("gates", models[1], DMS(threshold=0.0)),
  ]
  entries, own = summary(job, methods, tokenizer, batch=2)
  never, gates = entries["never", "answer_loglik"], entries["gates", "answer_loglik"]
  assert never.difference == 0 == never.difference_se and never.achieved_cr == 1
  assert gates.achieved_cr > 1.2 and gates.difference != 0 and gates.samples == 3
  assert [record.grades for record in own["original"]] == [record.grades for record in own["never"]]
  assert gates.mean == pytest.approx(np.mean([record.grades["answer_loglik"] for record in own["gates"]]))
  assert own["gates"][0].budget == {"threshold": 0.0} and own["never"][0].budget == {}
  with pytest.raises(ValueError, match=r"gsm8k: given continuations are scored under DMS or vanilla, not H2O \(h2o\)"):
    summary(job, [run.Method("h2o", models[0], H2O(budget=8))], tokenizer)


def test_what_is_there_is_not_answered_again(models):
  tokenizer = byte_tokenizer()
  (job,) = run.prepare([Needle()], TasksConfig(limit=3, seed=7), (560,), tokenizer, 4096)
  method = run.Method("gates", models[1], DMS(threshold=0.0), checkpoint="mine")
  parts = list(run.run(job, [method], tokenizer, batch=2))
  assert [len(part) for part in parts] == [2, 1]
  whole = [record for part in parts for record in part]
  assert [record.prompt for record in whole] == [0, 1, 2] and whole[0].seed == 7
  assert whole[0].settings == f"{job.content}-mine"
  for record in whole:
    assert 1 < record.achieved_cr < record.tokens and record.peak <= record.tokens and 0 < record.reads
    assert record.max_tokens == 128 and record.length == 560 and isinstance(record.text, str)
  (rest,) = run.run(job, [method], tokenizer, batch=2, done=[whole[0], whole[2]])
  assert [record.prompt for record in rest] == [1] and rest[0].text == whole[1].text
  assert not list(run.run(job, [method], tokenizer, done=whole))


def test_too_many_shots_for_the_context(tmp_path):
  task = GSM8K(str(write_gsm8k(tmp_path / "g.jsonl", 120)), shots=110)
  with pytest.raises(ValueError, match=r"--gsm8k.shots: a question with its shots has \d+ tokens; the model's context"):
    run.prepare([task], TasksConfig(limit=1), (), byte_tokenizer(), 4096)


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
  for wrong in ({"retrofit": ("r", "./r")}, {"retrofit": ("original",)},
                {"retrofit": ("r",), "thresholds": (1.0, 1.0)}):  # fmt: skip
    with pytest.raises(ValueError, match=r"--retrofit, --thresholds: .* would be the name of several methods"):
      evaluate.Config(checkpoint="base", **wrong)

  task = GSM8K(str(write_gsm8k(tmp_path / "g.jsonl", 2)), shots=0)
  (job,) = run.prepare([task], TasksConfig(), (), byte_tokenizer(), 4096)
  methods = [
    run.Method("original", models[0], Vanilla()),
    *(run.Method(n, models[1], DMS(threshold=at)) for n, at in zip(names, (0.0, 1e4), strict=True)),
  ]
  entries, own = summary(job, methods, byte_tokenizer(), batch=2)
  for name in names:  # each keeps its own samples
    score = np.mean([record.grades["answer_loglik"] for record in own[name]])
    assert entries[name, "answer_loglik"].mean == pytest.approx(score)
  assert entries[names[0], "answer_loglik"].mean != entries[names[1], "answer_loglik"].mean
  with pytest.raises(ValueError, match=r"\['original'\] would be the name"):
    next(run.run(job, methods[:1] * 2, byte_tokenizer()))


def test_the_picture_of_a_text_tells_retrofits_of_one_folder_name_apart(tmp_path, monkeypatch):
  shown = []
  monkeypatch.setattr(plots, "ablation", lambda path, rows, x, title: shown.extend(rows) or str(path))
  quality = {"length": 8, "chunks": 2, "perplexity_original": 10.0, "perplexity": 11.0, "kl": 0.5, "achieved_cr": 2.0}
  entries = [entry for name in ("a/final", "b/final") for entry in evaluate.text_entries(name, quality)]
  assert evaluate.text_picture(tmp_path / "x.png", entries, "title") == str(tmp_path / "x.png")
  assert [row["line"] for row in shown] == ["a/final", "b/final"]
  assert shown[0]["perplexity_change"] == pytest.approx(0.1) and shown[0]["achieved_cr"] == 2.0
  assert evaluate.text_picture(tmp_path / "x.png", entries[:3], "title") is None


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
  base, output = str(checkpoints[0]), tmp_path / "o" / "e.json"
  settings = {
    evaluate.Config: evaluate.Config(checkpoint=base, lengths=(600,), output=str(output)),
    TasksConfig: TasksConfig(tasks=("gsm8k", "needle"), limit=1),
    GSM8K: GSM8K(str(write_gsm8k(tmp_path / "g.jsonl", 2)), shots=0),
    Needle: Needle(),
  }
  real = run.run

  def killed(job, methods, *_, **__):
    if job.task.name == "needle":
      raise KeyboardInterrupt
    made = run.settings_of(job, methods[0])
    yield [Record("original", "gsm8k", None, {}, 1, 0, 42, 0, 0, made, 9, None, None, 1.0, {"answer_loglik": -1.0})]

  monkeypatch.setattr(program, "read_flags", lambda prefix, cls: settings[cls])
  monkeypatch.setattr(run, "run", killed)
  with pytest.raises(KeyboardInterrupt):
    evaluate.main()
  saved = json.loads(output.read_text())
  assert [row["mean"] for row in saved["summary"]] == [-1.0]
  (record,) = records.read(output.with_suffix(".jsonl"))
  assert (record.task, record.prompt, record.grades) == ("gsm8k", 0, {"answer_loglik": -1.0})
  assert all(not path.name.startswith(".") for path in output.parent.iterdir())
  assert output.with_suffix(".png").exists() == (plots.pyplot() is not None)

  monkeypatch.setattr(run, "run", real)
  monkeypatch.setattr(program, "finish", lambda result: None)
  evaluate.main()  # goes on: what was recorded stays as it was
  assert [row["mean"] for row in json.loads(output.read_text())["summary"] if row["task"] == "gsm8k"] == [-1.0]
  assert [record.task for record in records.read(output.with_suffix(".jsonl"))] == ["gsm8k", "needle"]
  settings[GSM8K] = GSM8K(settings[GSM8K].data, shots=1)
  with pytest.raises(ValueError, match="holds records of original on gsm8k made with other settings"):
    evaluate.main()

  (tmp_path / "latin").write_bytes(b"caf\xe9")
  settings[evaluate.Config] = evaluate.Config(checkpoint=base, text=str(tmp_path / "latin"))
  with pytest.raises(ValueError, match=r"--text=\S+latin: not UTF-8"):
    evaluate.main()


def test_the_program(tmp_path, checkpoints):
  base, retrofit = checkpoints
  (tmp_path / "h.txt").write_text(SIX_LINES)
  command = [
    sys.executable, "-m", "experiments.evaluate", f"--checkpoint={base}", f"--retrofit={retrofit}", "--batch=2",
    "--dtype=float32", "--tasks=needle,hellaswag,mmlu", "--limit=2", "--lengths=600", "--hellaswag.shots=1",
    "--mmlu.shots=1", f"--hellaswag.data={tmp_path / 'h.txt'}", f"--mmlu.data={write_mmlu(tmp_path / 'mmlu')}",
  ]  # fmt: skip
  env = {**os.environ, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
  done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=300, cwd=tmp_path)
  assert done.returncode == 0, done.stderr
  result = json.loads(done.stdout.splitlines()[-1])
  name = str(retrofit)
  rows = {(row["task"], row["metric"]): row for row in result["summary"] if row["method"] == name}
  assert set(rows) == {
    ("needle", "score"), ("hellaswag", "acc"), ("hellaswag", "acc_norm"), ("hellaswag", "answer_loglik"),
    ("mmlu", "acc"), ("mmlu", "answer_loglik"),
  }  # fmt: skip
  assert len(result["summary"]) == 2 * len(rows) and rows["needle", "score"]["length"] == 600
  assert all(row["samples"] == 2 and row["achieved_cr"] > 1.05 for row in rows.values())
  assert all(row["difference"] is not None and row["difference_se"] is not None for row in rows.values())
  saved = json.loads((tmp_path / result["saved"]).read_text())
  assert saved["summary"] == result["summary"] and saved["config"]["limit"] == 2
  assert re.fullmatch(r"runs/evaluate/checkpoint=base,.*-[0-9a-f]{8}/evaluate.json", result["saved"])
  found = records.read(tmp_path / result["records"])
  assert len(found) == 2 * 6 and (found[0].method, found[0].task) == ("original", "needle")
  again = summarise(found, "original")
  assert [program.to_plain(entry) for entry in again] == saved["summary"]  # every table is redrawn from the records
  shown = [line for line in done.stdout.splitlines()[:-1] if "needle" in line and "600" in line]
  assert len(shown) == 2 and all("original below 60" in line for line in shown)
  if plots.pyplot() is not None:
    assert (tmp_path / result["picture"]).read_bytes().startswith(b"\x89PNG")

  refused = subprocess.run(
    [*command, "--hellaswag.data=none"], env=env, capture_output=True, text=True, timeout=300, cwd=tmp_path
  )
  assert refused.returncode == 1 and "error: --hellaswag.data=none: nothing there" in refused.stderr
  assert "Traceback" not in refused.stderr
