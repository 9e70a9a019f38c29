"""R-KV: tokens that are attended to and whose keys are not repeated stay (arXiv 2505.24133)."""

from __future__ import annotations

import jax.numpy as jnp
from flax import struct
from jax import lax
from jaxtyping import Array, Bool, Float

from dms_jax.policies.base import is_whole, per_row, register
from dms_jax.policies.budget import check_number
from dms_jax.policies.periodic import WatchesWindow, closed_ranks, shares
from pallas_kernels.common.xla_dot import einsum

BLOCK = 256  # keys that are compared with all others at once


@register
@struct.dataclass
class RKV(WatchesWindow):
  """Keeps the tokens with the largest `importance` x attention - (1 - `importance`) x redundancy (section 3).

  *Attention* (section 3.2): the last W + 1 = 8 tokens are the observation window, whose queries attend to the tokens
  before it. A KV head takes the largest logit over its query heads, the softmax over tokens, the mean over the window's
  queries, and of this the maximum over `pool` neighbouring tokens.

  *Redundancy* (section 3.3): the cosine similarity of a token's key with the other keys that the head holds, the
  window's included; their mean, and its softmax over tokens. So that the latest of several similar tokens stays, each
  token's similarity to the most recent token that resembles it by more than `threshold` counts as 0.

  `budget` is the paper's B_budget and `buffer` its B_buffer of 128 tokens. The paper's lambda is `importance`, 0.1.

  Where paper and released code differ, or the paper is open, this follows the code: queries are averaged before tokens
  are pooled, the softmax excludes the window, one recent similar token is spared, and pool 7 and threshold 0.5 are its
  numbers. Unlike the code, a token that resembles no other spares none (there it spares the first token held).

  Attributes:
    importance: weight of attention against redundancy (lambda).
    threshold: similarity from which the latest of similar tokens is spared.
    pool: neighbouring tokens over which attention is maximal.
  """

  window: int | None = struct.field(pytree_node=False, default=7)
  importance: float = 0.1
  threshold: float = 0.5
  pool: int = struct.field(pytree_node=False, default=7)

  compact_observes = ("keys",)

  def resolved(self, window):
    policy = super().resolved(window)
    check_number(policy, "importance", 0.0, 1.0)
    check_number(policy, "threshold", -1.0, 1.0)
    if not is_whole(self.pool) or self.pool < 1 or self.pool % 2 == 0:
      raise ValueError(f"RKV: pool={self.pool} must be an odd number of tokens")
    return policy

  def scores(self, candidates):
    attention = jnp.mean(shares(jnp.max(self.logits(candidates), axis=2)), axis=2)
    front, place = closed_ranks(attention, candidates.live, -jnp.inf)
    front = lax.reduce_window(front, -jnp.inf, lax.max, (1, 1, self.pool), (1, 1, 1), "SAME")
    attention = jnp.take_along_axis(front, place, axis=-1)
    similar = mean_similarity(candidates.keys, candidates.held, per_row(self.threshold, 2))
    redundancy = shares(jnp.where(candidates.held, similar, -jnp.inf))
    weight = per_row(self.importance, 2).astype(jnp.float32)
    return weight * attention - (1 - weight) * redundancy


def mean_similarity(
  keys: Float[Array, "B K X H"], held: Bool[Array, "B K X"], threshold: Float[Array, "..."]
) -> Float[Array, "B K X"]:
  """The mean over all held tokens of the cosine of their keys with each token's, float32.

  Each token spares itself and the latest other one whose cosine exceeds `threshold`, [] or [B, 1, 1]: these cosines
  count as 0. Keys are compared in blocks of BLOCK, so the memory grows with X, not with its square.
  """
  keys = jnp.where(held[..., None], keys, 0).astype(jnp.float32)
  length = jnp.sqrt(jnp.sum(keys * keys, axis=-1, keepdims=True))
  unit = keys / jnp.where(length > 0, length, 1)
  count = keys.shape[2]
  blocks = jnp.pad(unit, ((0, 0), (0, 0), (0, -count % BLOCK), (0, 0)))
  index, threshold = jnp.arange(count), threshold[..., None].astype(jnp.float32)

  def block(start, total):
    own = start * BLOCK + jnp.arange(BLOCK)
    cosine = einsum("bkyh,bkxh->bkyx", lax.dynamic_slice_in_dim(blocks, start * BLOCK, BLOCK, 2), unit)
    cosine = jnp.where(own[:, None] == index, 0, cosine)
    others = held[:, :, None] & (own[:, None] != index)
    latest = jnp.max(jnp.where(others & (cosine > threshold), index, -1), axis=-1, keepdims=True)
    return total + jnp.sum(jnp.where(index == latest, 0, cosine), axis=2)

  total = lax.fori_loop(0, blocks.shape[2] // BLOCK, block, jnp.zeros(held.shape, jnp.float32))
  return total / jnp.maximum(jnp.sum(held, axis=-1, keepdims=True), 1).astype(jnp.float32)
