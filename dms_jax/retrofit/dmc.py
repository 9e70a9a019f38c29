"""The objective "dmc": tokens append a slot or are merged into the last one (arXiv 2403.09636).

Training relaxes the decisions as DMS does: alpha = sigmoid((logit + noise) / tau). Every token j has a slot s_j, a
weighted mean of the keys up to it, and likewise of the values:

    s_j = y_j / z_j,    y_j = alpha_j y_(j-1) + omega_j k_j,    z_j = alpha_j z_(j-1) + omega_j

Query i sees the keys of its window, i - W .. i, as they are. Of the tokens before it sees the slots s_j, with
log(1 - alpha_(j+1)) added to the score: a slot that the next token is merged into is gone. The newest slot,
j = i - W - 1, gets no bias. With hard decisions this is what the policy `DMC` reads; its docstring says what differs
from the paper. The losses are DMS's: distillation, or the next token's likelihood as in the paper (`loss.kind=lm`), and
a compression loss where the share of merges is below the target. The released code sums the last 12 tokens of a slot;
here there is no limit. The paper's phase at a fixed target is `schedule.steps` beyond the ramp.
"""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from dms_jax.attention import softmax_of_layer, window_bias_attention
from dms_jax.decoder import Model
from dms_jax.gates import gate_logits
from dms_jax.model import segment_positions
from dms_jax.policies.dmc import weight_of
from dms_jax.retrofit.batch import Batch, run
from dms_jax.retrofit.config import RetrofitConfig
from pallas_kernels.common.softmax import soft_capped, with_sinks

FORGETS = -1e30  # the logarithm of a decay of 0; finite, so that its product with 0 is 0
_product = functools.partial(jnp.einsum, precision=lax.Precision.HIGHEST)  # of float32, which are not rounded first


def prefix_sums(x: Float[Array, "B T K D"], log_decay: Float[Array, "B T K"]) -> Float[Array, "B T K D"]:
  """y_j = exp(log_decay_j) y_(j-1) + x_j, float32, by products with triangular matrices.

  One product sums within chunks of about sqrt(T) tokens, another over the chunks' last sums: few operations, where a
  scan takes T steps and an associative one 2 log2 T passes over `x`.

  Args:
    log_decay: 0 or less, finite; `FORGETS` where nothing before counts.
  """
  b, t, heads, width = x.shape
  chunk = math.isqrt(t - 1) + 1
  x, decay = (jnp.pad(y, ((0, 0), (0, -t % chunk), *((0, 0),) * (y.ndim - 2))) for y in (x, log_decay))
  x, decay = x.reshape(b, -1, chunk, heads, width), jnp.moveaxis(decay.reshape(b, -1, chunk, heads), 3, 1)
  within, across = _decays(decay), _decays(decay.sum(axis=-1))
  y = _product("bkcji,bcikd->bcjkd", within, x)
  ends = _product("bkji,bikd->bjkd", across, y[:, :, -1])
  before = jnp.pad(ends[:, :-1], ((0, 0), (1, 0), (0, 0), (0, 0)))  # of each chunk, the sum up to it
  since = within[..., 0] * jnp.exp(decay[..., :1])  # from the end of the chunk before to each token
  return (y + jnp.moveaxis(since, 1, 3)[..., None] * before[:, :, None]).reshape(b, -1, heads, width)[:, :t]


def _decays(log_decay: Float[Array, "*rows C"]) -> Float[Array, "*rows C C"]:
  """What is left at token j of token i's share: the exponential of the sum over i < m <= j; 0 where i > j."""
  earlier = jnp.tri(log_decay.shape[-1], dtype=jnp.float32)  # [j, m]: m <= j
  # Summed anew for each i: a difference of running sums would lose the small ones behind a large one.
  sums = _product("jm,...m,mi->...ji", earlier, log_decay, 1.0 - earlier.T)
  return jnp.where(earlier > 0, jnp.exp(sums), 0.0)


