"""What a process that runs tests sets up once: CPU, compilation, type checks, random cases."""

from __future__ import annotations

import gc
import os
import signal
import sys
import threading
import types
import zlib
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")  # before jax: the suite means the same on every machine
# All compiled programs are kept: for the other worker, for the processes that tests start, and for the next run.
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(Path.home() / ".cache" / "dms_jax" / "xla"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:  # a shell's background job: programs under test are none
  signal.signal(signal.SIGINT, signal.default_int_handler)
os.environ["PYTHONDONTWRITEBYTECODE"] = ""  # the first process that a test starts compiles the packages for all

import hypothesis
import jax
from jax._src import compilation_cache
from jax._src.interpreters import mlir

import tests.typecheck

sys.dont_write_bytecode = False  # nor do later runs compile the packages and the tests again

# Before the packages: each annotated function then checks the shapes and types of its arguments and result.
tests.typecheck.install(["dms_jax", "pallas_kernels"])

if os.environ.get("DMS_QUICK"):  # `make test`, most of whose time would be compilation; no backend has started yet
  from dms_jax.testing import QUICK

  quick = [f"--{name}={str(value).lower()}" for name, value in QUICK.items()]
  os.environ["XLA_FLAGS"] = " ".join([os.environ.get("XLA_FLAGS", ""), *quick]).strip()

# Derandomised, so that a failure is a fact about the commit; HYPOTHESIS_PROFILE=explore draws afresh and more.
hypothesis.settings.register_profile(
  "default", derandomize=True, deadline=None, database=None, print_blob=True,
  phases=(hypothesis.Phase.explicit, hypothesis.Phase.generate),  # shrinking would compile a hundred more shapes
  suppress_health_check=[hypothesis.HealthCheck.too_slow, hypothesis.HealthCheck.data_too_large],
)  # fmt: skip
hypothesis.settings.register_profile("explore", parent=hypothesis.settings.get_profile("default"), derandomize=False)
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "default"))

# Without zstandard, JAX packs what it keeps at level 6. Level 1 takes a third of that time and a fifth more bytes.
assert hasattr(compilation_cache, "zlib"), "this jax compresses programs in another way"
compilation_cache.zlib = types.SimpleNamespace(compress=lambda data: zlib.compress(data, 1), decompress=zlib.decompress)

# A quarter to a half of the time of a small program that is lowered is its MLIR context. JAX 0.12 uses each ten times.
if jax.__version_info__ < (0, 12):
  make_context, contexts, USES = mlir.make_ir_context, threading.local(), 10

  def recent_context():
    if not getattr(contexts, "left", 0):
      contexts.recent, contexts.left = make_context(), USES
    contexts.left -= 1
    return contexts.recent

  mlir.make_ir_context = recent_context


def collect_less_garbage():
  """Modules that stay are looked at no more, and what tests leave behind less often: tracing makes many objects."""
  gc.collect()
  gc.freeze()
  gc.set_threshold(20_000, 20, 20)


class Programs:
  """How many programs this process has compiled or read from disk, and how many when its mappings were counted."""

  made = counted = 0

  def __init__(self):
    jax.monitoring.register_event_duration_secs_listener(self._count)

  def _count(self, event, *_, **__):
    self.made += event == "/jax/core/compile/backend_compile_duration"

  def forget_too_many(self):
    """A process may have 65,530 mappings of memory: programs take them, and memory. At a quarter, all are forgotten."""
    maps = Path("/proc/self/maps")  # Linux only, where the limit is
    if self.made - self.counted < 500 or not maps.exists():
      return
    self.counted = self.made
    if maps.read_bytes().count(b"\n") > 16_000:
      jax.clear_caches()


PROGRAMS = Programs()
