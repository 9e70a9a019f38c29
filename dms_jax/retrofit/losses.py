"""The two losses of the retrofit: distillation against the original, and pressure towards the target compression."""

from __future__ import annotations

from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from dms_jax.layers import linear


def kl_divergence(
  student: Float[Array, "*rows V"], teacher: Float[Array, "*rows V"], direction: Literal["reverse", "forward"]
) -> Float[Array, "*rows"]:
  """Nats per position, float32: "reverse" KL(student || teacher), "forward" KL(teacher || student), from logits."""
  log_s, log_t = (jax.nn.log_softmax(x.astype(jnp.float32), axis=-1) for x in (student, teacher))
  p, q = (log_s, log_t) if direction == "reverse" else (log_t, log_s)
  return jnp.sum(jnp.exp(p) * (p - q), axis=-1)


def distillation_loss(
  student: Float[Array, "B T D"],
  teacher: Float[Array, "B T D"],
  student_head: Float[Array, "V D"],
  teacher_head: Float[Array, "V D"],
  mask: Bool[Array, "B T"],
  *,
  direction: Literal["reverse", "forward"] = "reverse",
  chunk: int = 1024,
) -> Float[Array, ""]:
  """Mean KL over the positions of `mask`, from final normed hidden states.

  Logits exist for `chunk` positions at a time and are recomputed in the backward pass, so B x T x V never stands in
  memory. The teacher gets no gradient.
  """
  width = student.shape[-1]
  chunk = min(chunk, mask.size)
  pad = -mask.size % chunk
  flat = lambda x: jnp.pad(x.reshape(-1, width), ((0, pad), (0, 0))).reshape(-1, chunk, width)
  teacher, teacher_head = jax.lax.stop_gradient((teacher, teacher_head))
  weights = jnp.pad(mask.reshape(-1).astype(jnp.float32), (0, pad)).reshape(-1, chunk)

  @jax.checkpoint
  def part(total, xs):
    s, t, w = xs
    s_logits, t_logits = (linear(x, head, out_dtype=jnp.float32) for x, head in ((s, student_head), (t, teacher_head)))
    return total + jnp.sum(w * kl_divergence(s_logits, t_logits, direction)), None

  total, _ = jax.lax.scan(part, jnp.float32(0), (flat(student), flat(teacher), weights))
  return total / jnp.maximum(weights.sum(), 1.0)


def hard_decisions(z: Float[Array, "..."]) -> Float[Array, "..."]:
  """1 where z > 0, else 0, with the gradient of sigmoid(z)."""
  soft = jax.nn.sigmoid(z)
  return jax.lax.stop_gradient((z > 0).astype(z.dtype) - soft) + soft


def evicted_fraction(z: Float[Array, "L B K T"], mask: Bool[Array, "B T"]) -> Float[Array, "B"]:
  """Share of hard decisions that evict, a row: mean over layers, heads and the row's real positions."""
  count = jnp.maximum(mask.sum(axis=1), 1) * (z.shape[0] * z.shape[2])
  hard = jnp.where(mask[None, :, None], hard_decisions(z), 0.0)
  return hard.sum(axis=(0, 2, 3)) / count.astype(z.dtype)


def compression_loss(fraction: Float[Array, "B"], cr: Float[Array, ""]) -> Float[Array, ""]:
  """Mean over rows of relu((1 - 1/CR) - evicted fraction): one-sided, pays nothing for evicting more."""
  return jnp.mean(jax.nn.relu((1.0 - 1.0 / cr) - fraction))
