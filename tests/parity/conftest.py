"""Comparison with torch, transformers and lm-evaluation-harness; `make test-parity` installs them."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # everything compared is on disk; nothing may go looking
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

HERE = Path(__file__).parent


def pytest_collection_modifyitems(items):
  """torch's and transformers' own warnings are not ours to fix."""
  for item in items:
    if HERE in item.path.parents:
      item.add_marker(pytest.mark.filterwarnings("ignore"))


@pytest.fixture(scope="session")
def torch():
  return pytest.importorskip("torch", reason="torch is not installed (make test-parity installs it)")


@pytest.fixture(scope="session")
def transformers(torch):
  library = pytest.importorskip("transformers", reason="transformers is not installed (make test-parity installs it)")
  library.logging.set_verbosity_error()
  library.logging.disable_progress_bar()
  return library
