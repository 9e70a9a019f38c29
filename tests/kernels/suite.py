"""Cases and checks shared by every implementation of the three operations.

Suites are parametrised by implementation. A backend joins by adding its name, and the context that interprets it on
other hardware, to `IMPLEMENTATIONS` of the suite. A refusal (NotImplementedError with a reason) is a skip.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.common import compat, compat_tpu

# Error allowed against float64 for values of size 1: sums are float32, 16-bit types round the weights and the output.
TOLERANCE = {"float32": 1e-5, "bfloat16": 2e-2, "float16": 3e-3}


@dataclasses.dataclass(frozen=True)
class Backend:
  """An implementation and the context that it runs in here."""

  name: str
  context: type = contextlib.nullcontext
  dtype: str = "float32"  # in tests that are not about dtypes

  def __str__(self):
    return self.name

  @property
  def interpreted(self) -> bool:
    """Whether it is slow, so that suites try fewer combinations."""
    return self.context is not contextlib.nullcontext


# For tests of the Hopper kernels, which interpret or lower them.
needs_mosaic_gpu = pytest.mark.skipif(
  not compat.HAS_MOSAIC_GPU, reason=f"jax {jax.__version__} cannot interpret or lower Mosaic GPU kernels: needs >= 0.11"
)


@contextlib.contextmanager
def interpreted_tpu():
  """JAX's interpreter of TPU kernels without optimisations: each case compiles anew, and runs once or twice."""
  jax.config.update("jax_disable_most_optimizations", True)
  try:
    with compat_tpu.interpret_mode():
      yield
  finally:
    jax.config.update("jax_disable_most_optimizations", False)


@contextlib.contextmanager
def on_hopper():
  """The compiled Hopper kernels on such a GPU (JAX_PLATFORMS=cuda), otherwise JAX's interpreter with race detection."""
  if jax.default_backend() == "gpu":
    yield
    return
  with compat.gpu_interpret_mode(detect_races=True):
    yield


@contextlib.contextmanager
def running(backend: Backend):
  """Runs the body in the backend's context; a refused case is a skip with the backend's reason."""
  try:
    with backend.context():
      yield
  except NotImplementedError as refusal:
    pytest.skip(f"{backend.name} refuses: {refusal}")


@functools.cache
def compiled(backend: Backend, operation, *static: str):
  """`operation` by `backend`: one program a shape, where op by op would be some forty. A kernel that is interpreted is
  not compiled: a GPU's threads wait for each other, and a program lends them no more than there are cores."""
  run = functools.partial(operation, implementation=backend.name)
  return run if backend.interpreted else jax.jit(run, static_argnames=static)


def normal(rng, *shape, dtype="float32", scale=1.0):
  return jnp.asarray(scale * rng.standard_normal(shape), jnp.dtype(dtype))


def assert_close(actual, expected, dtype):
  actual = np.asarray(actual.astype(jnp.float32) if hasattr(actual, "astype") else actual, np.float64)
  assert np.isfinite(actual).all()
  scale = max(1.0, np.abs(expected).max())
  np.testing.assert_allclose(actual, expected, rtol=0, atol=TOLERANCE[dtype] * scale)


def float64(*arrays):
  """The exact numbers that the implementation saw, as float64."""
  return tuple(
    np.asarray(x.astype(jnp.float32), np.float64) if x.dtype == jnp.bfloat16 else np.asarray(x, np.float64)
    for x in arrays
  )


def unchecked(function):
  """`function` without the tests' shape checker, to see its own messages."""
  return inspect.unwrap(function)
