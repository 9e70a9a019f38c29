"""What caches with a window ring and an archive share, so that what was evicted really leaves.

Per layer, row and KV head, S = W + 1 + A slots:

    [ ring: W + 1 slots, token t in slot t mod (W + 1) | archive: what was kept as it left the ring ]

An archive that is only appended to is in the order of positions; a policy may also put tokens in each other's places.
Keys are stored after RoPE, so the order of slots does not matter and live slots are always one prefix. Where a policy
selects what is read, the ring and the archive are whole pages.

Slots are numbered as above whatever they lie in: `slots.ContiguousCache` has ring and archive in one array, the archive of
`paged.PagedCache` is in pages. A few short methods, the last of the class, are all that differs.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Bool, Float, Int, Shaped

from dms_jax.attention import NEVER, prefill_attention
from dms_jax.cache.base import Common, Plan, Usage, count_reads, group_mean, last_visible, packed, rows_of, unpacked
from dms_jax.policies import Leaving


@struct.dataclass
class Step:
  """What becomes of the token that leaves the ring, [L, B, K] each; before this step's own decisions are known."""

  target: jax.Array  # the slot it is moved to; past the end: it is forgotten
  grows: jax.Array  # whether that is a new one


@struct.dataclass
class Placement:
  """Of a plan. `step`: of single tokens, None for a chunk; `reserved`: what a cache sets aside for new slots."""

  step: Step | None
  reserved: Any


@struct.dataclass
class LayerCarry:
  """The arrays that are carried: `kv` [L, B, K, S or W+1, 2H] begins with the ring, `scores` [L, B, K, S], `summaries`
  [L, B, K, A / page, 2H]; `archive`: where that is not in `kv`. `leaving` [L, B, K, 2H]: what leaves the ring, where
  layers are in a list."""

  kv: jax.Array
  scores: jax.Array | None
  summaries: jax.Array | None
  archive: Any = None
  leaving: jax.Array | None = None


