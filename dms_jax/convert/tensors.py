"""Named tensors of a Hugging Face checkpoint <-> the parameter tree, driven by the parameter table."""

from __future__ import annotations

import dataclasses
import itertools
import math
import warnings
from collections.abc import Callable, Iterator
from typing import NamedTuple

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

  `dtype` is the dtype of most stored values, or float32 if they are quantised; `described_by` is what says which
  tensors there are to be.
  """

  source: str
  shapes: dict[str, tuple[int, ...]]
  read: Callable[[str], np.ndarray]
  dtype: str
  described_by: str = "config.json"


def check_layers(num_layers: int, tensors: int, source: str) -> None:
  """Raises ValueError if a file has fewer tensors than layers: it is damaged, and building the table would not end."""
  if num_layers > tensors:
    raise ValueError(f"{source}: {num_layers} layers, but only {tensors} tensors: damaged, or not all of the model")


Index = int | tuple[int, int] | None  # of a slice of a parameter: layer, (layer, expert), or None for the whole


def hf_names(path: str, spec: ParamSpec) -> Iterator[tuple[str, Index]]:
  """(name, layer) of each Hugging Face tensor of the parameter; layer is None if it is not layered."""
  if spec.by_expert:
    name = str(spec.hf_name)
    pairs = itertools.product(range(spec.shape[0]), range(spec.shape[1]))
    yield from ((name.format(layer=layer, expert=expert), (layer, expert)) for layer, expert in pairs)
  elif spec.hf_name is not None:
    layers = range(spec.shape[0]) if spec.layered else [None]
    yield from ((spec.hf_name if layer is None else spec.hf_name.format(layer=layer), layer) for layer in layers)


Part = tuple[str, Index]  # path and layer of a parameter's slice that a Hugging Face tensor holds


def hf_tensors(table: dict[str, ParamSpec]) -> dict[str, list[Part]]:
  """The parts of every Hugging Face tensor, by name; most have one, the whole."""
  tensors: dict[str, list[Part]] = {}
  for path, spec in table.items():
    for name, layer in hf_names(path, spec):
      tensors.setdefault(name, []).append((path, layer))
  return tensors


def hf_shape(specs: list[ParamSpec]) -> tuple[int, ...]:
  """The shape of a Hugging Face tensor of these parts."""
  if specs[0].hf_layout == "experts":
    experts, outputs, *inputs = specs[0].hf_shape
    return experts, *inputs, len(specs) * outputs
  shape = sum(spec.hf_shape[0] for spec in specs), *specs[0].hf_shape[1:]
  return shape[::-1] if specs[0].hf_layout == "columns" else shape


def joined(values: list[np.ndarray], specs: list[ParamSpec]) -> np.ndarray:
  """A Hugging Face tensor from its parts, each of its `hf_shape`."""
  if specs[0].hf_layout == "experts":
    alternating = np.stack(values, axis=2).reshape(len(values[0]), -1, *values[0].shape[2:])
    return np.moveaxis(alternating, 1, -1)
  if specs[0].hf_layout == "heads" and len(values) > 1:
    heads = [value.reshape(spec.shape[1], -1, *value.shape[1:]) for value, spec in zip(values, specs, strict=True)]
    return np.concatenate(heads, axis=1).reshape(hf_shape(specs))
  whole = values[0] if len(values) == 1 else np.concatenate(values)
  return whole.T if specs[0].hf_layout == "columns" else whole


def parted(value: np.ndarray, specs: list[ParamSpec]) -> list[np.ndarray]:
  """The parts of a Hugging Face tensor, each of its `hf_shape`; the inverse of `joined`."""
  if specs[0].hf_layout == "experts":
    rows = np.moveaxis(value, -1, 1)
    return [rows[:, index :: len(specs)] for index in range(len(specs))]
  if specs[0].hf_layout == "heads" and len(specs) > 1:
    heads = value.reshape(specs[0].shape[1], len(specs), -1, *value.shape[1:])
    return [heads[:, index].reshape(spec.hf_shape) for index, spec in enumerate(specs)]
  value = value.T if specs[0].hf_layout == "columns" else value
  stops = np.cumsum([spec.hf_shape[0] for spec in specs])
  return [value[stop - spec.hf_shape[0] : stop] for stop, spec in zip(stops, specs, strict=True)]


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
      read: a tensor overflows `dtype`.

  NaN and infinity stay, with one warning: they may lie in rows that no text reads, and other programs load such files.
  """
  check_layers(max(spec.shape[0] for spec in table.values() if spec.layered), len(tensors.shapes), tensors.source)
  wanted = hf_tensors(table)
  shapes = {name: hf_shape([table[path] for path, _ in parts]) for name, parts in wanted.items()}
  problems = [f"missing {name} {shape}" for name, shape in shapes.items() if name not in tensors.shapes]
  for name, shape in tensors.shapes.items():
    if name not in wanted and not ignore(name):
      problems.append(f"unexpected {name} {shape}")
    elif name in wanted and shape != shapes[name]:
      problems.append(f"{name} has shape {shape}, the config means {shapes[name]}")
  if problems:
    shown = "; ".join(problems[:40]) + (f"; and {len(problems) - 40} more" if len(problems) > 40 else "")
    what = f"{len(problems)} tensor(s) do not fit {tensors.described_by}"
    raise ValueError(f"{tensors.source}: {what}: {shown}")

  def read() -> Iterator[Slice]:
    found, broken = [name for name in tensors.shapes if name in wanted], {}
    for done, name in enumerate(found, 1):
      parts, specs = wanted[name], [table[path] for path, _ in wanted[name]]
      value = _cast(tensors, name, dtype_of(specs[0], np.dtype(dtype)), broken)
      for (path, layer), spec, part in zip(parts, specs, parted(value, specs), strict=True):
        yield path, layer, part.reshape(spec.shape[spec.layered + spec.by_expert :])
      if progress is not None:
        progress(done, len(found), name)
    if broken:
      names = ", ".join(list(broken)[:8]) + (f" and {len(broken) - 8} more" if len(broken) > 8 else "")
      count = f"{sum(broken.values())} values of {len(broken)} tensor(s) are NaN or infinite"
      warnings.warn(f"{tensors.source}: {count}, and a text that meets them fails: {names}", stacklevel=2)

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


