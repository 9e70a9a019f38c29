"""Notebooks are made from their texts, hold no outputs, install what is missing, and all run."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import re
import subprocess
import sys

import pytest

from tests.helpers import ROOT

NOTEBOOKS = sorted((ROOT / "colab").glob("*.ipynb"))
INSTALL = (ROOT / "colab" / "install.py").read_text()
nbformat = pytest.importorskip("nbformat")


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


def test_every_notebook_is_executed():
  """By `make test-notebooks`."""
  tests = (ROOT / "tests" / "notebooks" / "test_execution.py").read_text()
  assert set(re.findall(r"^def test_(\w+)\(", tests, re.M)) == {path.stem for path in NOTEBOOKS}


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
