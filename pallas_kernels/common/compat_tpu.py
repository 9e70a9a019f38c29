"""Mosaic TPU under different JAX versions and devices, in one place."""

from __future__ import annotations

import contextlib
import contextvars
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.common.dispatch import Expected
from pallas_kernels.common.later import Later
from pallas_kernels.common.platform import platform, setting

pltpu = Later("jax.experimental.pallas.tpu")
_interpreting = contextvars.ContextVar("interpreting_tpu", default=False)


@contextlib.contextmanager
def interpret_mode(**params: Any) -> Iterator[None]:
  """Runs TPU kernels traced inside in JAX's interpreter, on a CPU; `params` go to `pltpu.InterpretParams`.

  Unless `params` say otherwise, races are detected, reads out of bounds raise, and unwritten memory is NaN.

  Raises:
    RuntimeError: on leaving, if a race was found: JAX before 0.12 only prints it.
  """
  params = {"detect_races": True, "out_of_bounds_reads": "raise", "uninitialized_memory": "nan", **params}
  try:
    mode = pltpu.force_tpu_interpret_mode(pltpu.InterpretParams(**params))
    with setting(_interpreting, True), _recorded_races() as states, mode:
      yield
      jax.block_until_ready(jax.live_arrays())  # kernels started inside may still be running
    if any(state.races_found for state in states):
      raise RuntimeError("the interpreter found a race; it has printed the two accesses")
  except BaseException:
    pltpu.reset_tpu_interpret_mode_state()  # an interrupted kernel leaves its memory behind
    raise


@contextlib.contextmanager
def _recorded_races() -> Iterator[list]:
  """The race detectors of all kernels interpreted inside; JAX keeps only the latest."""
  from jax._src.pallas.mosaic.interpret import interpret_pallas_call as interpreter

  original, states = interpreter.RaceDetectionState, []

  def recording(*args, **kwargs):
    states.append(original(*args, **kwargs))
    return states[-1]

  interpreter.RaceDetectionState = recording
  try:
    yield states
  finally:
    interpreter.RaceDetectionState = original


def interpreting() -> bool:
  """Whether tracing happens inside `interpret_mode`."""
  return _interpreting.get()


def require_tpu() -> None:
  """Raises `Expected`, with the reason, where Mosaic TPU kernels cannot run."""
  if not _interpreting.get() and platform() != "tpu":
    raise Expected(f"needs a TPU, the device is a {platform()}")


def tile(dtype) -> int:
  """Rows of `dtype` that memory keeps together: copies begin and end at multiples of them."""
  return 8 * (4 // jnp.dtype(dtype).itemsize)
