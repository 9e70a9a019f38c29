"""Gates for a range of compression ratios (CR): the thresholds that give each row its own.

No paper has them. Each row of a batch has a target CR of its own, and so a share of decisions to evict. A first pass
reads the batch dense, without a gradient for anything but the gates, and gives their logits. A row's threshold is the
quantile of the batch's noisy logits at which its share is above, so that the ratio needs no penalty: the loss is the
distillation's alone. The second pass evicts at these thresholds.

The derivative of a threshold is that of the quantile over all noise: of the mean of the logits near it. So raising all
logits raises it with them and changes no decision, and what a step changes is the order of the tokens. Tokens whose
decision is certain get no gradient, as under the paper's loss. A mean over all tokens would push them further at every
step, until most heads evict all or nothing. Gates read the residual stream, but send no gradient into it: low-rank
updates serve the distillation alone.

With `LoRAConfig.by_cr` a row's low-rank updates grow with its CR too, in both passes.

At the end of a run `calibrated` measures the thresholds at which the gates are read from then on, without noise.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from dms_jax import masks
from dms_jax.attention import window_bias_attention
from dms_jax.decoder import Model
from dms_jax.gates import gate_logits
from dms_jax.levels import Levels
from dms_jax.model import Eviction
from dms_jax.params import flatten, param_table, unflatten
from dms_jax.policies.base import per_row
from dms_jax.retrofit import losses
from dms_jax.retrofit.batch import Batch, real_tokens, run
from dms_jax.retrofit.config import RetrofitConfig
from dms_jax.sharding import constrain

LEVELS = 24  # thresholds that a calibration measures
EDGES = 1025  # logits between which a calibration counts; at CR 12 a hundredth of the tokens kept lies between two


def shares(
  config: RetrofitConfig, cr: Float[Array, "*rows"], real: Bool[Array, "B T"], window: int
) -> Float[Array, "B"]:
  """Share of each row's decisions that evict at its CR, as `config.loss.counts` means it."""
  if config.loss.counts == "held":
    return losses.held_target(cr, real, window)
  return jnp.broadcast_to(1.0 - 1.0 / cr, real.shape[:1])


def quantiles(
  values: Float[Array, "L B K T"], counted: Bool[Array, "B T"], share: Float[Array, "S"]
) -> Float[Array, "S"]:
  """The value above which each share of the counted values lies: the greatest for 0, the least for 1."""
  ordered = jnp.sort(jnp.where(counted[:, None], values, jnp.inf), axis=None)
  count = counted.sum() * (values.shape[0] * values.shape[2])
  above = jnp.round(share * count.astype(jnp.float32)).astype(jnp.int32)
  return ordered[jnp.clip(count - 1 - above, 0, ordered.size - 1)]


def thresholds(
  logits: Float[Array, "L B K T"], noise: Float[Array, "L B K T"], counted: Bool[Array, "B T"], share: Float[Array, "S"]
) -> Float[Array, "S"]:
  """The thresholds above which each share of all rows' noisy logits lies, with the derivative of the logits at them.

  It is the derivative of the quantile over all noise: that of the mean of the logits, each weighted by the density of
  logistic noise that lifts it to the threshold.
  """
  fixed = jax.lax.stop_gradient(logits)
  values = quantiles(fixed + noise, counted, share)
  lowest = jnp.finfo(jnp.float32).min  # not -inf: a batch of padding has no weight to divide by

  @jax.checkpoint
  def at(value: Float[Array, ""]) -> Float[Array, ""]:
    away = fixed - value
    density = jnp.where(counted[:, None], jax.nn.log_sigmoid(away) + jax.nn.log_sigmoid(-away), lowest)
    return jnp.sum(jax.nn.softmax(density, axis=None) * jnp.where(counted[:, None], logits, 0.0))

  mean = jax.lax.map(at, values)
  return values + (mean - jax.lax.stop_gradient(mean))


