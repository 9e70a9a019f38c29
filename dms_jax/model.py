"""The decoder: one layer, run over a whole text (`forward`) or on a cache (`cached_forward`).

Pure functions over a frozen `Model`. Layers are scanned where their parameters are stacked [L, ...] and looped over
where they are a list (`Model.unstacked`). `Execution` makes the choices that depend on the device, once a step.
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
from jaxtyping import Array, Bool, Float, Int

from dms_jax import masks, policies
from dms_jax.attention import layer_softmax, window_bias_attention
from dms_jax.cache import Cache
from dms_jax.cache.base import Plan, Usage
from dms_jax.cache.sliding import Sliding
from dms_jax.collectives import looked_up, multiplied, on_any, summed
from dms_jax.config import DMSConfig, LoRAConfig, ModelConfig
from dms_jax.execution import Execution
from dms_jax.experts import expert_mlp
from dms_jax.gates import clear_neuron, gate_logits, step_gate_logits
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
from dms_jax.policies import Policy, Vanilla
from dms_jax.policies.base import check_kind, per_row
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


def _layer(
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


def _run_layers(
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
    return _layer(model, layer, index, xs_l, state, rope, attend, how, scale, neuron_kept)

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


@struct.dataclass
class Eviction:
  """How gates act in `forward`: by hard decisions, or by the soft training mask (arXiv 2506.05345, figure 2b).

  Attributes:
    threshold: a token is evicted where its logit is above; with `noise` it is taken off the logit. One number, or one a
      row [B].
    noise: float32 [L, B, K, T], added to the logits, token by token. With noise the mask is soft, without it hard.
    tau: temperature of the soft mask.
    window: W in tokens; None takes the model's.
  """

  threshold: float | Float[Array, "*rows"] = 0.0
  noise: Float[Array, "L B K T"] | None = None
  tau: float = 0.1
  window: int | None = struct.field(pytree_node=False, default=None)


def forward(
  model: Model,
  tokens: Int[Array, "B T"],
  *,
  positions: Int[Array, "B T"] | None = None,
  segment_ids: Int[Array, "B T"] | None = None,
  eviction: Eviction | None = None,
  cr: float | Float[Array, "*rows"] | None = None,
  remat: bool = False,
  neuron_kept: Float[Array, ""] | None = None,
  attention: Callable[..., tuple[Array, Any]] | None = None,
  attention_inputs: Any = None,
) -> tuple[Float[Array, "B T D"], Any]:
  """Runs whole texts without a cache, for training and evaluation; it is the reference of every cache.

  Args:
    positions: RoPE positions; by default they count from 0 in each segment.
    segment_ids: documents that never see each other, in contiguous runs; padding is a segment of its own.
    eviction: None keeps every token visible. The neuron gate's channel is cleared either way.
    cr: that of each row, for low-rank updates which depend on it (`LoRAConfig.by_cr`); None: 1 without eviction, else
      that of its threshold.
    remat: the backward pass recomputes whole layers; otherwise it keeps `SAVED_ACTIVATIONS`.
    neuron_kept: factor in 0 .. 1 on the neuron gate's channel while a retrofit fades it out; None means 0.
    attention: replaces attention and gates in each layer: `attention(layer, x, q, k, v) -> (attended, z)`, from the
      layer's parameters, the residual stream [B, T, D], and queries, keys and values after RoPE. Needs stacked layers.
    attention_inputs: a further argument of `attention`, by layer [L, ...]; None gives it none.

  Returns:
    (hidden, z). `hidden` are the states before the final norm, in the model's dtype (see `unembed`). `z` [L, B, K, T],
    float32, are the gate logits, or (logits - threshold + noise) / tau with noise, indexed by the token that computed
    them; None without gates; under `attention` what it returned, stacked by layer.

  Raises:
    ValueError: `eviction` for a model without gates, or with gates of another objective than DMS's.
  """
  if eviction is not None and model.dms is None:
    raise ValueError("this model has no eviction gates; load a retrofit, or pass eviction=None")
  if eviction is not None and model.dms.objective != "dms":
    raise ValueError(f"gates trained with retrofit.objective={model.dms.objective} evict by a policy and a cache alone")
  if positions is None:
    positions = segment_positions(segment_ids) if segment_ids is not None else jnp.arange(tokens.shape[1])[None]
    positions = jnp.broadcast_to(positions, tokens.shape)
  dms = model.dms
  noise = None if eviction is None else eviction.noise
  if noise is not None and dms.granularity == "layer":
    noise = jnp.broadcast_to(noise[:, :, :1], noise.shape)

  threshold, slides = 0.0 if eviction is None else per_row(eviction.threshold, 2), model.config.ring_window
  window = 0 if eviction is None else dms.window if eviction.window is None else eviction.window
  if slides is not None and window > slides:
    raise ValueError(
      f"window={window} of the eviction or of dms.window: with sliding layers it must be at most their window, {slides}"
    )

  def attend(carry, index, noise_l, q, k, v, logits):
    bias, z = None, logits
    if eviction is not None:
      bias, z = evicting(noise_l, logits)
    out = attention_by_kind(model.config, index, q, k, v, bias, window, segment_ids)
    return out, carry, z

  def evicting(noise_l, logits):
    if noise_l is not None:
      z = (logits - threshold + noise_l) / eviction.tau
      bias = masks.soft_bias(z, dms.lag(window))
    else:
      z = logits
      bias = masks.hard_bias(masks.about_key(z > threshold, dms.lag(window), False))
    return bias, z

  def attend_by(carry, index, xs, q, k, v, x):
    layer, more = xs
    out, z = attention(layer, x, q, k, v, *(() if more is None else (more,)))
    return out, carry, z

  if cr is None and model.lora is not None and model.lora.by_cr:
    cr = 1.0 if eviction is None else model.dms.levels.cr(eviction.threshold)
  how, xs = Execution.choose(model, *tokens.shape), noise
  if attention is not None:
    attend, how, xs = attend_by, dataclasses.replace(how, late_gates=True), (model.params["layers"], attention_inputs)
  x, _, z = _run_layers(
    model,
    embed(model, tokens, positions),
    positions,
    attend,
    how,
    update_scale(model, 1.0 if cr is None else cr),
    xs=xs,
    remat=remat,
    neuron_kept=neuron_kept,
    gather=True,
  )
  return x, z


def attention_by_kind(
  config: ModelConfig, index: Array | int, q: Array, k: Array, v: Array, bias: Array | None, window: int, segment_ids
) -> Array:
  """`window_bias_attention` in a layer; in a sliding layer no token is visible outside the layer's own window."""
  slides, shape = config.ring_window, (k.shape[0], k.shape[2], k.shape[1])
  if slides is None:
    return window_bias_attention(q, k, v, bias, window, segment_ids)
  if bias is None or window == slides:  # one window serves both kinds
    bias = jnp.zeros(shape) if bias is None else bias
    bias = jnp.where(jnp.asarray(config.sliding_layers)[index], -jnp.inf, bias)
    return window_bias_attention(q, k, v, bias, slides, segment_ids)
  slide = lambda: window_bias_attention(q, k, v, jnp.full(shape, -jnp.inf), slides, segment_ids)
  evict = lambda: window_bias_attention(q, k, v, bias, window, segment_ids)
  if isinstance(index, int):
    return slide() if config.sliding_layers[index] else evict()
  return lax.cond(jnp.asarray(config.sliding_layers)[index], slide, evict)


