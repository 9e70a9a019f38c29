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
from tests.programs import read

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
      logits, z = read(model, row.tokens[None], threshold)
      logits = logits[0].astype(np.float64)
      logits -= logits.max(axis=-1, keepdims=True)
      log_p = logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))
      np.testing.assert_allclose(result.logprobs, log_p[row.positions, row.targets], atol=2e-5)  # float32 sums
      if threshold is None:
        assert result.held is None
        continue
      held = np.zeros(z.shape[:1] + z.shape[2:3], int)  # the last W + 1, and of the others those not evicted
      for j in range(len(row.tokens)):
        held += ~((j < len(row.tokens) - 6) & (z[:, 0, :, min(j + 1, len(row.tokens) - 1)] > threshold))
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
  _, own = summary(job, [run.Method("h2o", models[0], H2O(budget=8))], tokenizer)
  assert [record.achieved_cr for record in own["h2o"]] == [record.tokens / 8 for record in own["h2o"]]
  assert own["h2o"][0].budget == {"budget": 8.0}


def test_what_is_there_is_not_answered_again(models):
  tokenizer = byte_tokenizer()
  (job,) = run.prepare([Needle()], TasksConfig(limit=3, seed=7), (560,), tokenizer, 4096)
  method = run.Method("gates", models[1], DMS(threshold=0.0), checkpoint="mine")
  whole = [record for part in run.run(job, [method], tokenizer, width=2) for record in part]
  whole.sort(key=lambda record: record.prompt)
  assert [record.prompt for record in whole] == [0, 1, 2] and whole[0].seed == 7
  assert whole[0].settings == f"{job.content}-mine"
  for record in whole:
    assert 1 < record.achieved_cr < record.tokens and record.peak <= record.tokens and 0 < record.reads
    assert record.max_tokens == 128 and record.length == 560 and isinstance(record.text, str)
  assert list(run.run(job, [method], tokenizer, width=2, done=[whole[0], whole[2]])) == [[whole[1]]]
  assert not list(run.run(job, [method], tokenizer, done=whole))


def test_chains_of_a_prompt_are_sampled_apart(models, monkeypatch):
  monkeypatch.setattr(Needle, "new_tokens", 4)
  tokenizer = byte_tokenizer()
  (job,) = run.prepare([Needle()], TasksConfig(limit=2, chains=2, temperature=1.0), (560,), tokenizer, 4096)
  method = run.Method("original", models[0])
  whole = [record for part in run.run(job, [method], tokenizer, width=3) for record in part]
  whole.sort(key=lambda record: (record.prompt, record.chain))
  assert [(record.prompt, record.chain) for record in whole] == [(0, 0), (0, 1), (1, 0), (1, 1)]
  assert all(record.chains == 2 for record in whole) and len({record.text for record in whole}) == 4
  (rest,) = run.run(job, [method], tokenizer, width=3, done=[whole[0], whole[1], whole[3]])
  assert rest == [whole[2]]  # by its own key, whatever else is in its batch
  (entry,) = summarise(whole, "original")
  assert entry.samples == 2 and entry.chains == 1
  for wrong in ({"chains": 2}, {"chains": 0}, {"temperature": -1.0}):
    with pytest.raises(ValueError, match=f"--{next(iter(wrong))}="):
      TasksConfig(**wrong)


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
  assert config.load(retrofit).dms is not None
  with pytest.raises(ValueError, match=f"--retrofit={base}: a model without gates, not a retrofit; give it as --check"):
    config.load(base)


def test_every_model_has_a_name_of_its_own(models, tmp_path):
  config = evaluate.Config(checkpoint="base", retrofit=("folder/r/",), thresholds=(0.0, 0.5))
  names = [config.name("folder/r/", at) for at in config.thresholds]
  assert names == ["folder/r at 0", "folder/r at 0.5"]
  assert evaluate.Config(checkpoint="base", retrofit=("r",)).name("r", 0.0) == "r"
  for wrong in ({"retrofit": ("r", "./r")}, {"retrofit": ("original",)},
                {"retrofit": ("r",), "thresholds": (1.0, 1.0)}):  # fmt: skip
    with pytest.raises(
      ValueError, match=r"--methods, --retrofit, --thresholds: .* would be the name of several methods"
    ):
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
  kind = lambda name, nll, kl, cr: Record(
    name, "text", 8, {}, 1, 0, 0, 0, 0, "s", 8, None, None, cr, {"nll": np.log(nll), "kl": kl}
  )
  made = [kind("original", 10, 0.0, 1.0), kind("a/final", 11, 0.5, 2.0), kind("b/final", 11, 0.5, 2.0)]
  entries = summarise(made, "original")
  perplexities = {entry.method: entry for entry in entries if entry.metric == "perplexity"}
  assert perplexities["a/final"].mean == pytest.approx(11) and perplexities["a/final"].difference == pytest.approx(1)
  assert evaluate.text_picture(tmp_path / "x.png", entries, "title") == str(tmp_path / "x.png")
  assert [row["line"] for row in shown] == ["a/final", "b/final"]
  assert shown[0]["perplexity_change"] == pytest.approx(0.1) and shown[0]["achieved_cr"] == 2.0
  assert evaluate.text_picture(tmp_path / "x.png", [e for e in entries if e.method != "b/final"], "title") is None


