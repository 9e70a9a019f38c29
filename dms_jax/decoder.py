"""The decoder: its parameters (`Model`), and its layers with whatever attention a pass gives them.

A pass is `model.forward`, which runs a whole text, or `model.cached_forward`, which runs on a cache. Here is what both
share: norms, projections, RoPE, gate logits and feed-forward of a layer, the embedding before the layers and the output
head after them. No mask, cache or policy is known here; they come as an `Attend`.

Layers are scanned where their parameters are stacked [L, ...] and looped over where they are a list
(`Model.unstacked`). `Execution` makes the choices that depend on the device, once a step.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax import lax
from jax.sharding import Mesh
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Int

from dms_jax.attention import layer_softmax
from dms_jax.collectives import looked_up, multiplied, summed
from dms_jax.config import DMSConfig, LoRAConfig, ModelConfig
from dms_jax.execution import Execution
from dms_jax.experts import expert_mlp
from dms_jax.gates import clear_neuron, gate_logits
from dms_jax.layers import (
  apply_rope,
  biased,
  join_updates,
  joint_updates,
  layer_rope,
  linear,
  look_up,
  mlp,
  norm,
  norm_heads,
  project,
  rope_tables,
  scaled,
)
from dms_jax.params import Params, merge_lora, param_table
from dms_jax.sharding import constrain_rows, gather_layer
from pallas_kernels import window_bias
from pallas_kernels.common.softmax import soft_capped

# The activations of each layer that the backward pass keeps: projections and attention. Norms, RoPE and SwiGLU are
# cheaper to recompute than to write and read; the down projection is part of the next layer's input, kept anyway.
SAVED_ACTIVATIONS = (*(f"{name}_proj" for name in ("q", "k", "v", "o", "gate", "up")), window_bias.SAVED)
JOINED = ("q_proj", "k_proj", "v_proj"), "qkv"  # projections of one input, and the name of their joint update


@struct.dataclass
class Model:
  """Parameters and the configs that give them meaning.

  Attributes:
    params: as `params.param_table` names them; `params["layers"]` stacked [L, ...] or a list of L layers.
    dms: settings of the eviction gates; None for a model without gates.
    lora: the low-rank updates in `params` that are not merged into the weights; None for none.
    tokenizer: needed for prompts that are strings; compared by identity. It changes no computation.
    mesh: the devices that decode together, each with its shard of `params` (`spmd.place`); None for one device.
    holds_updates: low-rank updates were merged into the weights, which are no longer those of its base.
  """

  params: Params
  config: ModelConfig = struct.field(pytree_node=False)
  dms: DMSConfig | None = struct.field(pytree_node=False, default=None)
  lora: LoRAConfig | None = struct.field(pytree_node=False, default=None)
  tokenizer: Any = struct.field(pytree_node=False, default=None)
  mesh: Mesh | None = struct.field(pytree_node=False, default=None)
  holds_updates: bool = struct.field(pytree_node=False, default=False)

  @property
  def dtype(self) -> jnp.dtype:
    return self.params["embed"].dtype

  def lag(self, window: int | None = None) -> int:
    """The distance from token t back to the token that it decides about, under `window`; 1, unused, without gates."""
    return self.dms.lag(window) if self.dms is not None else 1

  def merged(self) -> Model:
    """The same model with its low-rank updates merged into the weights and its layers stacked.

    Raises:
      ValueError: they depend on each row's CR (`LoRAConfig.by_cr`); `at` gives the model of one CR.
    """
    if self.lora is not None and self.lora.by_cr:
      raise ValueError("lora.by_cr: these low-rank updates depend on each row's CR and cannot be merged; use Model.at")
    return self.stacked()._folded()

  def at(self, cr: int | float, merge: bool = True) -> Model:
    """The same model for one CR of its range, which decodes faster where updates depend on it (`LoRAConfig.by_cr`).

    The threshold joins the gates' offset, so that `DMS()` reads them at this CR, and the updates have one strength.

    Args:
      merge: low-rank updates are merged into copies of their weights; all other weights are shared with this model.
        The result is saved whole, its gates alone are refused. False keeps the updates apart, to save a retrofit.

    Raises:
      ValueError: its gates are not for a range of ratios with this one in it.
    """
    d, lora = self.dms, self.lora
    if d is None or d.levels is None or not d.elastic[0] <= cr <= d.elastic[1]:
      kind = "for ratios from {:g} to {:g}".format(*d.elastic) if d is not None and d.elastic else "not for a range"
      raise ValueError(f"cr={cr:g}: these gates are {kind}")
    fixed = dataclasses.replace(d, elastic=(), elastic_thresholds=(), offset=d.offset + float(d.levels.threshold(cr)))
    if lora is not None and lora.by_cr:
      lora = dataclasses.replace(lora, scale=lora.scale * float(d.levels.strength(cr)), by_cr=False)
    model = self.replace(dms=fixed, lora=lora)
    return model._folded() if merge else model

  def _folded(self) -> Model:
    """The same model with its low-rank updates merged, its layers as they are."""
    if self.lora is None:
      return self
    holds = self.holds_updates or self.lora.rank > 0
    return self.replace(params=merge_lora(self.params, self.lora), lora=None, holds_updates=holds)

  def stacked(self) -> Model:
    """The same model with its layers' parameters stacked [L, ...]; the inverse of `unstacked`."""
    layers = self.params["layers"]
    if not isinstance(layers, list):
      return self
    return self.replace(params={**self.params, "layers": {n: jnp.stack([p[n] for p in layers]) for n in layers[0]}})

  def unstacked(self) -> Model:
    """The same model with a list of layers (see `Execution.layers`).

    On one CPU the layers share the memory of the stack; elsewhere their weights are copied.
    """
    layers = self.params["layers"]
    if isinstance(layers, list):
      return self
    by_name = {name: _each_layer(w, self.config.num_layers) for name, w in layers.items()}
    split = [{name: ws[i] for name, ws in by_name.items()} for i in range(self.config.num_layers)]
    return self.replace(params={**self.params, "layers": split})


