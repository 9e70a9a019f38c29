"""A chunk of a prompt in one layer of a ring cache: sparse prefill, then compaction.

The chunk's queries attend to the archive, the ring and the chunk at once. Tokens that the chunk pushes out of the
window are appended to the archive unless they were evicted. A policy that compacts decides instead which of all tokens
outside the window stay.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int, Shaped

from dms_jax.attention import NEVER, prefill_attention
from dms_jax.cache.base import Plan, Usage, count_reads, group_mean, last_visible, packed, rows_of, unpacked
from dms_jax.cache.compact import moves
from dms_jax.policies import Candidates, Observation, Policy

if TYPE_CHECKING:
  from dms_jax.cache.ring import LayerCarry, RingCache


class Window(NamedTuple):
  """The ring's tokens in the order of their positions, then the chunk's: X = W + 1 + T.

  `position` int32 [B, X]; `real` bool [B, X]; `slot` int32 [B, X], of the ring; `rows` [B, K, X, 2H], as stored;
  `evicted` bool [B, K, X]; `stays` bool [B, X]: in the window after the chunk.
  """

  position: Int[Array, "B X"]
  real: Bool[Array, "B X"]
  slot: Int[Array, "B X"]
  rows: Shaped[Array, "B K X 2*H"]
  evicted: Bool[Array, "B K X"]
  stays: Bool[Array, "B X"]


def attend(
  cache: RingCache, plan: Plan, policy: Policy, layer: Int[Array, ""] | int, carry: LayerCarry, state: Any,
  q: Float[Array, "B T N H"], k: Float[Array, "B T K H"], v: Float[Array, "B T K H"], evict: Bool[Array, "B K T"],
):  # fmt: skip
  """`Cache.attend` for a chunk: (attended [B, T, N, H], carry, state, usage)."""
  archived, flags = state
  h, ring, slots, heads = q.shape[3], cache.ring, cache.slots, archived.shape[1]
  rows, head = jnp.arange(len(q))[:, None, None], jnp.arange(heads)[:, None]
  window, reserved = _window(cache, plan, layer, carry, flags, k, v, evict), plan.placement.reserved
  stop = plan.seen + plan.lengths
  leaves = (window.real & ~window.stays)[:, None] & ~window.evicted
  ring_slot = jnp.where(window.stays, window.slot, slots)[:, None]
  flags = flags.at[rows, head, jnp.where(window.stays, window.slot, ring)[:, None]].set(window.evicted, mode="drop")
  if not policy.compacts:
    # The cache is written before its archive is read: read before, XLA may copy the whole cache twice in every layer.
    # The appended tokens lie behind the slots that count as archived here.
    to_archive = ring + archived[..., None] + jnp.cumsum(leaves, axis=-1) - 1
    carry = cache._written(carry, reserved, layer, jnp.where(leaves, to_archive, ring_slot), window.rows)

  # The window before the archive: every key then has the same place whatever the size of the cache, sums keep their
  # order, and the free slots come last.
  archive = cache._archive(carry, reserved, layer)
  keys = jnp.concatenate([unpacked(window.rows), archive], axis=2)
  in_archive = jnp.arange(slots - ring) < archived[..., None]
  real = jnp.broadcast_to(window.real[:, None], window.evicted.shape)
  position = window.position[:, None]
  first = jnp.concatenate([jnp.where(real, position, NEVER), jnp.where(in_archive, -1, NEVER)], axis=-1)
  last = jnp.where(real, last_visible(window.evicted, position, cache.window), -1)
  last = jnp.concatenate([last, jnp.where(in_archive, NEVER, -1)], axis=-1)
  q_pos = jnp.where(window.real[:, ring:], window.position[:, ring:], -2)
  weights = None
  if "mass" in policy.prompt_observes:
    weights = policy.query_weights(plan.lengths, plan.remaining, q.shape[1])
  out = prefill_attention(q, keys[..., :h], keys[..., h:], q_pos, first, last, query_weights=weights)
  reads = count_reads(first, last, plan.seen, stop)

  if policy.compacts:
    out, mass = out if weights is not None else (out, None)
    # Archive first from here on, in the order of slots: that of the text, unless the policy overwrites.
    ordered = lambda of_window, of_archive: jnp.concatenate([of_archive, of_window], axis=2)
    mass = None if mass is None else group_mean(ordered(*_split(mass, window)), q)
    seen = Observation(
      mass=mass, keys=ordered(*_split(keys[..., :h], window)) if "keys" in policy.prompt_observes else None,
      live=ordered(window.stays[:, None] | leaves, in_archive), lengths=plan.lengths, remaining=plan.remaining,
    )  # fmt: skip
    admitted = policy.admit(layer, jnp.broadcast_to(window.position[:, None, ring:], (*archived.shape, q.shape[1])))
    stats = {}
    for name, stat in carry.stats.items():
      of_window = jnp.concatenate([stat[layer, rows, head, window.slot[:, None, :ring]], admitted[name]], axis=-1)
      stats[name] = ordered(of_window, stat[layer, :, :, ring:])
    if policy.prompt_observes:
      active = (plan.lengths > 0)[:, None, None]
      stats = {name: jnp.where(active, after, stats[name]) for name, after in policy.observe(stats, seen).items()}
    candidates = Candidates(stats, ordered(leaves, in_archive), stop, plan.remaining)
    stays = candidates.live & policy.compact(candidates)
    # Attention reads the archive before the write: a read after it would copy the cache.
    out, stays, stats, carry = lax.optimization_barrier((out, stays, stats, carry))
    stays = jnp.where((plan.lengths > 0)[:, None, None], stays, candidates.live)
    in_order = not policy.overwrites
    moved = moves(stays, slots - ring, in_order)
    nowhere = jnp.broadcast_to(jnp.full_like(ring_slot[..., :1], slots), in_archive.shape)
    target = jnp.where(
      moved.target < slots - ring, ring + moved.target, ordered(jnp.broadcast_to(ring_slot, leaves.shape), nowhere)
    )
    moving = ordered(window.rows, packed(archive, window.rows.dtype))
    carry = cache._written(carry, reserved, layer, target, moving, in_order)
    for name, stat in stats.items():
      held = carry.stats[name].at[layer, :, :, ring:].set(stat[..., : slots - ring])
      held = held.at[layer, rows, head, target].set(stat, mode="drop")
      carry = carry.replace(stats={**carry.stats, name: held})
    archived = moved.archived
  else:
    archived = archived + jnp.sum(leaves, axis=-1, dtype=jnp.int32)
  if policy.page:
    carry = cache._all_summarised(policy, layer, carry, reserved, archived)
  live = jnp.minimum(stop[:, None], ring) + archived
  return out, carry, (archived, flags), Usage(live, reads)


def _split(x: Array, window: Window) -> tuple[Array, Array]:
  """What is on axis 2 for the window's tokens, and for the archive's."""
  count = window.real.shape[1]
  return x[:, :, :count], x[:, :, count:]


def _window(cache: RingCache, plan: Plan, layer, carry: LayerCarry, flags, k, v, evict) -> Window:
  """The ring's tokens and the chunk's, with what has been decided about them."""
  ring, lag = cache.ring, cache.lag
  rows, head = jnp.arange(len(k))[:, None, None], jnp.arange(k.shape[2])[:, None]
  t, seen, stop = k.shape[1], plan.seen[:, None], (plan.seen + plan.lengths)[:, None]
  position = jnp.concatenate([seen - ring + jnp.arange(ring), seen + jnp.arange(t)], axis=1)
  real = (position >= 0) & (position < stop)
  slot = position % ring
  from_ring = slot[:, None, :ring]
  # The chunk's decisions, by the token they are about: the chunk's token c is number ring + c.
  aligned = lambda x: jnp.pad(x, ((0, 0), (0, 0), (ring - lag, lag)))
  now = aligned((jnp.arange(t) < plan.lengths[:, None])[:, None])
  before = jnp.pad(flags[rows, head, from_ring], ((0, 0), (0, 0), (0, t)))
  old = carry.kv[layer, rows, head, from_ring]
  return Window(
    position=position, real=real, slot=slot,
    rows=jnp.concatenate([old, rows_of(k, v, carry.kv.dtype)], axis=2),
    evicted=jnp.where(now, aligned(evict), before), stays=real & (position >= stop - ring),
  )  # fmt: skip
