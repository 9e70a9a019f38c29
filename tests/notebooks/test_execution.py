"""Each notebook runs from start to end in its own kernel, as a user runs it, with small settings."""

from __future__ import annotations

import importlib.util
import json
import os
from typing import Any

import pytest

from tests.helpers import ROOT, save_checkpoints

nbformat = pytest.importorskip("nbformat")
client = pytest.importorskip("nbclient")
pytest.importorskip("ipykernel")
pytest.importorskip("matplotlib")
pytestmark = pytest.mark.filterwarnings(
  "ignore::DeprecationWarning", "ignore::RuntimeWarning", "ignore::ResourceWarning"
)  # Jupyter's


@pytest.fixture
def run(tmp_path, monkeypatch):
  """run(NAME, settings): the outputs of colab/NAME.ipynb, run in `tmp_path` with these values of its `setting`s."""

  def execute(name: str, settings: dict[str, Any]) -> list[Any]:
    for variable, value in settings.items():
      monkeypatch.setenv(f"NOTEBOOK_{variable}", str(value))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]))
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))
    notebook = nbformat.read(ROOT / "colab" / f"{name}.ipynb", as_version=4)
    # No limit for a cell: pytest has one for the test.
    client.NotebookClient(notebook, timeout=None, resources={"metadata": {"path": str(tmp_path)}}).execute()
    return [out for cell in notebook.cells for out in cell.get("outputs", ())]

  return execute


def printed(outputs: list[Any]) -> str:
  """What a notebook has printed."""
  return "".join(out.text for out in outputs if out.output_type == "stream" and out.name == "stdout")


def pictures(outputs: list[Any]) -> int:
  return sum("image/png" in out.get("data", {}) for out in outputs)


# The longest first: two workers begin with the first and the third, as each is given two tests at the start.


def test_05_hyperscaling(run, tmp_path):
  """With the ablation, which the notebook itself leaves out on a CPU."""
  sizes = {"PROBLEMS": 1, "ABLATE": 1, "TEXTS": 5, "LENGTH": 256, "ROWS": 1, "STEPS": 1}
  outputs = run("05_hyperscaling", {"OUTPUT": tmp_path / "runs"} | sizes)
  assert (tmp_path / "runs/sweep/index.html").exists() and pictures(outputs) >= 3
  assert "of which a head holds" in printed(outputs)
  rows = json.loads((tmp_path / "runs/ablations/eviction/ablation.json").read_text())["runs"]
  assert len(rows) == 4


def test_04_kernels(run):
  settings = {"LOG_BYTES": 20, "MATRIX": 128, "SLOTS": 256, "LENGTH": 64, "HEAD": 64}
  outputs = run("04_kernels", settings)
  assert "implementations on this device:" in printed(outputs) and pictures(outputs) == 2


@pytest.mark.skipif(
  not all(map(importlib.util.find_spec, ("torch", "transformers"))),
  reason="torch and transformers are not installed (make test-notebooks installs them)",
)
def test_06_to_pytorch(run, tmp_path, monkeypatch):
  """With a shorter training than a finding needs; its exports give the texts, caches and logits of dms_jax."""
  monkeypatch.setenv("HF_HUB_OFFLINE", "1")  # everything is on disk; nothing may go looking
  monkeypatch.setenv("TOKENIZERS_PARALLELISM", "false")
  settings = {
    "OUTPUT": tmp_path / "out", "BASE_STEPS": 20, "STEPS_PER_CR": 5, "LENGTH": 192, "ROWS": 4,
    "NEW_TOKENS": 24,
  }  # fmt: skip
  outputs = run("06_to_pytorch", settings)
  text = printed(outputs)
  assert "installing" not in text
  # By transformers with eviction, from NVIDIA's layout, from PEFT's, and by the twin.
  assert text.count("[True, True, True, True]") == 4
  assert text.count("tokens held equal: True") == 2
  gap = float(text.split("largest difference of logits: ")[1].split()[0])
  assert gap < 1e-5  # float32, three layers
  cr = float(text.split("achieved CR ")[1].split()[0])
  assert cr > 1.2  # gates evict, within 24 tokens and a prompt
  assert text.count("evicted_fraction") == 3  # the twin's steps
  assert pictures(outputs) == 2


def test_03_retrofit_your_model(run, tmp_path):
  base, _ = save_checkpoints(tmp_path)
  (tmp_path / "text.txt").write_text("The quick brown fox jumps over the lazy dog. " * 40)
  settings = {"CHECKPOINT": base, "TEXT": tmp_path / "text.txt", "OUTPUT": tmp_path / "mine"}
  settings |= {"STEPS": 8, "LENGTH": 64, "NEW_TOKENS": 8, "EVALUATED": 256}
  outputs = run("03_retrofit_your_model", settings)
  text = printed(outputs)
  assert "achieved_cr" in text and "tokens seen" in text and (tmp_path / "mine.zip").exists()
  assert pictures(outputs) == 1


def test_01_quickstart(run, tmp_path):
  base, retrofit = save_checkpoints(tmp_path)
  settings = {"CHECKPOINT": base, "RETROFIT": retrofit, "TOKENS": 300, "NEW_TOKENS": 8}
  outputs = run("01_quickstart", settings)
  text = printed(outputs)
  assert "dense:" in text and "achieved CR" in text
  table = {words[0]: words[1:] for words in map(str.split, text.splitlines()) if words and words[0] in ("dense", "DMS")}
  assert table["dense"][:2] == ["307", "1.00"] and float(table["DMS"][1]) > 1
  assert pictures(outputs) == 1


def test_02_delayed_eviction(run, tmp_path):
  base, retrofit = save_checkpoints(tmp_path)
  settings = {"CHECKPOINT": base, "RETROFIT": retrofit, "TOKENS": 120, "NEW_TOKENS": 16}
  outputs = run("02_delayed_eviction", settings)
  assert printed(outputs).count("tokens equal: True, tokens held equal: True") == 3
  assert pictures(outputs) == 5 and any("% of heads" in out.get("data", {}).get("text/html", "") for out in outputs)
