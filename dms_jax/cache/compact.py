"""Compaction: the archive after a chunk of a prompt, when a policy has said which tokens stay.

An archived token that stays keeps its slot, as long as the archive still reaches that far; slots that become free are
filled by the others, in order. So a token moves at most once, and live slots remain one prefix. Where the archive is to
stay in the order of the text, tokens close ranks instead.
"""

from __future__ import annotations

import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Bool, Int


@struct.dataclass
class Moves:
  """Where tokens go. `target` int32 [B, K, X]: the archive slot that each of X candidates moves to, A where it does not
  move or is forgotten. `archived` int32 [B, K]: tokens in the archive afterwards."""

  target: Int[Array, "B K X"]
  archived: Int[Array, "B K"]


def moves(stays: Bool[Array, "B K X"], slots: int, in_order: bool = False) -> Moves:
  """The moves after which the tokens that stay fill the first slots of an archive.

  Args:
    stays: X candidates, of which the first A = `slots` lie in the archive, in its order, and the others enter it.
    in_order: the order of the candidates remains; those that move go to slots that ascend without gaps.
  """
  b, k, count = stays.shape
  archived = jnp.sum(stays, axis=-1, dtype=jnp.int32)
  if in_order:
    place = jnp.cumsum(stays, axis=-1, dtype=jnp.int32) - 1
    return Moves(jnp.where(stays & (place != jnp.arange(count)), jnp.minimum(place, slots), slots), archived)
  used = jnp.arange(count) < archived[..., None]
  settled = stays & used & (jnp.arange(count) < slots)
  hole = used[..., :slots] & ~settled[..., :slots]
  # The n-th hole takes the n-th token that moves.
  rows, heads = jnp.arange(b)[:, None, None], jnp.arange(k)[:, None]
  holes = jnp.full((b, k, count), slots, jnp.int32)
  at = jnp.where(hole, jnp.cumsum(hole, axis=-1) - 1, count)
  holes = holes.at[rows, heads, at].set(jnp.arange(slots, dtype=jnp.int32), mode="drop")
  moving = stays & ~settled
  nth = jnp.where(moving, jnp.cumsum(moving, axis=-1) - 1, count - 1)
  return Moves(jnp.where(moving, jnp.take_along_axis(holes, nth, axis=-1), slots), archived)
