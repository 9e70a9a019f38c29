"""The losses of the retrofit: distillation or language model, and compression.

The distillation or language-model loss is computed from hidden states, in chunks of positions and of the vocabulary.
With a vocabulary of 128K, whole logits of one row of 4,096 tokens would take 2 GB, and the teacher's as much again.
Under a mesh each device computes its own rows and its own part of the vocabulary.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Float, Int

from dms_jax.layers import linear
from dms_jax.metrics import kl_divergence as kl_divergence
from dms_jax.sharding import row_and_head_axes, shard_map
from pallas_kernels.common.softmax import soft_capped

Loss = Literal["reverse_kl", "forward_kl", "lm"]
LOWEST = -1e30  # the initial running maximum; finite, so that differences of maxima are finite


def vocabulary_loss(
  kind: Loss,
  student: Float[Array, "B T D"],
  student_head: Float[Array, "V D"],
  mask: Bool[Array, "B T"],
  *,
  teacher: Float[Array, "B T D"] | None = None,
  teacher_head: Float[Array, "V D"] | None = None,
  targets: Int[Array, "B T"] | None = None,
  chunk: int = 4096,
  vocab_chunk: int = 8192,
  train_head: bool = True,
  softcap: float | None = None,
) -> Float[Array, ""]:
  """Mean loss in nats over the positions of `mask`: divergence from the teacher, or -log p(target) for "lm".

  Logits exist for `chunk` positions and `vocab_chunk` tokens of the vocabulary at a time, in float32, and are computed
  again in the backward pass. The result differs from that of whole logits only by the order of float32 sums.

  Args:
    student, teacher: hidden states after the final norm. The teacher gets no gradient; "lm" has no teacher.
    student_head, teacher_head: output projections.
    mask: the positions that count.
    targets: the next tokens, for "lm".
    chunk, vocab_chunk: positions and tokens of the vocabulary at a time.
    train_head: whether the student's head gets a gradient; False saves its cost.
    softcap: `ModelConfig.logit_softcap`, of both models.
  """
  weights = mask.astype(jnp.float32)
  weights = weights / jnp.maximum(weights.sum(), 1.0)
  constants = lax.stop_gradient((teacher, teacher_head, targets, weights))
  return _chunked(kind, chunk, vocab_chunk, train_head, softcap, student, student_head, constants)


@dataclasses.dataclass(frozen=True)
class _Split:
  """The mesh axes that split the rows, and the one that splits the vocabulary."""

  rows: tuple[str, ...] = ()
  vocab: str | None = None

  def first_token(self, head: Array) -> Array | int:
    """Id of the first token of this device's part of the vocabulary."""
    return lax.axis_index(self.vocab) * head.shape[0] if self.vocab else 0


def _on_shards(function: Callable, specs: Callable[[_Split], tuple], x: Array, head: Array, constants, *args):
  """`function(split, x, head, constants, *args)`; under a mesh each device computes its rows and its vocabulary.

  `specs(split)` gives the partitions of `args`, as a tuple, and of the results.
  """
  axes = row_and_head_axes(x.shape[0], head.shape[0])
  if axes is None:
    return function(_Split(), x, head, constants, *args)
  split = _Split(*axes)
  rows, vocab = P(split.rows), P(split.vocab)
  more, out = specs(split)
  in_specs = (rows, vocab, (rows, vocab, rows, rows), *more)
  # `_chunked` defines the gradient, so nothing is differentiated through shard_map.
  call = shard_map(partial(function, split), in_specs=in_specs, out_specs=out)
  return call(x, head, constants, *args)


def _in_chunks(chunk: int, *arrays: Array | None) -> list[Array | None]:
  """Arrays [B, T, ...] as [P, C, ...]: the positions of all rows end to end, and zeros to fill the last chunk."""

  def cut(x):
    size = x.shape[0] * x.shape[1]
    x = x.reshape(size, *x.shape[2:])
    x = jnp.pad(x, ((0, -size % min(chunk, size)), *((0, 0),) * (x.ndim - 1)))
    return x.reshape(-1, min(chunk, size), *x.shape[1:])

  return [None if x is None else cut(x) for x in arrays]


