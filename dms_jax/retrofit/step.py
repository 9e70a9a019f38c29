"""One training step: student under the soft eviction mask, teacher without, two losses, one optax update."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import optax
from flax import struct
from jaxtyping import Array, Bool, Float, Int

from dms_jax import masks
from dms_jax.config import DMSConfig
from dms_jax.layers import rms_norm
from dms_jax.model import Eviction, Model, forward, output_head
from dms_jax.params import Params, init_params, join_params, param_table, split_params
from dms_jax.retrofit import losses, schedule
from dms_jax.retrofit.config import RetrofitConfig

GROUPS = {"gates": ("gate",), "lora": ("gate", "lora"), "all": ("base", "gate")}


@struct.dataclass
class Batch:
  """`tokens` int32 [B, T]; `segment_ids` int32 [B, T], 0 for padding (None: each row one document)."""

  tokens: Int[Array, "B T"]
  segment_ids: Int[Array, "B T"] | None = None


@struct.dataclass
class TrainState:
  """What a run needs to go on: steps done, trained parameters (float32), optimizer state, moving average or None."""

  step: Int[Array, ""]
  trained: Params
  opt_state: optax.OptState
  ema: Params | None


def split_trained(model: Model, trainable: str) -> tuple[Params, Params]:
  """(parameters that `trainable` trains, the frozen others).

  Raises:
    ValueError: "lora" of a model without low-rank updates.
  """
  table = param_table(model.config, model.dms, model.lora)
  groups = GROUPS[trainable]
  chosen, frozen = split_params(model.params, lambda path: table[path].group in groups)
  if not chosen or (trainable == "lora" and not (model.lora and model.lora.rank)):
    raise ValueError(f"retrofit.trainable={trainable!r}: the model has nothing of {groups}; set dms.gate, lora.rank")
  return chosen, frozen


def optimizer(config: RetrofitConfig) -> optax.GradientTransformation:
  """AdamW with clipping by global norm."""
  adamw = optax.adamw(
    schedule.learning_rate(config), config.beta1, config.beta2, weight_decay=config.weight_decay
  )  # fmt: skip
  return optax.chain(optax.clip_by_global_norm(config.clip_norm), adamw)


def init_state(config: RetrofitConfig, trained: Params) -> TrainState:
  """State before the first step; `trained` is copied to float32."""
  trained = jax.tree.map(lambda x: jnp.array(x, jnp.float32, copy=True), trained)
  ema = jax.tree.map(jnp.copy, trained) if config.ema_decay else None
  return TrainState(jnp.int32(0), trained, optimizer(config).init(trained), ema)


def logistic_noise(key: jax.Array, shape: tuple[int, ...]) -> Float[Array, "L B K T"]:
  """Difference of two standard Gumbels, float32."""
  return jax.random.logistic(key, shape, jnp.float32)


def loss_fn(
  student: Model,
  teacher: Model,
  batch: Batch,
  noise: Float[Array, "L B K T"],
  cr: Float[Array, ""],
  config: RetrofitConfig,
) -> tuple[Float[Array, ""], dict[str, Array]]:
  """Distillation plus compression loss, and what the log shows."""
  c = student.config
  ids = batch.segment_ids
  real = jnp.ones(batch.tokens.shape, bool) if ids is None else ids > 0
  eviction = Eviction(noise=noise, tau=config.tau)
  hidden, z = forward(student, batch.tokens, segment_ids=ids, eviction=eviction, remat=config.remat)
  target, _ = forward(teacher, batch.tokens, segment_ids=ids, remat=config.remat)
  normed = [rms_norm(h, m.params["final_norm"], c.rms_norm_eps) for h, m in ((hidden, student), (target, teacher))]
  # What follows an end of text is no continuation of it: such positions teach nothing.
  counted = real & ~jnp.isin(batch.tokens, jnp.asarray(c.eos_token_ids, jnp.int32))
  kl = losses.distillation_loss(
    *normed, output_head(student), output_head(teacher), counted, direction=config.kl, chunk=config.loss_chunk
  )
  fraction = losses.evicted_fraction(z, real)
  compression = losses.compression_loss(fraction, cr)
  return kl + config.compression_weight * compression, {
    "kl": kl, "compression_loss": compression, "evicted_fraction": fraction.mean(),
    **_compression_metrics(student.dms, z * config.tau - noise, real),
  }  # fmt: skip


def _compression_metrics(dms: DMSConfig, logits: Float[Array, "L B K T"], real: Bool[Array, "B T"]) -> dict[str, Array]:
  """What hard, noiseless decisions would do: share of evictions, and achieved CR at the row length."""
  if dms.granularity == "layer":
    logits = jnp.broadcast_to(logits[:, :, :1], logits.shape)
  evicted = masks.about_key(logits > 0, dms.shift, False) & real[None, :, None]
  held = masks.held_tokens(evicted, dms.window).mean()
  return {"gate_rate": jnp.mean(evicted.astype(jnp.float32)), "achieved_cr": real.shape[1] / held}


@partial(jax.jit, static_argnames=("config",), donate_argnames=("state",))
def train_step(
  state: TrainState, student: Model, teacher: Model, batch: Batch, key: jax.Array, config: RetrofitConfig
) -> tuple[TrainState, dict[str, Array]]:
  """One update.

  Args:
    student: holds the frozen parameters only; the trained ones come from `state`.
    key: of the run; the step's noise depends on it and on `state.step` alone.
  """
  dtype = jnp.dtype(config.compute_dtype)
  cr = schedule.target_cr(config, state.step)

  def loss_of(trained, part: Batch, index):
    cast = jax.tree.map(lambda x: x.astype(dtype), trained)
    whole = student.replace(params=join_params(student.params, cast))
    original = teacher
    if config.teacher == "same":
      original = whole.replace(params=jax.lax.stop_gradient(whole.params))
    shape = (whole.config.num_layers, part.tokens.shape[0], whole.config.num_kv_heads, part.tokens.shape[1])
    noise = logistic_noise(jax.random.fold_in(jax.random.fold_in(key, state.step), index), shape)
    return loss_fn(whole, original, part, noise, cr, config)

  count = config.microbatches
  parts = jax.tree.map(lambda x: x.reshape(count, x.shape[0] // count, *x.shape[1:]), batch)

  def accumulate(total, xs):
    part, index = xs
    (loss, metrics), grads = jax.value_and_grad(loss_of, has_aux=True)(state.trained, part, index)
    return jax.tree.map(jnp.add, total, grads), {"loss": loss, **metrics}

  zeros = jax.tree.map(jnp.zeros_like, state.trained)
  grads, metrics = jax.lax.scan(accumulate, zeros, (parts, jnp.arange(count)))
  grads = jax.tree.map(lambda g: g / count, grads)
  metrics = jax.tree.map(jnp.mean, metrics)
  updates, opt_state = optimizer(config).update(grads, state.opt_state, state.trained)
  trained = optax.apply_updates(state.trained, updates)
  ema = state.ema
  if ema is not None:
    # A shorter memory at first, so that the start does not weigh on it.
    taken = state.step.astype(jnp.float32)
    decay = jnp.minimum(config.ema_decay, (1.0 + taken) / (10.0 + taken))
    ema = optax.incremental_update(trained, ema, 1.0 - decay)
  metrics |= {
    "target_cr": cr, "grad_norm": optax.tree.norm(grads), "learning_rate": schedule.learning_rate(config)(state.step),
  }  # fmt: skip
  return TrainState(state.step + 1, trained, opt_state, ema), metrics


def init_retrofit(model: Model, key: jax.Array, dtype) -> Params:
  """Fresh gates and low-rank updates for `model`'s dms and lora configs: a parameter tree without the base."""
  table = param_table(model.config, model.dms, model.lora)
  return init_params({path: spec for path, spec in table.items() if spec.group != "base"}, key, dtype)
