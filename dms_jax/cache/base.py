"""The cache protocol: three calls a step, the middle one in each layer.

    plan = cache.plan(policy, lengths, num_tokens[, remaining])  # before the layers: where everything goes, who stalls
    out, carry, state, seen = cache.attend(plan, policy, layer, carry, state, q, k, v, evict)    # in layer `layer`
    cache = cache.commit(plan, carry, states[, evict])           # after the layers

`carry` starts as `cache.layer_carry()`: the arrays too large to copy, with all layers, updated in place as they pass
through the layers. `state` is the layer's part of `cache.layer_state()`, small arrays with a leading L. `evict` holds
decisions by the token that computes them. It goes to `attend`; the decisions of a single token, for all layers, go to
`commit` instead (and None to `attend`) where `cache.can_decide_late` allows it.

A row without free slots sits a step out, untouched: `plan.stalled`. A step of one token is a decode step unless
`remaining` is given and the policy compacts prompts: then it is a chunk. Policies with `exact_prefill` refuse chunks;
`model.cached_forward` feeds them one token at a time.
"""

from __future__ import annotations

from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Bool, Float, Int, Shaped

from dms_jax.attention import NEVER
from dms_jax.execution import Execution
from dms_jax.policies import Policy

# A cache that may grow does so by GROWTH at least, to a multiple of SLOTS: each new shape is a compilation.
SLOTS, GROWTH = 256, 1.5


@struct.dataclass
class Plan:
  """Fixed before the layers run. `seen` [B]: tokens before this step. `lengths` [B]: real tokens of the step, 0 where a
  row sits out. `stalled` [B]: rows without free slots. `remaining` [B]: tokens of the prompt after a chunk; None in a
  decode step. `placement`: what the kind of cache adds."""

  seen: Int[Array, "B"]
  lengths: Int[Array, "B"]
  stalled: Bool[Array, "B"]
  remaining: Int[Array, "B"] | None = None
  placement: Any = None


@struct.dataclass
class Usage:
  """KV usage of one layer in one step, int32 [B, K]: `live` tokens held after it, `reads` keys read by its queries."""

  live: Int[Array, "B K"]
  reads: Int[Array, "B K"]


@runtime_checkable
class Cache(Protocol):
  """A fixed-shape pytree. `seen` int32 [B]: tokens of each row. `lag`: a decision computed at t is about t - lag.

  `slots`: slots a head. `nbytes`: bytes allocated. `bytes_live()`: bytes of the keys and values held. `live()`: tokens
  held, int32 [L, B, K]. `free_tokens(policy)`: tokens that each row can certainly take, int32 [B].
  `ensure_capacity(policy, coming, most)`: the cache, grown if `coming` more tokens a row, numpy [B], might not fit, but
  never beyond what `most` tokens need.
  """

  seen: Int[Array, "B"]
  window: int
  lag: int

  @property
  def slots(self) -> int: ...
  @property
  def nbytes(self) -> int: ...
  def bytes_live(self) -> int: ...
  def live(self) -> Int[Array, "L B K"]: ...
  def free_tokens(self, policy: Policy) -> Int[Array, "B"]: ...
  def grow(self, slots: int) -> Cache: ...
  def with_capacity(self, capacity: int, longest: int) -> Cache: ...
  def ensure_capacity(self, policy: Policy, coming: Any, most: int) -> Cache: ...
  def check(self, policy: Policy) -> None: ...
  def layer_carry(self) -> Any: ...
  def layer_state(self) -> Any: ...
  def plan(
    self, policy: Policy, lengths: Int[Array, "B"], num_tokens: int, remaining: Int[Array, "B"] | None = None
  ) -> Plan: ...
  def can_decide_late(self, policy: Policy) -> bool: ...
  def attend(
    self, plan: Plan, policy: Policy, layer: Int[Array, ""], carry: Any, state: Any, q: Float[Array, "B T N H"],
    k: Float[Array, "B T K H"], v: Float[Array, "B T K H"], evict: Bool[Array, "B K T"] | None,
  ) -> tuple[Float[Array, "B T N H"], Any, Any, Usage]: ...  # fmt: skip
  def commit(self, plan: Plan, carry: Any, states: Any, evict: Bool[Array, "L B K 1"] | None = None) -> Cache: ...


