"""One program in several processes: arrays of all their devices from host values, and back.

Every process runs the same program with the same inputs, as on several hosts under `jax.distributed`. A host value is
the same in each, and each puts the shards of its own devices. A device array, whose shards no process sees all, comes
to every host by one gathering program. In one process nothing is gathered.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

PATIENCE = 3600  # seconds that processes wait for the one that writes
_meetings = itertools.count()


def leads() -> bool:
  """Whether this is process 0, which prints and writes."""
  return jax.process_index() == 0


def spans_processes(mesh: Mesh) -> bool:
  """Whether a mesh has devices of other processes."""
  return any(device.process_index != jax.process_index() for device in mesh.devices.flat)


@contextlib.contextmanager
def together() -> Iterator[None]:
  """A context that fails on all processes if it fails on one; otherwise the others would wait forever.

  Raises:
    OSError: another process failed; its own message says why.
  """
  if jax.process_count() == 1:
    yield
    return
  failure = None
  try:
    yield
  except Exception as error:
    failure = error
  from jax.experimental import multihost_utils
  from orbax.checkpoint import multihost  # it takes a second to import

  # First a barrier that uses no devices: collectives have shorter time limits.
  multihost.get_barrier_sync_fn()(key=f"dms_jax_{next(_meetings)}", timeout_ms=PATIENCE * 1000)
  failed = np.flatnonzero(multihost_utils.process_allgather(np.int32(failure is not None)))
  if failure is not None:
    raise failure
  if failed.size:
    raise OSError(f"process {failed[0]} of the run failed; its own message says why")


def put(tree: Any, shardings: Any) -> Any:
  """`jax.device_put` of host values that are equal in all processes; each process sends only its devices' shards."""
  return jax.tree.map(_put, tree, shardings)


def _put(x: Any, sharding: NamedSharding) -> jax.Array:
  if sharding.is_fully_addressable or not getattr(x, "is_fully_addressable", True):
    return jax.device_put(x, sharding)
  if jax.dtypes.issubdtype(getattr(x, "dtype", None), jax.dtypes.prng_key):
    return jax.random.wrap_key_data(_put(jax.random.key_data(x), sharding), impl=jax.random.key_impl(x))
  host = np.asarray(x)  # `device_put` would compare it between the processes, whole
  return jax.make_array_from_callback(host.shape, sharding, host.__getitem__)


@functools.cache
def _gathers(mesh: Mesh) -> Callable[[list[jax.Array]], list[jax.Array]]:
  return jax.jit(lambda arrays: arrays, out_shardings=NamedSharding(mesh, P()))


def replicated(tree: Any) -> Any:
  """`tree` with its arrays that are split over processes whole on every device; waits for nothing.

  All processes must call it, in the same order.
  """
  leaves, structure = jax.tree.flatten(tree)
  split = [
    i
    for i, x in enumerate(leaves)
    if isinstance(x, jax.Array) and not (x.is_fully_addressable or x.is_fully_replicated)
  ]
  if split:
    whole = _gathers(leaves[split[0]].sharding.mesh)([leaves[i] for i in split])
    for i, x in zip(split, whole, strict=True):
      leaves[i] = x
  return jax.tree.unflatten(structure, leaves)


def fetch(tree: Any) -> Any:
  """`jax.device_get` of `replicated`: every array as numpy, in every process."""
  return jax.device_get(replicated(tree))