def _cast(tensors: Tensors, name: str, dtype, broken: dict[str, int]) -> np.ndarray:
  """One tensor in `dtype`; `broken` counts its values that are not finite."""
  value = tensors.read(name)
  with np.errstate(all="ignore"):
    cast = value.astype(dtype, copy=False)
  if _all_finite(cast):
    return cast
  finite = np.isfinite(cast.astype(np.float32, copy=False))
  if np.isfinite(value[~finite].astype(np.float32, copy=False)).any():
    raise ValueError(f"{tensors.source}: tensor {name} overflows {np.dtype(dtype).name}; choose float32 or bfloat16")
  broken[name] = finite.size - int(finite.sum())
  return cast


def _all_finite(value: np.ndarray, block: int = 2**18) -> bool:
  """Whether no number is NaN or infinity. Blocks that stay in a core's cache are many times faster than the whole."""
  flat = value.reshape(-1)
  blocks = (flat[start : start + block] for start in range(0, flat.size, block))
  return all(np.isfinite(one.astype(np.float32, copy=False)).all() for one in blocks)


class Output(NamedTuple):
  """A tensor to be written; `read()` returns it as a contiguous numpy array."""

  name: str
  shape: tuple[int, ...]
  dtype: np.dtype
  read: Callable[[], np.ndarray]

  @property
  def nbytes(self) -> int:
    return tensor_bytes(self.shape, self.dtype)


def from_params(table: dict[str, ParamSpec], params: Params, dtype=None) -> Iterator[Output]:
  """Every Hugging Face tensor, in `dtype`; default the parameter's."""
  flat = flatten(params)
  for name, parts in hf_tensors(table).items():
    specs = [table[path] for path, _ in parts]
    kind = np.dtype(dtype or flat[parts[0][0]].dtype)

    def read(parts=parts, specs=specs, kind=kind) -> np.ndarray:
      values = [_one(flat[path], layer, spec, kind) for (path, layer), spec in zip(parts, specs, strict=True)]
      return np.ascontiguousarray(joined(values, specs))

    yield Output(name, hf_shape(specs), kind, read)


def _one(value, layer: Index, spec: ParamSpec, dtype: np.dtype) -> np.ndarray:
  one = np.asarray(jax.device_get(value if layer is None else value[layer]))
  return np.ascontiguousarray(one.reshape(spec.hf_shape).astype(dtype, copy=False))


def tensor_bytes(shape: tuple[int, ...], dtype) -> int:
  """Size of one tensor in bytes."""
  return math.prod(shape) * np.dtype(dtype).itemsize