def evicted_keys(
  model: Model, logits: Float[Array, "L B K T"], threshold: Any, window: int | None = None
) -> tuple[Bool[Array, "L B K T"], int | Int[Array, "L 1 1 1"]]:
  """(which tokens are evicted once their windows have passed, these windows), for `masks.held_tokens`.

  The gates decide, with `window` or their own; of a sliding layer all tokens are evicted, after its own window.
  """
  evicted = masks.about_key(logits > threshold, model.dms.lag(window), False)
  return by_kind(model.config, evicted, model.dms.window if window is None else window)


def by_kind(
  config: ModelConfig, evicted: Bool[Array, "L B K T"], window: int
) -> tuple[Bool[Array, "L B K T"], int | Int[Array, "L 1 1 1"]]:
  """(decisions, window), with the window of each layer and every token evicted where the model has sliding layers."""
  sliding = Sliding.of(config, window)
  return (evicted, window) if sliding is None else sliding.in_force(slice(None), evicted)


def segment_positions(segment_ids: Int[Array, "B T"]) -> Int[Array, "B T"]:
  """Positions, int32, that count from 0 at the start of each run of equal ids."""
  index = jnp.arange(segment_ids.shape[1])
  starts = jnp.concatenate([jnp.ones_like(segment_ids[:, :1], bool), segment_ids[:, 1:] != segment_ids[:, :-1]], axis=1)
  return index - lax.cummax(jnp.where(starts, index, 0), axis=1)


