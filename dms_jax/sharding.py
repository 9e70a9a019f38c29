"""Where parameters live on a mesh of devices: logical axes to mesh axes, in one place, with JAX's own sharding."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from dms_jax.attention import row_and_head_axes
from dms_jax.params import Params, ParamSpec, map_table


@dataclasses.dataclass(frozen=True)
class ShardingRules:
  """The mesh axis that splits each logical axis of `ParamSpec.axes`; None replicates. A tensor uses each axis once.

  The default is tensor parallelism over "tensor" (heads, feed-forward, vocabulary) and fully sharded data parallelism
  over "data" (the model's width).
  """

  layers: str | None = None
  vocab: str | None = "tensor"
  embed: str | None = "data"
  ff: str | None = "tensor"
  heads: str | None = "tensor"
  kv_heads: str | None = "tensor"
  head_dim: str | None = None
  rank: str | None = None


def make_mesh(data: int = 1, tensor: int = 1, devices: Sequence[jax.Device] | None = None) -> Mesh:
  """A mesh of `data` x `tensor` devices, with the partitioner deciding what is not said (`AxisType.Auto`).

  Raises:
    ValueError: fewer devices than asked for.
  """
  devices = jax.devices() if devices is None else list(devices)
  if data * tensor > len(devices):
    raise ValueError(f"a mesh of data={data} x tensor={tensor} needs {data * tensor} devices; there are {len(devices)}")
  grid = np.asarray(devices[: data * tensor]).reshape(data, tensor)
  # Auto on purpose: with Explicit axes a per-row scatter into a sharded cache raises.
  return Mesh(grid, ("data", "tensor"), axis_types=(AxisType.Auto, AxisType.Auto))


def partition_spec(path: str, spec: ParamSpec, mesh: Mesh, rules: ShardingRules) -> PartitionSpec:
  """The partition of one tensor; an axis that the mesh does not divide is replicated, and the reason logged."""
  parts: list[str | None] = []
  for axis, size in zip(spec.axes, spec.shape, strict=True):
    name = getattr(rules, axis)
    if name is None or name in parts or mesh.shape[name] == 1:
      parts.append(None)
    elif size % mesh.shape[name]:
      logging.getLogger(__name__).info(
        "%s: %s = %d is not a multiple of mesh axis %s = %d: replicated", path, axis, size, name, mesh.shape[name]
      )
      parts.append(None)
    else:
      parts.append(name)
  return PartitionSpec(*parts)


def param_shardings(mesh: Mesh, table: dict[str, ParamSpec], rules: ShardingRules | None = None) -> Params:
  """A `NamedSharding` for every parameter of `table`, as a parameter tree."""
  rules = rules or ShardingRules()
  return map_table(lambda path, spec: NamedSharding(mesh, partition_spec(path, spec, mesh, rules)), table)


def shard_params(params: Params, mesh: Mesh, table: dict[str, ParamSpec], rules: ShardingRules | None = None) -> Params:
  """Places parameters on the mesh."""
  return jax.device_put(params, param_shardings(mesh, table, rules))


def cache_shardings(mesh: Mesh, cache: Any, heads: int) -> Any:
  """A `NamedSharding` for every array of a cache of `heads` KV heads, split as attention splits rows and heads.

  Arrays [L, B, K, ...] and [B] are split; a pool of pages, which any row may use, stands whole on every device.
  """
  batch = cache.seen.shape[0]
  with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
    rows, split = row_and_head_axes(batch, heads) or ((), None)

  def leaf(x):
    if x.shape[1:3] == (batch, heads):
      return NamedSharding(mesh, PartitionSpec(None, rows, split))
    return NamedSharding(mesh, PartitionSpec(rows) if x.shape == (batch,) else PartitionSpec())

  return jax.tree.map(leaf, cache)
