"""The losses of the retrofit: distillation or language model, and pressure towards the target compression.

The first is computed from hidden states, chunk by chunk of positions and of the vocabulary: with 128K words the logits
of one row of 4,096 tokens would take 2 GB, and twice that with the teacher's.
"""

from __future__ import annotations

from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from dms_jax.layers import linear

Loss = Literal["reverse_kl", "forward_kl", "lm"]
LOWEST = -1e30  # a running maximum before the first chunk; finite, so that differences are


def kl_divergence(
  student: Float[Array, "*rows V"], teacher: Float[Array, "*rows V"], direction: Literal["reverse", "forward"]
) -> Float[Array, "*rows"]:
  """Nats per position, float32: "reverse" KL(student || teacher), "forward" KL(teacher || student), from logits."""
  log_s, log_t = (jax.nn.log_softmax(x.astype(jnp.float32), axis=-1) for x in (student, teacher))
  p, q = (log_s, log_t) if direction == "reverse" else (log_t, log_s)
  return jnp.sum(jnp.exp(p) * (p - q), axis=-1)


def vocabulary_loss(
  kind: Loss,
  student: Float[Array, "B T D"],
  student_head: Float[Array, "V D"],
  mask: Bool[Array, "B T"],
  *,
  teacher: Float[Array, "B T D"] | None = None,
  teacher_head: Float[Array, "V D"] | None = None,
  targets: Int[Array, "B T"] | None = None,
  chunk: int = 1024,
  vocab_chunk: int = 8192,
  train_head: bool = True,
) -> Float[Array, ""]:
  """Mean over the positions of `mask` of the divergence from the teacher, or of the surprise at `targets`.

  Logits stand in memory for `chunk` positions and `vocab_chunk` words at a time, in float32, and are computed again in
  the backward pass; the result is that of whole logits but for the order of float32 sums.

  Args:
    student, teacher: final hidden states, normed. The teacher gets no gradient, and none is needed for "lm".
    targets: the next tokens, for "lm".
    train_head: False gives the head no gradient, and spends nothing on it.
  """
  width, size = student.shape[-1], mask.size
  chunk = min(chunk, size)
  pad = -size % chunk
  rows = lambda x: jnp.pad(x.reshape(-1, width), ((0, pad), (0, 0))).reshape(-1, chunk, width)
  numbers = lambda x: jnp.pad(x.reshape(-1), (0, pad)).reshape(-1, chunk)
  weights = numbers(mask.astype(jnp.float32))
  weights = weights / jnp.maximum(weights.sum(), 1.0)
  fixed = (None, None) if teacher is None else (rows(teacher), teacher_head)
  constants = lax.stop_gradient((*fixed, None if targets is None else numbers(targets), weights))
  return _chunked(kind, vocab_chunk, train_head, rows(student), student_head, constants)


