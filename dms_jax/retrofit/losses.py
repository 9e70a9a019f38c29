"""The losses of the retrofit: distillation or language model, and pressure towards the target compression.

The first is computed from hidden states, chunk by chunk of positions and of the vocabulary: with 128K words the logits
of one row of 4,096 tokens would take 2 GB, and twice that with the teacher's. Under a mesh each device takes its own
rows, and of the vocabulary its own words.
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
from dms_jax.sharding import row_and_head_axes

Loss = Literal["reverse_kl", "forward_kl", "lm"]
LOWEST = -1e30  # a running maximum before the first chunk; finite, so that differences are


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
) -> Float[Array, ""]:
  """Mean over the positions of `mask` of the divergence from the teacher, or of the surprise at `targets`.

  Logits stand in memory for `chunk` positions and `vocab_chunk` words at a time, in float32, and are computed again in
  the backward pass; the result is that of whole logits but for the order of float32 sums.

  Args:
    student, teacher: final hidden states, normed. The teacher gets no gradient, and none is needed for "lm".
    targets: the next tokens, for "lm".
    train_head: False gives the head no gradient, and spends nothing on it.
  """
  weights = mask.astype(jnp.float32)
  weights = weights / jnp.maximum(weights.sum(), 1.0)
  constants = lax.stop_gradient((teacher, teacher_head, targets, weights))
  return _chunked(kind, chunk, vocab_chunk, train_head, student, student_head, constants)


@dataclasses.dataclass(frozen=True)
class _Split:
  """The mesh axes that split the rows, and the one that splits the vocabulary."""

  rows: tuple[str, ...] = ()
  words: str | None = None

  def first_word(self, head: Array) -> Array | int:
    return lax.axis_index(self.words) * head.shape[0] if self.words else 0


def _on_shards(function: Callable, specs: Callable[[_Split], tuple], x: Array, head: Array, constants, *args):
  """`function(split, x, head, constants, *args)`: each device its rows and words under a mesh, else all at once.

  `specs` gives the partitions of `args`, as a tuple, and of the results.
  """
  axes = row_and_head_axes(x.shape[0], head.shape[0])
  if axes is None:
    return function(_Split(), x, head, constants, *args)
  split = _Split(*axes)
  rows, words = P(split.rows), P(split.words)
  more, out = specs(split)
  in_specs = (rows, words, (rows, words, rows, rows), *more)
  # By hand inside the rule for gradients: nothing is differentiated through the mesh.
  call = jax.shard_map(partial(function, split), in_specs=in_specs, out_specs=out, check_vma=False)
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


def _statistics(split: _Split, kind: Loss, vocab_chunk: int, x, head, constants) -> tuple[Array, list[Array]]:
  """Loss of each of C positions, and its log-sum-exp [C] under each pair's logits, by one pass over the vocabulary.

  A divergence is held relative to the running maxima m of the two models' logits, so that nothing large cancels:
  u = sum exp(a - m_a) ((a - m_a) - (b - m_b)). For "lm", u is the target's logit.
  """
  pairs, targets, words = _pairs(kind, x, head, constants), constants[2], _vocabulary(head.shape[0], vocab_chunk)
  first = split.first_word(head)
  zeros = jnp.zeros(x.shape[0], jnp.float32)

  def relative(u, tops, higher, scale, sums):
    moved = (higher[1] - tops[1]) - (higher[0] - tops[0])
    return scale[0] * (u + sums[0] * moved)

  def step(carry, index):
    tops, sums, u = carry
    start, new, logits = _logits(index, words[1], *pairs)
    logits = [jnp.where(new, y, -jnp.inf) for y in logits]
    higher = [jnp.maximum(m, y.max(axis=1)) for m, y in zip(tops, logits, strict=True)]
    centred = [y - m[:, None] for y, m in zip(logits, higher, strict=True)]
    scale = [jnp.exp(m - h) for m, h in zip(tops, higher, strict=True)]
    weights = [jnp.exp(y) for y in centred]
    if kind == "lm":
      here = first + start + jnp.arange(words[1]) == targets[:, None]
      u = u + jnp.sum(jnp.where(here & new, logits[0], 0.0), axis=1)
    else:
      gap = jnp.where(new, centred[0] - centred[1], 0.0)
      u = relative(u, tops, higher, scale, sums) + jnp.sum(weights[0] * gap, axis=1)
    sums = [a * z + w.sum(axis=1) for a, z, w in zip(scale, sums, weights, strict=True)]
    return (higher, sums, u), None

  init = ([zeros + LOWEST for _ in pairs], [zeros for _ in pairs], zeros)
  (tops, sums, u), _ = lax.scan(step, init, jnp.arange(words[0]))
  if split.words:
    highest = [lax.pmax(m, split.words) for m in tops]
    scale = [jnp.exp(m - h) for m, h in zip(tops, highest, strict=True)]
    u = lax.psum(u if kind == "lm" else relative(u, tops, highest, scale, sums), split.words)
    tops, sums = highest, [lax.psum(a * z, split.words) for a, z in zip(scale, sums, strict=True)]
  logs = [jnp.log(z) for z in sums]
  losses = tops[0] + logs[0] - u if kind == "lm" else u / sums[0] - logs[0] + logs[1]
  return losses, [m + z for m, z in zip(tops, logs, strict=True)]


@partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2, 3))
def _chunked(kind: Loss, chunk: int, vocab_chunk: int, train_head: bool, x, head, constants) -> Array:
  """Weighted sum of losses; x [B, T, D]; constants: teacher [B, T, D] or None, its head, targets and weights [B, T]."""
  return _forward(kind, chunk, vocab_chunk, train_head, x, head, constants)[0]


def _forward(kind: Loss, chunk: int, vocab_chunk: int, train_head: bool, x, head, constants) -> tuple[Array, Any]:
  def shard(split, x, head, constants):
    teacher, teacher_head, targets, weights = constants

    def part(total, xs):
      x, teacher, targets, weights = xs
      losses, logs = _statistics(split, kind, vocab_chunk, x, head, (teacher, teacher_head, targets))
      return total + jnp.sum(weights * losses), (losses, logs)

    total, statistics = lax.scan(part, jnp.float32(0), tuple(_in_chunks(chunk, x, teacher, targets, weights)))
    return lax.psum(total, split.rows) if split.rows else total, statistics

  total, statistics = _on_shards(shard, lambda split: ((), (P(), P(split.rows))), x, head, constants)
  return total, (x, head, constants, statistics)


def _backward(kind: Loss, chunk: int, vocab_chunk: int, train_head: bool, saved, cotangent) -> tuple:
  x, head, constants, statistics = saved

  def scattered(split: _Split) -> str | tuple[str, ...] | None:
    """Mesh axes over which each device keeps a part of the width of the head's gradient, already summed."""
    count = math.prod(jax.sharding.get_abstract_mesh().shape[name] for name in split.rows)
    return split.rows if split.rows and head.shape[1] % count == 0 else None

  def shard(split, x, head, constants, statistics, cotangent):
    teacher, teacher_head, targets, weights = constants
    words, first = _vocabulary(head.shape[0], vocab_chunk), split.first_word(head)

    def part(head_grad, xs):
      x, teacher, targets, weights, (losses, logs) = xs
      pairs = _pairs(kind, x, head, (teacher, teacher_head))

      def step(carry, index):
        x_grad, head_grad = carry
        start, new, logits = _logits(index, words[1], *pairs)
        logp = [y - z[:, None] for y, z in zip(logits, logs, strict=True)]
        if kind == "lm":
          here = first + start + jnp.arange(words[1]) == targets[:, None]
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
      x_grad = lax.psum(x_grad, split.words) if split.words else x_grad
      return head_grad, x_grad.astype(x.dtype)

    init = jnp.zeros(head.shape, jnp.float32) if train_head else None
    chunks = (*_in_chunks(chunk, x, teacher, targets, weights), statistics)
    head_grad, x_grad = lax.scan(part, init, chunks)
    if train_head and split.rows:
      width = scattered(split)
      scatter = partial(lax.psum_scatter, scatter_dimension=1, tiled=True)
      head_grad = scatter(head_grad, width) if width else lax.psum(head_grad, split.rows)
    x_grad = x_grad.reshape(-1, x.shape[-1])[: x.shape[0] * x.shape[1]].reshape(x.shape)
    return x_grad, None if head_grad is None else head_grad.astype(head.dtype)

  specs = lambda split: ((P(split.rows), P()), (P(split.rows), P(split.words, scattered(split))))
  x_grad, head_grad = _on_shards(shard, specs, x, head, constants, statistics, cotangent)
  return x_grad, head_grad, None


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
