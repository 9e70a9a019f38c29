"""A model on a mesh: every device runs the program of one, on its own rows and heads.

    mesh = dms_jax.make_mesh(data=2, tensor=4)
    model, tokenizer = dms_jax.load(path, mesh=mesh)
    out = dms_jax.generate(model, prompts)  # `prompts` of a multiple of 2 rows

The mesh axis "data" splits rows; every device along it holds the same weights. "tensor" splits KV heads with their
queries, feed-forward (whole experts, where it divides their number) and vocabulary (`sharding.DECODING`). Where it does
not divide the KV heads, it splits rows as "data" does: a device then holds the weights of attention whole, and caches
of its own rows alone. Inside `jax.shard_map` a device sees a smaller model and an ordinary cache, whose pool and pages
are its own; `dms_jax.collectives` is all that it learns from others.

On several hosts each process calls `jax.distributed.initialize` first, makes the mesh of all devices, and then makes
the same calls with the same prompts, keys and requests (`dms_jax.processes`); all get the same results.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Callable, Iterable
from typing import Any

import jax
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from dms_jax.cache.base import Common
from dms_jax.cache.sharded import DEVICE, ShardedCache, policy_specs, rows_and_scalars
from dms_jax.collectives import among, summed
from dms_jax.config import ModelConfig
from dms_jax.decoder import Model
from dms_jax.json_files import shown
from dms_jax.metrics import Counts
from dms_jax.params import Params, param_table
from dms_jax.policies import Policy
from dms_jax.processes import put, spans_processes
from dms_jax.sharding import Split, decoding, partition_spec, shard_map

ROWS, STEPS, HEADS = P("data"), P(None, "data"), P(None, "data", "tensor")  # [B], [steps, B], [L, B, K]
CACHE = DEVICE
COUNTS = Counts(HEADS, HEADS, STEPS, P(None, None, "data", "tensor"), STEPS)


def check(model: Model, mesh: Mesh, policy: Policy | None = None) -> None:
  """Checks that a mesh can split a model, and its heads under `policy`.

  Raises:
    ValueError: it cannot.
  """
  check_axes(mesh)
  if spans_processes(mesh) and mesh.size != (count := jax.device_count()):
    raise ValueError(f"a mesh of {mesh.size} of the {count} devices of several processes: it must be all, or of one")
  if (tensor := mesh.shape["tensor"]) == 1:
    return
  check_feed_forward(model.config, tensor)
  if Split.of(model.config, mesh).by_rows:
    return
  dms = model.dms
  if dms is not None and (dms.granularity == "layer" or dms.objective == "dmc"):
    what = "granularity=layer" if dms.granularity == "layer" else "objective=dmc"
    raise ValueError(f"mesh.tensor={tensor} cannot split the heads of gates of {what}: split rows by mesh.data")
  if policy is not None and policy.joins_heads:
    name = type(policy).__name__
    raise ValueError(f"mesh.tensor={tensor}: the KV heads of a layer decide together here ({name}): use mesh.data")


def check_axes(mesh: Mesh) -> None:
  """Checks that a mesh has the axes of `dms_jax.make_mesh`, in that order and of type Auto.

  Raises:
    ValueError: it has others, or is no mesh.
  """
  if not isinstance(mesh, Mesh):
    raise ValueError(f"mesh={shown(mesh)} is no mesh; `dms_jax.make_mesh(data=2, tensor=4)` makes one")
  if mesh.axis_names != ("data", "tensor"):
    raise ValueError(f"a mesh of axes {mesh.axis_names}, not ('data', 'tensor'); `dms_jax.make_mesh` makes one")
  if set(mesh.axis_types) != {AxisType.Auto}:  # as jax.make_mesh makes them
    raise ValueError("a mesh whose axes are not all of AxisType.Auto; `dms_jax.make_mesh` makes one")


def check_feed_forward(config: ModelConfig, tensor: int) -> None:
  """Checks that `tensor` devices can share the feed-forward of a layer.

  Raises:
    ValueError: they cannot.
  """
  whole_experts = config.num_experts and config.num_experts % tensor == 0
  if config.d_ff % tensor and not whole_experts:
    raise ValueError(
      f"mesh.tensor={tensor} does not divide the {config.d_ff} channels of the feed-forward of this model: split rows "
      "by mesh.data"
    )


def model_specs(model: Model, mesh: Mesh) -> Params:
  """The partition of every parameter, for layers that are stacked or a list; gates that are not used are whole."""
  table = param_table(model.config, model.dms, model.lora)
  rules = decoding(model.config, mesh)
  specs = {path: partition_spec(path, spec, mesh, rules) for path, spec in table.items()}
  layers, listed = model.params["layers"], isinstance(model.params["layers"], list)

  def of_layer(names: Iterable[str]) -> Params:
    parts = {name: specs.get(f"layers/{name}", P()) for name in names}
    return {name: P(*part[1:]) if listed else part for name, part in parts.items()}

  own = [of_layer(layer) for layer in layers] if listed else of_layer(layers)
  return {name: own if name == "layers" else specs.get(name, P()) for name in model.params}


def place(model: Model, mesh: Mesh | None) -> Model:
  """The model on the devices of a mesh, each with its shard; None: unchanged.

  Raises:
    ValueError: the mesh cannot split the model.
  """
  if mesh is None:
    return model
  check(model, mesh)
  shardings = jax.tree.map(lambda spec: NamedSharding(mesh, spec), model_specs(model, mesh))
  return model.replace(params=put(model.params, shardings), mesh=mesh)


def place_rows(model: Model, tree: Any) -> Any:
  """Arrays of rows [B, ...] on the devices of their rows, and scalars on all, for a model on a mesh."""
  specs = rows_and_scalars(tree, Split.of(model.config, model.mesh))
  return put(tree, jax.tree.map(lambda spec: NamedSharding(model.mesh, spec), specs))


def row_parts(model: Model) -> int:
  """Parts into which a model's devices split rows; 1 on one device."""
  return 1 if model.mesh is None else Split.of(model.config, model.mesh).row_parts


