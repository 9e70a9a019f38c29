"""Set-up of every test: CPU, compilation cache, shape and type checks, strict numpy semantics."""

from __future__ import annotations

import os
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")  # before jax: the suite means the same on every machine
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(Path.home() / ".cache" / "dms_jax" / "xla"))

import hypothesis
import jax
import pytest
from jax.experimental.compilation_cache import compilation_cache
from jaxtyping import install_import_hook

import tests.typecheck  # noqa: F401  (the hook looks it up by name)

# Before the packages: each annotated function then checks the shapes and types of its arguments and result.
install_import_hook(["dms_jax", "pallas_kernels"], "tests.typecheck.check")

if os.environ.get("DMS_QUICK"):  # `make test`, most of whose time would be compilation; no backend has started yet
  from dms_jax.testing import QUICK

  quick = [f"--{name}={str(value).lower()}" for name, value in QUICK.items()]
  os.environ["XLA_FLAGS"] = " ".join([os.environ.get("XLA_FLAGS", ""), *quick]).strip()

jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)

# Derandomised, so that a failure is a fact about the commit; HYPOTHESIS_PROFILE=explore draws afresh and more.
hypothesis.settings.register_profile(
  "default", derandomize=True, deadline=None, database=None, print_blob=True,
  phases=(hypothesis.Phase.explicit, hypothesis.Phase.generate),  # shrinking would compile a hundred more shapes
  suppress_health_check=[hypothesis.HealthCheck.too_slow, hypothesis.HealthCheck.data_too_large],
)  # fmt: skip
hypothesis.settings.register_profile("explore", parent=hypothesis.settings.get_profile("default"), derandomize=False)
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "default"))


@pytest.fixture(scope="module", autouse=True)
def compiled_programs_forgotten():
  """Each keeps memory mapped, and a process may have 65,530 mappings: the whole suite would need more."""
  yield
  jax.clear_caches()


@pytest.fixture(autouse=True)
def mappings_left():
  """One module of many shapes may need as many: at half of them the programs compiled so far are forgotten."""
  maps = Path("/proc/self/maps")  # Linux only, where the limit is
  if maps.exists() and maps.read_bytes().count(b"\n") > 32_000:
    jax.clear_caches()


@pytest.fixture(autouse=True)
def strict_promotion(request):
  """Mixing dtypes is an error; `@pytest.mark.standard_promotion` lifts it, for code of other packages."""
  if request.node.get_closest_marker("standard_promotion"):
    yield
    return
  with jax.numpy_dtype_promotion("strict"):
    yield


@pytest.fixture(autouse=True)
def compiled_for_an_absent_tpu(request):
  """Tests marked `tpu` trace for one; what they compile cannot be read back from disk, so it is not kept there."""
  if not request.node.get_closest_marker("tpu"):
    yield
    return
  from pallas_kernels.common.platform import tracing_for

  def keep_compiled_programs(kept: bool):
    jax.config.update("jax_enable_compilation_cache", kept)
    compilation_cache.reset_cache()  # else what JAX decided at the process's first compilation goes on to hold

  keep_compiled_programs(False)
  with tracing_for("tpu"):
    yield
  keep_compiled_programs(True)


def pytest_collection_modifyitems(items):
  for item in items:
    backend = item.callspec.params.get("backend") if hasattr(item, "callspec") else None
    if getattr(backend, "interpreted", False):
      item.add_marker(pytest.mark.slow)


def pytest_configure(config):
  config.addinivalue_line("markers", "standard_promotion: runs other packages' code that mixes dtypes")
