"""MaskedCache: keeps every token and masks the evicted ones.

It frees no memory. It is the reference of the other caches, and the cache for ablations.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import struct

from dms_jax.attention import NEVER, prefill_attention
from dms_jax.cache import replay
from dms_jax.cache.base import (
  Common,
  Plan,
  Usage,
  blended,
  count_reads,
  empty_memory,
  observation,
  padded,
  queries_of,
  rows_of,
  storage_dtype,
)
from dms_jax.collectives import on_any
from dms_jax.policies import Candidates, Leaving
from pallas_kernels.paged.format import floats


@struct.dataclass
class Dropped:
  """What a decode step does to older tokens.

  Attributes:
    slots: int32 [L, B, K, n], the evicted tokens; S is none.
    into: int32 [L, B, K], the archived token that the leaving one is merged into; S is none. None: nothing merges.
    weight: float32 [L, B, K], the leaving token's share.
  """

  slots: jax.Array
  into: jax.Array | None = None
  weight: jax.Array | None = None


@struct.dataclass
class MaskedCache(Common):
  """The token at position t lies in slot t. `kv` is [L, B, K, S, 2H], `evicted` bool [L, B, K, S].

  A policy's archive is the set of tokens that left the window and are not evicted. A token that the policy overwrites
  is evicted; one that it merges is evicted, and its key and value go into the archived slot. A policy that selects
  pages must keep every token, because pages are runs of positions here.
  """

  @classmethod
  def create(cls, layers, batch, heads, head_dim, *, capacity, policy, lag, dtype, group=1, sliding=None):
    """An empty cache.

    Args:
      capacity: S, tokens a row.
      policy, lag, dtype, group: see `cache.create`.
      sliding: the layers that slide; None for none.
    """
    shape = (layers, batch, heads, capacity)
    return cls(
      kv=jnp.zeros((*shape, 2 * head_dim), storage_dtype(dtype)),
      evicted=jnp.zeros(shape, bool),
      seen=jnp.zeros((batch,), jnp.int32),
      stats={name: jnp.zeros(shape, jnp.float32) for name in policy.stats},
      memory=empty_memory(policy, shape[:3], group, head_dim),
      window=policy.window,
      lag=lag,
      sliding=sliding,
    )

  def layer_carry(self, leaving=None):
    return self.kv, self.stats, self.memory

  def layer_state(self):
    return self.evicted

  def with_carry(self, carry):
    kv, stats, memory = carry
    return self.replace(kv=kv, stats=stats, memory=memory)

  def free_tokens(self, policy, rows=None):
    """Tokens that each row can take, int32 [B]: its free slots."""
    return self.slots - self.seen

  def grow(self, slots: int) -> MaskedCache:
    """The same cache with slots for `slots` tokens a row.

    Raises:
      ValueError: the cache has more slots.
    """
    extra = slots - self.slots
    if extra < 0:
      raise ValueError(f"cannot shrink a cache of {self.slots} tokens a row to {slots}")
    kv, evicted, stats = padded((self.kv, self.evicted, self.stats), count=extra)
    return self.replace(kv=kv, evicted=evicted, stats=stats)

  @jax.jit
  def live(self):
    """Tokens visible to the newest query, int32 [L, B, K]."""
    position = jnp.arange(self.slots)
    newest = (self.seen - 1)[:, None, None]
    evicted, window = self._in_force(slice(None), self.evicted)
    visible = (newest - position <= window) | ~evicted
    return jnp.sum(visible & (position <= newest), axis=-1, dtype=jnp.int32)

  def plan(self, policy, lengths, num_tokens, remaining=None):
    self.check(policy)
    fits = self.seen + lengths <= self.slots
    plan = Plan(self.seen, jnp.where(fits, lengths, 0), ~fits)
    if self.takes_chunk(policy, num_tokens, remaining):
      return plan.replace(remaining=jnp.zeros_like(self.seen) if remaining is None else remaining)
    return plan.replace(placement=self._dropped(policy, plan)) if policy.stats else plan

  def _dropped(self, policy, plan):
    """What a decode step does to older tokens: a `Dropped`."""
    left = (self.seen - self.window - 1)[:, None]
    at = jnp.broadcast_to(left[..., None], (*self.evicted.shape[:3], 1))
    of_left = lambda x: jnp.take_along_axis(x, at, axis=-1, mode="clip")[..., 0]
    live = (jnp.arange(self.slots) < left[..., None]) & ~self.evicted
    retired = policy.retire(
      Leaving(
        evicted=of_left(self.evicted), tokens=(self.seen + 1)[:, None], archived=jnp.sum(live, -1, dtype=jnp.int32),
        live=live, stats={name: of_left(stat) for name, stat in self.stats.items()}, archive_stats=self.stats,
      )
    )  # fmt: skip
    there = (left >= 0) & (plan.lengths > 0)[:, None]
    slot = jnp.full_like(at[..., 0], -1) if retired.slot is None else retired.slot
    taken = jnp.where(there & retired.keep & (slot >= 0), slot, self.slots)
    if self.sliding is not None:  # nothing is merged there; what is evicted does not matter
      taken = jnp.where(self.sliding.heads, self.slots, taken)
    gone = there & ~retired.keep if retired.merge is None else there & (~retired.keep | (slot >= 0))
    forgotten = jnp.where(gone, at[..., 0], self.slots)
    if retired.merge is None:
      dropped = jnp.stack(jnp.broadcast_arrays(forgotten, taken), axis=-1)
      if retired.removed is not None:
        removed = jnp.where(there[..., None], retired.removed, self.slots)
        dropped = jnp.concatenate([dropped, removed], axis=-1)
      return Dropped(dropped)
    return Dropped(forgotten[..., None], taken, retired.merge)

  def _merged(self, dropped, left, layer, kv, stats):
    """`kv` and `stats` with the leaving tokens, at positions `left` [B], merged into archived ones."""
    into, weight = dropped.into[layer], dropped.weight[layer]
    rows, head = jnp.arange(into.shape[0])[:, None], jnp.arange(into.shape[1])
    leaving, at = (layer, rows, head, jnp.maximum(left, 0)[:, None]), (layer, rows, head, into)
    kv = kv.at[at].set(blended(kv[at], kv[leaving], weight), mode="drop")
    return kv, {name: stat.at[at].add(stat[leaving], mode="drop") for name, stat in stats.items()}

  def attend(self, plan, policy, layer, carry, state, q, k, v, evict, logits=None):
    kv, stats, memory = carry
    b, t = q.shape[:2]
    heads, slots = kv.shape[2:4]
    rows, head, token = jnp.arange(b)[:, None, None], jnp.arange(heads)[:, None], jnp.arange(t)
    position = plan.seen[:, None] + token
    real = token < plan.lengths[:, None]
    slot = jnp.where(real, position, slots)[:, None]
    if plan.placement is not None and plan.placement.into is not None:
      kv, stats = self._merged(plan.placement, plan.seen - self.window - 1, layer, kv, stats)
    kv = kv.at[layer, rows, head, slot].set(rows_of(k, v, kv.dtype), mode="drop")
    state = state.at[rows, head, slot].set(jnp.zeros_like(evict), mode="drop")  # new tokens are undecided
    about = jnp.where(real & (position >= self.lag), position - self.lag, slots)[:, None]
    state = state.at[rows, head, about].set(evict, mode="drop")
    if plan.placement is not None:
      state = state.at[rows, head, plan.placement.slots[layer]].set(True, mode="drop")
    if policy.stats:
      admitted = policy.admit(layer, jnp.broadcast_to(position[:, None], (b, heads, t)))
      stats = {n: stat.at[layer, rows, head, slot].set(admitted[n], mode="drop") for n, stat in stats.items()}
    if policy.gate_stats:
      rated = policy.rate(logits)
      stats |= {n: stats[n].at[layer, rows, head, about].set(rated[n], mode="drop") for n in policy.gate_stats}
    index = jnp.broadcast_to(jnp.arange(slots), state.shape)
    stop = plan.seen + plan.lengths
    replays = plan.remaining is not None and policy.replays
    if replays:
      state, forgotten = replay.masked(policy, plan, self.window, t, state, {n: x[layer] for n, x in stats.items()})
      if self.sliding is not None:
        forgotten = jnp.where(self.sliding.at(layer), NEVER, forgotten)
    held = index < stop[:, None, None]
    first = jnp.where(held, index, NEVER)
    last = jnp.where(held, self._last_visible(layer, state, index), -1)
    if replays:
      last = jnp.where(held & (forgotten < NEVER), forgotten, last)
    live = count_reads(first, last, stop - 1, stop)
    held_rows = floats(kv[layer])
    keys, values = jnp.split(held_rows, 2, axis=-1)
    if policy.page and t == 1:
      last = jnp.where(self._selected(policy, layer, keys, stop, q), last, -1)
    q_pos = jnp.where(real, position, -2)
    observes = policy.observes if plan.remaining is None else policy.prompt_observes
    weights = None
    if "mass" in observes:
      ones = jnp.ones((b, 1), jnp.float32)
      weights = ones if plan.remaining is None else policy.query_weights(plan.lengths, plan.remaining, t)
    out = prefill_attention(q, keys, values, q_pos, first, last, query_weights=weights)
    out, mass = (out, None) if weights is None else out
    if policy.remembers:
      memory = policy.remember(memory, layer, queries_of(q, heads), plan.seen, plan.lengths)
    if policy.steers:
      memory = policy.tally(memory, layer, evict, plan.seen, plan.lengths)
    own, remaining = {}, jnp.zeros_like(stop) if plan.remaining is None else plan.remaining
    active = (plan.lengths > 0)[:, None, None]
    if policy.stats:
      own = {name: stat[layer] for name, stat in stats.items()}
      if observes:
        seen = observation(
          observes, mass=mass, rows=held_rows, q=q, stats=own, lengths=plan.lengths, remaining=remaining,
          live=(first <= last) & (last >= stop[:, None, None] - 1),
        )  # fmt: skip
        after = policy.observe(own, seen)
        own = {name: jnp.where(active, after[name], stat) for name, stat in own.items()}
        stats = {name: stat.at[layer].set(own[name]) for name, stat in stats.items()}
    if plan.remaining is not None and policy.compacts and not replays:
      state, memory = self._cut(policy, layer, held_rows, own, state, memory, stop, plan.lengths > 0, remaining)
      live = count_reads(first, jnp.where(held, self._last_visible(layer, state, index), -1), stop - 1, stop)
    return out, (kv, stats, memory), state, Usage(live, count_reads(first, last, plan.seen, stop))

  def _cut(self, policy, layer, rows, stats, evicted, memory, stop, active, remaining):
    """(evicted [B, K, S], memory) of one layer after the policy has cut the tokens outside the window.

    Args:
      rows: [B, K, S, 2H], keys and values as numbers.
      stop: int32 [B], tokens that each row has read.
    """
    index, h = jnp.arange(self.slots), rows.shape[-1] // 2
    seen, outside = index < stop[:, None, None], index < (stop - self.window - 1)[:, None, None]
    live = outside & ~evicted
    candidates = Candidates(
      layer, stats, live, live | (seen & ~outside), stop, remaining,
      keys=rows[..., :h] if "keys" in policy.compact_observes else None,
      values=rows[..., h:] if "values" in policy.compact_observes else None,
      memory={name: x[layer] for name, x in memory.items()},
    )  # fmt: skip
    evicted = evicted | (live & ~policy.compact(candidates) & active[:, None, None])
    return evicted, policy.renew(memory, layer, active & (remaining == 0)) if policy.remembers else memory

  def prune(self, policy, active):
    due = active & on_any(policy.due(self.seen, self._held()))

    def body(layer, state):
      evicted, memory = state
      stats = {name: stat[layer] for name, stat in self.stats.items()}
      own, memory = self._cut(
        policy, layer, floats(self.kv[layer]), stats, evicted[layer], memory, self.seen, due, jnp.zeros_like(self.seen)
      )
      return evicted.at[layer].set(own), memory

    layers = jnp.where(jnp.any(due), len(self.kv), 0)
    evicted, memory = jax.lax.fori_loop(0, layers, body, (self.evicted, self.memory))
    return self.replace(evicted=evicted, memory=memory)

  def _selected(self, policy, layer, keys, stop, q):
    """Which tokens a query reads, bool [B, K, S]: the window, and older tokens in a page that the policy selects."""
    b, heads, slots, h = keys.shape
    left = (stop - self.window - 1)[:, None, None]  # tokens before this one have left the window
    pages = -(-slots // policy.page)
    keys = jnp.pad(keys, ((0, 0), (0, 0), (0, pages * policy.page - slots), (0, 0)))
    live = jnp.broadcast_to(jnp.arange(pages * policy.page) < left, keys.shape[:3])
    live = live.reshape(b, heads, pages, policy.page)
    summaries = policy.summarise(keys.reshape(b, heads, pages, policy.page, h), live)
    q = q.reshape(b, heads, -1, h)
    chosen = policy.select(layer, q, summaries, jnp.any(live, axis=-1), stop)
    if self.sliding is not None:
      chosen |= self.sliding.at(layer)
    return jnp.repeat(chosen, policy.page, axis=-1)[..., :slots] | (jnp.arange(slots) >= left)

  def commit(self, plan, carry, states, evict=None):
    assert evict is None, "decisions go to attend: can_decide_late is False"
    return self.with_carry(carry).replace(evicted=states, seen=plan.seen + plan.lengths)
