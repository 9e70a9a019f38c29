"""Single operations outside compiled programs, computed by numpy: JAX would compile one more program for each shape.

For `make test`; `make test-all` leaves them to JAX. Operations that move, compare or count, and sums and products of
two numbers: all that numpy computes to the same bit. Everything else is compiled as usual.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax._src import core, pjit

MOST = 8  # operations of a function of `jax.numpy` that are computed one by one


def _broadcast(x, shape, broadcast_dimensions, sharding=None):
  sizes = np.ones(len(shape), int)
  sizes[list(broadcast_dimensions)] = x.shape
  return np.broadcast_to(x.reshape(sizes), shape)


def _convert(x, new_dtype, weak_type, sharding):
  whole = np.issubdtype(new_dtype, np.integer) and x.dtype.kind not in "iub"  # beyond the range they differ
  return NotImplemented if whole else x.astype(new_dtype)


def _dynamic_slice(x, *starts, slice_sizes):
  begin = [min(max(int(s), 0), n - size) for s, n, size in zip(starts, x.shape, slice_sizes, strict=True)]
  return x[tuple(slice(b, b + size) for b, size in zip(begin, slice_sizes, strict=True))]


def _slice(x, start_indices, limit_indices, strides):
  return x[tuple(map(slice, start_indices, limit_indices, strides or [1] * x.ndim))]


def _iota(dtype, shape, dimension, sharding=None):
  sizes = [n if axis == dimension else 1 for axis, n in enumerate(shape)]
  return np.broadcast_to(np.arange(shape[dimension], dtype=dtype).reshape(sizes), shape)


def _pad(x, value, padding_config):
  if any(low < 0 or high < 0 or inner for low, high, inner in padding_config):
    return NotImplemented
  return np.pad(x, [edge[:2] for edge in padding_config], constant_values=value)


def _reduction(f: Callable) -> Callable:
  return lambda x, axes, out_sharding=None: f(x, axis=axes)


def _whole_sum(x, axes, out_sharding=None):
  return NotImplemented if np.issubdtype(x.dtype, np.inexact) or x.dtype.kind == "V" else x.sum(axes, dtype=x.dtype)


def _pairwise(f: Callable) -> Callable:
  return lambda *args, **_: f(*args)


COMPUTED: dict[str, Callable] = {
  "broadcast_in_dim": _broadcast,
  "concatenate": lambda *xs, dimension: np.concatenate(xs, dimension),
  "convert_element_type": _convert,
  "copy": lambda x: x,
  "dynamic_slice": _dynamic_slice,
  "expand_dims": lambda x, dimensions: np.expand_dims(x, dimensions),
  "iota": _iota,
  "pad": _pad,
  "reduce_and": _reduction(np.all),
  "reduce_max": _reduction(np.max),
  "reduce_min": _reduction(np.min),
  "reduce_or": _reduction(np.any),
  "reduce_sum": _whole_sum,
  "reshape": lambda x, new_sizes, dimensions, sharding: NotImplemented if dimensions else x.reshape(new_sizes),
  "rev": lambda x, dimensions: np.flip(x, dimensions),
  "select_n": lambda which, *cases: NotImplemented if which.dtype != bool else np.where(which, cases[1], cases[0]),
  "slice": _slice,
  "squeeze": lambda x, dimensions: np.squeeze(x, dimensions),
  "transpose": lambda x, permutation: x.transpose(permutation),
} | {
  name: _pairwise(f)
  for name, f in {
    "add": np.add, "sub": np.subtract, "mul": np.multiply, "max": np.maximum, "min": np.minimum, "eq": np.equal,
    "ne": np.not_equal, "lt": np.less, "le": np.less_equal, "gt": np.greater, "ge": np.greater_equal,
    "and": np.bitwise_and, "or": np.bitwise_or, "not": np.invert, "neg": np.negative,
  }.items()
}  # fmt: skip


def _plain(x: Any, device: jax.Device) -> bool:
  """Whether numpy may stand for an operand: on the first device, where nothing put it on purpose."""
  if isinstance(x, jax.Array):
    return (
      not x.weak_type and not isinstance(x, core.Tracer) and not x._committed
      and isinstance(x.sharding, jax.sharding.SingleDeviceSharding) and x.sharding.device_set == {device}
      and not jax.dtypes.issubdtype(x.dtype, jax.dtypes.extended)
    )  # fmt: skip
  return isinstance(x, np.ndarray | np.generic) and x.dtype.itemsize < 8


def _compute(name: str, args: Sequence[Any], params: dict[str, Any]) -> jax.Array | None:
  """The result of an operation, or None where JAX computes it."""
  device = jax.devices()[0]
  if params.get("weak_type") or params.get("sharding") is not None or params.get("out_sharding") is not None:
    return None
  if jax.config.jax_default_device is not None or not all(_plain(x, device) for x in args):
    return None
  with np.errstate(all="ignore"):
    found = COMPUTED[name](*map(np.asarray, args), **params)
  if found is NotImplemented:
    return None
  return jax.device_put(np.array(found, order="C"))  # a copy: operands may be donated to a program later


def _simple(jaxpr: core.ClosedJaxpr) -> bool:
  """Whether a function of `jax.numpy` is a few operations of the table."""
  equations = jaxpr.jaxpr.eqns
  return (
    1 < len(equations) <= MOST and all(e.primitive.name in COMPUTED for e in equations)
    and not any(v.aval.weak_type for v in jaxpr.jaxpr.outvars)
  )  # fmt: skip


def install() -> None:
  """For the rest of the process."""

  def first_try(primitive, compile):
    def run(*args, **params):
      found = _compute(primitive.name, args, params)
      return compile(*args, **params) if found is None else found

    return run

  for primitive in {p for p in vars(jax.lax).values() if isinstance(p, core.Primitive)}:
    if primitive.name in COMPUTED and not primitive.multiple_results:
      primitive.def_impl(first_try(primitive, primitive.impl))
  compiled = pjit._pjit_call_impl_python

  def call(*args, jaxpr, **params):
    device = jax.devices()[0]
    if (
      _simple(jaxpr) and not any(params["donated_invars"]) and not params["compiler_options_kvs"]
      and all(_plain(x, device) for x in args)
    ):  # fmt: skip
      return core.eval_jaxpr(jaxpr.jaxpr, jaxpr.consts, *args), None, None, []
    return compiled(*args, jaxpr=jaxpr, **params)

  pjit._pjit_call_impl_python = call