def _vocabulary(size: int, chunk: int) -> tuple[int, int]:
  """(number of chunks, tokens of each): chunks are as even as multiples of 128 allow.

  The last chunk overlaps the one before it if `size` is not a multiple of their tokens.
  """
  count = -(-size // min(chunk, size))
  width = -(-size // count)
  return count, min(size, -(-width // 128) * 128)


def _logits(
  index: Array, width: int, softcap: float | None, *pairs: tuple[Array, Array]
) -> tuple[Array, Array, list[Array]]:
  """Chunk `index` of the vocabulary for C positions.

  Returns:
    (id of the chunk's first token, bool [width]: which tokens no earlier chunk had, logits float32 [C, width] of each
    pair of states and head).
  """
  size = pairs[0][1].shape[0]
  start = jnp.minimum(index * width, size - width)
  new = start + jnp.arange(width) >= index * width  # others were in the chunk before
  cut = [lax.dynamic_slice_in_dim(head, start, width) for _, head in pairs]
  logits = [linear(x, head, out_dtype=jnp.float32) for (x, _), head in zip(pairs, cut, strict=True)]
  return start, new, [soft_capped(y, softcap) for y in logits]


def _pairs(kind: Loss, x, head, constants) -> list[tuple[Array, Array]]:
  """States and heads in the order of KL(first || second)."""
  teacher, teacher_head = constants[:2]
  if kind == "lm":
    return [(x, head)]
  return [(x, head), (teacher, teacher_head)][:: 1 if kind == "reverse_kl" else -1]


def _statistics(
  split: _Split, kind: Loss, vocab_chunk: int, softcap: float | None, x, head, constants
) -> tuple[Array, list[Array]]:
  """Losses of C positions, and the log-sum-exp [C] of each pair's logits, in one pass over the vocabulary.

  A divergence is accumulated relative to the running maxima m of the two models' logits, so that no large terms cancel:
  u = sum exp(a - m_a) ((a - m_a) - (b - m_b)). For "lm", u is the target's logit.
  """
  pairs, targets = _pairs(kind, x, head, constants), constants[2]
  count, width = _vocabulary(head.shape[0], vocab_chunk)
  first = split.first_token(head)
  zeros = jnp.zeros(x.shape[0], jnp.float32)

  def relative(u, tops, higher, scale, sums):
    moved = (higher[1] - tops[1]) - (higher[0] - tops[0])
    return scale[0] * (u + sums[0] * moved)

  def step(carry, index):
    tops, sums, u = carry
    start, new, logits = _logits(index, width, softcap, *pairs)
    logits = [jnp.where(new, y, -jnp.inf) for y in logits]
    higher = [jnp.maximum(m, y.max(axis=1)) for m, y in zip(tops, logits, strict=True)]
    centred = [y - m[:, None] for y, m in zip(logits, higher, strict=True)]
    scale = [jnp.exp(m - h) for m, h in zip(tops, higher, strict=True)]
    weights = [jnp.exp(y) for y in centred]
    if kind == "lm":
      here = first + start + jnp.arange(width) == targets[:, None]
      u = u + jnp.sum(jnp.where(here & new, logits[0], 0.0), axis=1)
    else:
      gap = jnp.where(new, centred[0] - centred[1], 0.0)
      u = relative(u, tops, higher, scale, sums) + jnp.sum(weights[0] * gap, axis=1)
    sums = [a * z + w.sum(axis=1) for a, z, w in zip(scale, sums, weights, strict=True)]
    return (higher, sums, u), None

  init = ([zeros + LOWEST for _ in pairs], [zeros for _ in pairs], zeros)
  (tops, sums, u), _ = lax.scan(step, init, jnp.arange(count))
  if split.vocab:
    highest = [lax.pmax(m, split.vocab) for m in tops]
    scale = [jnp.exp(m - h) for m, h in zip(tops, highest, strict=True)]
    u = lax.psum(u if kind == "lm" else relative(u, tops, highest, scale, sums), split.vocab)
    tops, sums = highest, [lax.psum(a * z, split.vocab) for a, z in zip(scale, sums, strict=True)]
  logs = [jnp.log(z) for z in sums]
  losses = tops[0] + logs[0] - u if kind == "lm" else u / sums[0] - logs[0] + logs[1]
  return losses, [m + z for m, z in zip(tops, logs, strict=True)]


@partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2, 3, 4))
def _chunked(
  kind: Loss, chunk: int, vocab_chunk: int, train_head: bool, softcap: float | None, x, head, constants
) -> Array:
  """Weighted sum of losses; x [B, T, D]; constants: teacher [B, T, D] or None, its head, targets and weights [B, T]."""
  return _forward(kind, chunk, vocab_chunk, train_head, softcap, x, head, constants)[0]


def _forward(
  kind: Loss, chunk: int, vocab_chunk: int, train_head: bool, softcap: float | None, x, head, constants
) -> tuple[Array, Any]:
  def shard(split, x, head, constants):
    teacher, teacher_head, targets, weights = constants

    def part(total, xs):
      x, teacher, targets, weights = xs
      losses, logs = _statistics(split, kind, vocab_chunk, softcap, x, head, (teacher, teacher_head, targets))
      return total + jnp.sum(weights * losses), (losses, logs)

    total, statistics = lax.scan(part, jnp.float32(0), tuple(_in_chunks(chunk, x, teacher, targets, weights)))
    return lax.psum(total, split.rows) if split.rows else total, statistics

  total, statistics = _on_shards(shard, lambda split: ((), (P(), P(split.rows))), x, head, constants)
  return total, (x, head, constants, statistics)


def _backward(
  kind: Loss, chunk: int, vocab_chunk: int, train_head: bool, softcap: float | None, saved, cotangent
) -> tuple:
  x, head, constants, statistics = saved

  def scattered(split: _Split) -> str | tuple[str, ...] | None:
    """Mesh axes that split the summed gradient of the head by D; None where they do not divide it."""
    devices = math.prod(jax.sharding.get_abstract_mesh().shape[name] for name in split.rows)
    return split.rows if split.rows and head.shape[1] % devices == 0 else None

  def shard(split, x, head, constants, statistics, cotangent):
    teacher, teacher_head, targets, weights = constants
    count, width = _vocabulary(head.shape[0], vocab_chunk)
    first = split.first_token(head)

    def part(head_grad, xs):
      x, teacher, targets, weights, (losses, logs) = xs
      pairs = _pairs(kind, x, head, (teacher, teacher_head))

      def step(carry, index):
        x_grad, head_grad = carry
        start, new, logits = _logits(index, width, softcap, *pairs)
        logp = [y - z[:, None] for y, z in zip(logits, logs, strict=True)]
        if kind == "lm":
          here = first + start + jnp.arange(width) == targets[:, None]
          g = jnp.exp(logp[0]) - here.astype(jnp.float32)
        elif kind == "reverse_kl":
          g = jnp.exp(logp[0]) * (logp[0] - logp[1] - losses[:, None])
        else:
          g = jnp.exp(logp[1]) - jnp.exp(logp[0])
        if softcap is not None:  # the slope of the cap, at the student's logits
          g = g * (1 - jnp.square(logits[1 if kind == "forward_kl" else 0] / softcap))
        # Rounded like the activations that it multiplies: a float32 product would be many times slower on a GPU or TPU.
        g = jnp.where(new, g * (cotangent * weights)[:, None], 0.0).astype(x.dtype)
        rows = lax.dynamic_slice_in_dim(head, start, width)
        x_grad = x_grad + linear(g, rows.T, out_dtype=jnp.float32)
        if train_head:
          update = lax.dynamic_slice_in_dim(head_grad, start, width) + linear(g.T, x.T, out_dtype=jnp.float32)
          head_grad = lax.dynamic_update_slice_in_dim(head_grad, update, start, 0)
        return (x_grad, head_grad), None

      init = (jnp.zeros(x.shape, jnp.float32), head_grad)
      (x_grad, head_grad), _ = lax.scan(step, init, jnp.arange(count))
      x_grad = lax.psum(x_grad, split.vocab) if split.vocab else x_grad
      return head_grad, x_grad.astype(x.dtype)

    init = jnp.zeros(head.shape, jnp.float32) if train_head else None
    chunks = (*_in_chunks(chunk, x, teacher, targets, weights), statistics)
    head_grad, x_grad = lax.scan(part, init, chunks)
    if train_head and split.rows:
      axes = scattered(split)
      scatter = partial(lax.psum_scatter, scatter_dimension=1, tiled=True)
      head_grad = scatter(head_grad, axes) if axes else lax.psum(head_grad, split.rows)
    x_grad = x_grad.reshape(-1, x.shape[-1])[: x.shape[0] * x.shape[1]].reshape(x.shape)
    return x_grad, None if head_grad is None else head_grad.astype(head.dtype)

  specs = lambda split: ((P(split.rows), P()), (P(split.rows), P(split.vocab, scattered(split))))
  x_grad, head_grad = _on_shards(shard, specs, x, head, constants, statistics, cotangent)
  return x_grad, head_grad, None


_chunked.defvjp(_forward, _backward)


def hard_decisions(z: Float[Array, "..."]) -> Float[Array, "..."]:
  """1 where z > 0, otherwise 0, with the gradient of sigmoid(z): a straight-through estimator."""
  soft = jax.nn.sigmoid(z)
  return jax.lax.stop_gradient((z > 0).astype(z.dtype) - soft) + soft


def evicted_fraction(z: Float[Array, "L B K T"], mask: Bool[Array, "B T"]) -> Float[Array, "B"]:
  """Share of each row's hard decisions that evict, over layers, heads and the row's real positions."""
  count = jnp.maximum(mask.sum(axis=1), 1) * (z.shape[0] * z.shape[2])
  hard = jnp.where(mask[None, :, None], hard_decisions(z), 0.0)
  return hard.sum(axis=(0, 2, 3)) / count.astype(z.dtype)


def held_target(cr: Float[Array, "*rows"], mask: Bool[Array, "B T"], window: int) -> Float[Array, "B"]:
  """Share of decisions to evict that leaves 1/CR of each row's n real tokens held at its end.

  The last W + 1 are held whatever is decided, so that it is (n - n/CR) / (n - W - 1), and 1 at most; 0 for a row within
  the window. A row of several documents counts as one text.
  """
  tokens = mask.sum(axis=1).astype(jnp.float32)
  outside = tokens - (window + 1)
  share = (tokens - tokens / cr) / jnp.maximum(outside, 1.0)
  return jnp.where(outside > 0, jnp.minimum(share, 1.0), 0.0)


def compression_loss(
  fraction: Float[Array, "B"], cr: Float[Array, "*rows"], target: Float[Array, "B"] | None = None
) -> Float[Array, ""]:
  """Mean over rows of relu(target - evicted fraction); a row that evicts more than that costs nothing.

  Args:
    cr: one number, or one a row [B].
    target: the share to evict; None means 1 - 1/CR.
  """
  target = 1.0 - 1.0 / cr if target is None else target
  return jnp.mean(jax.nn.relu(target - fraction))