def student(
  model: Model, batch: Batch, noise: Float[Array, "L B K T"], cr: Float[Array, "B"], config: RetrofitConfig
) -> tuple[Float[Array, "B T D"], Float[Array, "L B K T"]]:
  """The student's states before the final norm, and its relaxed decisions' logits (logit - threshold + noise) / tau.

  Args:
    noise: logistic noise of the relaxed decisions.
    cr: target compression ratio of each row.
  """
  dms, tau, real = model.dms, config.loss.tau, real_tokens(batch)
  if dms.granularity == "layer":
    noise = jnp.broadcast_to(noise[:, :, :1], noise.shape)
  _, logits = run(_gates_alone(model), batch, config, cr=cr)
  limit = thresholds(logits, noise, real, shares(config, cr, real, dms.window))

  def attention(layer, x, q, k, v, noise):
    own = gate_logits(model.config, dms, layer, jax.lax.stop_gradient(x), q)
    z = (own - per_row(limit, 2) + noise) / tau
    return window_bias_attention(q, k, v, masks.soft_bias(z, dms.lag()), dms.window, batch.segment_ids), z

  return run(model, batch, config, cr=cr, attention=attention, attention_inputs=noise)


def _gates_alone(model: Model) -> Model:
  """The model whose gates alone get a gradient."""
  table = param_table(model.config, model.dms, model.lora)
  stopped = lambda path, x: x if table[path].group == "gate" else jax.lax.stop_gradient(x)
  return model.replace(params=unflatten({path: stopped(path, x) for path, x in flatten(model.params).items()}))


def calibrated(
  model: Model,
  batches: Sequence[Batch],
  config: RetrofitConfig,
  progress: Callable[[Sequence[Batch]], Iterable[Batch]] = iter,
) -> Model:
  """`model` with the thresholds at which its gates evict, on the average over `batches`, what each CR asks for.

  Logits depend a little on what is evicted before and on the updates of that CR. So the thresholds of a dense pass
  come first, and the final ones are of passes that evict at these.
  """
  low, high = model.dms.elastic
  crs = jnp.asarray(Levels.ratios(low, high, LEVELS), jnp.float32)
  edges, limits = _edges(model, batches[0], config), None
  for rounds in (batches, progress(batches)):
    above, wanted = np.zeros((LEVELS, EDGES)), np.zeros(LEVELS)
    for batch in rounds:
      counts = jax.device_get(_counts(model, batch, crs, limits, edges, config))
      above, wanted = above + counts[0], wanted + counts[1]
    found = [np.interp(one, counted[::-1], np.asarray(edges)[::-1]) for one, counted in zip(wanted, above, strict=True)]
    limits = jnp.asarray(np.minimum.accumulate(found), jnp.float32)
  return model.replace(dms=dataclasses.replace(model.dms, elastic_thresholds=tuple(map(float, limits))))


@jax.jit
def _edges(model: Model, batch: Batch, config: RetrofitConfig) -> Float[Array, "E"]:
  """Logits of a dense pass at equal distances in their order, from the least to the greatest."""
  _, logits = run(model, batch, config, cr=model.dms.levels.usual)
  share = jnp.linspace(1.0, 0.0, EDGES, dtype=jnp.float32)
  return constrain(quantiles(logits, real_tokens(batch), share), {})


@jax.jit
def _counts(
  model: Model,
  batch: Batch,
  crs: Float[Array, "S"],
  limits: Float[Array, "S"] | None,
  edges: Float[Array, "E"],
  config: RetrofitConfig,
) -> tuple[Int[Array, "S E"], Float[Array, "S"]]:
  """(decisions above each edge, decisions to evict) of a batch at each CR, under the thresholds `limits` or dense."""
  real, count = real_tokens(batch), config.microbatches
  parts = jax.tree.map(lambda x: x.reshape(count, x.shape[0] // count, *x.shape[1:]), batch)

  def above(level: tuple[Float[Array, ""], Float[Array, ""] | None]) -> Int[Array, "E"]:
    cr, limit = level
    eviction = None if limit is None else Eviction(threshold=limit)

    def part(batch: Batch) -> Int[Array, "E"]:
      _, logits = run(model, batch, config, cr=cr, eviction=eviction)
      counted = jnp.broadcast_to(real_tokens(batch)[:, None], logits.shape)
      ordered = jnp.sort(jnp.where(counted, logits, jnp.inf), axis=None)
      return counted.sum() - jnp.searchsorted(ordered, edges, side="right").astype(jnp.int32)

    return jax.lax.map(part, parts).sum(axis=0)

  if limits is None:
    usual = above((jnp.float32(model.dms.levels.usual), None))
    found = jnp.broadcast_to(usual, (len(crs), len(edges)))
  else:
    found = jax.lax.map(above, (crs, limits))
  cells = model.config.num_layers * model.config.num_kv_heads * real.sum(axis=1)
  wanted = jax.vmap(lambda cr: jnp.sum(shares(config, cr, real, model.dms.window) * cells.astype(jnp.float32)))(crs)
  return constrain((found, wanted), {})