def _each_layer(w: Array, count: int) -> list[Array]:
  """The `count` layers of a weight [L, ...]."""
  held = isinstance(w, jax.Array) and not isinstance(w, jax.core.Tracer)
  alone = held and isinstance(w.sharding, jax.sharding.SingleDeviceSharding)  # not on a mesh, be it of one device
  if alone and [device.platform for device in w.devices()] == ["cpu"]:
    # JAX takes an aligned array of numpy's as it is, and donates no memory that numpy sees.
    return jax.device_put(list(np.asarray(w)), w.sharding if w.committed else None)
  return [w[i] for i in range(count)]


def update_scale(model: Model, cr: ArrayLike) -> float | Float[Array, "*rows"]:
  """The factor of the model's low-rank updates in rows that are read at `cr`; 0 for a model without."""
  if model.lora is None or not model.lora.by_cr:
    return 0.0 if model.lora is None else model.lora.scale
  assert model.dms is not None and model.dms.levels is not None  # `params.param_table` refuses others
  return model.lora.scale * model.dms.levels.strength(cr)


def for_steps(model: Model, rows: int) -> Model:
  """The model for many decode steps of `rows` rows, made once before them: see `Execution.joint_updates`."""
  if model.lora is None or rows > Execution.choose().joint_updates:
    return model
  layers, join = model.params["layers"], lambda layer: join_updates(layer, *JOINED)
  layers = [join(layer) for layer in layers] if isinstance(layers, list) else jax.vmap(join)(layers)
  return model.replace(params={**model.params, "layers": layers})


# attend(carry, layer, xs, q, k, v, gates) -> (attended [B, T, N, H], carry, ys), of one layer; see `_attention_inputs`
Attend = Callable[..., tuple[Array, Any, Any]]


def _attention_inputs(
  model: Model, layer: dict, x: Array, rope: tuple[Array, Array], how: Execution, scale: float | Array,
  neuron_kept: Array | None = None,
) -> tuple[Array, Array, Array, Array | None]:  # fmt: skip
  """Queries, keys and values after RoPE, [B, T, heads, H], and gate logits.

  The logits are float32 [B, K, T], None without gates. Under `late_gates`, x [B, T, D] takes their place:
  `step_gate_logits` computes the logits of all layers from it.
  """
  c, dms = model.config, model.dms
  neuron = dms is not None and dms.gate == "neuron"
  h = normed(c, layer, "attn_norm", x)
  updates = joint_updates(h, layer, *JOINED, scale)
  of = lambda name, dtype=None: project(h, layer, name, lora_scale=scale, out_dtype=dtype, update=updates.get(name))
  q = of("q_proj", jnp.float32 if neuron else None)  # the neuron gate reads its channel of q before rounding
  k, v = of("k_proj"), of("v_proj")
  if c.qkv_bias:
    q, k, v = (y + layer[name].astype(y.dtype) for y, name in ((q, "q_bias"), (k, "k_bias"), (v, "v_bias")))
  if c.qk_norm:
    q, k = norm_heads(c, q, k, layer)
  gates = None
  if dms is not None:
    with jax.named_scope("gates"):
      gates = x if how.late_gates else gate_logits(c, dms, layer, x, q, fused=how.fused_gate)
  q = q.astype(x.dtype)
  if neuron:
    q = clear_neuron(c, q, neuron_kept)
  q, k = apply_rope(q, rope), apply_rope(k, rope)
  if c.attention_scale is not None:  # attention itself multiplies scores by H ** -0.5
    q = scaled(q, c.attention_scale * c.head_dim**0.5)
  return (clear_neuron(c, q, neuron_kept) if neuron else q), k, v, gates


def normed(config: ModelConfig, layer: dict, name: str, x: Array) -> Array:
  """x after the layer's norm `name`; x itself in a model without that norm."""
  return norm(config, x, layer[name], layer.get(f"{name}_bias")) if name in layer else x


