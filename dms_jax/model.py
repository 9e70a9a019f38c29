"""A model's passes: a whole text at once (`forward`), or new tokens on a cache (`cached_forward`).

Pure functions over a frozen `Model`. Each pass gives the layers (`dms_jax.decoder`) its own attention: `forward` under
a mask, `cached_forward` to what the cache holds.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from dms_jax import masks, policies
from dms_jax.attention import window_bias_attention
from dms_jax.cache import Cache
from dms_jax.cache.base import Plan, Usage
from dms_jax.cache.sliding import Sliding
from dms_jax.collectives import on_any
from dms_jax.config import ModelConfig
from dms_jax.decoder import Model, embed, run_layer, run_layers, unembed, update_scale
from dms_jax.execution import Execution
from dms_jax.gates import step_gate_logits
from dms_jax.layers import rope_tables
from dms_jax.policies import Policy, Vanilla
from dms_jax.policies.base import check_kind, per_row
from dms_jax.sharding import constrain_rows


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
  x, _, z = run_layers(
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
  x, carry, (states, seen, logits) = run_layers(model, x, padded(positions), attend, how, scale, carry, xs)
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
    return run_layer(model, layer, index, state, (x, carry), rope, attend, how, scale)

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