def test_the_picture_of_levels_is_of_one_method_at_three_crs(tmp_path, monkeypatch):
  """Curves of elastic gates, marks of a retrofit for one CR; the dense model and shorter chunks are left out."""
  shown = []
  monkeypatch.setattr(plots, "levels", lambda path, rows, name: shown.append((rows, name)) or str(path))
  kind = lambda name, text, length, budget, kl, cr: [
    Record(name, text, length, budget, 1, 0, 0, n, 0, "s", 8, None, None, cr, {"nll": 1.0, "kl": kl * (n + 1)})
    for n in range(2)
  ]
  made = [
    *kind("original", "text a", 8, {}, 0.0, 1.0),
    *(r for cr in (2.0, 4.0, 8.0) for text in ("text a", "text b") for r in kind("dms e", text, 8, {"cr": cr}, cr, cr)),
    *kind("dms e", "text a", 4, {"cr": 2.0}, 9.0, 2.0),
    *kind("dms one", "text b", 8, {}, 0.5, 3.0),
  ]
  entries = summarise(made, "original")
  assert evaluate.levels_picture(tmp_path / "l.png", entries) == str(tmp_path / "l.png")
  ((rows, name),) = shown
  assert name == "dms e" and {(r["method"], r["text"], r["achieved_cr"]) for r in rows} == {
    ("dms one", "b", 3.0), *(("dms e", text, cr) for text in "ab" for cr in (2.0, 4.0, 8.0)),
  }  # fmt: skip
  assert {r["mean"] for r in rows if r["achieved_cr"] == 4.0} == {6.0} and all(r["standard_error"] > 0 for r in rows)
  assert evaluate.levels_picture(tmp_path / "l.png", [e for e in entries if e.budget.get("cr") != 8.0]) is None
  assert evaluate.levels_picture(tmp_path / "l.png", []) is None


def test_settings_of_the_program_that_cannot_be():
  for wrong, message in (
    ({"batch": 0}, "--batch=0 must be 1 or more"),
    ({"text_tokens": -1}, "--text_tokens=-1 must be 0 or more"),
    ({"max_tokens": (8, 0)}, "--max_tokens=0 must be 1 or more"),
    ({"methods": ("vanilla",), "cr": (2.0, 0.5)}, "--cr=0.5 must be 1 or more"),
    ({"methods": ("vanilla",), "budgets": (8, 8)}, "--budgets=8,8: a number twice"),
    ({"output": "a/b.json"}, "--output=a/b.json must be a folder"),
    ({"cr": (2.0,)}, "--cr bounds methods: name them"),
    ({"methods": ("DMS", "h3o")}, "--methods: 'h3o' is unknown; did you mean 'h2o'. there are dmc, dms"),
    ({"lengths": (64, 1)}, "--lengths=1 must be 2 or more"),
  ):
    with pytest.raises(ValueError, match=message):
      evaluate.Config(checkpoint="base", **wrong)
  assert program.describe(program.flag_types("", evaluate.Config)["dtype"]) == "bfloat16 | float32"


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
  folder = tmp_path / result["folder"]
  assert re.fullmatch(r"runs/evaluate/checkpoint=base,.*-[0-9a-f]{8}", result["folder"])
  saved = json.loads((folder / "summary.json").read_text())
  assert saved["summary"] == result["summary"] and saved["baseline"] == "original"
  assert json.loads((folder / "config.json").read_text())["config"]["limit"] == 2
  found = records.read(folder / "records.jsonl")
  assert len(found) == 2 * 6 and (found[0].method, found[0].task) == ("original", "needle")
  again = summarise(found, "original")
  order = lambda rows: sorted(rows, key=lambda row: (row["task"], row["metric"], row["method"]))
  assert order(map(program.to_plain, again)) == order(saved["summary"])  # every table is redrawn from the records
  shown = [line for line in done.stdout.splitlines()[:-1] if "needle" in line and "600" in line]
  assert len(shown) == 2 and all("original below 60" in line for line in shown)
  assert "2 methods x 3 tasks and 0 texts = 6 cells: 12 chains and questions to do (0 are there)" in done.stderr
  if plots.pyplot() is not None:
    assert [Path(path).name for path in result["pictures"]] == ["tasks.png"]
    assert (folder / "tasks.png").read_bytes().startswith(b"\x89PNG")

  refused = subprocess.run(
    [*command, "--hellaswag.data=none"], env=env, capture_output=True, text=True, timeout=300, cwd=tmp_path
  )
  assert refused.returncode == 1 and "error: --hellaswag.data=none: nothing there" in refused.stderr
  assert "Traceback" not in refused.stderr
