"""Parameters on disk by slices: written as they come, read when asked for, never a whole model in memory.

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

from dms_jax.params import ParamSpec, map_table

Slice = tuple[str, int | None, np.ndarray]  # path in the parameter table, layer (None without layers), value

STATE = "state"  # Orbax's folder of arrays
CHUNK_BYTES = 2**26  # most bytes of a chunk, which is read and written as one
FILE_BYTES = 2**28  # bytes of a file before the next one is begun: they are held in memory until then
IN_FLIGHT_BYTES = 2**26  # slices that wait to be written, beside the last one


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
  context = ts.Context({"cache_pool#ocdbt": {"total_bytes_limit": 2**26}})
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


def chunk_shape(spec: ParamSpec, dtype: np.dtype) -> list[int]:
  """The shape of a parameter's chunks: a layer, its longest axis halved until `CHUNK_BYTES` hold it.

  Chunks thus end where the shards of a mesh do, so that a device reads little more than its shard.
  """
  shape = [1 if spec.layered and axis == 0 else size for axis, size in enumerate(spec.shape)]
  while math.prod(shape) * dtype.itemsize > CHUNK_BYTES:
    longest = shape.index(max(shape))
    shape[longest] = -(-shape[longest] // 2)
  return shape


def _spec(directory: Path, path: str) -> dict:
  """TensorStore's description of a parameter that Orbax stores in `directory`."""
  files = {"driver": "file", "path": f"{directory / STATE}/"}
  whole = files | {"file_io_locking": {"mode": "non_atomic"}}  # names of data files are random: no two writers meet
  kvstore = {
    "driver": "ocdbt", "base": whole, "manifest": files, "path": f"{path.replace('/', '.')}/",
    "target_data_file_size": FILE_BYTES, "cache_pool": "cache_pool#ocdbt",
  }  # fmt: skip
  return {"driver": "zarr3", "kvstore": kvstore, "recheck_cached_data": False, "recheck_cached_metadata": False}
