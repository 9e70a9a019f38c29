"""Described, not attached TPUs: shared by the tests that compile for them (marker `tpu`)."""

from __future__ import annotations

TOPOLOGIES = ("v4:2x2x1", "v5e:2x2", "v5p:2x2x1", "v6e:2x2", "tpu7x:2x2x1")


def devices(topology: str):
  """The devices of a topology, by its name."""
  from jax.experimental import topologies

  return topologies.get_topology_desc(platform="tpu", topology_name=topology).devices