@struct.dataclass
class RingCache(Common):
  """`kv` begins with the ring; `evicted` bool [L, B, K, W+1], decisions about its tokens; `archived` int32 [L, B, K].

  `summaries` [L, B, K, A / page, 2H]: of the archive's pages of `page` slots, where the policy selects.
  """

  archived: jax.Array
  summaries: jax.Array | None
  page: int = struct.field(pytree_node=False)

  @property
  def ring(self) -> int:
    return self.window + 1

  def check(self, policy):
    super().check(policy)
    if policy.page != self.page:
      raise ValueError(f"{type(policy).__name__} selects pages of {policy.page} slots, the cache has {self.page}")

  def layer_carry(self):
    return LayerCarry(self.kv, self.scores, self.summaries, self._store())

  def layer_state(self):
    return self.archived, self.evicted

  def live(self):
    """Live slots, int32 [L, B, K]."""
    return jnp.minimum(self.seen, self.ring)[:, None] + self.archived

  def free_tokens(self, policy):
    """Tokens each row can surely take, int32 [B]: all of them kept, or as the policy bounds what it keeps."""
    free = self.slots - self.ring - jnp.max(self.archived, axis=(0, 2))
    return jnp.maximum(free + jnp.maximum(self.ring - self.seen, 0), policy.reach(self.slots) - self.seen)

  # Before the layers --------------------------------------------------------------------------------------------------

  def plan(self, policy, lengths, num_tokens):
    self.check(policy)
    if num_tokens == 1:
      return self._plan_step(policy, lengths)
    if policy.scored:
      raise ValueError(f"{type(policy).__name__} reads one token at a time, and here are {num_tokens}")
    position = self.seen[:, None] - self.ring + jnp.arange(self.ring + num_tokens)
    leaves = (position >= 0) & (position < (self.seen + lengths)[:, None] - self.ring)
    kept = jnp.sum(leaves[:, None] & ~self._foreseen(policy, position), axis=-1, dtype=jnp.int32)
    room, reserved = self._reserved(kept, num_tokens)
    return Plan(self.seen, jnp.where(room, lengths, 0), ~room, Placement(None, reserved))

  def _foreseen(self, policy, position):
    """What is known before the layers of the decisions about tokens at `position` [B, X], as `evicted` [L, B, K, X].

    Gates decide in the layers or behind them: what they have not decided yet counts as kept.
    """
    layers, *_ = lead = self.archived.shape
    shape = (*lead, position.shape[1])
    at = jnp.broadcast_to(position[:, None], shape)
    stored = jnp.take_along_axis(self.evicted, at % self.ring, axis=-1)
    coming = False if policy.uses_gates else policy.decide(None, jnp.arange(layers)[:, None, None, None], at)
    return jnp.where(at < (self.seen - self.lag)[:, None, None], stored, coming)

  def _plan_step(self, policy, lengths):
    ring, slots = self.ring, self.slots
    displaced = ((self.seen >= ring) & (lengths > 0))[:, None]
    score = scores = None
    if self.scores is not None:
      at = jnp.broadcast_to((self.seen % ring)[:, None, None], (*self.archived.shape, 1))
      score, scores = jnp.take_along_axis(self.scores, at, axis=-1)[..., 0], self.scores[..., ring:]
    retired = policy.retire(
      Leaving(
        evicted=self._foreseen(policy, (self.seen - ring)[:, None])[..., 0], tokens=(self.seen + 1)[:, None],
        archived=self.archived, live=jnp.arange(slots - ring) < self.archived[..., None], score=score, scores=scores,
      )
    )  # fmt: skip
    keep = displaced & retired.keep
    place = jnp.full_like(self.archived, -1) if retired.slot is None else retired.slot
    grows = keep & (place < 0)
    room, reserved = self._reserved(grows.astype(jnp.int32), 1)
    target = jnp.where(keep & room[:, None], ring + jnp.where(grows, self.archived, place), slots)
    step = Step(target, grows & room[:, None])
    return Plan(self.seen, jnp.where(room, lengths, 0), ~room, Placement(step, reserved))

  # In a layer ---------------------------------------------------------------------------------------------------------

  def can_decide_late(self, policy):
    """Not where W < lag: what a step decides about leaves the ring in that very step."""
    return self.window >= self.lag or not policy.evicts

  def attend(self, plan, policy, layer, carry, state, q, k, v, evict):
    attend = self._decode if q.shape[1] == 1 else self._prefill
    return attend(plan, policy, layer, carry, state, q, k, v, evict)

  def _decode(self, plan, policy, layer, carry, state, q, k, v, evict):
    archived, _ = state
    active, ring, slots = plan.lengths > 0, self.ring, self.slots
    rows, head = jnp.arange(q.shape[0])[:, None], jnp.arange(archived.shape[1])
    slot = (plan.seen % ring)[:, None]
    step, reserved = plan.placement.step, plan.placement.reserved
    target, grows = step.target[layer], step.grows[layer]
    known = self.can_decide_late(policy)
    if not known:
      target, grows = jnp.where(evict[..., 0], slots, target), grows & ~evict[..., 0]
    archived = archived + grows.astype(jnp.int32)

    newest = jnp.broadcast_to(jnp.where(active[:, None], slot, slots), target.shape)
    new = rows_of(k, v, carry.kv.dtype)
    if known and isinstance(layer, int):
      # Layers in a list: what leaves them all moves at once, before the first. A step on a GPU is many small kernels.
      if layer == 0:
        lead = jnp.ix_(*(jnp.arange(n) for n in step.target.shape))
        leaving = jax.lax.optimization_barrier(carry.kv[(*lead, slot)])
        carry = self._moved(carry.replace(leaving=leaving), reserved, step.target, leaving)
      # Written by rows that sit out, too: so that it comes after what leaves has been read, and needs no copy of all.
      stays = jnp.where(active[:, None, None], new[:, :, 0], carry.leaving[layer])
      carry = carry.replace(kv=carry.kv.at[layer, rows, head, slot].set(stays, unique_indices=True))
    else:
      displaced = carry.kv[layer, rows, head, slot]
      carry = self._exchanged(carry, reserved, layer, target, displaced, newest, new[:, :, 0])
    if policy.scored:
      first = policy.first_score(layer, jnp.broadcast_to(plan.seen[:, None], target.shape))
      moved = jnp.stack([carry.scores[layer, rows, head, slot], first], -1)
      at = (layer, rows[..., None], head[:, None], jnp.stack([target, newest], -1))
      carry = carry.replace(scores=carry.scores.at[at].set(moved, mode="drop"))

    in_ring = jnp.minimum(plan.seen + plan.lengths, ring)[:, None]
    live = read = in_ring + archived
    if policy.page:
      carry = self._summarised(policy, layer, carry, reserved, archived, (target - ring) // self.page)
      out, read = self._selected(plan, policy, layer, carry, reserved, archived, q)
    elif policy.observes:
      out, mass = self._attended(carry, reserved, layer, q[:, 0], in_ring, archived, mass=True)
      before = carry.scores[layer]
      after = jnp.where(active[:, None, None], policy.observe(before, group_mean(mass, q)), before)
      carry = carry.replace(scores=carry.scores.at[layer].set(after))
    else:
      out = self._attended(carry, reserved, layer, q[:, 0], in_ring, archived)
    decided = None if evict is None else evict[..., 0]
    return out[:, None], carry, (archived, decided), Usage(live, jnp.where(active[:, None], read, 0))

  def _summarised(self, policy, layer, carry, reserved, archived, page):
    """`carry` with the summary of archive page `page` [B, K] renewed; past the end: of none."""
    rows, head = jnp.arange(page.shape[0])[:, None], jnp.arange(page.shape[1])
    index = page[..., None] * self.page + jnp.arange(self.page)
    keys = self._archive_at(carry, reserved, layer, index)
    keys = keys[..., : keys.shape[-1] // 2]
    summary = packed(policy.summarise(keys, index < archived[..., None]), carry.summaries.dtype)
    return carry.replace(summaries=carry.summaries.at[layer, rows, head, page].set(summary, mode="drop"))

  def _selected(self, plan, policy, layer, carry, reserved, archived, q):
    """Attention to the ring and the selected pages of the archive: (attended [B, N, H], slots read [B, K])."""
    b, _, n, h = q.shape
    heads, pages = carry.summaries.shape[2:4]
    stop = plan.seen + plan.lengths
    used = -(-archived // self.page)
    chosen = policy.select(
      layer,
      q.reshape(b, heads, n // heads, h),
      unpacked(carry.summaries[layer]),
      jnp.arange(pages) < used[..., None],
      stop,
    )
    # Of the archive's pages the last alone may be partly filled; it comes last, if it is chosen at all.
    order = jnp.argsort(~chosen, axis=-1).astype(jnp.int32)
    partial = jnp.any(chosen & (jnp.arange(pages) == used[..., None] - 1), axis=-1)
    free = jnp.where(partial, used * self.page - archived, 0)
    length = jnp.sum(chosen, axis=-1, dtype=jnp.int32) * self.page - free
    in_ring = jnp.broadcast_to(jnp.minimum(stop, self.ring)[:, None], length.shape)
    return self._attended_pages(carry, reserved, layer, q[:, 0], in_ring, order, length), in_ring + length

  def _prefill(self, plan, policy, layer, carry, state, q, k, v, evict):
    archived, flags = state
    b, t, _, h = q.shape
    ring, slots, heads, kv = self.ring, self.slots, archived.shape[1], carry.kv
    rows, head = jnp.arange(b)[:, None, None], jnp.arange(heads)[:, None]
    seen, stop = plan.seen[:, None], (plan.seen + plan.lengths)[:, None]

    # Candidates: the ring's tokens in the order of their positions, then the chunk's.
    position = jnp.concatenate([seen - ring + jnp.arange(ring), seen + jnp.arange(t)], axis=1)  # [B, W+1+T]
    real = (position >= 0) & (position < stop)
    slot = position % ring
    from_ring = slot[:, None, :ring]
    # What the chunk's tokens decide, by the candidate it is about: the chunk's token c is candidate ring + c.
    aligned = lambda x: jnp.pad(x, ((0, 0), (0, 0), (ring - self.lag, self.lag)))
    now = aligned((jnp.arange(t) < plan.lengths[:, None])[:, None])
    before = jnp.pad(flags[rows, head, from_ring], ((0, 0), (0, 0), (0, t)))
    evicted = jnp.where(now, aligned(evict), before)
    old = kv[layer, rows, head, from_ring]
    candidates = jnp.concatenate([old, rows_of(k, v, kv.dtype)], axis=2)  # [B, K, W+1+T, 2H]

    # The cache is written before its archive is read: read before, XLA may copy the whole cache twice in every layer.
    # What the chunk appends lies behind the slots that count as archived here.
    kept = (real & (position < stop - ring))[:, None] & ~evicted
    stays = real & (position >= stop - ring)
    to_archive = ring + archived[..., None] + jnp.cumsum(kept, axis=-1) - 1
    target = jnp.where(kept, to_archive, jnp.where(stays, slot, slots)[:, None])
    reserved = plan.placement.reserved
    carry = self._written(carry, reserved, layer, target, candidates)
    flags = flags.at[rows, head, jnp.where(stays, slot, ring)[:, None]].set(evicted, mode="drop")

    # Candidates before the archive: then every key has the same place whatever the size of the cache, and sums the same
    # order, and the free slots come last.
    keys = jnp.concatenate([unpacked(candidates), self._archive(carry, reserved, layer)], axis=2)
    in_archive = jnp.arange(slots - ring) < archived[..., None]
    real_keys = jnp.broadcast_to(real[:, None], evicted.shape)
    first = jnp.where(real_keys, position[:, None], NEVER)
    first = jnp.concatenate([first, jnp.where(in_archive, -1, NEVER)], axis=-1)
    last = jnp.where(real_keys, last_visible(evicted, position[:, None], self.window), -1)
    last = jnp.concatenate([last, jnp.where(in_archive, NEVER, -1)], axis=-1)
    q_pos = jnp.where(real[:, ring:], position[:, ring:], -2)
    out = prefill_attention(q, keys[..., :h], keys[..., h:], q_pos, first, last)
    reads = count_reads(first, last, plan.seen, plan.seen + plan.lengths)

    archived = archived + jnp.sum(kept, axis=-1, dtype=jnp.int32)
    if policy.page:
      carry = self._all_summarised(policy, layer, carry, reserved, archived)
    live = jnp.minimum(stop, ring) + archived
    return out, carry, (archived, flags), Usage(live, reads)

  def _all_summarised(self, policy, layer, carry, reserved, archived):
    """`carry` with the summaries of all pages of a layer renewed, as after a chunk."""
    b, heads = archived.shape
    keys = self._archive(carry, reserved, layer)
    keys = keys[..., : keys.shape[-1] // 2].reshape(b, heads, -1, self.page, keys.shape[-1] // 2)
    live = jnp.arange(self.slots - self.ring).reshape(-1, self.page) < archived[..., None, None]
    summaries = packed(policy.summarise(keys, live), carry.summaries.dtype)
    return carry.replace(summaries=carry.summaries.at[layer].set(summaries))

  # After the layers ---------------------------------------------------------------------------------------------------

  def commit(self, plan, carry, states, evict=None):
    archived, evicted = states
    evicted = evicted if evict is None else evict[..., 0]
    if plan.placement.step is not None:
      evicted = self._decided(plan, evicted)
    return self.replace(
      kv=carry.kv, scores=carry.scores, summaries=carry.summaries, archived=archived, evicted=evicted,
      seen=plan.seen + plan.lengths,
    )  # fmt: skip

  def _decided(self, plan, decided: Bool[Array, "L B K"]) -> Bool[Array, "L B K ring"]:
    """`evicted` after a step: of token t - lag what has been decided, which may already be gone; then the new token,
    undecided."""

    def is_of(ago):
      there = (plan.lengths > 0) & (plan.seen >= ago)
      return jnp.arange(self.ring) == jnp.where(there, (plan.seen - ago) % self.ring, -1)[:, None, None]

    own = decided[..., None] if self.lag == 0 else False
    evicted = jnp.where(is_of(self.lag), decided[..., None], self.evicted) if self.lag else self.evicted
    return jnp.where(is_of(0), own, evicted)

  # Where the archive lies ---------------------------------------------------------------------------------------------

  def _store(self) -> Any:
    """What `layer_carry` adds as `LayerCarry.archive`."""
    return None

  def _reserved(self, new: Int[Array, "L B K"], most: int) -> tuple[Bool[Array, "B"], Any]:
    """(rows with room for `new` more archive slots of each head, at most `most` of any; what is set aside for them)."""
    raise NotImplementedError

  def _written(
    self, carry: LayerCarry, reserved, layer, target: Int[Array, "B K X"], rows: Shaped[Array, "B K X 2*H"]
  ) -> LayerCarry:
    """`carry` with rows, as stored, in slots `target`; past the last slot: nowhere."""
    raise NotImplementedError

  def _exchanged(
    self, carry: LayerCarry, reserved, layer, target: Int[Array, "B K"], leaves, newest: Int[Array, "B K"], enters
  ):
    """`carry` with what leaves the ring in archive slot `target` and what enters it in slot `newest`, rows [B, K, 2H] as
    stored; past the last slot: nowhere."""
    return self._written(carry, reserved, layer, jnp.stack([target, newest], -1), jnp.stack([leaves, enters], 2))

  def _moved(
    self, carry: LayerCarry, reserved, target: Int[Array, "L B K"], rows: Shaped[Array, "L B K 2*H"]
  ) -> LayerCarry:
    """`carry` with rows of all layers, as stored, in archive slots `target`; past the last slot: nowhere."""
    raise NotImplementedError

  def _archive(self, carry: LayerCarry, reserved, layer) -> Float[Array, "B K A 2*H"]:
    """The whole archive of a layer, as numbers; free slots hold anything."""
    raise NotImplementedError

  def _archive_at(self, carry: LayerCarry, reserved, layer, index: Int[Array, "B K X"]) -> Float[Array, "B K X 2*H"]:
    """The same at archive slots `index` alone; past the end: anything."""
    raise NotImplementedError

  def _attended(
    self, carry: LayerCarry, reserved, layer, q: Float[Array, "B N H"], in_ring, archived, mass: bool = False
  ):
    """Attention to `in_ring` [B, 1] and `archived` [B, K] slots; with `mass`, the pair with the attention [B, K, S]."""
    raise NotImplementedError

  def _attended_pages(self, carry: LayerCarry, reserved, layer, q: Float[Array, "B N H"], in_ring, order, length):
    """Attention to `in_ring` [B, K] slots and, of the archive's pages in `order` [B, K, A / page], `length` slots."""
    raise NotImplementedError
