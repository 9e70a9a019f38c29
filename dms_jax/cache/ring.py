"""RingCache: the base of caches with a window ring and an archive, which free evicted tokens.

Each (layer, row, KV head) has S = W + 1 + A slots:

    [ ring: W + 1 slots, token t in slot t mod (W + 1) | archive: tokens kept as they left the ring ]

The live slots of a ring, and those of an archive, are its first. Archived tokens are in the order of their positions,
unless a policy overwrites some or the layer slides (`sliding`). Attention does not depend on the order of slots,
because keys are stored after RoPE. If a policy selects pages, ring and archive consist of whole pages.

Both memory layouts number slots this way: `contiguous.ContiguousCache` stores ring and archive in one array,
`paged.PagedCache` stores archives in pages. A layout defines the methods at the end of `RingCache`. `chunk` attends for
chunks of a prompt.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Bool, Float, Int, Shaped

from dms_jax.cache import chunk, pruning
from dms_jax.cache.base import Common, Plan, Usage, blended, observation, packed, queries_of, rows_of
from dms_jax.cache.compact import Closing, closing
from dms_jax.collectives import on_any
from dms_jax.policies import Leaving
from pallas_kernels.paged.format import floats


@struct.dataclass
class Step:
  """Where the token that leaves each ring goes, [L, B, K], planned before this step's own decisions are known."""

  target: jax.Array  # int32, the slot that the token moves to; S if it is forgotten
  grows: jax.Array  # bool, whether the move adds a slot to the archive
  merge: jax.Array | None = None  # float32, the leaving token's share of the slot, 1 where it is not merged
  closing: Closing | None = None  # of the gaps that other removed tokens leave


@struct.dataclass
class Placement:
  """`Plan.placement` of a cache with a ring.

  Attributes:
    step: the leaving tokens of a decode step; None for a chunk.
    reserved: the memory of new slots: the `Table` of a paged cache, None for a contiguous one.
  """

  step: Step | None
  reserved: Any


@struct.dataclass
class LayerCarry:
  """The arrays carried through the layers.

  Attributes:
    kv: [L, B, K, S, 2H], the ring, then the archive; [L, B, K, W+1, 2H], the ring alone, if archives lie in pages.
    stats: float32 [L, B, K, S] each.
    summaries: [L, B, K, A / page, 2H], for a policy that selects pages, else None.
    memory: the policy's memory, [L, B, K, own axes] each.
    archive: the pages' `Store`, if archives lie in pages, else None.
    leaving: [L, B, K, 2H], stored keys and values that leave the rings; only if the model's layers are a list.
    unobserved: (archived, queries, mass) of each layer that the policy will observe once all layers have written; only
      if the model's layers are a list. A program of some layers has its own alone.
  """

  kv: jax.Array
  stats: dict[str, jax.Array]
  summaries: jax.Array | None
  memory: dict[str, jax.Array]
  archive: Any = None
  leaving: jax.Array | None = None
  unobserved: tuple = ()


