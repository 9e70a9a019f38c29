"""Sharding of parameters, activations and caches: logical axes to axes of the device mesh."""

from __future__ import annotations

import dataclasses
import logging
import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from dms_jax.config import ModelConfig
from dms_jax.params import Params, ParamSpec, map_table


@dataclasses.dataclass(frozen=True)
class ShardingRules:
  """The mesh axis that splits each logical axis of `ParamSpec.axes`; None replicates.

  A tensor uses each mesh axis once.

  The default is tensor parallelism over "tensor" (heads, feed-forward, vocabulary) and fully sharded data parallelism
  over "data" (model width). `DECODING` is tensor parallelism alone, in which "tensor" splits a layer's experts and each
  stays whole; where it does not divide their number it splits the hidden units of every expert, as in training.

  Attributes:
    spread: a mesh axis that the rules leave unused in a matrix splits its widest axis.
  """

  layers: str | None = None
  vocab: str | None = "tensor"
  embed: str | None = "data"
  ff: str | None = "tensor"
  heads: str | None = "tensor"
  kv_heads: str | None = "tensor"
  head_dim: str | None = None
  rank: str | None = None
  gate_ff: str | None = None
  gate_heads: str | None = None
  positions: str | None = None
  experts: str | None = None
  choices: str | None = None
  spread: bool = True


DECODING = ShardingRules(embed=None, experts="tensor", spread=False)


@dataclasses.dataclass(frozen=True)
class Split:
  """How a mesh splits generation and its caches: "data" splits rows, "tensor" the KV heads of each row.

  Where "tensor" does not divide the KV heads, those of a row stay together and "tensor" splits rows as "data" does.

  Attributes:
    mesh: a `Mesh`, or an `AbstractMesh` where shapes alone matter.
    by_rows: "tensor" splits rows.
  """

  mesh: Any
  by_rows: bool

  @classmethod
  def of(cls, config: ModelConfig, mesh: Mesh | AbstractMesh) -> Split:
    """The split of a model's rows and heads."""
    return cls(mesh, by_rows=config.num_kv_heads % mesh.shape["tensor"] != 0)

  @property
  def row_parts(self) -> int:
    """Parts of the rows, each on devices of its own."""
    return self.mesh.size if self.by_rows else self.mesh.shape["data"]

  @property
  def head_parts(self) -> int:
    """Parts of the KV heads of a row, each on a device of its own."""
    return 1 if self.by_rows else self.mesh.shape["tensor"]

  @property
  def parts(self) -> tuple[int, int]:
    """(`row_parts`, `head_parts`)."""
    return self.row_parts, self.head_parts

  def spec(self, spec: PartitionSpec) -> PartitionSpec:
    """The partition of an array whose partition is `spec` where "tensor" splits heads."""
    if not self.by_rows:
      return spec
    moved = {"data": ("data", "tensor"), "tensor": None}
    return PartitionSpec(*(moved.get(axis, axis) if isinstance(axis, str) else axis for axis in spec))


def decoding(config: ModelConfig, mesh: Mesh | AbstractMesh) -> ShardingRules:
  """`DECODING`; where "tensor" splits rows, every device has the whole weights of attention."""
  by_rows = Split.of(config, mesh).by_rows
  return dataclasses.replace(DECODING, heads=None, kv_heads=None) if by_rows else DECODING


def make_mesh(data: int = 1, tensor: int = 1, devices: Sequence[jax.Device] | None = None) -> Mesh:
  """A mesh of `data` x `tensor` devices with `AxisType.Auto`: the partitioner chooses what is not constrained.

  Raises:
    ValueError: there are fewer devices, or `data` or `tensor` is no whole number from 1 on.
  """
  for name, size in (("data", data), ("tensor", tensor)):
    if not isinstance(size, int | np.integer) or size < 1:
      raise ValueError(f"mesh.{name}={size} must be a whole number of devices, at least 1")
  devices = jax.devices() if devices is None else list(devices)
  if (needed := data * tensor) > (found := len(devices)):
    raise ValueError(f"a mesh of mesh.data={data} x mesh.tensor={tensor} needs {needed} devices; there are {found}")
  grid = np.asarray(devices[: data * tensor]).reshape(data, tensor)
  # With Explicit axes a per-row scatter into a sharded cache raises.
  return Mesh(grid, ("data", "tensor"), axis_types=(AxisType.Auto, AxisType.Auto))


def _by_rules(spec: ParamSpec, mesh: Mesh | AbstractMesh, rules: ShardingRules) -> list[tuple[str, ...]]:
  """The mesh axes of each axis of a tensor by the rules, where the sizes divide."""
  parts: list[tuple[str, ...]] = []
  for axis, size in zip(spec.axes, spec.shape, strict=True):
    name = getattr(rules, axis)
    fits = name is not None and (name,) not in parts and mesh.shape[name] > 1 and size % mesh.shape[name] == 0
    parts.append((name,) if fits else ())
  return parts


