"""Cases and checks shared by every implementation of the three operations.

A suite is parametrised by the implementation's name: a backend joins by adding its name (and, off its hardware, the
context that interprets it) to `IMPLEMENTATIONS` of its operation. A refusal (NotImplementedError with a reason) skips.
"""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dms_jax import cache as caches
from dms_jax import policies
from dms_jax.config import DMSConfig
from dms_jax.families import PRESETS
from dms_jax.model import Model, cached_forward
from dms_jax.params import map_table, param_table
from pallas_kernels.common import compat, compat_tpu

# Error allowed against float64, of unit-sized values: float32 sums; 16-bit types round the weights and the output.
TOLERANCE = {"float32": 1e-5, "bfloat16": 2e-2, "float16": 3e-3}


@dataclasses.dataclass(frozen=True)
class Backend:
  """An implementation and the context that it runs in here."""

  name: str
  context: type = contextlib.nullcontext
  dtype: str = "float32"  # what a test that needs no particular one gives it

  def __str__(self):
    return self.name

  @property
  def interpreted(self) -> bool:
    """Slow: suites try fewer combinations."""
    return self.context is not contextlib.nullcontext


# For tests of the Hopper kernels, which interpret or lower them.
needs_mosaic_gpu = pytest.mark.skipif(
  not compat.HAS_MOSAIC_GPU, reason=f"jax {jax.__version__} cannot interpret or lower Mosaic GPU kernels: needs >= 0.11"
)


def lowered_for_cuda(tokens: int, kind: str = "slots", **options) -> str:
  """SmolLM2's step of `tokens` tokens a row into a cache of a kind, lowered for a Hopper GPU that is not there."""
  config, dms, struct = PRESETS["smollm2-135m"], DMSConfig(window=64), jax.ShapeDtypeStruct
  params = map_table(lambda _, spec: struct(spec.shape, jnp.bfloat16), param_table(config, dms))
  sizes = dict(batch=4, capacity=1024, window=64, lag=1, dtype=jnp.bfloat16)
  cache = jax.eval_shape(partial(caches.create, kind, config, **sizes, **options))
  as_on_a_gpu = lambda x: struct(x.shape, jnp.bfloat16) if x.dtype == jnp.uint16 else x  # not as bits, as on a CPU
  cache = jax.tree.map(as_on_a_gpu, cache)
  policy = policies.DMS(window=64, threshold=struct((), jnp.float32))
  arguments = Model(params, config, dms), policy, cache, struct((4, tokens), jnp.int32), struct((4,), jnp.int32)
  with compat.assume_hopper():
    return jax.jit(cached_forward, donate_argnums=2).trace(*arguments).lower(lowering_platforms=("cuda",)).as_text()


@contextlib.contextmanager
def interpreted_tpu():
  """JAX's interpreter of TPU kernels, compiled quickly: each case compiles anew, and runs once or twice."""
  jax.config.update("jax_disable_most_optimizations", True)
  try:
    with compat_tpu.interpret_mode():
      yield
  finally:
    jax.config.update("jax_disable_most_optimizations", False)


@contextlib.contextmanager
def on_hopper():
  """The Hopper kernels as they are compiled, where this is such a GPU (JAX_PLATFORMS=cuda), else JAX's interpreter of
  them, with race detection."""
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


def normal(rng, *shape, dtype="float32", scale=1.0):
  return jnp.asarray(scale * rng.standard_normal(shape), jnp.dtype(dtype))


def assert_close(actual, expected, dtype):
  actual = np.asarray(actual.astype(jnp.float32) if hasattr(actual, "astype") else actual, np.float64)
  assert np.isfinite(actual).all()
  scale = max(1.0, np.abs(expected).max())
  np.testing.assert_allclose(actual, expected, rtol=0, atol=TOLERANCE[dtype] * scale)


def float64(*arrays):
  """The very numbers the implementation saw, as float64."""
  return tuple(
    np.asarray(x.astype(jnp.float32), np.float64) if x.dtype == jnp.bfloat16 else np.asarray(x, np.float64)
    for x in arrays
  )


def unchecked(function):
  """`function` without the tests' shape checker, to see its own messages."""
  return inspect.unwrap(function)