def run_layer(
  model: Model, layer: dict, index: Array | int, xs: Any, state: tuple[Array, Any], rope: tuple[Array, Array],
  attend: Attend, how: Execution, scale: float | Array, neuron_kept: Array | None = None,
) -> tuple[tuple[Array, Any], Any]:  # fmt: skip
  """One layer, from `state` (x, carry) to ((x, carry), ys); `scale`: of the low-rank updates (`update_scale`)."""
  x, carry = state
  c = model.config
  rope = layer_rope(c, rope, index)
  with jax.named_scope("attention"):
    q, k, v, gates = _attention_inputs(model, layer, x, rope, how, scale, neuron_kept)
    with layer_softmax(c.attention_softcap, layer.get("sinks")):
      attended, carry, ys = attend(carry, index, xs, q, k, v, gates)
    added = biased(summed(project(attended, layer, "o_proj", 2, lora_scale=scale)), layer, "o_bias")
    read, x = x, x + scaled(normed(c, layer, "attn_post_norm", added), c.residual_scale)
  with jax.named_scope("mlp"):
    h = normed(c, layer, "mlp_norm", read if c.parallel else x)
    added = expert_mlp(c, layer, h) if c.num_experts else mlp(layer, h, scale, c.activation)
    x = x + scaled(normed(c, layer, "mlp_post_norm", added), c.residual_scale)
  return (constrain_rows(x), carry), ys


def run_layers(
  model: Model,
  x: Array,
  positions: Array,
  attend: Attend,
  how: Execution,
  scale: float | Array,
  carry: Any = None,
  xs: Any = None,
  *,
  remat: bool | None = None,
  neuron_kept: Array | None = None,
  gather: bool = False,
) -> tuple[Array, Any, Any]:
  """Runs all layers; returns (x, carry, ys) with ys stacked [L, ...].

  Args:
    scale: of the low-rank updates, see `update_scale`.
    xs: `attend`'s inputs by layer, leaves [L, ...].
    remat: activations of a layer that a backward pass keeps: all for None, `SAVED_ACTIVATIONS` for False, none for
      True.
    gather: on a mesh, each layer's weights are gathered over "data" (`sharding.gather_layer`).
  """
  table = param_table(model.config, model.dms, model.lora) if gather else {}
  rope = rope_tables(model.config, positions)

  def body(state, inputs):
    index, layer, xs_l = inputs
    layer = gather_layer(layer, table) if gather else layer
    return run_layer(model, layer, index, xs_l, state, rope, attend, how, scale, neuron_kept)

  x, layers = constrain_rows(x), model.params["layers"]
  if isinstance(layers, list):
    state, outs = (x, carry), []
    for index, layer in enumerate(layers):
      state, ys = body(state, (index, layer, jax.tree.map(lambda leaf, index=index: leaf[index], xs)))
      outs.append(ys)
    return *state, jax.tree.map(lambda *leaves: jnp.stack(leaves), *outs)
  if remat is not None:
    policy = None if remat else jax.checkpoint_policies.save_only_these_names(*SAVED_ACTIVATIONS)
    body = jax.checkpoint(body, policy=policy, prevent_cse=False)  # not needed inside a scan
  (x, carry), ys = lax.scan(body, (x, carry), (jnp.arange(model.config.num_layers), layers, xs))
  return x, carry, ys


@jax.named_scope("embed")
def embed(model: Model, tokens: Int[Array, "B T"], positions: Int[Array, "B T"] | None = None) -> Float[Array, "B T D"]:
  """Token embeddings, in the model's dtype; with those of the positions, if the model has learned such."""
  table = model.params["embed"]
  if table.dtype == jnp.bfloat16 and Execution.choose().embed_barrier:
    table, tokens = lax.optimization_barrier((table, tokens))
  x = scaled(looked_up(table, tokens, model.config.vocab_size, look_up), model.config.embed_scale)
  return x + jnp.take(model.params["positions"], positions, axis=0, mode="clip") if "positions" in model.params else x


@jax.named_scope("unembed")
def unembed(model: Model, x: Float[Array, "*rows D"]) -> Float[Array, "*rows V"]:
  """Final norm and output head: logits, float32."""
  product = partial(linear, out_dtype=jnp.float32)
  logits = multiplied(head_inputs(model, x), output_head(model), model.config.vocab_size, product)
  return soft_capped(logits, model.config.logit_softcap)


def head_inputs(model: Model, x: Float[Array, "*rows D"]) -> Float[Array, "*rows D"]:
  """The states, after the final norm, whose products with the output head are the logits."""
  x = normed(model.config, model.params, "final_norm", x)
  return scaled(x, 1 / model.config.logit_divisor)


def output_head(model: Model) -> Float[Array, "V D"]:
  """The output projection, which is the embedding where they are tied."""
  return model.params["embed" if model.config.tie_embeddings else "lm_head"]
