"""The objective "trimkv": each token's retention, learned under a soft capacity (arXiv 2512.03324).

The student attends with retention-gated attention (`decay.decay_attention`). It is distilled from the original model
and predicts the next token. The capacity loss of each layer and KV head,

    1/T sum over t of max(0, sum over i <= t of beta_i^(t - i) - M) / t,

is averaged over layers, heads and rows; t counts from 1 in each document. The paper trains gates alone, with a forward
KL (`loss.kind=forward_kl`), all weights 1, learning rate 2e-4, weight decay 0.01 and, for mathematics, M of 512 tokens.
Its gates are MLPs with 512 hidden units and a large bias, so that nothing decays at first: 18 in the paper, 10 by
default in the released code. Here it is 10 (`dms.offset=-10`): at 18 the sigmoid's slope is 1.5e-8, which AdamW's
epsilon swallows where texts are short. The gate has a norm of its own, in place of the attention's, and low-rank
updates may be trained as well. Gates tied across layers with one capacity for all (2605.09649) are not part of this.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from dms_jax.decoder import Model
from dms_jax.gates import gate_logits
from dms_jax.model import segment_positions
from dms_jax.retrofit.batch import Batch, real_tokens, run, text_loss
from dms_jax.retrofit.config import RetrofitConfig
from dms_jax.retrofit.decay import decay_attention, soft_sizes


def capacity_loss(
  sizes: Float[Array, "L B K T"], position: Int[Array, "B T"], real: Bool[Array, "B T"], capacity: float
) -> Float[Array, ""]:
  """Mean over layers, heads and real tokens of max(0, size - capacity) / t.

  Args:
    sizes: soft cache sizes, in tokens.
    position: each token's in its document, from 0; t is one more.
    capacity: M, in tokens.
  """
  over = jax.nn.relu(sizes - capacity) / (position + 1).astype(sizes.dtype)[:, None]
  count = jnp.maximum(jnp.sum(real), 1).astype(sizes.dtype) * (sizes.shape[0] * sizes.shape[2])
  return jnp.sum(jnp.where(real[:, None], over, 0.0)) / count


def loss_fn(
  student: Model, teacher: Model, batch: Batch, config: RetrofitConfig
) -> tuple[Float[Array, ""], dict[str, Array]]:
  """Distillation, language-model and capacity loss, and the metrics for the log."""
  ids, real = batch.segment_ids, real_tokens(batch)

  def attention(layer, x, q, k, v):
    log_beta = jax.nn.log_sigmoid(gate_logits(student.config, student.dms, layer, x, q))
    return decay_attention(q, k, v, log_beta, ids), (soft_sizes(log_beta, ids), log_beta)

  hidden, (sizes, log_beta) = run(student, batch, config, attention=attention)
  position = jnp.broadcast_to(jnp.arange(real.shape[1]), real.shape) if ids is None else segment_positions(ids)
  over = capacity_loss(sizes, position, real, float(config.trimkv.capacity))
  loss, metrics = config.loss.compression_weight * over, {"capacity_loss": over}
  weights = {"nll": 1.0} if config.loss.kind == "lm" else {"kl": 1.0, "nll": config.trimkv.lm_weight}
  for name, weight in weights.items():
    if weight:
      metrics[name] = text_loss("lm" if name == "nll" else config.loss.kind, hidden, student, teacher, batch, config)
      loss = loss + weight * metrics[name]
  seen = (position + 1).astype(jnp.float32)[:, None]
  share = jnp.where(real[:, None], jnp.minimum(sizes, config.trimkv.capacity) / seen, 0.0)
  beta = jnp.where(real[:, None], jnp.exp(log_beta), 0.0)
  count = jnp.maximum(jnp.sum(real), 1).astype(jnp.float32) * (sizes.shape[0] * sizes.shape[2])
  return loss, metrics | {
    "soft_tokens": jnp.sum(jnp.where(real[:, None], sizes, 0.0)) / count,
    "soft_share": jnp.sum(share) / count,
    "retention": jnp.sum(beta) / count,
  }
