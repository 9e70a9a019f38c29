"""Small functions outside compiled programs, computed by numpy instead of compiled.

`x[0]`, `x + 1` and `jnp.pad(x, ...)` on arrays are programs of JAX, 30 ms for each shape, thousands in all tests. This
takes their place in `make test`; `make test-all` and tests under jax 0.12 leave them to JAX. Computed are operations
that move, compare or count, and sums and products of two numbers: those in which numpy agrees to the last bit.
"""

from __future__ import annotations

import collections
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax._src import pjit
from jax.extend.core import Literal

MOST = 8  # operations of a function
OFTEN = 50  # times that a function is computed by numpy before it is compiled, which takes as long


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


def _plain(x: Any) -> bool:
  """Whether numpy may stand for an argument or result: of a usual type, and nobody put it on a device on purpose."""
  if not isinstance(x, jax.Array):
    return isinstance(x, bool | int | float | np.ndarray | np.generic)
  if isinstance(x, jax.core.Tracer) or jax.dtypes.issubdtype(x.dtype, jax.dtypes.extended) or x._committed:
    return False
  return isinstance(x.sharding, jax.sharding.SingleDeviceSharding) and x.sharding.device_set == {jax.devices()[0]}


def _simple(jaxpr: Any) -> bool:
  """Whether a function is a few operations of the table."""
  return len(jaxpr.eqns) <= MOST and all(
    _simple(e.params["jaxpr"].jaxpr) if e.primitive.name == "jit" else e.primitive.name in COMPUTED for e in jaxpr.eqns
  )


class _UnlikeJAX(Exception):
  """A case that numpy would answer otherwise."""


def _evaluate(jaxpr: Any, consts: Sequence[Any], args: Sequence[Any]) -> list[np.ndarray]:
  """The results of a function.

  Raises:
    _UnlikeJAX: one is not of the type that JAX says.
  """
  values: dict[Any, Any] = dict(zip([*jaxpr.constvars, *jaxpr.invars], [*consts, *args], strict=True))
  read = lambda v: np.asarray(v.val if isinstance(v, Literal) else values[v], v.aval.dtype)
  for equation in jaxpr.eqns:
    inputs = [read(v) for v in equation.invars]
    if equation.primitive.name == "jit":
      inner = equation.params["jaxpr"]
      found = _evaluate(inner.jaxpr, inner.consts, inputs)
    else:
      found = [COMPUTED[equation.primitive.name](*inputs, **equation.params)]
    for v, value in zip(equation.outvars, found, strict=True):
      if value is NotImplemented or (value.shape, value.dtype) != (v.aval.shape, v.aval.dtype):
        raise _UnlikeJAX
      values[v] = value
  return [read(v) for v in jaxpr.outvars]


def install() -> None:
  """For the rest of the process, under the versions of JAX whose internals it uses."""
  if jax.__version_info__ >= (0, 12):
    return
  compiled, times = pjit._pjit_call_impl_python, collections.Counter[Any]()

  def usual(jaxpr: Any, args: Sequence[Any], params: dict[str, Any]) -> bool:
    """Whether JAX would do no more than compile the function and run it."""
    types = [v.aval for v in jaxpr.outvars]
    if any(t.weak_type or jax.dtypes.issubdtype(t.dtype, jax.dtypes.extended) for t in types):
      return False
    if any(params["donated_invars"]) or params["compiler_options_kvs"] or not params["ctx_mesh"].empty:
      return False
    return jax.config.jax_default_device is None and all(map(_plain, args))

  def call(*args, jaxpr, **params):
    if times[jaxpr] < OFTEN and _simple(jaxpr.jaxpr) and usual(jaxpr.jaxpr, args, params):
      times[jaxpr] += 1
      try:
        with np.errstate(all="ignore"):
          found = _evaluate(jaxpr.jaxpr, jaxpr.consts, args)
        # Copies, because programs to which an operand is given may write over it.
        return [jax.device_put(np.array(x, order="C")) for x in found], None, None, []
      except (_UnlikeJAX, ValueError):  # the latter from a reduction of nothing
        pass
    return compiled(*args, jaxpr=jaxpr, **params)

  pjit._pjit_call_impl_python = call
