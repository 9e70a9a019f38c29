"""A chunk of a prompt in one layer of a ring cache: sparse prefill, then compaction.

The chunk's queries attend to the archive, the ring and the chunk at once. Tokens that the chunk pushes out of the
window are appended to the archive unless they were evicted. A policy that `compacts` decides instead which of all
tokens outside the window stay; one that `replays` retires them in turn. Pruning is a cut after a chunk of no tokens.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int, Shaped

from dms_jax.attention import NEVER, prefill_attention
from dms_jax.cache import replay
from dms_jax.cache.base import Plan, Usage, count_reads, observation, packed, queries_of, rows_of
from dms_jax.cache.compact import moves
from dms_jax.policies import Candidates, Policy
from dms_jax.policies.base import Stats
from pallas_kernels.paged.format import floats

if TYPE_CHECKING:
  from dms_jax.cache.ring import LayerCarry, RingCache


class Window(NamedTuple):
  """The tokens of the ring in the order of their positions, then those of the chunk: X = W + 1 + T.

  Attributes:
    position: int32 [B, X], in the text; below 0 before its first token.
    real: bool [B, X], whether there is such a token.
    slot: int32 [B, X], the token's slot of the ring.
    rows: [B, K, X, 2H], keys and values in the storage dtype.
    evicted: bool [B, K, X], the decision about the token; False if it is not known yet.
    stays: bool [B, X], whether the token is in the window after the chunk.
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
  logits: Float[Array, "B K T"] | None = None,
):  # fmt: skip
  """`Cache.attend` for a chunk: (attended [B, T, N, H], carry, state, usage)."""
  archived, flags = state
  h, ring, slots, heads = q.shape[3], cache.ring, cache.slots, archived.shape[1]
  rows, head = jnp.arange(len(q))[:, None, None], jnp.arange(heads)[:, None]
  window, reserved = _window(cache, plan, layer, carry, flags, k, v, evict), plan.placement.reserved
  stop = plan.seen + plan.lengths
  left = (window.real & ~window.stays)[:, None]
  leaves = left & ~window.evicted
  own = None if cache.sliding is None else _slid(cache, layer, window, left, stop)
  if own is not None:
    leaves = jnp.where(own.here, own.leaves, leaves)
  stats = _window_stats(cache, plan, policy, layer, carry, window, logits)
  ring_slot = jnp.where(window.stays, window.slot, slots)[:, None]
  flags = flags.at[rows, head, jnp.where(window.stays, window.slot, ring)[:, None]].set(window.evicted, mode="drop")
  displaced = None
  if not policy.compacts:
    # Write before the archive is read: in the other order XLA may copy the whole cache twice in every layer. The read
    # is the same, because appended tokens lie behind the `archived` slots that count below. What a sliding layer
    # overwrites is read before.
    to_archive, stored = ring + archived[..., None] + jnp.cumsum(leaves, axis=-1) - 1, window.rows
    if own is not None:
      to_archive = jnp.where(own.here, ring + own.place, to_archive)
    if own is not None and min(cache.sliding.span, slots - ring) > 0:
      displaced, stored = _displaced(cache, layer, carry, reserved, window, leaves, own, archived)
    target = jnp.where(leaves, to_archive, ring_slot)
    carry = cache._written(carry, reserved, layer, target, stored, in_order=displaced is None)
    held = {n: x.at[layer, rows, head, target].set(stats[n], mode="drop") for n, x in carry.stats.items()}
    carry = carry.replace(stats=held)

  replayed = None
  if policy.replays:
    replayed = replay.replay(cache, plan, policy, layer, carry, window, stats, archived)
    if own is not None:
      replayed = _slid_replay(replayed, own, archived)

  # The window's keys come first. The place of a key then does not depend on the size of the cache, sums keep their
  # order, and free slots come last.
  archive = cache._archive(carry, reserved, layer)
  keys = jnp.concatenate([floats(window.rows), archive], axis=2)
  in_archive = jnp.arange(slots - ring) < archived[..., None]
  real = jnp.broadcast_to(window.real[:, None], window.evicted.shape)
  position = window.position[:, None]
  until, there = NEVER, in_archive
  if own is not None:
    until = jnp.where(own.here, own.until, NEVER)
    there = in_archive if displaced is None else in_archive & (own.stays | ~own.here)
  first = jnp.concatenate([jnp.where(real, position, NEVER), jnp.where(there, -1, NEVER)], axis=-1)
  last = jnp.where(real, cache._last_visible(layer, window.evicted, position), -1)
  last = jnp.concatenate([last, jnp.where(there, until, -1)], axis=-1)
  if displaced is not None:
    keys = jnp.concatenate([displaced.rows, keys], axis=2)
    first, last = (jnp.concatenate(x, axis=-1) for x in ((displaced.first, first), (displaced.last, last)))
  if replayed is not None:
    last = jnp.minimum(last, replayed.last)
  q_pos = jnp.where(window.real[:, ring:], window.position[:, ring:], -2)
  weights = None
  if "mass" in policy.prompt_observes:
    weights = policy.query_weights(plan.lengths, plan.remaining, q.shape[1])
  out = prefill_attention(q, keys[..., :h], keys[..., h:], q_pos, first, last, query_weights=weights)
  reads = count_reads(first, last, plan.seen, stop)

  mass = None
  if weights is not None:
    out, mass = out
  if policy.remembers:
    queries = queries_of(q, heads)
    carry = carry.replace(memory=policy.remember(carry.memory, layer, queries, plan.seen, plan.lengths))
  if policy.steers:
    carry = carry.replace(memory=policy.tally(carry.memory, layer, evict, plan.seen, plan.lengths))
  if replayed is not None:
    out, carry = replay.write(
      cache, plan, layer, carry, window, stats, replayed, archive if policy.removes else None, out
    )
    archived = replayed.archived
  elif policy.compacts:
    # From here on the archive comes first, in slot order: text order, unless the policy overwrites archived tokens.
    count, active = leaves.shape[2], plan.lengths > 0
    swapped = lambda x: jnp.concatenate([x[:, :, count:], x[:, :, :count]], axis=2)
    stats = _after_archive(stats, layer, carry, ring)
    if policy.prompt_observes:
      seen = observation(
        policy.prompt_observes, mass=None if mass is None else swapped(mass), rows=swapped(keys), q=q, stats=stats,
        live=jnp.concatenate([in_archive, window.stays[:, None] | leaves], axis=2), lengths=plan.lengths,
        remaining=plan.remaining,
      )  # fmt: skip
      after = policy.observe(stats, seen)
      stats = {name: jnp.where(active[:, None, None], after[name], stat) for name, stat in stats.items()}
    out, carry, archived = _cut(
      cache, policy, layer, carry, reserved, window, leaves, in_archive, archive, stats, out, active, stop,
      plan.remaining, own=own,
    )  # fmt: skip
  else:
    archived = archived + jnp.sum(leaves, axis=-1, dtype=jnp.int32)
    archived = archived if own is None else jnp.where(own.here, own.archived, archived)
  if policy.page:
    carry = cache._all_summarised(policy, layer, carry, reserved, archived)
  live = jnp.minimum(stop[:, None], ring) + archived
  return out, carry, (archived, flags), Usage(live, reads)


