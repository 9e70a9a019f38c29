"""MaskedCache: keeps every token and masks what was evicted. Frees nothing; the oracle, and the tool for ablations."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import struct

from dms_jax.attention import NEVER, prefill_attention
from dms_jax.cache.base import Plan, Seen, count_reads, last_visible, rows_of, storage_dtype, unpacked


@struct.dataclass
class MaskedCache:
  """Slot = position. `kv` [L, B, K, S, 2H], `evicted` bool [L, B, K, S], `seen` int32 [B]."""

  kv: jax.Array
  evicted: jax.Array
  seen: jax.Array
  window: int = struct.field(pytree_node=False)
  shift: int = struct.field(pytree_node=False)

  @classmethod
  def create(cls, layers, batch, heads, head_dim, *, capacity, window, shift, dtype):
    """An empty cache for `capacity` tokens a row."""
    shape = (layers, batch, heads, capacity)
    return cls(
      jnp.zeros((*shape, 2 * head_dim), storage_dtype(dtype)), jnp.zeros(shape, bool), jnp.zeros((batch,), jnp.int32),
      window, shift,
    )  # fmt: skip

  def layer_state(self):
    return self.evicted

  def room(self):
    """Tokens each row can surely take, int32 [B]."""
    return self.kv.shape[3] - self.seen

  def grown(self, slots: int) -> MaskedCache:
    """The same cache with room for `slots` tokens a row."""
    extra = slots - self.kv.shape[3]
    if extra < 0:
      raise ValueError(f"cannot shrink a cache of {self.kv.shape[3]} tokens a row to {slots}")
    pad = ((0, 0), (0, 0), (0, 0), (0, extra))
    return self.replace(kv=jnp.pad(self.kv, (*pad, (0, 0))), evicted=jnp.pad(self.evicted, pad))

  def live(self, policy):
    """Tokens visible to the newest query, int32 [L, B, K]."""
    position = jnp.arange(self.kv.shape[3])
    newest = (self.seen - 1)[:, None, None]
    visible = (newest - position <= self.window) | policy.retire(self.evicted, position)
    return jnp.sum(visible & (position <= newest), axis=-1, dtype=jnp.int32)

  def plan(self, policy, lengths, num_tokens):
    room = self.seen + lengths <= self.kv.shape[3]
    return Plan(self.seen, jnp.where(room, lengths, 0), ~room)

  def attend(self, plan, policy, layer, kv, state, q, k, v, evict):
    b, t, _, h = q.shape
    heads, slots = kv.shape[2:4]
    rows, head, token = jnp.arange(b)[:, None, None], jnp.arange(heads)[:, None], jnp.arange(t)
    position = plan.seen[:, None] + token
    real = token < plan.lengths[:, None]
    slot = jnp.where(real, position, slots)[:, None]
    kv = kv.at[layer, rows, head, slot].set(rows_of(k, v, kv.dtype), mode="drop")
    state = state.at[rows, head, slot].set(jnp.zeros_like(evict), mode="drop")  # what comes in is not decided yet
    about = jnp.where(real & (position >= self.shift), position - self.shift, slots)[:, None]
    state = state.at[rows, head, about].set(evict, mode="drop")
    index = jnp.broadcast_to(jnp.arange(slots), state.shape)
    stop = plan.seen + plan.lengths
    held = index < stop[:, None, None]
    first = jnp.where(held, index, NEVER)
    last = jnp.where(held, last_visible(policy.retire(state, index), index, self.window), -1)
    keys = unpacked(kv[layer])
    out = prefill_attention(q, keys[..., :h], keys[..., h:], jnp.where(real, position, -2), first, last)
    live = count_reads(first, last, stop - 1, stop)
    return out, kv, state, Seen(live, count_reads(first, last, plan.seen, stop))

  def commit(self, plan, kv, states):
    return self.replace(kv=kv, evicted=states, seen=plan.seen + plan.lengths)
