"""The demo: its figures against the whole text at once, its texts, tables and picture."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from dms_jax import testing as tiny
from dms_jax.evaluation.text import text_quality
from experiments import demo as report
from experiments.reports import plots
from tests import oracle
from tests.helpers import save_checkpoints
from tests.programs import read

T, NEW = 61, 9


@pytest.fixture(scope="module")
def models():
  cfg = tiny.config()
  original = tiny.model(cfg)
  retrofit = tiny.model(cfg, tiny.dms(scale=1.0, offset=0.0))
  params = {**original.params, "layers": {**original.params["layers"]}}
  for name in ("dms_norm", "dms_proj"):
    params["layers"][name] = retrofit.params["layers"][name]
  params["layers"]["v_proj"] = params["layers"]["v_proj"] * 1.2  # a retrofit's weights are not the original's
  return original, retrofit.replace(params=params)


@pytest.fixture(scope="module")
def tokens(models):
  return np.asarray(tiny.tokens(models[0].config, 1, T)[0])


@pytest.fixture(scope="module")
def compared(models, tokens):
  return report.compare(*models, tokens, new_tokens=NEW, chunk=16)


def test_quality_equals_the_whole_text_at_once(models, tokens, compared):
  """Float32: chunked and whole differ by summation order alone."""
  whole = text_quality(*models, tokens, T)
  assert compared["dense"]["perplexity"] == pytest.approx(whole["perplexity_original"], rel=1e-5)
  assert compared["dms"]["perplexity"] == pytest.approx(whole["perplexity"], rel=1e-5)
  assert compared["dms"]["kl"] == pytest.approx(whole["kl"], rel=1e-4, abs=1e-7)
  assert compared["dense"]["kl"] == 0.0


def test_written_tokens_and_live_curve_follow_the_masked_formula(models, tokens, compared):
  """Greedy tokens of one full forward pass; live tokens of every length by the definition of held tokens."""
  for name, model in zip(("dense", "dms"), models, strict=True):
    run = compared[name]
    logits, z = read(model, np.append(tokens, run["written"])[None], 0.0 if model.dms else None)
    np.testing.assert_array_equal(logits[0].argmax(axis=-1)[T - 1 : -1], run["written"])
    for position, live in zip(run["position"], run["live"], strict=True):
      if model.dms is None:
        assert (live == position).all()
        continue
      evicted = oracle.about(z[:, 0, :, :position] > 0, model.dms.shift)
      np.testing.assert_array_equal(live, oracle.held(evicted, model.dms.window))


def test_metrics(models, compared):
  dense, dms = compared["dense"]["metrics"], compared["dms"]["metrics"]
  assert dense.achieved_cr == pytest.approx(1.0) and dms.achieved_cr > 1.2
  assert dense.kv_reads == sum(range(T, T + NEW)) > dms.kv_reads
  assert dense.peak_tokens == T + NEW - 1 == dense.seen[0]
  assert dms.achieved_cr == pytest.approx((T + NEW - 1) / compared["dms"]["live"][-1].mean())
  assert dense.bytes_live == (T + NEW - 1) * 2 * 2 * 2 * 16 * 4 <= dense.bytes_allocated


def test_how_a_cache_grows_changes_nothing(models, tokens, compared, monkeypatch):
  monkeypatch.setattr(report, "STRIDES", 1)
  whole = report.compare(*models, tokens, new_tokens=NEW, chunk=16)["dms"]
  assert whole["metrics"].bytes_allocated >= compared["dms"]["metrics"].bytes_allocated
  assert whole["kl"] == pytest.approx(compared["dms"]["kl"], rel=1e-4)
  np.testing.assert_array_equal(whole["written"], compared["dms"]["written"])
  np.testing.assert_array_equal(whole["live"], compared["dms"]["live"])


def test_columns_and_table(compared):
  shown = report.side_by_side("one two three", "four\n\nfive", width=8).splitlines()
  assert shown == ["dense    | DMS", "-------- | --------", "one two  | four", "three    |", "         | five"]
  assert report.side_by_side("a\n" * 9, "b", rows=3).splitlines()[-1].startswith("... ")
  runs = [{**run, **run["metrics"].to_json()} for run in (compared["dense"], compared["dms"])]
  text = report.table(*runs)
  for words in (
    "perplexity of what was read",
    "KL to the original",
    f"achieved CR at T = {T + NEW - 1}",
    "cache, live",
    "x less",
  ):
    assert words in text


def test_picture(compared, tmp_path):
  pytest.importorskip("matplotlib")
  path = plots.live_tokens(tmp_path / "new" / "a.png", compared["dense"], compared["dms"], read=T, title="tiny")
  assert (tmp_path / "new" / "a.png").read_bytes().startswith(b"\x89PNG") and path.endswith("a.png")


def test_own_text_is_the_documents_first_and_enough():
  text = report.own_text()
  assert text.startswith("# dms_jax") and "Dynamic Memory Sparsification" in text
  assert len(text) > 40_000  # some 10,000 tokens


def test_settings_are_checked():
  with pytest.raises(ValueError, match="--chunk=0 must be 1 or more"):
    report.Config(chunk=0)


def test_the_program_from_checkpoints_to_its_last_line(tmp_path):
  base, retrofit = save_checkpoints(tmp_path)
  command = [
    sys.executable, "-m", "experiments.demo", f"--checkpoint={base}", f"--retrofit={retrofit}", "--tokens=150",
    "--new_tokens=12", "--chunk=64", f"--output={tmp_path / 'out'}",
  ]  # fmt: skip
  env = {**os.environ, "PYTHONPATH": str(report.ROOT)}
  done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=300, cwd=tmp_path)
  assert done.returncode == 0, done.stderr
  line = json.loads(done.stdout.splitlines()[-1])
  assert line["dense"]["achieved_cr"] == 1.0 and line["dms"]["achieved_cr"] > 1 and line["dms"]["kl"] > 0
  assert line["dense"]["seen_tokens"] == line["dms"]["seen_tokens"] == [161]
  assert line["config"]["tokens"] == 150 and set(line["answers"]) == {"dense", "dms"}
  assert Path(line["picture"]).read_bytes().startswith(b"\x89PNG")
  saved = json.loads((tmp_path / "out" / "report.json").read_text())
  assert len(saved["dms"]["live_mean"]) == len(saved["dms"]["position"]) == 3 + 12
  assert "perplexity of what was read" in done.stdout

  short = subprocess.run([*command, "--text=/dev/null"], env=env, capture_output=True, text=True, timeout=300)
  assert short.returncode == 1 and "error: --text=/dev/null: 0 tokens, fewer than --tokens=150" in short.stderr
