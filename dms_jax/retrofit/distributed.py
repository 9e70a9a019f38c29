"""One retrofit on several devices and hosts: mesh, rows of each process, coordination.

Every process runs the same program on the same run directory, which must be on a shared file system. Weights and
optimizer state are split over the mesh by `dms_jax.sharding`. Each process packs only the rows that its devices read,
and writes its shards of the training state; process 0 writes all other files.
"""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import Any

import jax
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from dms_jax.decoder import Model
from dms_jax.params import Params, param_table
from dms_jax.retrofit.config import RetrofitConfig
from dms_jax.retrofit.data import Batches
from dms_jax.retrofit.step import Batch, TrainState, init_state
from dms_jax.sharding import make_mesh, tree_shardings

AUTO = "auto"


@dataclasses.dataclass(frozen=True)
class MeshConfig:
  """The devices of a run. `data` splits rows, weights and optimizer state (FSDP); `tensor` splits heads, feed-forward
  and vocabulary.

  On several hosts, run the same command on each, with the `coordinator`'s "host:port" (process 0 listens there), the
  number of `processes` and the number of this `process`, from 0; or with coordinator "auto" where JAX finds these
  itself (Cloud TPU, Slurm, Open MPI). The mesh must then use all devices.

  Attributes:
    coordinator: "host:port" of process 0 on several hosts; "auto" where JAX finds it itself.
    processes: number of processes on several hosts.
    process: number of this process, from 0.
  """

  data: int = 1
  tensor: int = 1
  coordinator: str = ""
  processes: int | None = None
  process: int | None = None

  def __post_init__(self):
    for name in ("data", "tensor"):
      if getattr(self, name) < 1:
        raise ValueError(f"mesh.{name}={getattr(self, name)} must be at least 1")
    given = [name for name in ("processes", "process") if getattr(self, name) is not None]
    if self.coordinator in ("", AUTO):
      if given:
        raise ValueError(f"mesh.{', mesh.'.join(given)} without a mesh.coordinator=host:port to meet at")
      return
    host, _, port = self.coordinator.rpartition(":")
    if not host or not port.isdigit():
      raise ValueError(f"mesh.coordinator={self.coordinator!r} is neither host:port nor {AUTO!r}")
    if len(given) < 2:
      raise ValueError("mesh.coordinator=host:port needs mesh.processes (how many) and mesh.process (which, from 0)")
    if self.processes < 1 or not 0 <= self.process < self.processes:
      raise ValueError(f"mesh.process={self.process} must lie between 0 and mesh.processes={self.processes}, exclusive")


def initialize(config: MeshConfig) -> None:
  """Connects to the other processes of the run, if any. It must run before JAX is asked for a device.

  Raises:
    ValueError: JAX could not connect.
  """
  if not config.coordinator:
    return
  jax.config.update("jax_cpu_collectives_implementation", "gloo")
  try:
    if config.coordinator == AUTO:
      jax.distributed.initialize()
    else:
      jax.distributed.initialize(config.coordinator, config.processes, config.process)
  except (RuntimeError, ValueError) as error:
    raise ValueError(f"mesh.coordinator={config.coordinator!r}: {error}") from error


def mesh_of_all(config: MeshConfig) -> Mesh:
  """The mesh of the run.

  Raises:
    ValueError: there are fewer devices, or some process's devices are left out.
  """
  mesh = make_mesh(config.data, config.tensor)
  if jax.process_count() > 1 and mesh.size != jax.device_count():
    raise ValueError(
      f"mesh.data={config.data} x mesh.tensor={config.tensor} is {mesh.size} of the {jax.device_count()} devices of "
      f"{jax.process_count()} processes; it must be all of them"
    )
  return mesh


def create_mesh(config: MeshConfig, retrofit: RetrofitConfig) -> Mesh:
  """The mesh of a retrofit.

  Raises:
    ValueError: as `mesh_of_all`, or `data` does not divide the rows.
  """
  mesh = mesh_of_all(config)
  rows = retrofit.batch_size // retrofit.microbatches
  if rows % config.data:
    parts = f" in {retrofit.microbatches} microbatches" if retrofit.microbatches > 1 else ""
    raise ValueError(
      f"mesh.data={config.data} does not divide the {rows} rows at once of "
      f"retrofit.batch_size={retrofit.batch_size}{parts}"
    )
  return mesh


def place_state(config: RetrofitConfig, student: Model, trained: Params, mesh: Mesh) -> TrainState:
  """The state before the first step; each device holds only its shards."""
  make = partial(init_state, config)
  table = param_table(student.config, student.dms, student.lora)
  return jax.jit(make, out_shardings=tree_shardings(jax.eval_shape(make, trained), mesh, table))(trained)


def feed(packer: Batches, step: int, mesh: Mesh) -> Batch:
  """The batch of training step `step` on the mesh; this process packs only the rows of its own devices."""
  sharding = NamedSharding(mesh, P("data"))
  shape = packer.config.batch_size, packer.config.seq_len
  cuts = {cut.indices(shape[0]) for cut, *_ in sharding.addressable_devices_indices_map(shape).values()}
  batch = packer.batch(step, [row for cut in sorted(cuts) for row in range(*cut)])
  return jax.tree.map(lambda x: jax.make_array_from_process_local_data(sharding, x, shape), batch)


def gathered(tree: Any) -> Any:
  """`tree` as whole numpy arrays, gathered one by one, if there are several processes; otherwise unchanged."""
  if jax.process_count() == 1:
    return tree
  return jax.tree.map(partial(multihost_utils.process_allgather, tiled=True), tree)


def preempted(step: int) -> bool:
  """Whether to stop after `step` because a host got SIGTERM; JAX has all processes agree on the same step."""
  return multihost_utils.reached_preemption_sync_point(step)
