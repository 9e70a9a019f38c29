"""The flags `--mesh.data` and `--mesh.tensor` of programs that generate."""

from __future__ import annotations

from jax.sharding import Mesh

from dms_jax.retrofit.distributed import MeshConfig
from dms_jax.sharding import make_mesh
from experiments.common import program


def define() -> None:
  """Defines the flags, those that training has."""
  program.define_flags("mesh", MeshConfig)


def read() -> Mesh | None:
  """The mesh of the flags; None for one device.

  Raises:
    ValueError: there are fewer devices, or the flags name several processes.
  """
  config = program.read_flags("mesh", MeshConfig)
  if config.coordinator:
    raise ValueError(f"--mesh.coordinator={config.coordinator}: generation runs on the devices of one process")
  return None if config.data * config.tensor == 1 else make_mesh(config.data, config.tensor)
