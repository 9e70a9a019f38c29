"""Named tensors of a Hugging Face checkpoint <-> the parameter tree, driven by the parameter table."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator

import jax
import numpy as np

from dms_jax.params import Params, ParamSpec, flatten, unflatten
from dms_jax.slices import Slice, dtype_of

DTYPES = ("float32", "bfloat16", "float16")  # dtypes of stored weights
NO_PICKLES = "pickles can run code and are not read; save the model as safetensors"
Progress = Callable[[int, int, str], None]  # (done, total, name)


@dataclasses.dataclass(frozen=True)
class Tensors:
  """Named tensors on disk: all `shapes`, and `read(name)`, which returns one tensor as a numpy array.

  `dtype` is the dtype of most stored values, or float32 if they are quantised.
  """

  source: str
  shapes: dict[str, tuple[int, ...]]
  read: Callable[[str], np.ndarray]
  dtype: str


def check_layers(num_layers: int, tensors: int, source: str) -> None:
  """Raises ValueError if a file has fewer tensors than layers: it is damaged, and building the table would not end."""
  if num_layers > tensors:
    raise ValueError(f"{source}: {num_layers} layers, but only {tensors} tensors: damaged, or not all of the model")


def hf_names(path: str, spec: ParamSpec) -> Iterator[tuple[str, int | None]]:
  """(name, layer) of each Hugging Face tensor of the parameter; layer is None if it is not layered."""
  if spec.hf_name is not None:
    layers = range(spec.shape[0]) if spec.layered else [None]
    yield from ((spec.hf_name if layer is None else spec.hf_name.format(layer=layer), layer) for layer in layers)


def to_slices(
  table: dict[str, ParamSpec],
  tensors: Tensors,
  dtype,
  *,
  ignore: Callable[[str], bool] = lambda name: False,
  progress: Progress | None = None,
) -> Iterator[Slice]:
  """The slices of the parameters of `table`, in the order of the files; each is read when it is asked for.

  Args:
    dtype: that of the weights; gates are float32 (`slices.dtype_of`).
    ignore: whether a tensor name outside the table may be present.

  Raises:
    ValueError: tensors are missing, unexpected or of wrong shape (the message lists all); later, while slices are
      read: a tensor holds NaN or infinity.
  """
  check_layers(max(spec.shape[0] for spec in table.values() if spec.layered), len(tensors.shapes), tensors.source)
  wanted = {name: (path, layer) for path, spec in table.items() for name, layer in hf_names(path, spec)}
  shapes = {name: table[path].hf_shape for name, (path, _) in wanted.items()}
  problems = [f"missing {name} {shape}" for name, shape in shapes.items() if name not in tensors.shapes]
  for name, shape in tensors.shapes.items():
    if name not in wanted and not ignore(name):
      problems.append(f"unexpected {name} {shape}")
    elif name in wanted and shape != shapes[name]:
      problems.append(f"{name} has shape {shape}, the config means {shapes[name]}")
  if problems:
    shown = "; ".join(problems[:40]) + (f"; and {len(problems) - 40} more" if len(problems) > 40 else "")
    raise ValueError(f"{tensors.source}: {len(problems)} tensor(s) do not fit config.json: {shown}")

  def read() -> Iterator[Slice]:
    found = [name for name in tensors.shapes if name in wanted]
    for done, name in enumerate(found, 1):
      path, layer = wanted[name]
      spec = table[path]
      yield path, layer, _finite(tensors, name, dtype_of(spec, np.dtype(dtype))).reshape(spec.shape[spec.layered :])
      if progress is not None:
        progress(done, len(found), name)

  return read()


def to_params(table: dict[str, ParamSpec], tensors: Tensors, dtype, *, progress: Progress | None = None) -> Params:
  """The parameters of `table` as numpy arrays, layers stacked; gates are float32, the others of `dtype`.

  Raises:
    ValueError: as `to_slices`.
  """
  slices = to_slices(table, tensors, dtype, progress=progress)  # checks the shapes before memory is asked for
  flat = {path: np.empty(spec.shape, dtype_of(spec, np.dtype(dtype))) for path, spec in table.items()}
  for path, layer, value in slices:
    flat[path][... if layer is None else layer] = value
  return unflatten(flat)


def _finite(tensors: Tensors, name: str, dtype) -> np.ndarray:
  value = tensors.read(name)
  if not _all_finite(value):
    raise ValueError(f"{tensors.source}: tensor {name} holds NaN or infinity; the file is damaged")
  if value.dtype == dtype:
    return value
  with np.errstate(over="ignore"):
    cast = value.astype(dtype)
  if not _all_finite(cast):
    raise ValueError(f"{tensors.source}: tensor {name} overflows {np.dtype(dtype).name}; choose float32 or bfloat16")
  return cast


def _all_finite(value: np.ndarray, block: int = 2**18) -> bool:
  """Whether no number is NaN or infinity. Blocks that stay in a core's cache are many times faster than the whole."""
  flat = value.reshape(-1)
  blocks = (flat[start : start + block] for start in range(0, flat.size, block))
  return all(np.isfinite(one.astype(np.float32, copy=False)).all() for one in blocks)


def from_params(
  table: dict[str, ParamSpec], params: Params, dtype=None
) -> Iterator[tuple[str, tuple[int, ...], Callable]]:
  """(name, shape, read) of every Hugging Face tensor; `read()` returns a contiguous numpy array of `dtype`."""
  flat = flatten(params)
  for path, spec in table.items():
    for name, layer in hf_names(path, spec):
      yield name, spec.hf_shape, lambda path=path, layer=layer, spec=spec: _one(flat[path], layer, spec, dtype)


def _one(value, layer: int | None, spec: ParamSpec, dtype) -> np.ndarray:
  one = np.asarray(jax.device_get(value if layer is None else value[layer]))
  return np.ascontiguousarray(one.reshape(spec.hf_shape).astype(dtype or one.dtype, copy=False))


def tensor_bytes(shape: tuple[int, ...], dtype) -> int:
  """Size of one tensor in bytes."""
  return math.prod(shape) * np.dtype(dtype).itemsize
