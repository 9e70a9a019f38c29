"""Notebooks run from start to end in their own kernel, and are stored without outputs."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.helpers import save_checkpoints

ROOT = Path(__file__).parents[2]
NOTEBOOKS = sorted((ROOT / "colab").glob("*.ipynb"))
nbformat = pytest.importorskip("nbformat")


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_stored_without_outputs(path):
  for cell in nbformat.read(path, as_version=4).cells:
    assert not cell.get("outputs") and not cell.get("execution_count"), f"{path.name} holds outputs: clear and save it"


@pytest.mark.filterwarnings(
  "ignore::DeprecationWarning", "ignore::RuntimeWarning", "ignore::ResourceWarning"
)  # Jupyter's
def test_quickstart_runs_from_start_to_end(tmp_path, monkeypatch):
  """In its own kernel, as a user runs it; small settings and folders come by environment variables."""
  client = pytest.importorskip("nbclient")
  pytest.importorskip("ipykernel")
  pytest.importorskip("matplotlib")
  base, retrofit = save_checkpoints(tmp_path)
  settings = {"CHECKPOINT": base, "RETROFIT": retrofit, "ROOT": ROOT, "TOKENS": 300, "NEW_TOKENS": 8}
  for name, value in settings.items():
    monkeypatch.setenv(f"QUICKSTART_{name}", str(value))
  monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]))
  monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))
  notebook = nbformat.read(ROOT / "colab" / "01_quickstart.ipynb", as_version=4)
  client.NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(tmp_path)}}).execute()

  outputs = [out for cell in notebook.cells for out in cell.get("outputs", ())]
  printed = "".join(out.text for out in outputs if out.output_type == "stream" and out.name == "stdout")
  assert "dense:" in printed and "achieved CR" in printed
  table = {
    words[0]: words[1:] for words in map(str.split, printed.splitlines()) if words and words[0] in ("dense", "DMS")
  }
  assert table["dense"][:2] == ["307", "1.00"] and float(table["DMS"][1]) > 1
  assert any("image/png" in out.get("data", {}) for out in outputs)
