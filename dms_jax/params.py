"""The parameter table: one description of every tensor.

`param_table` gives initialisation, abstract shapes, shardings (`dms_jax.sharding`), conversion from and to Hugging Face
names, parameter counts and the parameters that a retrofit trains. Projections are stored outputs first ([out..., in]),
as in Hugging Face checkpoints, so conversion only reshapes. On a CPU, row-major dot products per output are also
faster.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np

from dms_jax import families
from dms_jax.config import DMSConfig, LoRAConfig, ModelConfig

Params = dict[str, Any]  # {"embed": [V, D], "layers": {name: [L, ...]}, "final_norm": [D], ("lm_head": [V, D])}
Group = Literal["base", "gate", "lora"]
GROUPS: tuple[Group, ...] = get_args(Group)


@dataclasses.dataclass(frozen=True)
class ParamSpec:
  """One tensor: shape (with a leading L if `layered`), logical axes, initialiser, group and Hugging Face name.

  The last `num_inputs` axes are contracted with activations. The others are outputs; vectors have only outputs.
  `hf_name` holds `{layer}` for layered tensors, and `{expert}` for those of one expert; None means that Hugging Face
  checkpoints do not contain the tensor (low-rank updates are merged on export). `hf_shape` is the shape there of one
  layer or expert, with outputs and inputs flattened. Parameters of one `hf_name` are parts of one tensor there, in the
  order of the table; `hf_layout` says how, as `Family.layout`. "experts" holds all experts of a layer, as [experts,
  inputs, outputs] or [experts, outputs], in which the outputs of the parts alternate.
  """

  shape: tuple[int, ...]
  axes: tuple[str, ...]
  num_inputs: int
  init: Literal["normal", "ones", "zeros", "fan_in"]
  group: Group
  hf_name: str | None
  hf_shape: tuple[int, ...]
  hf_layout: Literal["rows", "columns", "heads", "experts"] = "rows"

  @property
  def layered(self) -> bool:
    return self.axes[0] == "layers"

  @property
  def of_experts(self) -> bool:
    """Whether each expert of a layer has numbers of its own; the router, whose axis is "choices", is one for all."""
    return "experts" in self.axes

  @property
  def by_expert(self) -> bool:
    """Whether each expert of a layer has a tensor of its own in Hugging Face checkpoints."""
    return self.hf_name is not None and "{expert}" in self.hf_name


@dataclasses.dataclass(frozen=True)
class StoredParam:
  """A parameter on disk in the place of an array: `stored[layer]`, or `np.asarray(stored)`, reads it.

  `read(layer)` returns a numpy array of one layer, without L; of the whole parameter where layer is None.
  """

  shape: tuple[int, ...]
  dtype: Any
  read: Callable[[int | None], Any]

  def __getitem__(self, layer: int) -> Any:
    return self.read(layer)

  def __array__(self, dtype=None, copy=None) -> np.ndarray:
    return np.asarray(self.read(None), dtype)

  def astype(self, dtype) -> StoredParam:
    """The same values in `dtype`, cast as they are read."""
    return StoredParam(self.shape, jnp.dtype(dtype), lambda layer: self.read(layer).astype(dtype))


def param_table(
  config: ModelConfig, dms: DMSConfig | None = None, lora: LoRAConfig | None = None
) -> dict[str, ParamSpec]:
  """Every tensor of a model, by path ("embed", "layers/q_proj", ...), in a fixed order."""
  c = config
  if dms is not None:
    _check_gates(c, dms)
  sizes = {
    "vocab": c.vocab_size, "embed": c.d_model, "ff": c.d_ff, "heads": c.num_heads, "kv_heads": c.num_kv_heads,
    "head_dim": c.head_dim, "rank": lora.rank if lora else 0, "gate_ff": dms.hidden if dms else 0,
    "gate_heads": 2 * c.num_kv_heads, "positions": c.max_position_embeddings,
    "experts": c.num_experts, "choices": c.num_experts,
  }  # fmt: skip
  table: dict[str, ParamSpec] = {}
  family = families.get(c.family)
  names = family.names

  def add(path, outputs, inputs, init, hf_name, group: Group = "base"):
    axes, layered = (*outputs, *inputs), path.startswith("layers/")
    hf_name = names.get(path, hf_name)
    experts = "experts" in outputs
    stacked = experts and hf_name is not None and "{expert}" not in hf_name
    sides = [math.prod(sizes[a] for a in side if a != "experts") for side in (outputs, inputs) if side]
    table[path] = ParamSpec(
      shape=(c.num_layers,) * layered + tuple(sizes[a] for a in axes),
      axes=("layers",) * layered + axes,
      num_inputs=len(inputs), init=init, group=group, hf_name=hf_name,
      hf_shape=(c.num_experts,) * stacked + tuple(sides),
      hf_layout="experts" if stacked else family.layout if layered and group == "base" else "rows",
    )  # fmt: skip

  ones = "zeros" if c.norm_plus_one else "ones"
  layer, attn = "model.layers.{layer}.", "model.layers.{layer}.self_attn."
  vector, no_inputs = ("embed",), ()
  norm_biases = (
    (lambda path: add(f"{path}_bias", vector, no_inputs, "zeros", None)) if c.layer_norm else lambda path: None
  )
  add("embed", ("vocab",), ("embed",), "normal", "model.embed_tokens.weight")
  if c.learned_positions:
    add("positions", ("positions",), ("embed",), "normal", None)
  if c.norms != "after":
    add("layers/attn_norm", vector, no_inputs, ones, layer + "input_layernorm.weight")
  for name, heads in (("q", "heads"), ("k", "kv_heads"), ("v", "kv_heads")):
    add(f"layers/{name}_proj", (heads, "head_dim"), ("embed",), "normal", f"{attn}{name}_proj.weight")
    if c.qkv_bias:
      add(f"layers/{name}_bias", (heads, "head_dim"), no_inputs, "zeros", f"{attn}{name}_proj.bias")
    if c.qk_norm and name != "v":
      normed = ("head_dim",) if c.qk_norm_over == "head" else (heads, "head_dim")
      add(f"layers/{name}_norm", normed, no_inputs, ones, f"{attn}{name}_norm.weight")
  add("layers/o_proj", ("embed",), ("heads", "head_dim"), "normal", attn + "o_proj.weight")
  if c.proj_bias:
    add("layers/o_bias", vector, no_inputs, "zeros", None)
  if c.attention_sinks:
    add("layers/sinks", ("heads",), no_inputs, "normal", attn + "sinks")
  if c.norms != "before":
    add("layers/attn_post_norm", vector, no_inputs, ones, layer + "post_attention_layernorm.weight")
  if c.norms != "after":
    before_mlp = "pre_feedforward_layernorm" if c.norms == "both" else "post_attention_layernorm"
    add("layers/mlp_norm", vector, no_inputs, ones, f"{layer}{before_mlp}.weight")
  mlp, each = (layer + "mlp.experts.{expert}.", ("experts",)) if c.num_experts else (layer + "mlp.", ())
  if c.num_experts:
    add("layers/router", ("choices",), ("embed",), "normal", layer + "mlp.gate.weight")
  if c.gated_mlp:
    add("layers/gate_proj", (*each, "ff"), ("embed",), "normal", mlp + "gate_proj.weight")
  add("layers/up_proj", (*each, "ff"), ("embed",), "normal", mlp + "up_proj.weight")
  add("layers/down_proj", (*each, "embed"), ("ff",), "normal", mlp + "down_proj.weight")
  if c.proj_bias:
    if c.num_experts:
      add("layers/router_bias", ("choices",), no_inputs, "zeros", None)
    if c.gated_mlp:
      add("layers/gate_bias", (*each, "ff"), no_inputs, "zeros", None)
    add("layers/up_bias", (*each, "ff"), no_inputs, "zeros", None)
    add("layers/down_bias", (*each, "embed"), no_inputs, "zeros", None)
  for path in [path for path in table if path in ("layers/attn_norm", "layers/mlp_norm")]:
    norm_biases(path)
  if c.norms != "before":
    add("layers/mlp_post_norm", vector, no_inputs, ones, layer + "post_feedforward_layernorm.weight")
  add("final_norm", vector, no_inputs, ones, "model.norm.weight")
  norm_biases("final_norm")
  if not c.tie_embeddings:
    add("lm_head", ("vocab",), ("embed",), "normal", "lm_head.weight")
  if dms is not None and dms.gate != "neuron":  # names as in NVIDIA's Model-Optimizer student, which has adapters
    outputs = ("gate_heads",) if dms.objective == "dmc" else ("kv_heads",)
    add("layers/dms_norm", vector, no_inputs, "ones", attn + "dms_proj_alpha_norm.weight", "gate")
    if dms.gate == "mlp":
      add("layers/dms_fc", ("gate_ff",), ("embed",), "normal", attn + "dms_proj_alpha_fc.weight", "gate")
      add("layers/dms_fc_bias", ("gate_ff",), no_inputs, "zeros", attn + "dms_proj_alpha_fc.bias", "gate")
      add("layers/dms_proj", outputs, ("gate_ff",), "normal", attn + "dms_proj_alpha.weight", "gate")
    else:
      add("layers/dms_proj", outputs, ("embed",), "zeros", attn + "dms_proj_alpha.weight", "gate")
    if dms.gate != "adapter":
      add("layers/dms_bias", outputs, no_inputs, "zeros", attn + "dms_proj_alpha.bias", "gate")
  if lora is not None:
    lora.check_gates(dms)
  if lora is not None and lora.rank:
    for target in lora.targets:
      base = table.get(f"layers/{target}")
      if base is None or not base.num_inputs:
        raise ValueError(f"lora.targets: {target!r} is not a projection of this model")
      if base.of_experts or "choices" in base.axes:
        raise ValueError(f"lora.targets: {target!r} is of experts and their router, which have no low-rank updates")
      axes = base.axes[1:]
      outputs, inputs = axes[: -base.num_inputs], axes[-base.num_inputs :]
      add(f"layers/{target}_lora_a", ("rank",), inputs, "fan_in", None, "lora")
      add(f"layers/{target}_lora_b", outputs, ("rank",), "zeros", None, "lora")
  return table


def _check_gates(config: ModelConfig, dms: DMSConfig) -> None:
  """A ValueError for gates that a model with sliding layers cannot have; theirs are there, and unused."""
  if (slides := config.ring_window) is None:
    return
  about = f"a {config.family} model with layers that slide over {slides + 1} tokens"
  if dms.objective != "dms" or dms.gate == "neuron":  # the neuron's channel would be cleared in sliding layers too
    raise ValueError(
      f"retrofit.objective={dms.objective}, dms.gate={dms.gate!r}: {about} takes DMS's other gates alone"
    )
  if dms.elastic:  # the thresholds of a batch would count the unused gates of sliding layers
    raise ValueError(f"dms.elastic={','.join(f'{cr:g}' for cr in dms.elastic)}: {about} takes gates for one ratio")
  if dms.window > slides:
    raise ValueError(f"dms.window={dms.window}: {about} takes dms.window={slides} at most")


def unflatten(flat: dict[str, Any]) -> Params:
  """{"layers/q_proj": x} -> {"layers": {"q_proj": x}}."""
  tree: Params = {}
  for path, value in flat.items():
    *parents, name = path.split("/")
    node = tree
    for parent in parents:
      node = node.setdefault(parent, {})
    node[name] = value
  return tree


def flatten(params: Params, prefix: str = "") -> dict[str, Any]:
  """The inverse of `unflatten`."""
  flat = {}
  for name, value in params.items():
    flat.update(flatten(value, f"{prefix}{name}/") if isinstance(value, dict) else {prefix + name: value})
  return flat


def map_table(fn: Callable[[str, ParamSpec], Any], table: dict[str, ParamSpec]) -> Params:
  """A parameter tree with `fn(path, spec)` at each leaf."""
  return unflatten({path: fn(path, spec) for path, spec in table.items()})


def abstract_params(table: dict[str, ParamSpec], dtype=jnp.float32) -> Params:
  """The parameter tree as `jax.ShapeDtypeStruct`s, to load, compile and count without allocation."""
  return map_table(lambda _, spec: jax.ShapeDtypeStruct(spec.shape, dtype), table)


def init_params(table: dict[str, ParamSpec], key: jax.Array, dtype=jnp.float32, stddev: float = 0.02) -> Params:
  """Random parameters. Each tensor's key depends only on its path, so adding a tensor changes no other."""

  def leaf(path: str, spec: ParamSpec):
    if spec.init == "ones":
      return jnp.ones(spec.shape, dtype)
    if spec.init == "zeros":
      return jnp.zeros(spec.shape, dtype)
    # A stable hash, because Python's own differs between processes.
    name_key = jax.random.fold_in(key, sum(ord(ch) * 31**i for i, ch in enumerate(path)) % (2**31))
    # fan_in is for the low-rank A, [L, R, in...]: its inputs follow R.
    scale = stddev if spec.init == "normal" else math.prod(spec.shape[2:]) ** -0.5
    return (scale * jax.random.normal(name_key, spec.shape, jnp.float32)).astype(dtype)

  return map_table(leaf, table)


