"""The interpreter of TPU kernels notices races and unwritten memory under every JAX version."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.common import compat_tpu


def copy(x, wait_first: bool):
  """A copy through a buffer that is read after its DMA, or while it runs."""

  def kernel(x_ref, out_ref, buffer, semaphore):
    move = pltpu.make_async_copy(x_ref, buffer, semaphore)
    move.start()
    if wait_first:
      move.wait()
    out_ref[...] = buffer[...]
    if not wait_first:
      move.wait()

  return pl.pallas_call(
    kernel,
    out_shape=jax.ShapeDtypeStruct(x.shape, x.dtype),
    in_specs=[pl.BlockSpec(memory_space=pl.ANY)],
    scratch_shapes=[pltpu.VMEM(x.shape, x.dtype), pltpu.SemaphoreType.DMA],
  )(x)


def test_races_raise():
  x = jnp.arange(1024, dtype=jnp.float32).reshape(8, 128)
  with compat_tpu.interpret_mode():
    np.testing.assert_array_equal(copy(x, True), x)
  with pytest.raises(Exception, match=r"race|RACE"):
    with compat_tpu.interpret_mode():
      jax.block_until_ready(copy(x, False))
  with compat_tpu.interpret_mode():  # and leave nothing behind
    np.testing.assert_array_equal(copy(x, True), x)


def test_unwritten_memory_is_nan():
  def kernel(out_ref, scratch):
    out_ref[...] = scratch[...]

  shape = jax.ShapeDtypeStruct((8, 128), jnp.float32)
  with compat_tpu.interpret_mode():
    out = pl.pallas_call(kernel, out_shape=shape, scratch_shapes=[pltpu.VMEM(shape.shape, shape.dtype)])()
  assert np.isnan(out).all()


def test_refuses_other_devices():
  with pytest.raises(NotImplementedError, match="needs a TPU, the device is a cpu"):
    compat_tpu.require_tpu()