def partition_spec(path: str, spec: ParamSpec, mesh: Mesh | AbstractMesh, rules: ShardingRules) -> PartitionSpec:
  """The partition of one tensor.

  The rules leave a mesh axis unused if they map no axis of the tensor to it, or none whose size is a multiple. In a
  matrix such a mesh axis splits the widest axis that it divides, under `ShardingRules.spread`. If it divides none, the
  tensor is replicated over the mesh axis and the reason is logged.
  """
  parts = _by_rules(spec, mesh, rules)
  wanted = {name for name in vars(rules).values() if isinstance(name, str) and mesh.shape[name] > 1}
  for name in sorted(wanted) if spec.num_inputs and rules.spread else ():  # vectors are small
    if any(name in part for part in parts):
      continue
    shards = [size // math.prod(mesh.shape[n] for n in part) for size, part in zip(spec.shape, parts, strict=True)]
    free = [i for i, n in enumerate(shards) if n % mesh.shape[name] == 0 and spec.axes[i] != "layers"]
    if free:
      widest = max(free, key=lambda i: shards[i])
      parts[widest] = (*parts[widest], name)
    else:
      sizes = ", ".join(f"{axis} = {size}" for axis, size in zip(spec.axes, spec.shape, strict=True))
      logging.getLogger(__name__).info(
        "%s: mesh axis %s = %d divides none of %s: replicated", path, name, mesh.shape[name], sizes
      )
  return _as_partition(parts)


def _as_partition(parts: Sequence[tuple[str, ...]]) -> PartitionSpec:
  return PartitionSpec(*(part[0] if len(part) == 1 else part or None for part in parts))


def param_shardings(mesh: Mesh, table: dict[str, ParamSpec], rules: ShardingRules | None = None) -> Params:
  """A `NamedSharding` for every parameter of `table`, as a parameter tree."""
  rules = rules or ShardingRules()
  return map_table(lambda path, spec: NamedSharding(mesh, partition_spec(path, spec, mesh, rules)), table)


def tree_shardings(
  tree: Any, mesh: Mesh | AbstractMesh, table: dict[str, ParamSpec], rules: ShardingRules | None = None
) -> Any:
  """A `NamedSharding` for every array of `tree`.

  An array whose path ends with a parameter's path (the parameter, its optimizer state) is split as `table` says. Tokens
  and segment ids of a batch are split by rows. All other arrays, such as scalars and keys, are replicated.
  """
  rules = rules or ShardingRules()

  def leaf(path, x):
    names = [str(getattr(key, "key", getattr(key, "name", ""))) for key in path]
    name = "/".join(names[-2:]) if "/".join(names[-2:]) in table else names[-1] if names else ""
    if name in table and table[name].shape == x.shape:
      return NamedSharding(mesh, partition_spec(name, table[name], mesh, rules))
    return NamedSharding(mesh, PartitionSpec("data") if name in ("tokens", "segment_ids") else PartitionSpec())

  return jax.tree_util.tree_map_with_path(leaf, tree)


def constrain(tree: Any, table: dict[str, ParamSpec]) -> Any:
  """`tree` with its arrays constrained to `tree_shardings`; inside `jit`, under a mesh of several devices."""
  mesh = jax.sharding.get_abstract_mesh()
  if mesh.empty or mesh.size == 1:
    return tree
  return jax.lax.with_sharding_constraint(tree, tree_shardings(tree, mesh, table))


def constrain_rows(x: jax.Array) -> jax.Array:
  """`x` [B, ...] constrained to rows split over "data", where the mesh divides them.

  Activations need this: otherwise the partitioner may split them like a weight and compute every row on every device.
  """
  if rows_per_device(len(x)) == len(x):
    return x
  return jax.lax.with_sharding_constraint(x, PartitionSpec("data"))


def rows_per_device(rows: int) -> int:
  """Rows of activations on each device, out of `rows`; see `constrain_rows`."""
  mesh = jax.sharding.get_abstract_mesh()
  data = 1 if mesh.empty or _manual(mesh) else mesh.shape.get("data", 1)
  return rows if rows % data else rows // data


def _manual(mesh: AbstractMesh) -> bool:
  """Whether the code being traced runs on each device of `mesh` on its own."""
  return AxisType.Manual in mesh.axis_types


def gather_layer(layer: dict[str, jax.Array], table: dict[str, ParamSpec]) -> dict[str, jax.Array]:
  """One layer's parameters, without L, gathered over "data" for use; tensor parallelism stays.

  Fully sharded weights are gathered layer by layer, and again where the backward pass recomputes the layer. Their
  gradients are scattered directly to the stored shards. Without this the partitioner may move activations instead.
  """
  mesh = jax.sharding.get_abstract_mesh()
  if mesh.empty or mesh.size == 1 or _manual(mesh):
    return layer
  rules = ShardingRules()

  def gather(name: str, x: jax.Array) -> jax.Array:
    spec = table[f"layers/{name}"]
    stored = PartitionSpec(*partition_spec(name, spec, mesh, rules)[1:])
    used = _as_partition(_by_rules(spec, mesh, dataclasses.replace(rules, embed=None))[1:])
    return x if stored == used else _gather(stored, used, x)

  return {name: gather(name, x) for name, x in layer.items()}


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _gather(stored: PartitionSpec, used: PartitionSpec, x: jax.Array) -> jax.Array:
  return jax.lax.with_sharding_constraint(x, used)


_gather.defvjp(
  lambda stored, used, x: (_gather(stored, used, x), None),
  lambda stored, used, _, gradient: (jax.lax.with_sharding_constraint(gradient, stored),),
)


def shard_params(params: Params, mesh: Mesh, table: dict[str, ParamSpec], rules: ShardingRules | None = None) -> Params:
  """Places parameters on the mesh."""
  return jax.device_put(params, param_shardings(mesh, table, rules))


def row_and_head_axes(rows: int, kv_heads: int) -> tuple[tuple[str, ...], str | None] | None:
  """(mesh axes that split `rows`, the mesh axis that splits KV heads or None) under the current mesh; None without one.

  The losses of the retrofit pass the size of the vocabulary as `kv_heads`, so it is split like them. If no mesh axis
  divides a size, each device computes all of it.
  """
  mesh = jax.sharding.get_abstract_mesh()
  if mesh.empty:
    return None
  kinds = dict(zip(mesh.axis_names, mesh.axis_types, strict=True))
  sizes = {name: size for name, size in mesh.shape.items() if size > 1 and kinds[name] == AxisType.Auto}
  if not sizes:
    return None
  heads = "tensor" if "tensor" in sizes and kv_heads % sizes["tensor"] == 0 else None
  split: tuple[str, ...] = ()
  for name in ("data", "tensor"):
    if name in sizes and name != heads and rows % sizes[name] == 0:
      split, rows = (*split, name), rows // sizes[name]
  return split, heads


def shard_map(fn: Callable, mesh: Mesh | None = None, *, in_specs: tuple, out_specs: Any) -> Callable:
  """`jax.shard_map` of `fn`, with a mesh or under one, for arguments of which some may have no elements.

  Each device makes those itself: jaxlib 0.11.2 ends with a segmentation fault while it compiles a program that hands
  them over beside others. Over which axes results vary is not checked, since kernels do not declare it.
  """
  over = lambda body, specs: jax.shard_map(body, mesh=mesh, in_specs=specs, out_specs=out_specs, check_vma=False)

  def call(*args: Any) -> Any:
    arrays, structure = jax.tree.flatten(args)
    if all(jnp.size(x) for x in arrays):
      return over(fn, in_specs)(*args)
    specs, devices = jax.tree.leaves(jax.tree.broadcast(in_specs, args)), mesh or jax.sharding.get_abstract_mesh()
    shapes = [NamedSharding(devices, spec).shard_shape(jnp.shape(x)) for x, spec in zip(arrays, specs, strict=True)]
    dtypes, given = [x.dtype for x in arrays], [jnp.size(x) > 0 for x in arrays]

    def body(*parts):
      rest = iter(parts)
      made = zip(given, shapes, dtypes, strict=True)
      return fn(*jax.tree.unflatten(structure, [next(rest) if has else jnp.zeros(*like) for has, *like in made]))

    kept = [(x, spec) for x, spec, has in zip(arrays, specs, given, strict=True) if has]
    return over(body, tuple(spec for _, spec in kept))(*(x for x, _ in kept))

  return call


def cache_shardings(mesh: Mesh, cache: Any, heads: int) -> Any:
  """A `NamedSharding` for every array of a cache of `heads` KV heads, split like attention's rows and heads.

  Arrays [L, B, K, ...] and [B] are split; a pool of pages, which any row may use, is replicated.
  """
  batch = cache.seen.shape[0]
  with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
    rows, split = row_and_head_axes(batch, heads) or ((), None)

  def leaf(path, x):
    pool = jax.tree_util.GetAttrKey("store") in path
    if x.shape[1:3] == (batch, heads) and not pool:
      return NamedSharding(mesh, PartitionSpec(None, rows, split))
    return NamedSharding(mesh, PartitionSpec(rows) if x.shape == (batch,) else PartitionSpec())

  return jax.tree_util.tree_map_with_path(leaf, cache)
