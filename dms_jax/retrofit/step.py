"""One training step: a student under the soft mask, a dense teacher, two losses, one update."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import struct
from jaxtyping import Array, Bool, Float, Int

from dms_jax import masks
from dms_jax.config import DMSConfig, ModelConfig
from dms_jax.decoder import Model
from dms_jax.metrics import held_share
from dms_jax.model import Eviction, by_kind
from dms_jax.params import Group, Params, flatten, init_params, join_params, param_table, split_params, unflatten
from dms_jax.retrofit import dmc, elastic, kvzap, losses, schedule, trimkv
from dms_jax.retrofit.batch import Batch as Batch
from dms_jax.retrofit.batch import real_tokens, run, text_loss
from dms_jax.retrofit.config import RetrofitConfig
from dms_jax.sharding import constrain

TRAINED: dict[str, tuple[Group, ...]] = {"gates": ("gate",), "lora": ("gate", "lora"), "all": ("base", "gate")}


@struct.dataclass
class TrainState:
  """The state from which a run resumes.

  Attributes:
    step: int32 [], steps done.
    trained: trained parameters, float32.
    opt_state: the optimizer's state.
    ema: moving average of `trained`, or None.
  """

  step: Int[Array, ""]
  trained: Params
  opt_state: optax.OptState
  ema: Params | None


def split_trained(model: Model, trainable: str) -> tuple[Params, Params]:
  """(trained parameters, frozen parameters) under `trainable`.

  Raises:
    ValueError: "lora" for a model without low-rank updates, or "gates" for one whose gates have no parameters.
  """
  table = param_table(model.config, model.dms, model.lora)
  groups = TRAINED[trainable]
  chosen, frozen = split_params(model.params, lambda path: table[path].group in groups)
  if not chosen or (trainable == "lora" and not (model.lora and model.lora.rank)):
    raise ValueError(f"retrofit.trainable={trainable!r}: the model has nothing of {groups}; set dms.gate, lora.rank")
  return chosen, frozen


def optimizer(config: RetrofitConfig) -> optax.GradientTransformation:
  """AdamW with clipping by global norm; the numbers of `config`'s schedules may be traced."""
  o = config.optimizer
  adamw = optax.adamw(partial(schedule.learning_rate, config), o.beta1, o.beta2, weight_decay=o.weight_decay)
  return optax.chain(optax.clip_by_global_norm(o.clip_norm), adamw)


def init_state(config: RetrofitConfig, trained: Params) -> TrainState:
  """State before the first step; `trained` is copied to float32."""
  trained = jax.tree.map(lambda x: jnp.array(x, jnp.float32, copy=True), trained)
  ema = jax.tree.map(jnp.copy, trained) if config.saving.ema_decay else None
  return TrainState(jnp.int32(0), trained, optimizer(config).init(trained), ema)


def cast_trained(model: Model, trained: Params, dtype) -> Params:
  """`trained` in the compute dtype. Gates stay float32: they are small, and rounding at scale 100 flips decisions."""
  table = param_table(model.config, model.dms, model.lora)
  cast = lambda path, x: x if table[path].group == "gate" else x.astype(dtype)
  return unflatten({path: cast(path, x) for path, x in flatten(trained).items()})


def trained_model(model: Model, trained: Params, dtype) -> Model:
  """`model` with the parameters `trained` so far, in `dtype` (see `cast_trained`), in buffers of its own.

  It outlives the next step, which deletes the buffers of the state that it is given.
  """
  copied = jax.tree.map(jnp.copy, trained)
  return model.replace(params=join_params(model.params, cast_trained(model, copied, dtype)))


def zero_neuron(model: Model, state: TrainState) -> TrainState:
  """`state` with the weights of every borrowed channel set to 0 (w = 0 in equation 1): every gate logit is -offset."""

  def zeroed(trained: Params) -> Params:
    flat = flatten(trained)
    for path in ("layers/q_proj", "layers/q_bias"):
      if path in flat:
        flat[path] = flat[path].at[:, :: model.config.group_size, -1].set(0.0)
    return unflatten(flat)

  return state.replace(trained=zeroed(state.trained), ema=None if state.ema is None else zeroed(state.ema))


