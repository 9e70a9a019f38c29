"""Notebooks run from start to end, are made from their texts, and hold no outputs."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import re
import subprocess
import sys

import pytest

from tests.helpers import ROOT, printed, run_notebook, save_checkpoints

NOTEBOOKS = sorted((ROOT / "colab").glob("*.ipynb"))
INSTALL = (ROOT / "colab" / "install.py").read_text()
nbformat = pytest.importorskip("nbformat")
JUPYTER = pytest.mark.filterwarnings(
  "ignore::DeprecationWarning", "ignore::RuntimeWarning", "ignore::ResourceWarning"
)  # Jupyter's


def pictures(outputs) -> int:
  return sum("image/png" in out.get("data", {}) for out in outputs)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_stored_without_outputs(path):
  cells = nbformat.read(path, as_version=4).cells
  for cell in cells:
    assert not cell.get("outputs") and not cell.get("execution_count"), f"{path.name} holds outputs: clear and save it"
  for row in ("colab-badge.svg", "| runs on |", "| minutes |", "| expect |"):
    assert row in cells[0].source, f"{path.name} does not say: {row}"
  assert "MINUTES_" not in cells[0].source


def test_notebooks_are_those_of_their_texts():
  check = [sys.executable, ROOT / ".ci" / "notebooks.py", "--check"]
  done = subprocess.run(check, capture_output=True, text=True)
  assert done.returncode == 0, done.stderr
  assert [path.stem[:2] for path in NOTEBOOKS] == ["01", "02", "03", "04", "05", "06"]


class Installing:
  """Runs the first cell where dms_jax is missing; pip changes the versions that are installed."""

  def __init__(self, monkeypatch, tmp_path, before: str, after: str):
    self.commands, version = [], [before]

    def pip(command, check):
      self.commands.append(" ".join(map(str, command[1:])))
      version[0] = after

    real = importlib.metadata.version
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(subprocess, "run", pip)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(importlib.metadata, "version", lambda name: version[0] if name == "jax" else real(name))

  def run(self, url: str) -> None:
    exec(compile(INSTALL.replace("{url}", url), "install.py", "exec"), {})


def test_the_first_cell_installs_from_the_address(monkeypatch, tmp_path, capsys):
  cell = Installing(monkeypatch, tmp_path, "0.10.2", "0.10.2")
  monkeypatch.setattr("dms_jax.keep_compiled", lambda: None)
  cell.run("https://example.org/x")
  assert re.fullmatch(r"-m pip install -q dms_jax\[demo(,cuda|,tpu)?\] @ git\+https://example.org/x", *cell.commands)
  assert "dms_jax " in capsys.readouterr().out


def test_the_first_cell_asks_for_a_restart_where_jax_was_older(monkeypatch, tmp_path):
  cell = Installing(monkeypatch, tmp_path, "0.7.2", "0.10.2")
  with pytest.raises(SystemExit, match=r"RESTART NEEDED: newer versions of jax 0.7.2 .* Runtime > Restart session"):
    cell.run("https://example.org/x")


def test_the_first_cell_says_that_the_address_is_missing(monkeypatch, tmp_path):
  cell = Installing(monkeypatch, tmp_path, "0.10.2", "0.10.2")
  with pytest.raises(SystemExit, match="set REPOSITORY above"):
    cell.run("")
  assert not cell.commands


@JUPYTER
def test_quickstart_runs_from_start_to_end(tmp_path, monkeypatch):
  """In its own kernel, as a user runs it; small settings and folders come by environment variables."""
  base, retrofit = save_checkpoints(tmp_path)
  settings = {"CHECKPOINT": base, "RETROFIT": retrofit, "TOKENS": 300, "NEW_TOKENS": 8}
  outputs = run_notebook("01_quickstart.ipynb", tmp_path, monkeypatch, settings)
  text = printed(outputs)
  assert "dense:" in text and "achieved CR" in text
  table = {words[0]: words[1:] for words in map(str.split, text.splitlines()) if words and words[0] in ("dense", "DMS")}
  assert table["dense"][:2] == ["307", "1.00"] and float(table["DMS"][1]) > 1
  assert pictures(outputs) == 1


@JUPYTER
def test_delayed_eviction_runs_from_start_to_end(tmp_path, monkeypatch):
  base, retrofit = save_checkpoints(tmp_path)
  settings = {"CHECKPOINT": base, "RETROFIT": retrofit, "TOKENS": 120, "NEW_TOKENS": 16}
  outputs = run_notebook("02_delayed_eviction.ipynb", tmp_path, monkeypatch, settings)
  assert printed(outputs).count("tokens equal: True, tokens held equal: True") == 3
  assert pictures(outputs) == 5 and any("% of heads" in out.get("data", {}).get("text/html", "") for out in outputs)


@JUPYTER
def test_a_retrofit_runs_from_start_to_end(tmp_path, monkeypatch):
  base, _ = save_checkpoints(tmp_path)
  (tmp_path / "text.txt").write_text("The quick brown fox jumps over the lazy dog. " * 40)
  settings = {"CHECKPOINT": base, "TEXT": tmp_path / "text.txt", "OUTPUT": tmp_path / "mine"}
  settings |= {"STEPS": 8, "LENGTH": 64, "NEW_TOKENS": 8, "EVALUATED": 256}
  outputs = run_notebook("03_retrofit_your_model.ipynb", tmp_path, monkeypatch, settings)
  text = printed(outputs)
  assert "achieved_cr" in text and "tokens seen" in text and (tmp_path / "mine.zip").exists()
  assert pictures(outputs) == 1


@JUPYTER
def test_kernels_run_from_start_to_end(tmp_path, monkeypatch):
  settings = {"LOG_BYTES": 20, "MATRIX": 128, "SLOTS": 256, "LENGTH": 64, "HEAD": 64}
  outputs = run_notebook("04_kernels.ipynb", tmp_path, monkeypatch, settings)
  assert "implementations on this device:" in printed(outputs) and pictures(outputs) == 2


@JUPYTER
def test_hyperscaling_runs_from_start_to_end(tmp_path, monkeypatch):
  outputs = run_notebook("05_hyperscaling.ipynb", tmp_path, monkeypatch, {"OUTPUT": tmp_path / "runs", "PROBLEMS": 2})
  assert (tmp_path / "runs/sweep/index.html").exists() and pictures(outputs) >= 2
  assert "of which a head holds" in printed(outputs)


@pytest.mark.slow
@JUPYTER
def test_hyperscaling_with_its_ablation(tmp_path, monkeypatch):
  sizes = {"PROBLEMS": 1, "ABLATE": 1, "TEXTS": 10, "LENGTH": 512, "ROWS": 2, "STEPS": 2}
  settings = {"OUTPUT": tmp_path / "runs"} | sizes
  run_notebook("05_hyperscaling.ipynb", tmp_path, monkeypatch, settings)
  rows = json.loads((tmp_path / "runs/ablations/eviction/ablation.json").read_text())["runs"]
  assert len(rows) == 4
