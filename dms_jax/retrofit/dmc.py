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

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from dms_jax.gates import gate_logits
from dms_jax.model import Model
from dms_jax.policies.dmc import weight_of
from dms_jax.retrofit.batch import Batch, run
from dms_jax.retrofit.config import RetrofitConfig
from dms_jax.retrofit.decay import blocks, visible
from pallas_kernels.common.xla_dot import einsum


def slots(
  x: Float[Array, "B T K H"], alpha: Float[Array, "B K T"], omega: Float[Array, "B K T"]
) -> Float[Array, "B T K H"]:
  """The slots s_j of keys or values `x`, float32, by the relaxed decisions `alpha` and the importances `omega`."""
  keep, weight = (jnp.swapaxes(y, 1, 2)[..., None] for y in (alpha, omega))
  parts = jnp.concatenate([weight * x.astype(jnp.float32), weight], axis=-1)

  def combine(left, right):
    return left[0] * right[0], left[1] * right[0] + right[1]

  _, sums = lax.associative_scan(combine, (keep, parts), axis=1)
  return sums[..., :-1] / sums[..., -1:]


def merging_attention(
  q: Float[Array, "B T N H"], k: Float[Array, "B T K H"], v: Float[Array, "B T K H"], z: Float[Array, "B K T"],
  omega: Float[Array, "B K T"], window: int, segment_ids: Int[Array, "B T"] | None = None,
) -> Float[Array, "B T N H"]:  # fmt: skip
  """Attention to the window's tokens and to the slots of the tokens before, as the module describes.

  Args:
    z: float32, logits of the relaxed decisions, alpha = sigmoid(z); not the z_j of the module.
    omega: float32, importances, positive.
    window: W in tokens.
    segment_ids: documents that do not see each other, in contiguous runs.
  """
  b, t, n, h = q.shape
  heads = k.shape[2]
  starts = _starts(b, t, segment_ids)[:, None]
  alpha = jnp.where(starts, 0.0, jax.nn.sigmoid(z))
  slot_k, slot_v = (slots(x, alpha, omega).astype(x.dtype) for x in (k, v))
  # log(1 - alpha) of the next token; that of a document's first token is about no slot of the document before
  replaced = jnp.where(starts, 0.0, jax.nn.log_sigmoid(-z))
  replaced = jnp.concatenate([replaced[..., 1:], jnp.zeros_like(replaced[..., :1])], axis=-1)
  grouped = q.reshape(b, t, heads, n // heads, h)

  def each(queries):
    mine = jnp.take(grouped, queries, axis=1, mode="clip")
    age = queries[:, None] - jnp.arange(t)
    bias = jnp.where(age > window + 1, replaced[:, :, None], 0.0)[:, :, None]
    own = einsum("bqkgh,bskh->bkgqs", mine, k) * h**-0.5
    old = einsum("bqkgh,bskh->bkgqs", mine, slot_k) * h**-0.5 + bias
    seen = visible(queries, segment_ids, t)[:, None, None]
    scores = [jnp.where(seen & (age <= window), own, -jnp.inf), jnp.where(seen & (age > window), old, -jnp.inf)]
    weights = jax.nn.softmax(jnp.concatenate(scores, axis=-1), axis=-1).astype(v.dtype)
    product = lambda weights, values: einsum("bkgqs,bskh->qbkgh", weights, values)
    return product(weights[..., :t], v) + product(weights[..., t:], slot_v)

  return jnp.moveaxis(blocks(each, t), 0, 1).reshape(b, t, n, h).astype(q.dtype)


def _starts(batch: int, length: int, segment_ids: Int[Array, "B T"] | None) -> Bool[Array, "B T"]:
  """Whether each token is the first of its document."""
  first = jnp.broadcast_to(jnp.arange(length) == 0, (batch, length))
  if segment_ids is None:
    return first
  return first | (segment_ids != jnp.roll(segment_ids, 1, axis=1))


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
