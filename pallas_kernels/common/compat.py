"""Mosaic GPU under different JAX versions and devices, in one place."""

from __future__ import annotations

import contextlib
import contextvars
import importlib.util
import inspect
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from pallas_kernels.common.dispatch import Expected
from pallas_kernels.common.later import Later
from pallas_kernels.common.platform import platform, setting

plgpu = Later("jax.experimental.pallas.mosaic_gpu")

# jax 0.10 lacks names that the kernels need; a jaxlib may be built without Mosaic GPU.
HAS_MOSAIC_GPU = jax.__version_info__ >= (0, 11) and importlib.util.find_spec("jaxlib.mosaic") is not None

_interpreting = contextvars.ContextVar("interpreting", default=False)
_assumed = contextvars.ContextVar("assumed_hopper", default=False)


@contextlib.contextmanager
def gpu_interpret_mode(**params: Any):
  """Runs Mosaic GPU kernels traced inside in JAX's interpreter, on a CPU; `params` go to `InterpretGPUParams`."""
  if not HAS_MOSAIC_GPU:
    raise NotImplementedError(f"jax {jax.__version__} has no Mosaic GPU interpreter; it needs jax >= 0.11")
  with setting(_interpreting, True), plgpu.force_gpu_interpret_mode(plgpu.InterpretGPUParams(**params)):
    yield


def assume_hopper() -> contextlib.AbstractContextManager[None]:
  """Lets kernels be traced and lowered for a Hopper GPU that this machine does not have."""
  return setting(_assumed, True)


def interpreting() -> bool:
  """Whether tracing happens inside `gpu_interpret_mode`."""
  return _interpreting.get()


def require_hopper() -> None:
  """Raises NotImplementedError, with the reason, where Mosaic GPU kernels for Hopper cannot run.

  It is `Expected` on another device than a GPU.
  """
  refusal = NotImplementedError if platform() == "gpu" else Expected
  if not HAS_MOSAIC_GPU:
    raise refusal(f"jax {jax.__version__} is older than 0.11, the first whose Mosaic GPU is supported")
  if _interpreting.get() or _assumed.get():
    return
  if platform() != "gpu":
    raise Expected(f"needs a Hopper GPU, the default device is a {platform()}")
  capability = str(getattr(jax.devices()[0], "compute_capability", "unknown"))
  if capability.split(".")[0] != "9":
    raise NotImplementedError(f"needs a Hopper GPU (compute capability 9.0), this one has {capability}")


def kernel(body: Callable, *, out_type: Any, scratch_types: Any = (), **kwargs: Any) -> Callable:
  """`plgpu.kernel` with the argument names of jax 0.11 and later."""
  names = inspect.signature(plgpu.kernel).parameters
  out, scratch = ("out_type", "scratch_types") if "out_type" in names else ("out_shape", "scratch_shapes")
  return plgpu.kernel(body, **{out: out_type, scratch: scratch_types}, **kwargs)


def row_layout():
  """Layout of a vector with one value per row of a warpgroup's matrix."""
  return plgpu.Layout.WGMMA.reduce(1)


def column_layout():
  """Layout of a vector with one value per column of a warpgroup's matrix."""
  return plgpu.Layout.WGMMA.reduce(0)


def strided_layout(shape: tuple[int, ...], vector: int):
  """Layout of a row-major array spread over a warpgroup, `vector` neighbouring elements a thread at a time."""
  return plgpu.Layout.WG_STRIDED(shape, vec_size=vector)


def operand_transforms(dtype: Any = jnp.bfloat16, columns: int = 64) -> tuple:
  """Layout of a matrix in shared memory, read `columns` at a time: rows of up to 128 bytes, swizzled, as the tensor
  cores read 16-bit matrices."""
  size = jnp.dtype(dtype).itemsize
  width = min(128, columns * size)
  return plgpu.TilingTransform((8, width // size)), plgpu.SwizzleTransform(width)


def dot(a, b, then: Callable[[], None] | None = None) -> jax.Array:
  """a @ b in float32 by a warpgroup; b a shared-memory ref, a such a ref or an array in registers.

  Args:
    then: called after the product is issued and before it is awaited.
  """
  if interpreting() and isinstance(a, jax.Array):  # the interpreter knows no operand in registers
    if then is not None:
      then()
    return jnp.dot(a, b[...], preferred_element_type=jnp.float32)

  def issue(acc_ref):
    plgpu.wgmma(acc_ref, a, b)
    if then is not None:
      then()
    return acc_ref[...]

  return pl.run_scoped(issue, plgpu.ACC((a.shape[0], b.shape[1]), jnp.float32))


def dot_pair(a, b, c, d, then: Callable[[jax.Array], Any]) -> tuple[Any, jax.Array]:
  """(then(a @ b), c @ d), all four shared-memory refs: the second product runs on while `then` works on the first."""

  def issue(first_ref, second_ref):
    plgpu.wgmma(first_ref, a, b)
    plgpu.wgmma(second_ref, c, d)
    done = then(plgpu.wgmma_accumulator_load(first_ref, wait_n=1))
    return done, second_ref[...]

  sums = plgpu.ACC((a.shape[0], b.shape[1]), jnp.float32), plgpu.ACC((c.shape[0], d.shape[1]), jnp.float32)
  return pl.run_scoped(issue, *sums)


def dot_twice(a, b, c, d, then: Callable[[jax.Array], Any]) -> tuple[Any, jax.Array]:
  """`dot_pair`, one product after the other."""
  return then(dot(a, b)), dot(c, d)


def accumulate_pair(x: jax.Array, a: jax.Array, b, y: jax.Array, d, extra: jax.Array, then: Callable):
  """(x + a @ b, y + c @ d, new) with (c, new) = then(extra), computed while the first product runs.

  x, y, a, c in registers; b and d shared-memory refs.
  """
  if interpreting():
    c, extra = then(extra)
    return accumulate(x, a, b), accumulate(y, c, d), extra

  def issue(refs):
    x_ref, y_ref, extra_ref = refs
    plgpu.wgmma(x_ref, a, b)
    c, extra_ref[...] = then(extra_ref[...])
    plgpu.wgmma(y_ref, c, d)

  return pl.run_state(issue)((plgpu.ACC.init(x), plgpu.ACC.init(y), extra))


def accumulate(total: jax.Array, a, b) -> jax.Array:
  """total + a @ b; total in registers, a in registers or a shared-memory ref, b such a ref."""
  if interpreting():
    return total + jnp.dot(a[...], b[...], preferred_element_type=jnp.float32)
  return pl.run_state(lambda acc_ref: plgpu.wgmma(acc_ref, a, b))(plgpu.ACC.init(total))


def release(barrier) -> None:
  """Tells the loader that a slot has been read."""
  settle()
  plgpu.barrier_arrive(barrier)


def drain(used, *barriers) -> None:
  """Awaits the last release of each slot by its readers; slot s of a ring was in use if `used` > s."""
  for barrier in barriers:
    for slot in range(barrier.shape[0]):
      pl.when(used > slot)(lambda barrier=barrier, slot=slot: plgpu.barrier_wait(barrier.at[slot]))


def settle() -> None:
  """The fence that the interpreter wants between ordinary reads and the next TMA write to the same shared memory.

  The hardware needs none: the barrier orders them.
  """
  if interpreting():
    plgpu.commit_smem()