@struct.dataclass
class StepOutput:
  """The output of a step; the cache is returned next to it.

  Attributes:
    hidden: states before the final norm, in the model's dtype.
    seen: tokens held and keys read, int32 [L, B, K] each.
    logits: gate logits, float32; None without gates.
    lengths: tokens that each row has read in this step, int32.
    stalled: rows without free slots, which have read none.
  """

  hidden: Float[Array, "B T D"]
  seen: Usage
  logits: Float[Array, "L B K T"] | None
  lengths: Int[Array, "B"]
  stalled: Bool[Array, "B"]


def cached_forward(
  model: Model,
  policy: Policy,
  cache: Cache,
  tokens: Int[Array, "B T"],
  lengths: Int[Array, "B"],
  override: Bool[Array, "L B K T"] | None = None,
  remaining: Int[Array, "B"] | None = None,
) -> tuple[StepOutput, Cache]:
  """Reads up to T tokens a row into the cache: T = 1 is a decode step, T > 1 a chunk of a prompt.

  Args:
    tokens: right-padded; the first `lengths[b]` of row b are real. A row of length 0 stays as it is.
    override: decisions that replace the policy's, indexed by the token that computes them; to compare precisions.
    remaining: tokens of each row's prompt still to come after this chunk, for policies that compact at the prompt's
      end. None means a decode step if T = 1, and 0 if T > 1.

  Returns:
    (output, the cache with these tokens). A row without free slots is unchanged and marked in `stalled`.

  Raises:
    ValueError: the cache was made for another policy.
  """
  if policy.exact_prefill and tokens.shape[1] > 1:
    return _sequential_prefill(model, policy, cache, tokens, lengths, override)
  cache, plan = _planned(policy, cache, tokens, lengths, remaining)
  rows, layers = tokens.shape[0], model.params["layers"]
  how = Execution.choose(model, *tokens.shape)
  late = how.late_gates and plan.remaining is None and cache.can_decide_late(policy)
  how = dataclasses.replace(how, late_gates=late)
  padded = partial(_pad_rows, least=how.least_rows)
  positions, about, attend = _attend_cache(model, policy, cache, plan, tokens.shape, how)

  x, xs = embed(model, padded(tokens), padded(positions)), (cache.layer_state(), override)
  scale = update_scale(model, policy.target)
  scale = padded(scale) if jnp.ndim(scale) else scale
  carry = cache.layer_carry()
  x, carry, (states, seen, logits) = _run_layers(model, x, padded(positions), attend, how, scale, carry, xs)
  evict = None
  if how.late_gates:
    with jax.named_scope("gates"):
      logits = step_gate_logits(model.config, model.dms, layers, logits)
    index, about = jnp.arange(len(layers))[:, None, None, None], jnp.broadcast_to(about, logits.shape)
    evict = policy.decide(logits, index, about) if override is None else override
  return StepOutput(x[:rows], seen, logits, plan.lengths, plan.stalled), cache.commit(plan, carry, states, evict)