def logistic_noise(key: jax.Array, shape: tuple[int, ...]) -> Float[Array, "L B K T"]:
  """Samples of the difference of two standard Gumbel variables, float32."""
  return jax.random.logistic(key, shape, jnp.float32)


def loss_fn(
  student: Model,
  teacher: Model,
  batch: Batch,
  noise: Float[Array, "L B K T"],
  cr: Float[Array, "*rows"],
  config: RetrofitConfig,
  neuron_kept: Float[Array, ""] | None = None,
) -> tuple[Float[Array, ""], dict[str, Array]]:
  """Distillation (or language-model) loss plus compression loss, and the metrics for the log; of DMS and DMC.

  Args:
    noise: logistic noise of the relaxed decisions.
    cr: target compression ratio; one a row [B] for gates for a range of ratios, whose loss is the first term alone:
      the thresholds at which they are read give each row its ratio. A single one is read at 0.
    neuron_kept: the share of the borrowed channel that is left, in phase 1 alone. In phase 1 nothing is evicted and
      there is no compression loss.
  """
  real = real_tokens(batch)
  fading = neuron_kept is not None
  if config.objective == "dmc":
    hidden, z = dmc.student(student, batch, noise, config)
  elif jnp.ndim(cr):
    hidden, z = elastic.student(student, batch, noise, cr, config)
  else:
    eviction = None if fading else Eviction(0.0, noise, config.loss.tau)
    hidden, z = run(student, batch, config, eviction=eviction, neuron_kept=neuron_kept)
  distance = text_loss(config.loss.kind, hidden, student, teacher, batch, config)
  slides = bool(student.config.sliding_layers)
  gated = z[np.asarray(student.config.global_layers)] if slides else z  # the gates of sliding layers decide nothing
  fraction = losses.evicted_fraction(gated, real)
  compression = jnp.float32(0.0)
  if not fading and not jnp.ndim(cr):
    target = losses.held_target(cr, real, student.dms.window) if config.loss.counts == "held" else None
    compression = losses.compression_loss(fraction, cr, target)
  return distance + config.loss.compression_weight * compression, {
    "nll" if config.loss.kind == "lm" else "kl": distance,
    "compression_loss": compression,
    "evicted_fraction": fraction.mean(),
    "kept_target": jnp.mean(1.0 / cr),
    **_compression_metrics(student.dms, z if fading else z * config.loss.tau - noise, real, student.config),
  }


def _compression_metrics(
  dms: DMSConfig, logits: Float[Array, "L B K T"], real: Bool[Array, "B T"], model: ModelConfig | None = None
) -> dict[str, Array]:
  """Metrics of hard decisions without noise: gate rate, overall and by head, and share of tokens held at the end.

  Args:
    model: says which layers slide, none of them for None. They count among those that hold tokens, not among those with
      gates.
  """
  if dms.granularity == "layer":
    logits = jnp.broadcast_to(logits[:, :, :1], logits.shape)
  evicted = masks.about_key(logits > 0, dms.lag(), False) & real[None, :, None]
  tokens = real.sum(axis=1, dtype=jnp.int32)
  evicts = (evicted, dms.window) if model is None else by_kind(model, evicted, dms.window)
  held = masks.held_tokens(*evicts, tokens[:, None])
  two_kinds = model is not None and bool(model.sliding_layers)
  if two_kinds:
    evicted = evicted & ~np.asarray(model.sliding_layers)[:, None, None, None]
  rates = jnp.mean(evicted.astype(jnp.float32), axis=(1, 3))
  return {
    "gate_rate": rates[np.asarray(model.global_layers)].mean() if two_kinds else rates.mean(),
    "gate_rates": rates,
    "held_share": held_share(held, jnp.maximum(tokens, 1)),
  }


def lm_loss(student: Model, batch: Batch, config: RetrofitConfig) -> tuple[Float[Array, ""], dict[str, Array]]:
  """The next token's negative log-likelihood under a model without gates, of the objective "lm"."""
  hidden, _ = run(student, batch, config)
  loss = text_loss("lm", hidden, student, student, batch, config)
  return loss, {"nll": loss}