@struct.dataclass
class Common:
  """What caches of one array `kv` [L, B, K, S, 2H] share. `stats`: the policy's statistics, name -> float32
  [L, B, K, S]."""

  kv: jax.Array
  evicted: jax.Array
  seen: jax.Array
  stats: dict[str, jax.Array]
  window: int = struct.field(pytree_node=False)
  lag: int = struct.field(pytree_node=False)

  @property
  def slots(self) -> int:
    return self.kv.shape[3]

  @property
  def slot_bytes(self) -> int:
    """Of one key and value, in `kv`."""
    return self.kv.shape[4] * self.kv.dtype.itemsize

  def bytes_live(self) -> int:
    return int(jnp.sum(self.live())) * self.slot_bytes

  @property
  def nbytes(self) -> int:
    return sum(leaf.nbytes for leaf in jax.tree.leaves(self))

  def with_capacity(self, capacity, longest):
    """The same cache with a fixed capacity; ValueError if that is below what it has."""
    if capacity < self.slots:
      raise ValueError(f"capacity={capacity} is below the {self.slots} slots the conversation has")
    return self.grow(capacity)

  def ensure_capacity(self, policy, coming, most):
    lack = int((coming - jax.device_get(self.free_tokens(policy))).max())
    if lack <= 0 or self.slots >= most:
      return self
    return self.grow(max(min(rounded(max(self.slots + lack, int(self.slots * GROWTH))), rounded(most)), self.slots))

  def can_decide_late(self, policy: Policy) -> bool:
    """Whether a single token's decisions may come after its layers."""
    return False

  def check(self, policy: Policy) -> None:
    """Raises ValueError where `policy` has another window, or needs of a cache what this one was not made with."""
    name = type(policy).__name__
    if policy.window != self.window:
      raise ValueError(f"policy window={policy.window}, but the cache has window={self.window}")
    if set(policy.stats) != set(self.stats):
      raise ValueError(f"{name} needs the statistics {sorted(policy.stats)}, but the cache stores {sorted(self.stats)}")


def rounded(slots: int) -> int:
  """Up to a multiple of SLOTS."""
  return -(-slots // SLOTS) * SLOTS


def storage_dtype(dtype) -> jnp.dtype:
  """The dtype of the arrays in which a cache keeps numbers of `dtype`: uint16 for bfloat16 under `bits_storage`."""
  bits = dtype == jnp.bfloat16 and Execution.choose().bits_storage
  return jnp.dtype(jnp.uint16) if bits else jnp.dtype(dtype)


def packed(rows: Float[Array, "*shape"], dtype) -> Shaped[Array, "*shape"]:
  """Numbers as they are stored in `dtype`; with `unpacked` the one place that knows."""
  if dtype == jnp.uint16:
    return jax.lax.bitcast_convert_type(rows.astype(jnp.bfloat16), jnp.uint16)
  return rows.astype(dtype)


def unpacked(rows: Shaped[Array, "*shape"]) -> Float[Array, "*shape"]:
  """Rows as numbers again, where they are stored as bits."""
  return jax.lax.bitcast_convert_type(rows, jnp.bfloat16) if rows.dtype == jnp.uint16 else rows


def rows_of(k: Float[Array, "B T K H"], v: Float[Array, "B T K H"], dtype) -> Shaped[Array, "B K T 2*H"]:
  """Keys and values side by side, one row of 2H a token, heads first, in a cache's storage `dtype`."""
  return packed(jnp.swapaxes(jnp.concatenate([k, v], axis=-1), 1, 2), dtype)


def group_mean(mass: Float[Array, "B K S"], q: Float[Array, "B T N H"]) -> Float[Array, "B K S"]:
  """Attention summed over the query heads of each group, as their mean."""
  return mass * (mass.shape[1] / q.shape[2])


def last_visible(evicted: Bool[Array, "B K S"], position: Int[Array, "B #K S"], window: int) -> Int[Array, "B K S"]:
  """The last query position that sees a key: never evicted, or its position + W."""
  return jnp.where(evicted, position + window, NEVER)


def count_reads(first: Array, last: Array, start: Int[Array, "B"], stop: Int[Array, "B"]) -> Int[Array, "B K"]:
  """Visible (query, key) pairs for queries at positions start .. stop-1, keys [B, K, S] seen from first to last."""
  low = jnp.maximum(first, start[:, None, None])
  high = jnp.minimum(last, stop[:, None, None] - 1)
  return jnp.sum(jnp.maximum(high - low + 1, 0), axis=-1, dtype=jnp.int32)