def _planned(policy: Policy, cache: Cache, tokens, lengths, remaining) -> tuple[Cache, Plan]:
  """The cache, pruned where that is due, and the plan of a step."""
  if policy.prunes and not cache.takes_chunk(policy, tokens.shape[1], remaining):
    with jax.named_scope("prune"):
      cache = cache.prune(policy, lengths > 0)
  return cache, cache.plan(policy, lengths, tokens.shape[1], remaining)


def _positions(plan: Plan, width: int) -> Int[Array, "B T"]:
  return plan.seen[:, None] + jnp.arange(width)


def _attend_cache(
  model: Model, policy: Policy, cache: Cache, plan: Plan, shape: tuple[int, int], how: Execution
):  # fmt: skip
  """(positions of the tokens [B, T], those that they decide about [B, K, T], attention to the cache in a layer)."""
  rows, width = shape
  positions = _positions(plan, width)
  heads = (rows, model.config.num_kv_heads, width)
  about = jnp.broadcast_to((positions - cache.lag)[:, None], heads)
  if policy.steers:
    policy = policy.steered(cache.memory, plan.seen, width)

  def attend(carry, index, xs, q, k, v, gates):
    state, override = xs
    q, k, v, gates = jax.tree.map(lambda y: y[:rows], (q, k, v, gates))
    of_tokens = jnp.swapaxes(k, 1, 2) if policy.uses_keys else None
    evict = None if how.late_gates else policy.decide(gates, index, about, of_tokens) if override is None else override
    rated = {"logits": gates} if policy.gate_stats else {}
    out, carry, state, seen = cache.attend(plan, policy, index, carry, state, q, k, v, evict, **rated)
    return _pad_rows(out, how.least_rows), carry, (state, seen, gates)

  return positions, about, attend


def begin_chunk(model: Model, policy: Policy, cache: Cache, tokens, lengths, remaining) -> tuple[Cache, Plan, Array]:
  """The first part of `cached_forward`: (cache, plan, embeddings), for `chunk_layer` or `some_layers`."""
  cache, plan = _planned(policy, cache, tokens, lengths, remaining)
  return cache, plan, constrain_rows(embed(model, tokens, _positions(plan, tokens.shape[1])))


def chunk_layer(
  model: Model, policy: Policy, cache: Cache, plan: Plan, layer: dict, index: Int[Array, ""], x: Array
) -> tuple[Cache, Array, tuple[Any, Usage]]:
  """One layer of a chunk: (cache, x, (state, usage)), the last for `end_chunk`; `some_layers` has the arguments."""
  carry, x, (out,) = some_layers(model, policy, cache, plan, [layer], index, x, cache.layer_carry())
  return cache.with_carry(carry), x, out


def some_layers(
  model: Model, policy: Policy, cache: Cache, plan: Plan, layers: list[dict], first: Int[Array, ""],
  x: Float[Array, "B T D"], carry: Any,
) -> tuple[Any, Array, list[tuple[Any, Usage]]]:  # fmt: skip
  """Some layers of a chunk or a decode step: (carry, x, (state, usage) of each).

  Args:
    model: its own layers are not read.
    layers: parameters of each.
    first: index of the first.
    carry: of the cache, whose own arrays it replaces.
  """
  how = dataclasses.replace(Execution.choose(model, *x.shape[:2]), late_gates=False, least_rows=0)
  positions, _, attend = _attend_cache(model, policy, cache, plan, x.shape[:2], how)
  rope, states, outs = rope_tables(model.config, positions), cache.layer_state(), []
  scale = update_scale(model, policy.target)

  @jax.jit  # traced and lowered once; XLA puts it in line
  def one(layer, index, x, carry, rope, states, scale):
    state = jax.tree.map(lambda leaf: leaf[index], states), None
    return _layer(model, layer, index, state, (x, carry), rope, attend, how, scale)

  for offset, layer in enumerate(layers):
    (x, carry), (state, seen, _) = one(layer, first + offset, x, carry, rope, states, scale)
    outs.append((state, seen))
  return carry, x, outs