def count_params(table: dict[str, ParamSpec], group: Group | None = None) -> int:
  """Number of parameters, in one group or in all."""
  return sum(math.prod(s.shape) for s in table.values() if group in (None, s.group))


def split_params(params: Params, predicate: Callable[[str], bool]) -> tuple[Params, Params]:
  """(leaves whose path satisfies `predicate`, the others)."""
  flat = flatten(params)
  chosen = {p: v for p, v in flat.items() if predicate(p)}
  return unflatten(chosen), unflatten({p: v for p, v in flat.items() if p not in chosen})


def join_params(*trees: Params) -> Params:
  """The union of parameter trees; the last tree that holds a path wins."""
  flat: dict[str, Any] = {}
  for tree in trees:
    flat.update(flatten(tree))
  return unflatten(flat)


def merge_lora(params: Params, lora: LoRAConfig | None) -> Params:
  """Parameters with low-rank updates folded into their projections, in float32, rounded once.

  Layers stay stacked or a list. A projection on disk stays there: each layer's update is folded in when it is read.
  """
  layers = params["layers"]
  if isinstance(layers, list):
    alone = lambda w, a, b: _folded(w[None], a[None], b[None], lora.scale)[0]
    return {**params, "layers": [_each_folded(layer, alone) for layer in layers]}

  def fold(w, a, b):
    part = lambda w, layers=...: _folded(w, a[layers], b[layers], lora.scale)
    return _folded_when_read(w, part) if isinstance(w, StoredParam) else part(w)

  return unflatten(_each_folded(flatten(params), fold))


