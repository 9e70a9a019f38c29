"""The model as compiled programs that tests share: once a shape and process, and quickly."""

from __future__ import annotations

import functools
import os
import socket
import subprocess
import sys
from collections.abc import Callable, Mapping

import jax
import numpy as np

from dms_jax import model as models
from dms_jax import testing as tiny
from tests.helpers import ROOT

quick = functools.partial(jax.jit, compiler_options=tiny.QUICK)
whole, step = quick(models.forward), quick(models.cached_forward)
unembed, last_logits = quick(models.unembed), quick(models.last_logits)
PADDED = 16


def on_devices(count: int) -> dict[str, str]:
  """The environment of a process of `count` simulated devices that compiles as this one does."""
  flags = [os.environ.get("XLA_FLAGS", ""), f"--xla_force_host_platform_device_count={count}"]
  return {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": " ".join(flags)}


def run_on_eight_devices(module: str, names: str) -> None:
  """Runs cases of a module of `tests` by its `run_cases`, in a process of eight simulated devices, compiled quickly."""
  env = on_devices(8)
  env["XLA_FLAGS"] = " ".join([env["XLA_FLAGS"], *(f"--{flag}={str(on).lower()}" for flag, on in tiny.QUICK.items())])
  command = [sys.executable, "-W", "error", "-m", module, *names.split()]
  done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=600)
  assert done.returncode == 0 and "equal" in done.stdout, done.stderr[-3000:]


def run_cases(cases: Mapping[str, Callable[[], None]]) -> None:
  """Runs the cases that the command line names, in the process that `run_on_eight_devices` starts."""
  assert jax.device_count() == 8
  for name in sys.argv[1:]:
    cases[name]()
  print("equal")


def meeting(processes: int = 2) -> list[tuple[str, ...]]:
  """The flags with which the processes of a run meet at a free port, those of each."""
  with socket.socket() as free:
    free.bind(("localhost", 0))
    port = free.getsockname()[1]
  place = f"--mesh.coordinator=localhost:{port}", f"--mesh.processes={processes}"
  return [(*place, f"--mesh.process={index}") for index in range(processes)]


def finished(*processes: subprocess.Popen) -> list[tuple[int, str, str]]:
  """(exit status, stdout, stderr) of each process, none of which goes on."""
  try:
    outputs = [process.communicate(timeout=500) for process in processes]
  finally:
    for process in processes:
      process.kill()
  return [(process.returncode, *texts) for process, texts in zip(processes, outputs, strict=True)]


@quick
def _read(model, tokens, eviction):
  hidden, gates = models.forward(model, tokens, eviction=eviction)
  return models.unembed(model, hidden), gates


def read(model: models.Model, tokens, threshold: float | None = 0.0) -> tuple[np.ndarray, np.ndarray | None]:
  """Logits [B, T, V] of whole texts [B, T] under the mask, and gate logits [L, B, K, T] or None; None evicts nothing.

  Texts are padded to a multiple of `PADDED` tokens, which none of their own tokens sees: few shapes are compiled.
  """
  tokens = np.asarray(tokens, np.int32)
  length = tokens.shape[1]
  eviction = None if threshold is None else models.Eviction(threshold=threshold)
  logits, gates = _read(model, np.pad(tokens, ((0, 0), (0, -length % PADDED))), eviction)
  return np.asarray(logits)[:, :length], None if gates is None else np.asarray(gates)[..., :length]