@partial(jax.jit, static_argnames=("fading",), donate_argnames=("state",))
def train_step(
  state: TrainState,
  student: Model,
  teacher: Model,
  batch: Batch,
  key: jax.Array,
  config: RetrofitConfig,
  fading: bool = False,
  frame: tuple[Int[Array, "P"], Int[Array, "M"]] | None = None,
) -> tuple[TrainState, dict[str, Array]]:
  """One optimizer step: (new state, metrics).

  Under a mesh the state is sharded by `sharding.tree_shardings`, and metrics are replicated.

  Args:
    state: donated.
    student: holds the frozen parameters only; the trained ones come from `state`.
    key: the run's random key; the noise of a step, and the target CR of its rows where the gates are for a range of
      ratios, depend only on it and on `state.step`.
    config: the numbers of its schedules are traced (`config.traced`): another CR, hold or decay compiles nothing.
    fading: whether the step belongs to phase 1 (`ScheduleConfig.fade_steps`).
    frame: tokens before a text and between it and its repetition, for the objective "kvzap" (`kvzap.frame`).
  """
  dtype = jnp.dtype(config.memory.compute_dtype)
  placed = partial(constrain, table=param_table(student.config, student.dms, student.lora))
  cr = schedule.target_cr(config, state.step)
  kept = schedule.neuron_kept(config, state.step) if fading else None

  levels = None if student.dms is None else student.dms.levels
  ranged = levels is not None and levels.ranged

  def loss_of(trained, part: Batch, index):
    cast = cast_trained(student, trained, dtype)
    whole = student.replace(params=join_params(student.params, cast))
    original = teacher
    if config.loss.teacher == "same":
      original = whole.replace(params=jax.lax.stop_gradient(whole.params))
    if config.objective == "lm":
      return lm_loss(whole, part, config)
    if config.objective == "trimkv":
      return trimkv.loss_fn(whole, original, part, config)
    if config.objective == "kvzap":
      return kvzap.loss_fn(whole, part, frame, config)
    shape = (whole.config.num_layers, part.tokens.shape[0], whole.config.num_kv_heads, part.tokens.shape[1])
    own = jax.random.fold_in(jax.random.fold_in(key, state.step), index)
    targets = cr
    if ranged:
      targets = schedule.row_targets(config, levels, state.step, jax.random.fold_in(own, 1), shape[1])
    return loss_fn(whole, original, part, logistic_noise(own, shape), targets, config, kept)

  count = config.microbatches
  parts = jax.tree.map(lambda x: x.reshape(count, x.shape[0] // count, *x.shape[1:]), batch)

  def accumulate(total, xs):
    part, index = xs
    (loss, metrics), grads = jax.value_and_grad(loss_of, has_aux=True)(state.trained, part, index)
    return placed(jax.tree.map(jnp.add, total, grads)), {"loss": loss, **metrics}

  zeros = placed(jax.tree.map(jnp.zeros_like, state.trained))
  grads, metrics = jax.lax.scan(accumulate, zeros, (parts, jnp.arange(count)))
  grads = jax.tree.map(lambda g: g / count, grads)
  metrics = jax.tree.map(lambda x: x.mean(axis=0), metrics)
  if config.ramps:
    metrics["achieved_cr"] = 1.0 / metrics.pop("held_share")
    kept_target = metrics.pop("kept_target")
    metrics["target_cr"] = 1.0 / kept_target if ranged else cr
  updates, opt_state = optimizer(config).update(grads, state.opt_state, state.trained)
  trained = optax.apply_updates(state.trained, updates)
  ema = state.ema
  if ema is not None:
    # The first averages are over fewer steps, so that the initial parameters lose their weight.
    taken = state.step.astype(jnp.float32)
    decay = jnp.minimum(config.saving.ema_decay, (1.0 + taken) / (10.0 + taken))
    ema = optax.incremental_update(trained, ema, 1.0 - decay)
  metrics |= {"grad_norm": optax.tree.norm(grads), "learning_rate": schedule.learning_rate(config, state.step)}
  return placed((TrainState(state.step + 1, trained, opt_state, ema), metrics))


def init_retrofit(model: Model, key: jax.Array, dtype) -> Params:
  """Initial gates and low-rank updates for `model`'s dms and lora configs: a parameter tree without the base."""
  table = param_table(model.config, model.dms, model.lora)
  return init_params({path: spec for path, spec in table.items() if spec.group != "base"}, key, dtype)
