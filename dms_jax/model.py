"""The decoder: one layer written once, run over a whole text (`forward`) or against a cache (`cached_forward`).

Pure functions over a frozen `Model`. Layers are scanned when parameters are stacked [L, ...], and looped over in Python
when `unstack_layers` has made them a list: on a CPU indexing stacked weights copies them.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from dms_jax import masks
from dms_jax.attention import window_bias_attention
from dms_jax.cache import Cache
from dms_jax.cache.base import Usage
from dms_jax.config import DMSConfig, LoRAConfig, ModelConfig
from dms_jax.gates import clear_neuron, gate_logits, step_gate_logits
from dms_jax.layers import apply_rope, linear, mlp, project, rms_norm, rope_tables
from dms_jax.params import Params, merge_lora, param_table
from dms_jax.policies import DMS, Policy, Vanilla
from dms_jax.sharding import constrain_rows, gather_layer, row_and_head_axes
from pallas_kernels import window_bias as retrofit
from pallas_kernels.common.platform import platform

# A decode step of fewer rows runs the layers with so many on a GPU, but for their attention: for one row XLA reads
# weights at half the speed, and takes more kernels for a norm. On a mesh, rows would move between devices for it.
LEAST_ROWS = 8
# Up to so many rows on one GPU, one kernel behind a list of layers computes the adapter gates of all. It reads each
# layer's x once a KV head, by a choice among as many arrays as there are layers: for more rows one in each layer is
# faster.
LATE_ROWS = 32

# What the backward pass keeps of each layer's forward pass: products and attention. What lies between them (norms,
# rotations, SwiGLU) is cheaper to compute again than to write and read; the last product leads to the next layer.
SAVED = (*(f"{name}_proj" for name in ("q", "k", "v", "o", "gate", "up")), retrofit.SAVED)


@struct.dataclass
class Model:
  """Weights and what they mean. `dms` None: no gates. `lora` describes low-rank updates still apart in `params`.

  `tokenizer` rides along so that prompts can be strings; it compares by identity and changes nothing computed.
  """

  params: Params
  config: ModelConfig = struct.field(pytree_node=False)
  dms: DMSConfig | None = struct.field(pytree_node=False, default=None)
  lora: LoRAConfig | None = struct.field(pytree_node=False, default=None)
  tokenizer: Any = struct.field(pytree_node=False, default=None)

  @property
  def dtype(self) -> jnp.dtype:
    return self.params["embed"].dtype

  def merged(self) -> Model:
    """The same model with its low-rank updates folded into the weights; its layers are stacked."""
    return self.replace(params=merge_lora(self.stacked().params, self.lora), lora=None)

  def stacked(self) -> Model:
    """The same model with its layers' parameters stacked [L, ...]; the inverse of `unstacked`."""
    layers = self.params["layers"]
    if not isinstance(layers, list):
      return self
    return self.replace(params={**self.params, "layers": {n: jnp.stack([p[n] for p in layers]) for n in layers[0]}})

  def unstacked(self) -> Model:
    """The same model with a list of layers, which decodes faster on a CPU; a copy of the layers' weights."""
    layers = self.params["layers"]
    if isinstance(layers, list):
      return self
    count = self.config.num_layers
    split = [{name: w[i] for name, w in layers.items()} for i in range(count)]
    return self.replace(params={**self.params, "layers": split})


# attend(carry, index, xs, q, k, v, gates) -> (attended, carry, ys), all of one layer; gates: see `_attention_inputs`
Attend = Callable[..., tuple[Array, Any, Any]]


def _attention_inputs(
  model: Model, layer: dict, x: Array, rope: tuple[Array, Array], neuron_kept: Array | None = None, late: bool = False
):
  """Queries, keys, values after RoPE [B, T, heads, H], and gates: their logits, float32 [B, K, T], None where there are
  none, or, for `late`, x [B, T, D], from which `step_gate_logits` computes those of all layers."""
  c, dms = model.config, model.dms
  neuron = dms is not None and dms.gate == "neuron"
  scale = model.lora.scale if model.lora else 0.0
  h = rms_norm(x, layer["attn_norm"], c.rms_norm_eps)
  # The borrowed channel is read before anything is rounded.
  q = project(h, layer, "q_proj", lora_scale=scale, out_dtype=jnp.float32 if neuron else None)
  k, v = (project(h, layer, name, lora_scale=scale) for name in ("k_proj", "v_proj"))
  if c.qkv_bias:
    q, k, v = (y + layer[name].astype(y.dtype) for y, name in ((q, "q_bias"), (k, "k_bias"), (v, "v_bias")))
  if c.qk_norm:
    q, k = rms_norm(q, layer["q_norm"], c.rms_norm_eps), rms_norm(k, layer["k_norm"], c.rms_norm_eps)
  gates = x if late else None if dms is None else gate_logits(c, dms, layer, x, q)
  q = q.astype(x.dtype)
  if neuron:
    q = clear_neuron(c, q, neuron_kept)
  q, k = apply_rope(q, rope), apply_rope(k, rope)
  return (clear_neuron(c, q, neuron_kept) if neuron else q), k, v, gates


