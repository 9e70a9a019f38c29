"""Compaction: the archive after a policy has said which of its tokens stay, or which few go.

After compaction the live slots are a prefix of the archive. An archived token whose slot lies in this prefix keeps it;
the other tokens that stay fill the free slots in order. So a token moves at most once. Where the archive must remain in
text order, tokens close ranks instead.
"""

from __future__ import annotations

import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Bool, Int


@struct.dataclass
class Moves:
  """The moves of a compaction.

  Attributes:
    target: int32 [B, K, X], the archive slot that each of X candidates moves to; A for one that does not move.
    archived: int32 [B, K], tokens in the archive afterwards.
  """

  target: Int[Array, "B K X"]
  archived: Int[Array, "B K"]


def moves(stays: Bool[Array, "B K X"], slots: int, in_order: bool = False) -> Moves:
  """The moves after which the tokens that stay fill the first slots of an archive.

  Args:
    stays: whether each of X candidates stays. The first A candidates are the archive's slots in order, the others are
      tokens that would enter it.
    slots: A, the archive's slots.
    in_order: keep the order of the candidates; those that move go to slots that ascend without gaps.
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


@struct.dataclass
class Closing:
  """How the last tokens of an archive take the places of removed ones.

  Attributes:
    source, target: int32 [..., R], archive slots; R tokens or fewer move, and those that do not have slot A twice.
    removed: int32 [...], tokens removed.
  """

  source: Int[Array, "*heads R"]
  target: Int[Array, "*heads R"]
  removed: Int[Array, "*heads"]


def closing(removed: Int[Array, "*heads R"], archived: Int[Array, "*heads"], slots: int) -> Closing:
  """The moves that close the gaps which removed tokens leave.

  Args:
    removed: archive slots, each once; A for none.
    archived: tokens in the archive before.
    slots: A.
  """
  count = jnp.sum(removed < slots, axis=-1, dtype=jnp.int32)
  after = (archived - count)[..., None]
  last = after + jnp.arange(removed.shape[-1])  # the slots that are free afterwards
  moves = (last < archived[..., None]) & ~jnp.any(last[..., None] == removed[..., None, :], axis=-1)
  source = jnp.sort(jnp.where(moves, last, slots), axis=-1)
  target = jnp.sort(jnp.where(removed < after, removed, slots), axis=-1)
  return Closing(source, target, count)
