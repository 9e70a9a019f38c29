"""SlotCache: a window ring and an archive that only grows, so that what was evicted really leaves.

Per layer, row and KV head, S = W + 1 + A slots:

    [ ring: W + 1 slots, token t in slot t mod (W + 1) | archive: survivors in the order of their positions ]

Keys are stored after RoPE, so the order of slots does not matter and live slots are always one prefix.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import struct

from dms_jax.attention import NEVER, decode_attention, prefill_attention
from dms_jax.cache.base import Plan, Seen, count_reads, last_visible, rows_of, storage_dtype, unpacked


@struct.dataclass
class Step:
  """What becomes of the token that leaves the ring, [L, B, K] each: the slot it would take, and whether it is kept."""

  archive: jax.Array
  keep: jax.Array  # with W < shift not yet final: this step's own decision is about the displaced token


@struct.dataclass
class SlotCache:
  """`kv` [L, B, K, S, 2H]; `evicted` bool [L, B, K, W+1], decisions about ring tokens; `archived` int32 [L, B, K]."""

  kv: jax.Array
  evicted: jax.Array
  archived: jax.Array
  seen: jax.Array
  window: int = struct.field(pytree_node=False)
  shift: int = struct.field(pytree_node=False)

  @classmethod
  def create(cls, layers, batch, heads, head_dim, *, capacity, window, shift, dtype):
    """An empty cache whose heads hold at most `capacity` tokens each, the ring's W + 1 included."""
    ring, shape = window + 1, (layers, batch, heads)
    slots = ring + max(capacity - ring, 0)
    return cls(
      jnp.zeros((*shape, slots, 2 * head_dim), storage_dtype(dtype)), jnp.zeros((*shape, ring), bool),
      jnp.zeros(shape, jnp.int32), jnp.zeros((batch,), jnp.int32), window, shift,
    )  # fmt: skip

  @property
  def ring(self) -> int:
    return self.window + 1

  def layer_state(self):
    return self.archived, self.evicted

  def live(self, policy=None):
    """Live slots, int32 [L, B, K]."""
    return jnp.minimum(self.seen, self.ring)[:, None] + self.archived

  def room(self):
    """Tokens each row can take even if none of them and none of its ring is evicted, int32 [B]."""
    free = self.kv.shape[3] - self.ring - jnp.max(self.archived, axis=(0, 2))
    return free + jnp.maximum(self.ring - self.seen, 0)

  def grown(self, slots: int) -> SlotCache:
    """The same cache with `slots` slots a head, for a row that has no room left."""
    extra = slots - self.kv.shape[3]
    if extra < 0:
      raise ValueError(f"cannot shrink a cache of {self.kv.shape[3]} slots a head to {slots}")
    return self.replace(kv=jnp.pad(self.kv, ((0, 0), (0, 0), (0, 0), (0, extra), (0, 0))))

  def plan(self, policy, lengths, num_tokens):
    slots = self.kv.shape[3]
    if num_tokens > 1:
      # Gates decide inside the layers, so a chunk asks for room as if it evicted nothing.
      retiring = jnp.maximum(self.seen + lengths - self.ring, 0) - jnp.maximum(self.seen - self.ring, 0)
      room = jnp.all(self.ring + self.archived + retiring[:, None] <= slots, axis=(0, 2))
      return Plan(self.seen, jnp.where(room, lengths, 0), ~room)
    slot = jnp.broadcast_to((self.seen % self.ring)[:, None, None], self.archived.shape + (1,))
    evicted = jnp.take_along_axis(self.evicted, slot, axis=-1)[..., 0]
    displaced = self.seen >= self.ring
    keep = displaced[:, None] & policy.retire(evicted, (self.seen - self.ring)[:, None])
    room = (lengths == 0) | jnp.all(~keep | (self.ring + self.archived < slots), axis=(0, 2))
    lengths = jnp.where(room, lengths, 0)
    keep = keep & (lengths > 0)[:, None]
    archive = jnp.where(keep, self.ring + self.archived, slots)  # an index past the end writes nothing
    return Plan(self.seen, lengths, ~room, Step(archive, keep))

  def attend(self, plan, policy, layer, kv, state, q, k, v, evict):
    attend = self._decode if q.shape[1] == 1 else self._prefill
    return attend(plan, policy, layer, kv, state, q, k, v, evict)

  def _decode(self, plan, policy, layer, kv, state, q, k, v, evict):
    archived, flags = state
    step, active, ring, slots = plan.placement, plan.lengths > 0, self.ring, kv.shape[3]
    rows, head = jnp.arange(q.shape[0])[:, None], jnp.arange(kv.shape[2])
    slot = (plan.seen % ring)[:, None]
    keep = step.keep[layer]
    if self.window < self.shift:  # the incoming decision is about the very token that leaves
      keep = keep & policy.retire(evict[..., 0], plan.seen[:, None] - ring)
    archived = archived + keep.astype(jnp.int32)

    # Decisions first: about token t - shift, which may already be gone; then the new token starts undecided.
    own = evict[..., 0] if self.shift == 0 else jnp.zeros_like(evict[..., 0])
    if self.shift:
      before = jnp.where(active & (plan.seen >= self.shift), (plan.seen - self.shift) % ring, ring)
      flags = flags.at[rows, head, before[:, None]].set(evict[..., 0], mode="drop")
    flags = flags.at[rows, head, jnp.where(active[:, None], slot, ring)].set(own, mode="drop")

    displaced = kv[layer, rows, head, slot]
    new = rows_of(k, v, kv.dtype)[:, :, 0]
    targets = jnp.stack(
      [step.archive[layer], jnp.broadcast_to(jnp.where(active[:, None], slot, slots), keep.shape)], -1
    )
    kv = kv.at[layer, rows[..., None], head[:, None], targets].set(jnp.stack([displaced, new], 2), mode="drop")

    stop = plan.seen + plan.lengths
    live = jnp.minimum(stop, ring)[:, None] + archived
    out = decode_attention(q[:, 0], kv, layer, live)[:, None]
    return out, kv, (archived, flags), Seen(live, jnp.where(active[:, None], live, 0))

  def _prefill(self, plan, policy, layer, kv, state, q, k, v, evict):
    archived, flags = state
    b, t, _, h = q.shape
    ring, slots, heads = self.ring, kv.shape[3], kv.shape[2]
    rows, head = jnp.arange(b)[:, None, None], jnp.arange(heads)[:, None]
    seen, stop = plan.seen[:, None], (plan.seen + plan.lengths)[:, None]

    # Candidates: the ring's tokens in the order of their positions, then the chunk's.
    position = jnp.concatenate([seen - ring + jnp.arange(ring), seen + jnp.arange(t)], axis=1)  # [B, W+1+T]
    real = (position >= 0) & (position < stop)
    slot = position % ring
    from_ring = slot[:, None, :ring]
    # What the chunk's tokens decide, by the candidate it is about: the chunk's token c is candidate ring + c.
    aligned = lambda x: jnp.pad(x, ((0, 0), (0, 0), (ring - self.shift, self.shift)))
    now = aligned((jnp.arange(t) < plan.lengths[:, None])[:, None])
    before = jnp.pad(flags[rows, head, from_ring], ((0, 0), (0, 0), (0, t)))
    evicted = jnp.where(now, aligned(evict), before)
    keep = policy.retire(evicted, position[:, None])
    old = kv[layer, rows, head, from_ring]
    candidates = jnp.concatenate([old, rows_of(k, v, kv.dtype)], axis=2)  # [B, K, W+1+T, 2H]

    # Candidates before the archive: then every key has the same place whatever the size of the cache, and sums the same
    # order, and the free slots come last.
    keys = unpacked(jnp.concatenate([candidates, kv[layer, :, :, ring:]], axis=2))
    in_archive = jnp.arange(slots - ring) < archived[..., None]
    real_keys = jnp.broadcast_to(real[:, None], keep.shape)
    first = jnp.where(real_keys, position[:, None], NEVER)
    first = jnp.concatenate([first, jnp.where(in_archive, -1, NEVER)], axis=-1)
    last = jnp.where(real_keys, last_visible(keep, position[:, None], self.window), -1)
    last = jnp.concatenate([last, jnp.where(in_archive, NEVER, -1)], axis=-1)
    q_pos = jnp.where(real[:, ring:], position[:, ring:], -2)
    out = prefill_attention(q, keys[..., :h], keys[..., h:], q_pos, first, last)
    reads = count_reads(first, last, plan.seen, plan.seen + plan.lengths)

    retired = (real & (position < stop - ring))[:, None] & keep
    stays = real & (position >= stop - ring)
    to_archive = ring + archived[..., None] + jnp.cumsum(retired, axis=-1) - 1
    target = jnp.where(retired, to_archive, jnp.where(stays, slot, slots)[:, None])
    kv = kv.at[layer, rows, head, target].set(candidates, mode="drop")
    flags = flags.at[rows, head, jnp.where(stays, slot, ring)[:, None]].set(evicted, mode="drop")
    archived = archived + jnp.sum(retired, axis=-1, dtype=jnp.int32)
    live = jnp.minimum(stop, ring) + archived
    return out, kv, (archived, flags), Seen(live, reads)

  def commit(self, plan, kv, states):
    archived, evicted = states
    return self.replace(kv=kv, archived=archived, evicted=evicted, seen=plan.seen + plan.lengths)
