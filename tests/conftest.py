"""Hooks and fixtures of every test: numpy's semantics of dtypes, programs for absent TPUs."""

from __future__ import annotations

import gc
import os
import re
from pathlib import Path

import pytest

_LINES = (Path(__file__).parent / "variants.txt").read_text().splitlines()
_IDS = [re.escape(line).replace(r"\*", ".*") for line in _LINES if line and not line.startswith("#")]
VARIANT = re.compile(rf"tests/({'|'.join(_IDS)})")


PART, PARTS = map(int, os.environ.get("DMS_PART", "1/1").split("/"))  # only this part of the files with variants runs


def pytest_configure(config):
  config.addinivalue_line("markers", "standard_promotion: runs other packages' code that mixes dtypes")
  if (
    hasattr(config, "workerinput") or config.getoption("dist", "no") == "no"
  ):  # else it only hands out files to workers
    import tests.environment  # noqa: F401


@pytest.hookimpl(tryfirst=True)  # before pytest selects by marks
def pytest_collection_modifyitems(config, items):
  for item in items:
    backend = item.callspec.params.get("backend") if hasattr(item, "callspec") else None
    if getattr(backend, "interpreted", False):
      item.add_marker(pytest.mark.slow)
    if VARIANT.fullmatch(item.nodeid):
      item.add_marker(pytest.mark.variant)
  if PARTS > 1:
    mine = set(sorted({item.path for item in items if item.get_closest_marker("variant")})[PART - 1 :: PARTS])
    config.hook.pytest_deselected(items=[item for item in items if item.path not in mine])
    items[:] = [item for item in items if item.path in mine]


def pytest_collection_finish(session):
  if session.items:
    from tests.environment import collect_less_garbage

    collect_less_garbage()


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish():
  gc.freeze()  # pytest then looks five times for what was left behind: 4 s among all compiled programs


@pytest.fixture(autouse=True)
def few_mappings():
  from tests.environment import PROGRAMS

  PROGRAMS.forget_too_many()


@pytest.fixture(autouse=True)
def strict_promotion(request):
  """Mixing dtypes is an error; `@pytest.mark.standard_promotion` lifts it, for code of other packages."""
  if request.node.get_closest_marker("standard_promotion"):
    yield
    return
  import jax

  with jax.numpy_dtype_promotion("strict"):
    yield


@pytest.fixture(autouse=True)
def compiled_for_an_absent_tpu(request):
  """Tests marked `tpu` trace for one; what they compile cannot be read back from disk, so it is not kept there."""
  if not request.node.get_closest_marker("tpu"):
    yield
    return
  import jax
  from jax.experimental.compilation_cache import compilation_cache

  from pallas_kernels.common.platform import tracing_for

  def keep_compiled_programs(kept: bool):
    jax.config.update("jax_enable_compilation_cache", kept)
    compilation_cache.reset_cache()  # else what JAX decided at the process's first compilation goes on to hold

  keep_compiled_programs(False)
  with tracing_for("tpu"):
    yield
  keep_compiled_programs(True)
