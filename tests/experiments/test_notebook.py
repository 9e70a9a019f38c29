"""Notebooks run from start to end in their own kernel, and are stored without outputs."""

from __future__ import annotations

import pytest

from tests.helpers import ROOT, printed, run_notebook, save_checkpoints

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
  base, retrofit = save_checkpoints(tmp_path)
  settings = {"CHECKPOINT": base, "RETROFIT": retrofit, "ROOT": ROOT, "TOKENS": 300, "NEW_TOKENS": 8}
  settings = {f"QUICKSTART_{name}": value for name, value in settings.items()}
  outputs = run_notebook("01_quickstart.ipynb", tmp_path, monkeypatch, settings)
  text = printed(outputs)
  assert "dense:" in text and "achieved CR" in text
  table = {words[0]: words[1:] for words in map(str.split, text.splitlines()) if words and words[0] in ("dense", "DMS")}
  assert table["dense"][:2] == ["307", "1.00"] and float(table["DMS"][1]) > 1
  assert any("image/png" in out.get("data", {}) for out in outputs)
