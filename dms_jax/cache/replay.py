"""Replay: a chunk of a prompt retires its tokens one after another, as decode steps would.

A policy whose statistics do not depend on attention (`Policy.replays`) can be asked to `retire` before the chunk
attends. Every query then sees exactly the tokens that it would see if the chunk were read one token at a time, within
the same budget. In each layer the calls of `retire` are a scan over the chunk's tokens.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import jax.numpy as jnp
from flax import struct
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from dms_jax.attention import NEVER
from dms_jax.cache.base import Plan, packed
from dms_jax.cache.compact import closing
from dms_jax.policies import Leaving, Policy, Retired
from dms_jax.policies.base import Stats

if TYPE_CHECKING:
  from dms_jax.cache.chunk import Window
  from dms_jax.cache.ring import LayerCarry, RingCache


@struct.dataclass
class Replayed:
  """The archive after a chunk, and the last query that sees each of XA = X + A tokens, window first, then archive.

  Attributes:
    last: int32 [B, K, XA], position of the last query that sees the token; NEVER if it is not forgotten.
    place: int32 [B, K, XA], the archive slot of each token; A for none.
    archived: int32 [B, K], tokens in the archive.
    stats: float32 [B, K, A] each, of the archive.
  """

  last: Int[Array, "B K XA"]
  place: Int[Array, "B K XA"]
  archived: Int[Array, "B K"]
  stats: Stats


def _retire(policy: Policy, **leaving: Any) -> Retired:
  """`policy.retire` in one layer: adds a leading axis [1] to the arguments and removes it from the answer."""
  one = lambda x: {name: value[None] for name, value in x.items()} if isinstance(x, dict) else x[None]
  tokens = leaving.pop("tokens")
  retired = policy.retire(Leaving(tokens=tokens, **{name: one(value) for name, value in leaving.items()}))
  if retired.merge is not None:
    raise ValueError(f"{type(policy).__name__}: a policy that merges tokens cannot replay a chunk")
  slot = jnp.full_like(retired.keep, -1, jnp.int32) if retired.slot is None else retired.slot
  return Retired(retired.keep[0], slot[0], removed=None if retired.removed is None else retired.removed[0])


def _deaths(victims: Int[Array, "T B K V"], seen: Int[Array, "B"], count: int) -> Int[Array, "B K XA"]:
  """Position of the last query that sees each of `count` tokens; tokens `victims[a]` are forgotten before query a."""
  width, b, heads, _ = victims.shape
  rows, head = jnp.arange(b)[:, None, None], jnp.arange(heads)[:, None]
  before = seen[:, None, None] + jnp.arange(width)[:, None, None, None] - 1
  last = jnp.full((b, heads, count), NEVER, jnp.int32)
  return last.at[rows, head, victims].set(jnp.broadcast_to(before, victims.shape), mode="drop")


def replay(
  cache: RingCache, plan: Plan, policy: Policy, layer, carry: LayerCarry, window: Window, stats: Stats,
  archived: Int[Array, "B K"],
) -> Replayed:  # fmt: skip
  """Retires the tokens that leave the window in a chunk, in order.

  Args:
    stats: statistics of the window's tokens.
    archived: tokens in the archive before the chunk.

  Raises:
    ValueError: the policy merges tokens.
  """
  ring, (b, heads, count) = cache.ring, window.evicted.shape
  slots, width = cache.slots - ring, count - ring
  rows, head, index = jnp.arange(b)[:, None], jnp.arange(heads), jnp.arange(slots)

  def step(state, a):
    archived, owner, of_archive = state
    leaving = {name: stat[..., a] for name, stat in stats.items()}
    retired = _retire(
      policy, evicted=window.evicted[..., a], tokens=(plan.seen + a + 1)[:, None], archived=archived,
      live=index < archived[..., None], stats=leaving, archive_stats=of_archive,
    )  # fmt: skip
    there = ((a < plan.lengths) & window.real[:, a])[:, None]
    keep, appends = there & retired.keep, retired.slot < 0
    target = jnp.where(keep, jnp.where(appends, archived, retired.slot), slots)
    before = jnp.take_along_axis(owner, jnp.where(keep & ~appends, retired.slot, 0)[..., None], -1, mode="clip")
    victim = jnp.where(keep, jnp.where(appends, count + slots, before[..., 0]), jnp.where(there, a, count + slots))
    gaps, victims = None, victim[..., None]
    if retired.removed is not None:
      gaps = closing(jnp.where(there[..., None], retired.removed, slots), archived, slots)
      gone = jnp.take_along_axis(owner, retired.removed, -1, mode="clip")
      gone = jnp.where(there[..., None] & (retired.removed < slots), gone, count + slots)
      victims = jnp.concatenate([victims, gone], axis=-1)

    def put(x, value):
      x = x.at[rows, head, target].set(value, mode="drop")
      if gaps is None:
        return x
      moved = jnp.take_along_axis(x, gaps.source, -1, mode="clip")
      return x.at[rows[..., None], head[:, None], gaps.target].set(moved, mode="drop")

    of_archive = {name: put(stat, leaving[name]) for name, stat in of_archive.items()}
    archived = archived + (keep & appends).astype(jnp.int32)
    return (archived if gaps is None else archived - gaps.removed, put(owner, a), of_archive), victims

  owner = jnp.broadcast_to(count + index, (b, heads, slots)).astype(jnp.int32)  # the token in each slot
  if not slots:  # nothing to take an index of
    owner = jnp.zeros((b, heads, 1), jnp.int32)
  init = archived, owner, {name: stat[layer, :, :, ring:] for name, stat in carry.stats.items()}
  (archived, owner, of_archive), victims = lax.scan(step, init, jnp.arange(width))
  owner = jnp.where(jnp.arange(owner.shape[-1]) < archived[..., None], owner, count + slots)
  place = jnp.full((b, heads, count + slots), slots, jnp.int32)
  to = jnp.broadcast_to(jnp.arange(owner.shape[-1], dtype=jnp.int32), owner.shape)
  place = place.at[rows[..., None], head[:, None], owner].set(to, mode="drop")
  return Replayed(_deaths(victims, plan.seen, count + slots), place, archived, of_archive)


def write(
  cache: RingCache, plan: Plan, layer, carry: LayerCarry, window: Window, stats: Stats, replayed: Replayed,
  archive: Float[Array, "B K A width"] | None, out: Float[Array, "B T N H"],
):  # fmt: skip
  """Writes tokens where the replay put them: (out, carry). `out` is returned behind a barrier.

  Args:
    archive: where archived tokens may have moved; None: only the window's tokens have.
  """
  ring, slots, (b, heads, _) = cache.ring, cache.slots, window.evicted.shape
  rows, head = jnp.arange(b)[:, None, None], jnp.arange(heads)[:, None]
  # The barrier makes attention read the archive before the write; a read after the write, or one that XLA fuses into
  # it, would copy the cache.
  waited = (out, replayed, stats, archive, window.rows, carry)
  out, replayed, stats, archive, stored, carry = lax.optimization_barrier(waited)
  in_ring = jnp.broadcast_to(jnp.where(window.stays, window.slot, slots)[:, None], window.evicted.shape)
  place, count = replayed.place, in_ring.shape[-1]
  target = jnp.where(place[..., :count] < slots - ring, ring + place[..., :count], in_ring)
  if archive is not None:
    moves = (place[..., count:] != jnp.arange(slots - ring)) & (place[..., count:] < slots - ring)
    target = jnp.concatenate([target, jnp.where(moves, ring + place[..., count:], slots)], axis=-1)
    stored = jnp.concatenate([stored, packed(archive, stored.dtype)], axis=2)
  carry = cache._written(carry, plan.placement.reserved, layer, target, stored, in_order=False)
  for name, stat in stats.items():
    held = carry.stats[name].at[layer, :, :, ring:].set(replayed.stats[name])
    held = held.at[layer, rows, head, in_ring].set(stat, mode="drop")
    carry = carry.replace(stats={**carry.stats, name: held})
  return out, carry


def masked(
  policy: Policy, plan: Plan, window: int, width: int, evicted: Bool[Array, "B K S"], stats: Stats
) -> tuple[Bool[Array, "B K S"], Int[Array, "B K S"]]:
  """The replay in a cache that holds token t in slot t: (evicted, last).

  Args:
    width: T, tokens of the chunk.
    evicted: the decisions about all tokens, those of the chunk included.
    stats: float32 [B, K, S] each, of all tokens.
  """
  b, heads, slots = evicted.shape
  rows, head, index = jnp.arange(b)[:, None], jnp.arange(heads), jnp.arange(slots)

  def step(evicted, a):
    left = (plan.seen + a - window - 1)[:, None]
    at = jnp.broadcast_to(jnp.maximum(left, 0)[..., None], (b, heads, 1))
    of_left = lambda x: jnp.take_along_axis(x, at, axis=-1)[..., 0]
    live = (index < left[..., None]) & ~evicted
    retired = _retire(
      policy, evicted=of_left(evicted), tokens=(plan.seen + a + 1)[:, None], live=live,
      archived=jnp.sum(live, axis=-1, dtype=jnp.int32), stats={name: of_left(stat) for name, stat in stats.items()},
      archive_stats=stats,
    )  # fmt: skip
    there = (a < plan.lengths)[:, None] & (left >= 0)
    victims = jnp.where(retired.keep, jnp.where(retired.slot < 0, slots, retired.slot), left)[..., None]
    if retired.removed is not None:
      victims = jnp.concatenate([victims, retired.removed], axis=-1)
    victims = jnp.where(there[..., None], victims, slots)
    return evicted.at[rows[..., None], head[:, None], victims].set(True, mode="drop"), victims

  evicted, victims = lax.scan(step, evicted, jnp.arange(width))
  return evicted, _deaths(victims, plan.seen, slots)