@struct.dataclass
class RingCache(Common):
  """A cache with a ring of W + 1 slots and an archive of A slots for each (layer, row, KV head).

  Attributes:
    kv: begins with the ring.
    evicted: bool [L, B, K, W+1], decisions about the ring's tokens.
    archived: int32 [L, B, K], tokens in each archive.
    summaries: [L, B, K, A / page, 2H], of the archive's pages, for a policy that selects pages, else None.
    page: slots of such a page, else 0.
  """

  archived: jax.Array
  summaries: jax.Array | None
  page: int = struct.field(pytree_node=False)

  @property
  def ring(self) -> int:
    """Slots of the ring, W + 1."""
    return self.window + 1

  def check(self, policy):
    """Also compares the pages that the policy selects; see `Common.check`."""
    super().check(policy)
    if policy.page != self.page:
      raise ValueError(f"{type(policy).__name__} selects pages of {policy.page} slots, the cache has {self.page}")

  def layer_carry(self, leaving=None):
    return LayerCarry(self.kv, self.stats, self.summaries, self.memory, self._store(), leaving)

  def layer_state(self):
    return self.archived, self.evicted

  def with_carry(self, carry):
    return self._after(carry)

  @jax.jit
  def live(self):
    """Live slots, int32 [L, B, K]."""
    return jnp.minimum(self.seen, self.ring)[:, None] + self.archived

  @jax.jit
  def free_tokens(self, policy, rows=None):
    """Tokens that each row can take for certain, int32 [B]: if all are kept, or more by the policy's `reach`."""
    archived = self.archived if self.sliding is None else jnp.where(self.sliding.heads, 0, self.archived)
    free = self.slots - self.ring - jnp.max(archived, axis=(0, 2))
    tokens = jnp.maximum(free + jnp.maximum(self.ring - self.seen, 0), policy.reach(self.slots) - self.seen)
    if self.sliding is None or self.sliding.holds(self.slots):
      return tokens
    return jnp.minimum(tokens, self.slots - self.seen)

  # Before the layers --------------------------------------------------------------------------------------------------

  def plan(self, policy, lengths, num_tokens, remaining=None):
    self.check(policy)
    if not self.takes_chunk(policy, num_tokens, remaining):
      return self._plan_step(policy, lengths)
    position = self.seen[:, None] - self.ring + jnp.arange(self.ring + num_tokens)
    leaves = (position >= 0) & (position < (self.seen + lengths)[:, None] - self.ring)
    appended = jnp.sum(leaves[:, None] & ~self._foreseen(policy, position), axis=-1, dtype=jnp.int32)
    if policy.compacts:
      most = jnp.broadcast_to(policy.capacity(self.seen + lengths), self.seen.shape) - self.ring
      appended = jnp.minimum(appended, jnp.maximum(most[:, None] - self.archived, 0))
    if self.sliding is not None:
      enter = self.sliding.archived(self.seen + lengths)[:, None] - self.archived
      appended = jnp.where(self.sliding.heads, enter, appended)
    fits, reserved = self._reserved(appended, num_tokens)
    remaining = jnp.zeros_like(self.seen) if remaining is None else remaining
    return Plan(self.seen, jnp.where(fits, lengths, 0), ~fits, remaining, Placement(None, reserved))

  def _foreseen(self, policy, position):
    """The decisions about tokens at `position` int32 [B, X] that are known before the layers run, bool [L, B, K, X].

    A decision that a layer of this step will compute counts as "keep".
    """
    layers, *_ = lead = self.archived.shape
    shape = (*lead, position.shape[1])
    at = jnp.broadcast_to(position[:, None], shape)
    made = jnp.take_along_axis(self.evicted, at % self.ring, axis=-1)
    coming = policy.decide(None, jnp.arange(layers)[:, None, None, None], at) if policy.known_ahead else False
    return jnp.where(at < (self.seen - self.lag)[:, None, None], made, coming)

  def _plan_step(self, policy, lengths):
    ring, slots = self.ring, self.slots
    displaced = ((self.seen >= ring) & (lengths > 0))[:, None]
    at = jnp.broadcast_to((self.seen % ring)[:, None, None], (*self.archived.shape, 1))
    retired = policy.retire(
      Leaving(
        evicted=self._foreseen(policy, (self.seen - ring)[:, None])[..., 0], tokens=(self.seen + 1)[:, None],
        archived=self.archived, live=jnp.arange(slots - ring) < self.archived[..., None],
        stats={name: jnp.take_along_axis(stat, at, axis=-1)[..., 0] for name, stat in self.stats.items()},
        archive_stats={name: stat[..., ring:] for name, stat in self.stats.items()},
      )
    )  # fmt: skip
    if self.sliding is not None:
      retired = self.sliding.retired(retired, (self.seen - ring)[:, None], self.archived, slots - ring)
    keep = displaced & retired.keep
    place = jnp.full_like(self.archived, -1) if retired.slot is None else retired.slot
    grows = keep & (place < 0)
    fits, reserved = self._reserved(grows.astype(jnp.int32), 1)
    target = jnp.where(keep & fits[:, None], ring + jnp.where(grows, self.archived, place), slots)
    merge = None if retired.merge is None else jnp.where(place < 0, 1.0, retired.merge)
    closes = None
    if retired.removed is not None:
      removed = jnp.where((displaced & fits[:, None])[..., None], retired.removed, slots - ring)
      closes = closing(removed, self.archived, slots - ring)
    step = Step(target, grows & fits[:, None], merge, closes)
    return Plan(self.seen, jnp.where(fits, lengths, 0), ~fits, None, Placement(step, reserved))

  # In a layer ---------------------------------------------------------------------------------------------------------

  def _decided_ahead(self, policy) -> bool:
    """Whether the decision about the token that leaves the ring is known before the layers.

    An earlier step made it if W >= lag; without gates the policy knows it, or evicts nothing by decisions.
    """
    return self.window >= self.lag or policy.known_ahead or not policy.evicts

  def can_decide_late(self, policy):
    return self._decided_ahead(policy) and not (policy.uses_keys or policy.gate_stats or policy.steers)

  def steps_in_parts(self, policy):
    return self._decided_ahead(policy) and not (policy.merges or policy.removes)

  def begin_parts(self, plan, policy):
    step = plan.placement.step
    if step.merge is not None or step.closing is not None:
      raise ValueError(f"{type(policy).__name__}.retire merges or removes tokens: set merges or removes of its class")
    carry = self._all_left(plan, self.layer_carry())
    return self.with_carry(carry), carry.leaving

  def end_parts(self, plan, policy, unobserved):
    if not unobserved:
      return self
    carry = self.layer_carry().replace(unobserved=tuple(unobserved))
    return self.with_carry(self._all_observed(plan, policy, carry, plan.placement.reserved))

  def attend(self, plan, policy, layer, carry, state, q, k, v, evict, logits=None):
    if plan.placement.step is None:
      return chunk.attend(self, plan, policy, layer, carry, state, q, k, v, evict, logits)
    return self._decode(plan, policy, layer, carry, state, q, k, v, evict, logits)

  def _decode(self, plan, policy, layer, carry, state, q, k, v, evict, logits=None):
    archived, _ = state
    active, ring, slots = plan.lengths > 0, self.ring, self.slots
    rows, head = jnp.arange(q.shape[0])[:, None], jnp.arange(archived.shape[1])
    slot = (plan.seen % ring)[:, None]
    step, reserved = plan.placement.step, plan.placement.reserved
    target, grows = step.target[layer], step.grows[layer]
    known = self._decided_ahead(policy)
    if not known:
      gone = evict if self.sliding is None else evict & ~self.sliding.at(layer)
      target, grows = jnp.where(gone[..., 0], slots, target), grows & ~gone[..., 0]
    archived = archived + grows.astype(jnp.int32)

    newest = jnp.broadcast_to(jnp.where(active[:, None], slot, slots), target.shape)
    new = rows_of(k, v, carry.kv.dtype)
    listed = isinstance(layer, int) or carry.leaving is not None
    if known and listed and step.merge is None:
      # Layers are a list: one write before the first layer moves the leaving tokens of all layers. This saves kernels:
      # a step on a GPU is many small ones.
      if carry.leaving is None:
        carry = self._all_left(plan, carry)
      # Stalled rows write, too: their old row. So the write depends on the read of `leaving`, follows it, and needs no
      # copy of the cache.
      stays = jnp.where(active[:, None, None], new[:, :, 0], carry.leaving[layer])
      carry = carry.replace(kv=carry.kv.at[layer, rows, head, slot].set(stays, unique_indices=True))
    else:
      displaced = carry.kv[layer, rows, head, slot]
      if step.merge is not None:
        old = self._archive_at(carry, reserved, layer, (target - ring)[..., None])[:, :, 0]
        displaced = blended(old, displaced, step.merge[layer])
      carry = self._exchanged(carry, reserved, layer, target, displaced, newest, new[:, :, 0])
    if step.closing is not None:
      own = jax.tree.map(lambda x: x[layer], step.closing)
      carry, archived = self._closed(carry, reserved, layer, own), archived - own.removed
    if policy.stats:
      admitted = policy.admit(layer, jnp.broadcast_to(plan.seen[:, None, None], (*target.shape, 1)))
      at = (layer, rows[..., None], head[:, None], jnp.stack([target, newest], -1))
      leaving = {name: stat[layer, rows, head, slot] for name, stat in carry.stats.items()}
      if step.merge is not None:
        merged = (layer, rows, head, jnp.minimum(target, slots - 1))
        leaving = {n: x + jnp.where(grows, 0.0, carry.stats[n][merged]) for n, x in leaving.items()}
      moved = {name: jnp.stack([x, admitted[name][..., 0]], -1) for name, x in leaving.items()}
      stats = {n: stat.at[at].set(moved[n], mode="drop") for n, stat in carry.stats.items()}
      if policy.gate_stats:
        rated, decided = policy.rate(logits), (plan.lengths > 0) & (plan.seen >= self.lag)
        at = (layer, rows, head, jnp.where(decided, (plan.seen - self.lag) % ring, slots)[:, None])
        stats |= {name: stats[name].at[at].set(rated[name][..., 0], mode="drop") for name in policy.gate_stats}
      carry = carry.replace(stats=stats)

    if policy.remembers:
      queries = queries_of(q, archived.shape[1])
      carry = carry.replace(memory=policy.remember(carry.memory, layer, queries, plan.seen, plan.lengths))
    if policy.steers:
      carry = carry.replace(memory=policy.tally(carry.memory, layer, evict, plan.seen, plan.lengths))
    in_ring = jnp.minimum(plan.seen + plan.lengths, ring)[:, None]
    live = read = in_ring + archived
    if policy.page:
      carry = self._summarised(policy, layer, carry, reserved, archived, (target - ring) // self.page)
      out, read = self._selected(plan, policy, layer, carry, reserved, archived, q)
    elif policy.observes:
      out, mass = self._attended(carry, reserved, layer, q[:, 0], in_ring, archived, mass="mass" in policy.observes)
      if listed and {"keys", "values"} & set(policy.observes):
        # Nothing that a later layer writes would depend on this read of the cache, so XLA would copy the cache first.
        carry = carry.replace(unobserved=(*carry.unobserved, (archived, q, mass)))
        if isinstance(layer, int) and layer + 1 == len(carry.kv):
          carry = self._all_observed(plan, policy, carry, reserved)
      else:
        carry = self._observed(plan, policy, carry, reserved, layer, archived, q, mass)
    else:
      out, _ = self._attended(carry, reserved, layer, q[:, 0], in_ring, archived)
    decided = None if evict is None else evict[..., 0]
    return out[:, None], carry, (archived, decided), Usage(live, jnp.where(active[:, None], read, 0))

  def _all_left(self, plan, carry):
    """`carry` after the write that moves the leaving tokens of all layers in a decode step."""
    step, slot = plan.placement.step, (plan.seen % self.ring)[:, None]
    lead = jnp.ix_(*(jnp.arange(n) for n in step.target.shape))
    leaving = jax.lax.optimization_barrier(carry.kv[(*lead, slot)])
    return self._moved(carry.replace(leaving=leaving), plan.placement.reserved, step.target, leaving)

  def _closed(self, carry, reserved, layer, own: Closing):
    """`carry` with the gaps of a layer's archives closed."""
    (b, heads, _), ring, slots = own.source.shape, self.ring, self.slots
    rows, head = jnp.arange(b)[:, None, None], jnp.arange(heads)[:, None]
    moved = packed(self._archive_at(carry, reserved, layer, own.source), carry.kv.dtype)
    moved, carry = jax.lax.optimization_barrier((moved, carry))  # read before the write
    target = jnp.where(own.target < slots - ring, own.target + ring, slots)
    source = jnp.minimum(own.source + ring, slots - 1)
    stats = {
      name: x.at[layer, rows, head, target].set(x[layer, rows, head, source], mode="drop")
      for name, x in carry.stats.items()
    }
    return self._written(carry, reserved, layer, target, moved, in_order=False).replace(stats=stats)

  def _observed(self, plan, policy, carry, reserved, layer, archived, q, mass):
    """`carry` with the statistics of one layer after `policy.observe` in a decode step."""
    index, in_ring, rows = jnp.arange(self.slots), jnp.minimum(plan.seen + plan.lengths, self.ring)[:, None], None
    if {"keys", "values"} & set(policy.observes):
      rows = self._all_slots(carry, reserved, layer)
    before = {name: stat[layer] for name, stat in carry.stats.items()}
    seen = observation(
      policy.observes, mass=mass, rows=rows, q=q, stats=before, lengths=plan.lengths,
      live=jnp.where(index < self.ring, index < in_ring[..., None], index - self.ring < archived[..., None]),
      remaining=jnp.zeros_like(plan.lengths),
    )  # fmt: skip
    after = policy.observe(before, seen)
    active = (plan.lengths > 0)[:, None, None]
    after = {name: jnp.where(active, after[name], stat) for name, stat in before.items()}
    return carry.replace(stats={name: stat.at[layer].set(after[name]) for name, stat in carry.stats.items()})

  def _all_observed(self, plan, policy, carry, reserved):
    """`carry` with the statistics of all layers after `policy.observe`, one layer at a time to save memory."""
    waiting, carry = jax.tree.map(lambda *layers: jnp.stack(layers), *carry.unobserved), carry.replace(unobserved=())

    def body(layer, stats):
      own = jax.tree.map(lambda x: x[layer], waiting)
      return self._observed(plan, policy, carry.replace(stats=stats), reserved, layer, *own).stats

    return carry.replace(stats=jax.lax.fori_loop(0, len(carry.kv), body, carry.stats))

  def _summarised(self, policy, layer, carry, reserved, archived, page):
    """`carry` with the summary of archive page `page` int32 [B, K] recomputed; a number past the end is ignored."""
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
      floats(carry.summaries[layer]),
      jnp.arange(pages) < used[..., None],
      stop,
    )
    if self.sliding is not None:
      chosen |= self.sliding.at(layer) & (jnp.arange(pages) < used[..., None])
    # Only the archive's last page may be partly filled; if it is chosen, it is the last chosen page in `order`.
    order = jnp.argsort(~chosen, axis=-1).astype(jnp.int32)
    partial = jnp.any(chosen & (jnp.arange(pages) == used[..., None] - 1), axis=-1)
    free = jnp.where(partial, used * self.page - archived, 0)
    length = jnp.sum(chosen, axis=-1, dtype=jnp.int32) * self.page - free
    in_ring = jnp.broadcast_to(jnp.minimum(stop, self.ring)[:, None], length.shape)
    return self._attended_pages(carry, reserved, layer, q[:, 0], in_ring, order, length), in_ring + length

  def _all_summarised(self, policy, layer, carry, reserved, archived):
    """`carry` with the summaries of all archive pages of a layer recomputed, as a chunk requires."""
    b, heads = archived.shape
    keys = self._archive(carry, reserved, layer)
    keys = keys[..., : keys.shape[-1] // 2].reshape(b, heads, -1, self.page, keys.shape[-1] // 2)
    live = jnp.arange(self.slots - self.ring).reshape(-1, self.page) < archived[..., None, None]
    summaries = packed(policy.summarise(keys, live), carry.summaries.dtype)
    # Nothing that a later layer writes depends on this read of the cache, so XLA would copy the cache first.
    summaries, carry = jax.lax.optimization_barrier((summaries, carry))
    return carry.replace(summaries=carry.summaries.at[layer].set(summaries))

  # After the layers ---------------------------------------------------------------------------------------------------

  def commit(self, plan, carry, states, evict=None):
    archived, evicted = states
    evicted = evicted if evict is None else evict[..., 0]
    if plan.placement.step is not None:
      evicted = self._decided(plan, evicted)
    return self._after(carry, archived=archived, evicted=evicted, seen=plan.seen + plan.lengths)

  def _after(self, carry: LayerCarry, **fields) -> RingCache:
    """The cache with the arrays of `carry`, and other `fields`."""
    return self.replace(kv=carry.kv, stats=carry.stats, summaries=carry.summaries, memory=carry.memory, **fields)

  def prune(self, policy, active):
    return pruning.prune(self, policy, active & on_any(policy.due(self.seen, self._held())))

  @property
  def _unit(self) -> int:
    """Slots to whose multiple the width of an archive is rounded."""
    return 1

  def _rows_of(self, layer: Int[Array, "R"], rows: Int[Array, "R"], archive: int) -> RingCache:
    """The layer `layer` of each of `rows`, a cache of one layer with `archive` archive slots that hold all its tokens.

    The layers do not slide. A number past the last row gives an empty row.
    """

    def take(x, width=None):
      at = (layer, rows, *((slice(None), slice(width)) if width else ()))
      return x.at[at].get(mode="fill", fill_value=0)[None]

    width = self.ring + archive
    return self.replace(
      kv=take(self.kv, width), evicted=take(self.evicted), archived=take(self.archived), sliding=None,
      seen=self.seen.at[rows].get(mode="fill", fill_value=0), memory=jax.tree.map(take, self.memory),
      stats={name: take(stat, width) for name, stat in self.stats.items()},
      summaries=None if self.summaries is None else take(self.summaries, -(-archive // self.page)),
    )  # fmt: skip

  def _with_rows(self, layer: Int[Array, "R"], rows: Int[Array, "R"], part: RingCache) -> RingCache:
    """This cache with what `part`, a later state of `_rows_of(layer, rows, ...)`, holds."""

    def put(x, new):
      return x.at[(layer, rows, *(slice(size) for size in new.shape[2:]))].set(new[0], mode="drop")

    fields = ("kv", "archived", "stats", "memory")
    return self.replace(**{name: jax.tree.map(put, getattr(self, name), getattr(part, name)) for name in fields})

  def _decided(self, plan, decided: Bool[Array, "L B K"]) -> Bool[Array, "L B K ring"]:
    """`evicted` after a decode step: `decided` for token t - lag, then "undecided", False, for the new token t.

    With lag 0 both are token t, which is decided. With lag W + 1 token t - lag has left, and token t has its slot.
    """

    def is_of(ago):
      there = (plan.lengths > 0) & (plan.seen >= ago)
      return jnp.arange(self.ring) == jnp.where(there, (plan.seen - ago) % self.ring, -1)[:, None, None]

    own = decided[..., None] if self.lag == 0 else False
    evicted = jnp.where(is_of(self.lag), decided[..., None], self.evicted) if self.lag else self.evicted
    return jnp.where(is_of(0), own, evicted)

  # Where the archive lies ---------------------------------------------------------------------------------------------

  def _store(self) -> Any:
    """The initial `LayerCarry.archive`."""
    return None

  def _place(self) -> Any:
    """`Placement.reserved` of a step that needs no new slots."""
    return None

  def _reserved(self, new: Int[Array, "L B K"], most: int) -> tuple[Bool[Array, "B"], Any]:
    """Reserves archive slots before the layers run.

    Args:
      new: slots that each head needs.
      most: an upper bound of `new`.

    Returns:
      (which rows have room for all of their heads, `Placement.reserved`).
    """
    raise NotImplementedError

  def _written(
    self, carry: LayerCarry, reserved, layer, target: Int[Array, "B K X"], rows: Shaped[Array, "B K X 2*H"],
    in_order: bool = True,
  ) -> LayerCarry:  # fmt: skip
    """`carry` with stored rows written to slots `target`; rows with a slot past the last one are dropped.

    Args:
      in_order: whether the archive slots of each head ascend without gaps.
    """
    raise NotImplementedError

  def _exchanged(
    self, carry: LayerCarry, reserved, layer, target: Int[Array, "B K"], leaves, newest: Int[Array, "B K"], enters
  ):
    """`carry` with `leaves` written to archive slot `target`, and `enters` to ring slot `newest`.

    Both are stored rows [B, K, 2H]; those with a slot past the last one are dropped.
    """
    return self._written(carry, reserved, layer, jnp.stack([target, newest], -1), jnp.stack([leaves, enters], 2))

  def _moved(
    self, carry: LayerCarry, reserved, target: Int[Array, "L B K"], rows: Shaped[Array, "L B K 2*H"]
  ) -> LayerCarry:
    """`carry` with stored rows of all layers written to archive slots `target`; past the last slot they are dropped."""
    raise NotImplementedError

  def _archive(self, carry: LayerCarry, reserved, layer) -> Float[Array, "B K A 2*H"]:
    """The whole archive of a layer, as numbers; free slots hold arbitrary ones."""
    raise NotImplementedError

  def _all_slots(self, carry: LayerCarry, reserved, layer) -> Float[Array, "B K S width"]:
    """The ring and the archive of a layer, as numbers; free slots hold arbitrary ones."""
    own = floats(carry.kv[layer, :, :, : self.ring])
    return jnp.concatenate([own, self._archive(carry, reserved, layer)], axis=2)

  def _archive_at(self, carry: LayerCarry, reserved, layer, index: Int[Array, "B K X"]) -> Float[Array, "B K X 2*H"]:
    """The archive slots `index` of a layer, as numbers; an index past the end gives arbitrary ones."""
    raise NotImplementedError

  def _attended(
    self, carry: LayerCarry, reserved, layer, q: Float[Array, "B N H"], in_ring, archived, mass: bool = False
  ):
    """Attention of one query a row to the first `in_ring` [B, 1] ring slots and `archived` [B, K] archive slots.

    Returns:
      (attended [B, N, H], the attention mass of each slot [B, K, S] if `mass`, else None).
    """
    raise NotImplementedError

  def _attended_pages(self, carry: LayerCarry, reserved, layer, q: Float[Array, "B N H"], in_ring, order, length):
    """Attention of one query a row to the first `in_ring` [B, K] ring slots and to archive pages: [B, N, H].

    Args:
      order: int32 [B, K, A / page], the archive's pages, the chosen ones first.
      length: int32 [B, K], archive slots to read, counted in this order.
    """
    raise NotImplementedError