def _vocabulary(size: int, chunk: int) -> tuple[int, int]:
  """(chunks, words of each): as even as multiples of 128 allow; the last one starts early where it would not fit."""
  count = -(-size // min(chunk, size))
  words = -(-size // count)
  return count, min(size, -(-words // 128) * 128)


def _logits(index: Array, words: int, *pairs: tuple[Array, Array]) -> tuple[Array, Array, list[Array]]:
  """(first word, which words are new, logits float32 [C, words] of each pair of states and head) of chunk `index`."""
  size = pairs[0][1].shape[0]
  start = jnp.minimum(index * words, size - words)
  new = start + jnp.arange(words) >= index * words  # the others were in the chunk before
  cut = [lax.dynamic_slice_in_dim(head, start, words) for _, head in pairs]
  return start, new, [linear(x, head, out_dtype=jnp.float32) for (x, _), head in zip(pairs, cut, strict=True)]


def _pairs(kind: Loss, x, head, constants) -> list[tuple[Array, Array]]:
  """States and heads in the order of KL(first || second)."""
  teacher, teacher_head = constants[:2]
  if kind == "lm":
    return [(x, head)]
  return [(x, head), (teacher, teacher_head)][:: 1 if kind == "reverse_kl" else -1]


def _statistics(kind: Loss, words: tuple[int, int], x, head, constants) -> tuple[Array, list[Array]]:
  """Loss of each of C positions, and its log-sum-exp [C] under each pair's logits, by one pass over the vocabulary.

  A divergence is held relative to the running maxima m of the two models' logits, so that nothing large cancels:
  u = sum exp(a - m_a) ((a - m_a) - (b - m_b)). For "lm", u is the target's logit.
  """
  pairs, targets = _pairs(kind, x, head, constants), constants[2]
  zeros = jnp.zeros(x.shape[0], jnp.float32)

  def step(carry, index):
    tops, sums, u = carry
    start, new, logits = _logits(index, words[1], *pairs)
    logits = [jnp.where(new, y, -jnp.inf) for y in logits]
    higher = [jnp.maximum(m, y.max(axis=1)) for m, y in zip(tops, logits, strict=True)]
    centred = [y - m[:, None] for y, m in zip(logits, higher, strict=True)]
    scale = [jnp.exp(m - h) for m, h in zip(tops, higher, strict=True)]
    weights = [jnp.exp(y) for y in centred]
    if kind == "lm":
      here = start + jnp.arange(words[1]) == targets[:, None]
      u = u + jnp.sum(jnp.where(here & new, logits[0], 0.0), axis=1)
    else:
      moved = (higher[1] - tops[1]) - (higher[0] - tops[0])
      gap = jnp.where(new, centred[0] - centred[1], 0.0)
      u = scale[0] * (u + sums[0] * moved) + jnp.sum(weights[0] * gap, axis=1)
    sums = [a * z + w.sum(axis=1) for a, z, w in zip(scale, sums, weights, strict=True)]
    return (higher, sums, u), None

  init = ([zeros + LOWEST for _ in pairs], [zeros for _ in pairs], zeros)
  (tops, sums, u), _ = lax.scan(step, init, jnp.arange(words[0]))
  logs = [jnp.log(z) for z in sums]
  losses = tops[0] + logs[0] - u if kind == "lm" else u / sums[0] - logs[0] + logs[1]
  return losses, [m + z for m, z in zip(tops, logs, strict=True)]


@partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _chunked(kind: Loss, vocab_chunk: int, train_head: bool, x, head, constants) -> Array:
  """Weighted sum of losses; x [P, C, D]; constants: teacher [P, C, D] or None, its head, targets and weights [P, C]."""
  return _forward(kind, vocab_chunk, train_head, x, head, constants)[0]


def _forward(kind: Loss, vocab_chunk: int, train_head: bool, x, head, constants) -> tuple[Array, Any]:
  words, (teacher, teacher_head, targets, weights) = _vocabulary(head.shape[0], vocab_chunk), constants

  def part(total, xs):
    x, teacher, targets, weights = xs
    losses, logs = _statistics(kind, words, x, head, (teacher, teacher_head, targets))
    return total + jnp.sum(weights * losses), (losses, logs)

  total, statistics = lax.scan(part, jnp.float32(0), (x, teacher, targets, weights))
  return total, (x, head, constants, statistics)


def _backward(kind: Loss, vocab_chunk: int, train_head: bool, saved, cotangent) -> tuple:
  x, head, (teacher, teacher_head, targets, weights), statistics = saved
  words = _vocabulary(head.shape[0], vocab_chunk)

  def part(head_grad, xs):
    x, teacher, targets, weights, (losses, logs) = xs
    pairs = _pairs(kind, x, head, (teacher, teacher_head))

    def step(carry, index):
      x_grad, head_grad = carry
      start, new, logits = _logits(index, words[1], *pairs)
      logp = [y - z[:, None] for y, z in zip(logits, logs, strict=True)]
      if kind == "lm":
        here = start + jnp.arange(words[1]) == targets[:, None]
        g = jnp.exp(logp[0]) - here.astype(jnp.float32)
      elif kind == "reverse_kl":
        g = jnp.exp(logp[0]) * (logp[0] - logp[1] - losses[:, None])
      else:
        g = jnp.exp(logp[1]) - jnp.exp(logp[0])
      # Rounded like the activations it meets: a float32 product would be many times slower on an accelerator.
      g = jnp.where(new, g * (cotangent * weights)[:, None], 0.0).astype(x.dtype)
      rows = lax.dynamic_slice_in_dim(head, start, words[1])
      x_grad = x_grad + linear(g, rows.T, out_dtype=jnp.float32)
      if train_head:
        update = lax.dynamic_slice_in_dim(head_grad, start, words[1]) + linear(g.T, x.T, out_dtype=jnp.float32)
        head_grad = lax.dynamic_update_slice_in_dim(head_grad, update, start, 0)
      return (x_grad, head_grad), None

    init = (jnp.zeros(x.shape, jnp.float32), head_grad)
    (x_grad, head_grad), _ = lax.scan(step, init, jnp.arange(words[0]))
    return head_grad, x_grad.astype(x.dtype)

  init = jnp.zeros(head.shape, jnp.float32) if train_head else None
  head_grad, x_grad = lax.scan(part, init, (x, teacher, targets, weights, statistics))
  return x_grad, None if head_grad is None else head_grad.astype(head.dtype), None


_chunked.defvjp(_forward, _backward)


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