def _run_layers(
  model: Model, x: Array, positions: Array, attend: Attend, carry=None, xs=None, remat: bool | None = None,
  neuron_kept=None, gather: bool = False, late: bool = False,
):  # fmt: skip
  """Runs all layers; returns (x, carry, ys) with ys stacked [L, ...].

  Args:
    remat: what a backward pass keeps of a layer: all, for None; `SAVED`, for False; nothing, for True.
    gather: on a mesh weights move to the rows.
    late: see `_attention_inputs`.
  """
  table = param_table(model.config, model.dms, model.lora) if gather else {}
  rope = rope_tables(model.config, positions)
  scale = model.lora.scale if model.lora else 0.0

  def body(state, inputs):
    x, carry = state
    index, layer, x_l = inputs
    layer = gather_layer(layer, table) if gather else layer
    q, k, v, gates = _attention_inputs(model, layer, x, rope, neuron_kept, late)
    attended, carry, ys = attend(carry, index, x_l, q, k, v, gates)
    x = x + project(attended, layer, "o_proj", 2, lora_scale=scale)
    x = x + mlp(layer, rms_norm(x, layer["mlp_norm"], model.config.rms_norm_eps), scale)
    return (constrain_rows(x), carry), ys

  x, layers = constrain_rows(x), model.params["layers"]
  if isinstance(layers, list):
    state, outs = (x, carry), []
    for index, layer in enumerate(layers):
      state, ys = body(state, (index, layer, jax.tree.map(lambda leaf, index=index: leaf[index], xs)))
      outs.append(ys)
    return *state, jax.tree.map(lambda *leaves: jnp.stack(leaves), *outs)
  if remat is not None:
    policy = None if remat else jax.checkpoint_policies.save_only_these_names(*SAVED)
    body = jax.checkpoint(body, policy=policy, prevent_cse=False)  # in a scan nothing is there to merge it with
  (x, carry), ys = lax.scan(body, (x, carry), (jnp.arange(model.config.num_layers), layers, xs))
  return x, carry, ys


def embed(model: Model, tokens: Int[Array, "B T"]) -> Float[Array, "B T D"]:
  """Token embeddings."""
  table = model.params["embed"]
  if table.dtype == jnp.bfloat16 and platform() == "cpu":
    # There a bfloat16 gather goes through float32, and in a loop of decode steps XLA would hoist the conversion, of the
    # whole table, out of the fused gather: tying it to the tokens keeps it inside.
    table, tokens = lax.optimization_barrier((table, tokens))
  return table[tokens]


def unembed(model: Model, x: Float[Array, "*rows D"]) -> Float[Array, "*rows V"]:
  """Final norm and output head: logits in float32."""
  x = rms_norm(x, model.params["final_norm"], model.config.rms_norm_eps)
  return linear(x, output_head(model), out_dtype=jnp.float32)


def output_head(model: Model) -> Float[Array, "V D"]:
  """The output projection: the embedding itself where they are tied."""
  return model.params["embed" if model.config.tie_embeddings else "lm_head"]


@struct.dataclass
class Eviction:
  """How `forward` lets gates act: hard decisions at `threshold`, or with `noise` the soft training mask at `tau`.

  `noise` is float32 [L, B, K, T], indexed like the logits it is added to; `window` overrides the model's.
  """

  threshold: float = 0.0
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
  remat: bool = False,
  neuron_kept: Float[Array, ""] | None = None,
) -> tuple[Float[Array, "B T D"], Float[Array, "L B K T"] | None]:
  """The whole text at once, without a cache: training, evaluation and the oracle of everything cached.

  Args:
    positions: RoPE positions; default counts each segment from 0.
    segment_ids: documents (or padding, as a segment of its own) that never see each other, in contiguous runs.
    eviction: None leaves everything visible (the neuron gate's channel is cleared all the same).
    remat: recompute whole layers in the backward pass, which keeps `SAVED` otherwise.
    neuron_kept: what is left of the neuron gate's channel while a retrofit fades it out, 1 to 0; None: nothing.

  Returns:
    Hidden states before the final norm (see `unembed`), and z: what decides, float32, indexed by the token that
    computed it: logits, or (logits + noise) / tau under training noise. None without gates.

  Raises:
    ValueError: eviction asked of a model without gates.
  """
  if eviction is not None and model.dms is None:
    raise ValueError("this model has no eviction gates; load a retrofit, or pass eviction=None")
  if positions is None:
    positions = segment_positions(segment_ids) if segment_ids is not None else jnp.arange(tokens.shape[1])[None]
    positions = jnp.broadcast_to(positions, tokens.shape)
  dms = model.dms
  noise = None if eviction is None else eviction.noise
  if noise is not None and dms.granularity == "layer":
    noise = jnp.broadcast_to(noise[:, :, :1], noise.shape)

  def attend(carry, index, noise_l, q, k, v, logits):
    if eviction is None:
      return window_bias_attention(q, k, v, None, 0, segment_ids), carry, logits
    window = dms.window if eviction.window is None else eviction.window
    if noise_l is not None:
      z = (logits + noise_l) / eviction.tau
      bias = masks.soft_bias(z, dms.lag(window))
    else:
      z = logits
      bias = masks.hard_bias(masks.about_key(z > eviction.threshold, dms.lag(window), False))
    return window_bias_attention(q, k, v, bias, window, segment_ids), carry, z

  x, _, z = _run_layers(model, embed(model, tokens), positions, attend, None, noise, remat, neuron_kept, gather=True)
  return x, z