def _each_folded(flat: dict[str, Any], fold: Callable) -> dict[str, Any]:
  """`flat` with `fold(w, a, b)` in place of each projection that has an update."""
  flat = dict(flat)
  for path in [p for p in flat if p.endswith("_lora_a")]:
    target = path[: -len("_lora_a")]
    flat[target] = fold(flat[target], flat.pop(path), flat.pop(f"{target}_lora_b"))
  return flat


def _folded_when_read(stored: StoredParam, fold: Callable) -> StoredParam:
  def read(layer: int | None):
    value = stored.read(layer)
    return np.asarray(fold(value) if layer is None else fold(value[None], slice(layer, layer + 1))[0])

  return StoredParam(stored.shape, stored.dtype, read)


@jax.jit
def _folded(w, a, b, scale):
  """Projections w [L, ...] with the update scale * b a of each layer; b [L, outputs..., R], a [L, R, inputs...]."""
  update = jnp.einsum(
    "lor,lri->loi",
    b.reshape(b.shape[0], -1, b.shape[-1]).astype(jnp.float32),
    a.reshape(a.shape[0], a.shape[1], -1).astype(jnp.float32),
    precision=jax.lax.Precision.HIGHEST,
  )
  return (w.astype(jnp.float32) + scale * update.reshape(w.shape)).astype(w.dtype)
