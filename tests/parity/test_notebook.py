"""The notebook that ports a finding: its exports give the texts, caches and logits of dms_jax."""

from __future__ import annotations

from tests.helpers import printed, run_notebook


def test_a_finding_is_ported_from_start_to_end(tmp_path, monkeypatch, transformers):
  """In its own kernel, as a user runs it, with a shorter training than a finding needs."""
  settings = {
    "OUTPUT": tmp_path / "out", "BASE_STEPS": 20, "STEPS_PER_CR": 5, "LENGTH": 192, "ROWS": 4,
    "NEW_TOKENS": 24,
  }  # fmt: skip
  outputs = run_notebook("06_to_pytorch.ipynb", tmp_path, monkeypatch, settings)
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
  assert sum("image/png" in out.get("data", {}) for out in outputs) == 2