def slots(
  k: Float[Array, "B T K H"], v: Float[Array, "B T K H"], log_alpha: Float[Array, "B K T"], omega: Float[Array, "B K T"]
) -> tuple[Float[Array, "B T K H"], Float[Array, "B T K H"]]:
  """The slots s_j of keys and of values, float32, by the relaxed decisions and the importances `omega`.

  Args:
    log_alpha: logarithms of the decisions; `FORGETS` at the first token of a document.
  """
  log_alpha, weight = jnp.swapaxes(log_alpha, 1, 2), jnp.swapaxes(omega, 1, 2)[..., None]
  parts = [*(weight * x.astype(jnp.float32) for x in (k, v)), weight]
  sums = prefix_sums(jnp.concatenate(parts, axis=-1), log_alpha)
  keys, values = jnp.split(sums[..., :-1] / sums[..., -1:], 2, axis=-1)
  return keys, values


def merging_attention(
  q: Float[Array, "B T N H"], k: Float[Array, "B T K H"], v: Float[Array, "B T K H"], z: Float[Array, "B K T"],
  omega: Float[Array, "B K T"], window: int, segment_ids: Int[Array, "B T"] | None = None,
) -> Float[Array, "B T N H"]:  # fmt: skip
  """Attention to the window's tokens and to the slots of the tokens before, as the module describes.

  Both parts are the library's attention with a bias, each with its log-sum-exp. Slot j stands W + 1 places behind its
  token, so that a query sees those up to its own place, the newest free of bias.

  Args:
    z: float32, logits of the relaxed decisions, alpha = sigmoid(z); not the z_j of the module.
    omega: float32, importances, positive.
    window: W in tokens.
    segment_ids: documents that do not see each other, in contiguous runs.
  """
  b, t = q.shape[:2]
  position = jnp.broadcast_to(jnp.arange(t), (b, t)) if segment_ids is None else segment_positions(segment_ids)
  first = (position == 0)[:, None]
  keys, values = slots(k, v, jnp.where(first, FORGETS, jax.nn.log_sigmoid(z)), omega)
  # log(1 - alpha) of the next token; that of a document's first token is about no slot of the document before
  replaced = jnp.roll(jnp.where(first, 0.0, jax.nn.log_sigmoid(-z)), -1, axis=2)
  behind = lambda x, axis: jnp.roll(x, window + 1, axis)
  has_slot = position > window
  bias = jnp.where(has_slot[:, None], behind(replaced, 2), -jnp.inf)
  keys, values = (behind(x.astype(k.dtype), 1) for x in (keys, values))
  old, old_logs = window_bias_attention(q, keys, values, bias, 0, segment_ids, lse=True)
  old_logs = jnp.where(has_slot[..., None], old_logs, -jnp.inf)
  if window:
    own, own_logs = window_bias_attention(q, k, v, jnp.full_like(z, -jnp.inf), window, segment_ids, lse=True)
  else:
    own, own_logs = _own(q, k, v)
  share = jax.nn.sigmoid(old_logs - own_logs)[..., None]
  old, own = old.astype(jnp.float32), own.astype(jnp.float32)
  out, _ = with_sinks(own + share * (old - own), jnp.logaddexp(own_logs, old_logs), softmax_of_layer()[1])
  return out.astype(q.dtype)


def _own(
  q: Float[Array, "B T N H"], k: Float[Array, "B T K H"], v: Float[Array, "B T K H"]
) -> tuple[Float[Array, "B T N H"], Float[Array, "B T N"]]:
  """Attention of each query to its own token alone, and its score, float32."""
  k, v = (jnp.repeat(x, q.shape[2] // x.shape[2], axis=2) for x in (k, v))
  scores = jnp.sum(q.astype(jnp.float32) * k.astype(jnp.float32), axis=-1) * q.shape[-1] ** -0.5
  return v, soft_capped(scores, softmax_of_layer()[0])


def student(
  model: Model, batch: Batch, noise: Float[Array, "L B K T"], config: RetrofitConfig
) -> tuple[Float[Array, "B T D"], Float[Array, "L B K T"]]:
  """The student's states before the final norm, and its relaxed decisions' logits (logit + noise) / tau."""

  def attention(layer, x, q, k, v, noise):
    merges, importance = jnp.split(gate_logits(model.config, model.dms, layer, x, q), 2, axis=1)
    z = (merges + noise) / config.loss.tau
    omega = weight_of(importance)
    return merging_attention(q, k, v, z, omega, model.dms.window, batch.segment_ids), z

  return run(model, batch, config, attention=attention, attention_inputs=noise)
