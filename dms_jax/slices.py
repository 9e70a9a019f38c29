"""Parameters on disk by slices: written as they come, read when asked for; no model in memory.

A slice is one layer of a layered parameter, or a whole parameter without layers. The folder is one that Orbax reads:
Orbax writes it for a single element of each parameter, and TensorStore, in which Orbax stores arrays, then puts an
array of the full shape in the place of each element and takes the slices.
"""

from __future__ import annotations

import collections
import math
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import tensorstore as ts
from orbax.checkpoint import v1 as ocp

from dms_jax.params import ParamSpec, StoredParam, map_table

# Path in the parameter table, layer (None without layers; with the expert where each has a slice), value.
Slice = tuple[str, int | tuple[int, int] | None, np.ndarray]

STATE = "state"  # Orbax's folder of arrays
CHUNK_BYTES = 2**26  # most bytes of a chunk, which is read and written as one
FILE_BYTES = 2**27  # bytes of a file before the next one is begun: they are held in memory until then
IN_FLIGHT_BYTES = 2**27  # slices that wait to be written, beside the last one
_NODES = {"cache_pool#ocdbt": {"total_bytes_limit": 2**26}}  # for the index of the files


def dtype_of(spec: ParamSpec, dtype: np.dtype) -> np.dtype:
  """The dtype that a parameter of a model of `dtype` is stored in: float32 for gates.

  They are small, and a rounded gate can flip a decision.
  """
  return np.dtype(np.float32) if spec.group == "gate" else dtype


def write(directory: Path, table: dict[str, ParamSpec], dtype: np.dtype, slices: Iterable[Slice]) -> None:
  """Writes the parameters of `table`, each in `dtype_of(spec, dtype)`, into the new folder `directory`.

  In memory are the slice that `slices` makes, the slice before it, and about `FILE_BYTES`.

  Args:
    slices: every slice of the table once, in any order.
  """
  ocp.save(directory, map_table(lambda _, spec: np.zeros((1,) * len(spec.shape), dtype_of(spec, dtype)), table))
  context = ts.Context(_NODES)
  opening = {}
  for path, spec in table.items():
    kind = dtype_of(spec, dtype)
    metadata = {
      "shape": spec.shape, "data_type": kind.name,
      "codecs": [{"name": "bytes", "configuration": {"endian": "little"}}],
      "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": chunk_shape(spec, kind)}},
    }  # fmt: skip
    # Zeros are stored too: Orbax takes what is not there for lost.
    stored = _spec(directory, path) | {"metadata": metadata, "store_data_equal_to_fill_value": True}
    opening[path] = ts.open(stored, context=context, create=True, delete_existing=True)
  arrays = {path: future.result() for path, future in opening.items()}
  pending: collections.deque = collections.deque()
  held = 0
  try:
    for path, layer, value in slices:
      array = arrays[path] if layer is None else arrays[path][layer]
      pending.append((array.write(value, can_reference_source_data_indefinitely=True), value.nbytes))
      held += value.nbytes
      del value  # `slices` makes the next one meanwhile
      while held > IN_FLIGHT_BYTES and len(pending) > 1:
        future, size = pending.popleft()
        future.result()
        held -= size
    for future, _ in pending:
      future.result()
  finally:
    for future, _ in pending:  # nothing is written any more once this function has ended
      future.exception()


def read(directory: Path, table: dict[str, ParamSpec]) -> dict[str, StoredParam]:
  """The parameters of `table` that Orbax stores in `directory`, by path; a layer is read when it is asked for.

  Where a chunk holds several layers, as in checkpoints that Orbax wrote, the last one read stays in memory.
  """
  arrays = _open(directory, table, chunk_bytes=0)
  chunks = {path: array.chunk_layout.read_chunk.shape for path, array in arrays.items()}
  if shared := [path for path, spec in table.items() if spec.layered and chunks[path][0] > 1]:
    most = max(math.prod(chunks[path]) * arrays[path].dtype.numpy_dtype.itemsize for path in shared)
    arrays |= _open(directory, shared, chunk_bytes=most + 2**20)  # TensorStore's notes of a chunk count too

  def stored(array: ts.TensorStore) -> StoredParam:
    one = lambda layer: array if layer is None else array[layer]
    return StoredParam(array.shape, array.dtype.numpy_dtype, lambda layer: one(layer).read().result())

  return {path: stored(array) for path, array in arrays.items()}


def _open(directory: Path, paths: Iterable[str], chunk_bytes: int) -> dict[str, ts.TensorStore]:
  """The arrays of the parameters `paths`; `chunk_bytes` of what is read of them stay in memory."""
  context = ts.Context({**_NODES, "cache_pool": {"total_bytes_limit": chunk_bytes}})
  opening = {path: ts.open(_spec(directory, path), open=True, read=True, context=context) for path in paths}
  return {path: future.result() for path, future in opening.items()}


def chunk_shape(spec: ParamSpec, dtype: np.dtype) -> list[int]:
  """The shape of a parameter's chunks: a layer, its longest axis halved until `CHUNK_BYTES` hold it.

  Chunks thus end where the shards of a mesh do, so that a device reads little more than its shard. Each expert's
  matrices are chunks of their own, because a device generates with whole experts.
  """
  apart = {"layers", *(["experts"] if spec.num_inputs else [])}
  shape = [1 if axis in apart else size for axis, size in zip(spec.axes, spec.shape, strict=True)]
  while math.prod(shape) * dtype.itemsize > CHUNK_BYTES:
    longest = shape.index(max(shape))
    shape[longest] = -(-shape[longest] // 2)
  return shape


def _spec(directory: Path, path: str) -> dict:
  """TensorStore's description of a parameter that Orbax stores in `directory`."""
  if ".." in directory.parts:  # which TensorStore refuses
    directory = directory.resolve()
  files = {"driver": "file", "path": f"{directory / STATE}/"}
  whole = files | {"file_io_locking": {"mode": "non_atomic"}}  # names of data files are random: no two writers meet
  kvstore = {
    "driver": "ocdbt", "base": whole, "manifest": files, "path": f"{path.replace('/', '.')}/",
    "target_data_file_size": FILE_BYTES, "cache_pool": "cache_pool#ocdbt",
  }  # fmt: skip
  return {"driver": "zarr3", "kvstore": kvstore, "recheck_cached_data": False, "recheck_cached_metadata": False}