def pruned(cache: RingCache, policy: Policy, layer: Int[Array, "B"], due: Bool[Array, "B"]) -> RingCache:
  """A cache of one layer after the cut of a chunk of no tokens in the rows `due`.

  Args:
    layer: of each row, as the policy knows it.
  """
  (_, b, heads), width, carry = cache.archived.shape, cache.kv.shape[-1], cache.layer_carry()
  none = jnp.zeros((b, 0, heads, width // 2))
  plan = Plan(cache.seen, jnp.zeros_like(cache.seen), jnp.zeros_like(due))
  window = _window(cache, plan, 0, carry, cache.evicted[0], none, none, jnp.zeros((b, heads, 0), bool))
  in_archive = jnp.arange(cache.slots - cache.ring) < cache.archived[0, ..., None]
  archive = cache._archive(carry, cache._place(), 0)
  stats = _after_archive(_window_stats(cache, plan, policy, 0, carry, window), 0, carry, cache.ring)
  _, carry, archived = _cut(
    cache, policy, 0, carry, cache._place(), window, jnp.zeros(window.evicted.shape, bool), in_archive, archive,
    stats, (), due, cache.seen, jnp.zeros_like(cache.seen), known_as=layer,
  )  # fmt: skip
  return cache._after(carry, archived=archived[None])


def _cut(
  cache: RingCache, policy: Policy, layer: Int[Array, ""] | int, carry: LayerCarry, reserved: Any, window: Window,
  leaves: Bool[Array, "B K X"], in_archive: Bool[Array, "B K A"], archive: Float[Array, "B K A width"],
  stats: dict[str, Float[Array, "B K AX"]], out: Any, active: Bool[Array, "B"], stop: Int[Array, "B"],
  remaining: Int[Array, "B"], known_as: Int[Array, "B"] | None = None, own: Slid | None = None,
):  # fmt: skip
  """Lets the policy say which tokens outside the window stay, and writes them: (out, carry, archived [B, K]).

  Args:
    leaves: tokens that left the window and may enter the archive.
    stats: of archive and window together, AX = A + X tokens.
    out: what was computed from the archive, returned behind a barrier.
    active: rows that are cut; the others keep all their tokens.
    stop: tokens that each row has read.
    remaining: tokens of the prompt still to come.
    known_as: the layer of each row for the policy, where `carry` has them as one.
    own: what happens instead if the layer slides.
  """
  ring, slots, (b, heads, _), h = cache.ring, cache.slots, leaves.shape, archive.shape[-1] // 2
  rows, head = jnp.arange(b)[:, None, None], jnp.arange(heads)[:, None]
  in_order = not policy.overwrites
  ordered = lambda of_window, of_archive: jnp.concatenate([of_archive, of_window], axis=2)
  live, sees = ordered(leaves, in_archive), policy.compact_observes
  number = layer if known_as is None else known_as
  candidates = Candidates(
    number, stats, live, ordered(window.stays[:, None] | leaves, in_archive), stop, remaining,
    keys=ordered(floats(window.rows[..., :h]), archive[..., :h]) if "keys" in sees else None,
    values=ordered(floats(window.rows[..., h:]), archive[..., h:]) if "values" in sees else None,
    memory={name: x[layer] for name, x in carry.memory.items()},
  )  # fmt: skip
  stays = live & policy.compact(candidates)
  # The barrier makes attention read the archive before the write; a read after the write would copy the cache. So would
  # a write that reads its rows from the archive itself, into which XLA would fuse the two.
  out, stays, stats, archive, new, carry = lax.optimization_barrier((out, stays, stats, archive, window.rows, carry))
  moved = moves(jnp.where(active[:, None, None], stays, live), slots - ring, in_order)

  in_ring = jnp.broadcast_to(jnp.where(window.stays, window.slot, slots)[:, None], leaves.shape)
  elsewhere = ordered(in_ring, jnp.full(in_archive.shape, slots, in_ring.dtype))
  target = jnp.where(moved.target < slots - ring, ring + moved.target, elsewhere)
  if own is not None:
    kept = ordered(jnp.where(leaves, ring + own.place, in_ring), jnp.full_like(in_archive, slots, in_ring.dtype))
    target, in_order = jnp.where(own.here, kept, target), False
    moved = moved.replace(archived=jnp.where(own.here, own.archived, moved.archived))
  stored = ordered(new, packed(archive, new.dtype))
  carry = cache._written(carry, reserved, layer, target, stored, in_order)
  for name, stat in stats.items():
    held = carry.stats[name].at[layer, :, :, ring:].set(stat[..., : slots - ring])
    held = held.at[layer, rows, head, target].set(stat, mode="drop")
    carry = carry.replace(stats={**carry.stats, name: held})
  if policy.remembers:
    carry = carry.replace(memory=policy.renew(carry.memory, layer, active & (remaining == 0)))
  return out, carry, moved.archived


class Slid(NamedTuple):
  """What a chunk does in a layer if that layer slides.

  Attributes:
    here: bool [], whether it does.
    leaves: bool [B, 1, X], the tokens of `Window` that leave the ring for the archive.
    place: int32 [B, 1, X], their archive slots.
    until: int32 [B, 1, A], the last query that sees each token of the archive before the chunk.
    stays: bool [B, 1, A], whether the token's slot is not overwritten.
    archived: int32 [B, 1], tokens in the archive after the chunk.
  """

  here: Bool[Array, ""]
  leaves: Bool[Array, "B 1 X"]
  place: Int[Array, "B 1 X"]
  until: Int[Array, "B 1 A"]
  stays: Bool[Array, "B 1 A"]
  archived: Int[Array, "B 1"]


def _slid(cache: RingCache, layer, window: Window, left: Bool[Array, "B 1 X"], stop: Int[Array, "B"]) -> Slid:
  """The `Slid` of a chunk after which rows have read `stop` tokens, those `left` no longer in the ring."""
  sliding, position, slots = cache.sliding, window.position[:, None], cache.slots - cache.ring
  before, after = (sliding.positions(tokens, slots)[:, None] for tokens in (cache.seen, stop))
  return Slid(
    here=sliding.at(layer), leaves=left & (position >= stop[:, None, None] - 1 - sliding.window),
    place=sliding.place(position), until=before + sliding.window, stays=before == after,
    archived=sliding.archived(stop)[:, None],
  )  # fmt: skip


class Displaced(NamedTuple):
  """The tokens of a sliding layer's archive that a chunk of T tokens overwrites, by the token that takes the slot.

  Attributes:
    rows: [B, K, T, 2H], keys and values as numbers; arbitrary where there is none.
    first, last: int32 [B, K, T], the first and the last query that see each; none does in a layer that does not slide.
  """

  rows: Float[Array, "B K T width"]
  first: Int[Array, "B K T"]
  last: Int[Array, "B K T"]


def _displaced(
  cache: RingCache, layer, carry: LayerCarry, reserved: Any, window: Window, leaves: Bool[Array, "B K X"], own: Slid,
  archived: Int[Array, "B K"],
) -> tuple[Displaced, Shaped[Array, "B K X width"]]:  # fmt: skip
  """(the `Displaced` of a chunk, `window.rows` to be written).

  The write depends on the read of what it overwrites, so that it follows and needs no copy of the cache.
  """
  count = leaves.shape[-1] - cache.ring  # no later token of the window can leave the ring
  goes, place = leaves[..., :count], jnp.broadcast_to(own.place[..., :count], (*archived.shape, count))
  old = cache._archive_at(carry, reserved, layer, jnp.minimum(place, cache.slots - cache.ring - 1))
  there = own.here & goes & (place < archived[..., None])
  until = jnp.broadcast_to(own.until, (*archived.shape, own.until.shape[-1]))
  until = jnp.take_along_axis(until, place, -1, mode="clip")
  new, kept = jnp.split(window.rows, [count], axis=2)
  written = (goes | window.stays[:, None, :count])[..., None]
  stored = jnp.concatenate([jnp.where(written, new, packed(old, new.dtype)), kept], axis=2)
  return Displaced(old, jnp.where(there, -1, NEVER), jnp.where(there, until, -1)), stored


def _slid_replay(replayed: replay.Replayed, own: Slid, archived: Int[Array, "B K"]) -> replay.Replayed:
  """`replayed`, but in a layer that slides what `own` says, where `archived` tokens were in the archive."""
  slots = replayed.place.shape[-1] - own.leaves.shape[-1]
  stays = jnp.broadcast_to(jnp.arange(slots, dtype=jnp.int32), (*archived.shape, slots))
  entering = jnp.broadcast_to(jnp.where(own.leaves, own.place, slots), (*archived.shape, own.leaves.shape[-1]))
  return replayed.replace(
    last=jnp.where(own.here, NEVER, replayed.last),
    place=jnp.where(own.here, jnp.concatenate([entering, stays], axis=-1), replayed.place),
    archived=jnp.where(own.here, own.archived, replayed.archived),
  )


def _window_stats(
  cache: RingCache, plan: Plan, policy: Policy, layer, carry: LayerCarry, window: Window, logits=None
) -> Stats:
  """The statistics of the window's tokens, [B, K, X] each, those from gate logits included."""
  ring, (b, heads, count) = cache.ring, window.evicted.shape
  rows, head = jnp.arange(b)[:, None, None], jnp.arange(heads)[:, None]
  position = jnp.broadcast_to(window.position[:, None, ring:], (b, heads, count - ring))
  admitted, stats = policy.admit(layer, position), {}
  for name, stat in carry.stats.items():
    stats[name] = jnp.concatenate([stat[layer, rows, head, window.slot[:, None, :ring]], admitted[name]], axis=-1)
  if policy.gate_stats and logits is not None:
    now = aligned(cache, (jnp.arange(count - ring) < plan.lengths[:, None])[:, None])
    rated = policy.rate(logits)
    stats |= {name: jnp.where(now, aligned(cache, rated[name]), stats[name]) for name in policy.gate_stats}
  return stats


def _after_archive(stats: Stats, layer, carry: LayerCarry, ring: int) -> Stats:
  """The statistics of archive and window, in this order, given those of the window."""
  return {name: jnp.concatenate([stat[layer, :, :, ring:], stats[name]], axis=-1) for name, stat in carry.stats.items()}


def aligned(cache: RingCache, x: Shaped[Array, "B _ T"]) -> Shaped[Array, "B _ X"]:
  """What the chunk's tokens compute, `x`, moved to the tokens of `Window` that it is about; elsewhere 0.

  Token c of the chunk is number W + 1 + c of `Window`.
  """
  return jnp.pad(x, ((0, 0), (0, 0), (cache.ring - cache.lag, cache.lag)))


def _window(cache: RingCache, plan: Plan, layer, carry: LayerCarry, flags, k, v, evict) -> Window:
  """The tokens of the ring and of the chunk, with the decisions made about them so far."""
  ring = cache.ring
  rows, head = jnp.arange(len(k))[:, None, None], jnp.arange(k.shape[2])[:, None]
  t, seen, stop = k.shape[1], plan.seen[:, None], (plan.seen + plan.lengths)[:, None]
  position = jnp.concatenate([seen - ring + jnp.arange(ring), seen + jnp.arange(t)], axis=1)
  real = (position >= 0) & (position < stop)
  slot = position % ring
  from_ring = slot[:, None, :ring]
  now = aligned(cache, (jnp.arange(t) < plan.lengths[:, None])[:, None])
  before = jnp.pad(flags[rows, head, from_ring], ((0, 0), (0, 0), (0, t)))
  old = carry.kv[layer, rows, head, from_ring]
  return Window(
    position=position, real=real, slot=slot,
    rows=jnp.concatenate([old, rows_of(k, v, carry.kv.dtype)], axis=2),
    evicted=jnp.where(now, aligned(cache, evict), before), stays=real & (position >= stop - ring),
  )  # fmt: skip