def rounded_rows(model: Model, rows: int) -> int:
  """The least number of rows from `rows` on that a model's devices split evenly."""
  parts = row_parts(model)
  return -(-rows // parts) * parts


def _own_model(model: Model) -> Model:
  """The model that one device runs."""
  config, parts = model.config, Split.of(model.config, model.mesh).head_parts
  heads = dict(num_heads=config.num_heads // parts, num_kv_heads=config.num_kv_heads // parts)
  return model.replace(config=dataclasses.replace(config, **heads), mesh=None)


def _own(arg: Any) -> Any:
  return arg.local() if isinstance(arg, ShardedCache) else _own_model(arg) if isinstance(arg, Model) else arg


def _result(out: Any, split: Split) -> Any:
  """One result of a device: a cache as its shard, counts summed over all heads."""
  if isinstance(out, Counts):
    return out.replace(held=summed(out.held), step_reads=None if out.step_reads is None else summed(out.step_reads))
  return ShardedCache.of_device(out, split) if isinstance(out, Common) else out


def on_mesh(*out: Any, whole: tuple[str, ...] = ()) -> Callable[[Callable], Callable]:
  """A decorator of compiled functions whose first argument is the model: on a mesh each device runs them.

  Args:
    out: the partition of each result, where "tensor" splits heads.
    whole: names of arguments that are not split by rows. Keyword arguments are static.
  """

  def decorate(fn: Callable) -> Callable:
    kinds = inspect.signature(fn).parameters.values()
    names = [kind.name for kind in kinds if kind.kind is kind.POSITIONAL_OR_KEYWORD]

    def specs_of(name: str, arg: Any, split: Split) -> Any:
      if isinstance(arg, ShardedCache):
        return DEVICE
      if isinstance(arg, Model):
        return arg.replace(params=model_specs(arg, arg.mesh))
      if isinstance(arg, Policy):
        return policy_specs(arg, split)
      return P() if name in whole else rows_and_scalars(arg, split)

    @functools.wraps(fn)
    def call(model: Model, *args: Any, **static: Any) -> Any:
      if model.mesh is None:
        return fn(model, *args, **static)
      split = Split.of(model.config, model.mesh)

      def body(*args):
        with among(split):
          return tuple(_result(x, split) for x in fn(*map(_own, args), **static))

      args = (model, *args)
      specs = tuple(specs_of(name, arg, split) for name, arg in zip(names, args, strict=True))
      return shard_map(body, model.mesh, in_specs=specs, out_specs=jax.tree.map(split.spec, out))(*args)

    return call

  return decorate