def segment_positions(segment_ids: Int[Array, "B T"]) -> Int[Array, "B T"]:
  """Positions that count from 0 at the start of each run of equal ids."""
  index = jnp.arange(segment_ids.shape[1])
  starts = jnp.concatenate([jnp.ones_like(segment_ids[:, :1], bool), segment_ids[:, 1:] != segment_ids[:, :-1]], axis=1)
  return index - lax.cummax(jnp.where(starts, index, 0), axis=1)


@struct.dataclass
class StepOutput:
  """`hidden` [B, T, D] before the final norm; `seen` tokens held and read, int32 [L, B, K] each; `logits` gate logits
  [L, B, K, T] (None without gates); `lengths` [B] tokens taken in; `stalled` [B] rows that had no room."""

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
) -> tuple[StepOutput, Cache]:
  """Takes up to T tokens a row into the cache: T = 1 is a decode step, more a chunk of a prompt.

  Args:
    tokens: right-padded; row b's first `lengths[b]` are real, 0 leaves the row untouched.
    override: decisions to use instead of the policy's, by the token that computes them; to compare precisions.

  Returns:
    The output, and the cache with these tokens in it. A row without room is left untouched and reported.

  Raises:
    ValueError: the cache was made for another policy.
  """
  if policy.scored and tokens.shape[1] > 1:
    return _one_by_one(model, policy, cache, tokens, lengths, override)
  plan = cache.plan(policy, lengths, tokens.shape[1])
  positions = plan.seen[:, None] + jnp.arange(tokens.shape[1])
  heads = (tokens.shape[0], model.config.num_kv_heads, tokens.shape[1])
  about = jnp.broadcast_to((positions - cache.lag)[:, None], heads)
  rows = tokens.shape[0]
  small = platform() == "gpu" and tokens.shape[1] == 1 and row_and_head_axes(rows, 1) is None
  padded = partial(_more_rows, least=LEAST_ROWS if small else 0)
  layers = model.params["layers"]
  adapters = model.dms is not None and model.dms.gate == "adapter"
  late = small and rows <= LATE_ROWS and isinstance(layers, list) and adapters and cache.can_decide_late(policy)

  def attend(carry, index, xs, q, k, v, gates):
    state, override = xs
    q, k, v, gates = jax.tree.map(lambda y: y[:rows], (q, k, v, gates))
    evict = None if late else policy.decide(gates, index, about) if override is None else override
    out, carry, state, seen = cache.attend(plan, policy, index, carry, state, q, k, v, evict)
    return padded(out), carry, (state, seen, gates)

  x, xs = embed(model, padded(tokens)), (cache.layer_state(), override)
  x, carry, (states, seen, logits) = _run_layers(
    model, x, padded(positions), attend, cache.layer_carry(), xs, late=late
  )
  evict = None
  if late:
    logits = step_gate_logits(model.config, model.dms, layers, logits)
    index, about = jnp.arange(len(layers))[:, None, None, None], jnp.broadcast_to(about, logits.shape)
    evict = policy.decide(logits, index, about) if override is None else override
  return StepOutput(x[:rows], seen, logits, plan.lengths, plan.stalled), cache.commit(plan, carry, states, evict)


def _more_rows(x: Array, least: int) -> Array:
  """x [B, ...] with zeros behind it where it has less than `least` rows."""
  return jnp.pad(x, [(0, max(least - len(x), 0))] + [(0, 0)] * (x.ndim - 1))


def _one_by_one(model: Model, policy: Policy, cache: Cache, tokens: Array, lengths: Array, override: Array | None):
  """`cached_forward` of a chunk for a policy whose decisions depend on every step before: a loop in the graph."""
  stalled = lengths > cache.free_tokens(policy)
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
  """Logits after each row's last real token of the step; of its first where it had none."""
  last = jnp.maximum(output.lengths - 1, 0)
  return unembed(model, jnp.take_along_axis(output.hidden, last[:, None, None], axis=1)[:, 0])


def check_policy(model: Model, policy: Policy | None) -> Policy:
  """`policy` with its window filled in where it was left open; None: `DMS()` if the model has gates, else `Vanilla()`.

  Raises:
    ValueError: the policy needs gates that the model does not have, or its numbers make no sense.
  """
  policy = policy or (DMS() if model.dms is not None else Vanilla())
  if policy.uses_gates and model.dms is None:
    raise ValueError(
      f"{type(policy).__name__} needs eviction gates and this model has none: load a retrofit, or use dms_jax.Vanilla()"
    )
  return policy.resolved(model.dms.window if model.dms is not None else None)


def decision_lag(model: Model, window: int | None = None) -> int:
  """The lag of the gates' decisions under the window in force; 1 for a model without gates: nothing depends on it."""
  return model.dms.lag(window) if model.dms is not None else 1