def end_chunk(cache: Cache, plan: Plan, x: Array, layers: list[tuple[Any, Usage]]) -> tuple[StepOutput, Cache]:
  """The last part of `cached_forward`, from what its layers returned."""
  states, seen = jax.tree.map(lambda *leaves: jnp.stack(leaves), *layers)
  output = StepOutput(x, seen, None, plan.lengths, plan.stalled)
  return output, cache.commit(plan, cache.layer_carry(), states)


def _pad_rows(x: Array, least: int) -> Array:
  """x [B, ...] padded with zeros to at least `least` rows."""
  return jnp.pad(x, [(0, max(least - len(x), 0))] + [(0, 0)] * (x.ndim - 1))


def _sequential_prefill(
  model: Model, policy: Policy, cache: Cache, tokens: Array, lengths: Array, override: Array | None
):
  """`cached_forward` of a chunk as a scan over its tokens, one decode step each, for policies with `exact_prefill`."""
  stalled = on_any(lengths > cache.free_tokens(policy, lengths > 0))
  lengths = jnp.where(stalled, 0, lengths)

  def step(cache, inputs):
    index, token, override = inputs
    override = None if override is None else override[..., None]
    out, cache = cached_forward(model, policy, cache, token[:, None], (index < lengths).astype(jnp.int32), override)
    return cache, out

  override = None if override is None else jnp.moveaxis(override, -1, 0)
  cache, out = lax.scan(step, cache, (jnp.arange(tokens.shape[1]), tokens.T, override))
  logits = None if out.logits is None else jnp.moveaxis(out.logits[..., 0], 0, -1)
  seen = Usage(out.seen.live[-1], jnp.sum(out.seen.reads, axis=0))
  return StepOutput(jnp.moveaxis(out.hidden[:, :, 0], 0, 1), seen, logits, lengths, stalled), cache


def last_logits(model: Model, output: StepOutput) -> Float[Array, "B V"]:
  """Logits, float32, at the last token that each row has read in the step; arbitrary for a row that has read none."""
  last = jnp.maximum(output.lengths - 1, 0)
  return unembed(model, jnp.take_along_axis(output.hidden, last[:, None, None], axis=1)[:, 0])


def check_policy(model: Model, policy: Policy | None) -> Policy:
  """`policy`, its window filled in from the model's gates; None means the gates' own (`DMS()`), or `Vanilla()`.

  Raises:
    ValueError: the policy needs gates and the model has none or others, or its numbers are invalid.
  """
  if policy is None:
    policy = policies.get(model.dms.objective)() if model.dms is not None else Vanilla()
  policy = check_kind(policy).fitted(model.config)
  if policy.uses_gates and model.dms is None:
    raise ValueError(
      f"{type(policy).__name__} needs eviction gates and this model has none: load a retrofit, or use dms_jax.Vanilla()"
    )
  if policy.uses_gates and policy.objective != model.dms.objective:
    raise ValueError(
      f"{type(policy).__name__} reads gates trained with retrofit.objective={policy.objective}; this model's were "
      f"trained with {model.dms.objective}: load another retrofit, or use another policy"
    )
  if policy.uses_gates:
    policy = policy.for_gates(model.dms)
  slides, given = model.config.ring_window, policy.window
  policy = policy.resolved(model.dms.window if model.dms is not None else slides)
  if slides is not None and not policy.evicts:  # its window changes no result
    policy = policy.replace(window=min(policy.window, slides))
  if slides is not None and policy.window > slides:
    raise ValueError(
      f"{type(policy).__name__}: window={policy.window}{' by its budget' if given is None else ''}: this "
      f"{model.config.family} model has layers that slide over {slides + 1} tokens and hold no more: give "
      f"window={slides} or less"
    )
  most = max(model.config.max_position_embeddings, model.dms.window if model.dms is not None else 0)
  if policy.window > most:  # its slots would never be used
    raise ValueError(f"{type(policy).__name__}: window={policy.window} must be at most {most}, the model's context")
  if policy.gate_stats and policy.window < model.lag(policy.window):
    raise ValueError(
      f"{type(policy).__name__}: window={policy.window} must be {model.lag(policy.window)} or more with these gates: a "
      "token's logit must be known when it leaves the window"
    )
  return policy
