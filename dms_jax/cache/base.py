"""The cache protocol: calls before the layers of a step, in each layer, and after them.

    cache = cache.prune(policy, lengths > 0)                     # before a decode step, if the policy prunes
    plan = cache.plan(policy, lengths, num_tokens[, remaining])  # before the layers: where everything goes, who stalls
    out, carry, state, usage = cache.attend(plan, policy, layer, carry, state, q, k, v, evict[, logits])  # in a layer
    cache = cache.commit(plan, carry, states[, evict])           # after the layers

`carry` starts as `cache.layer_carry()`: the arrays too large to copy, with all layers, updated in place from layer to
layer. `state` is the layer's part of `cache.layer_state()`, small arrays with a leading L.

`evict` holds decisions, bool, indexed by the token that computes them. `attend` takes those of one layer, [B, K, T]. If
`cache.can_decide_late`, a decode step may pass None to `attend` and the decisions of all layers, [L, B, K, 1], to
`commit`.

`plan.stalled` marks the rows without free slots: they take no token in this step and stay unchanged. A step of several
tokens is a chunk of a prompt. A step of one token is a decode step, unless `remaining` is given and the policy
`compacts`: then it is a chunk, too. A cache refuses chunks under a policy with `exact_prefill`; `model.cached_forward`
feeds it one token at a time.
"""

from __future__ import annotations

from functools import partial
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Array, Bool, Float, Int, Shaped

from dms_jax.attention import NEVER
from dms_jax.cache.sliding import Sliding
from dms_jax.execution import Execution
from dms_jax.policies import Observation, Policy
from pallas_kernels.paged.format import floats

# Each new shape is compiled, so a cache grows by a factor of GROWTH, to a multiple of SLOTS; less if texts need less.
SLOTS, GROWTH = 256, 1.5


@struct.dataclass
class Plan:
  """The decisions of one step that are fixed before its layers run.

  Attributes:
    seen: int32 [B], tokens that each row has read before this step.
    lengths: int32 [B], tokens that each row reads in this step; 0 for a stalled row.
    stalled: bool [B], rows without free slots.
    remaining: int32 [B], tokens of the prompt still to come after a chunk; None in a decode step.
    placement: the part that depends on the kind of cache.
  """

  seen: Int[Array, "B"]
  lengths: Int[Array, "B"]
  stalled: Bool[Array, "B"]
  remaining: Int[Array, "B"] | None = None
  placement: Any = None


@struct.dataclass
class Usage:
  """Cache usage of one layer in one step.

  Attributes:
    live: int32 [B, K], tokens held after the step.
    reads: int32 [B, K], (query, key) pairs: each key counts once for every query that sees it.
  """

  live: Int[Array, "B K"]
  reads: Int[Array, "B K"]


@runtime_checkable
class Cache(Protocol):
  """A fixed-shape pytree that holds the keys and values of B rows, in L layers of K KV heads.

  Attributes:
    seen: int32 [B], tokens that each row has read.
    window: W in tokens.
    lag: the decision that token t computes is about token t - lag.
    slots: the most slots that a head has.
    nbytes: bytes allocated.

  Methods without a docstring of their own:
    bytes_live: bytes of the keys and values held.
    live: int32 [L, B, K], tokens held.
    free_tokens: int32 [B], tokens that each row can take for certain, if only `rows`, bool [B], take any (None: all).
    grow: a copy with `slots` slots a head; ValueError if there are more already.
    with_capacity: a copy with a fixed capacity; ValueError if the cache is larger.
    ensure_capacity: the cache, grown if `coming` more tokens a row, numpy int [B], might not fit, but never beyond what
      a text of `most` tokens needs.
    check: ValueError if the cache was made for another policy.
    layer_carry, layer_state: the initial `carry`, and the `state` of all layers. `leaving`: see `begin_parts`.
    with_carry: the cache with the arrays of a `carry`, between two layers.
    takes_chunk: whether a step is a chunk of a prompt; ValueError if the policy refuses chunks.
    can_decide_late: whether a decode step may pass its decisions to `commit`.
    steps_in_parts: whether a decode step may be several programs of some layers each (`Execution.step_layers`), between
      `begin_parts` and `end_parts`.
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
  def free_tokens(self, policy: Policy, rows: Bool[Array, "B"] | None = None) -> Int[Array, "B"]: ...
  def grow(self, slots: int) -> Cache: ...
  def with_capacity(self, capacity: int, longest: int) -> Cache: ...
  def ensure_capacity(self, policy: Policy, coming: Any, most: int) -> Cache: ...
  def check(self, policy: Policy) -> None: ...
  def layer_carry(self, leaving: Any = None) -> Any: ...
  def layer_state(self) -> Any: ...
  def with_carry(self, carry: Any) -> Cache: ...
  def plan(
    self, policy: Policy, lengths: Int[Array, "B"], num_tokens: int, remaining: Int[Array, "B"] | None = None
  ) -> Plan:
    """Finds a place for every token of a step and reserves the memory.

    Args:
      lengths: int32, tokens that each row is to read, at most `num_tokens`; 0 for a row that sits out.
      num_tokens: T, tokens of the step, padding included.
      remaining: int32, tokens of each row's prompt after this chunk. None means a decode step if T = 1, and 0 if T > 1.

    Raises:
      ValueError: the cache was made for another policy, or the policy reads prompts one token at a time and T > 1.
    """
    ...

  def takes_chunk(self, policy: Policy, num_tokens: int, remaining: Int[Array, "B"] | None) -> bool: ...
  def can_decide_late(self, policy: Policy) -> bool: ...
  def steps_in_parts(self, policy: Policy) -> bool: ...
  def begin_parts(self, plan: Plan, policy: Policy) -> tuple[Cache, Any]:
    """(the cache with the tokens that leave the windows of all layers moved, these tokens), before the first part."""
    ...

  def end_parts(self, plan: Plan, policy: Policy, unobserved: list) -> Cache:
    """The cache once the policy has observed what the parts' layers left unobserved, after the last part."""
    ...

  def attend(
    self, plan: Plan, policy: Policy, layer: Int[Array, ""], carry: Any, state: Any, q: Float[Array, "B T N H"],
    k: Float[Array, "B T K H"], v: Float[Array, "B T K H"], evict: Bool[Array, "B K T"] | None,
    logits: Float[Array, "B K T"] | None = None,
  ) -> tuple[Float[Array, "B T N H"], Any, Any, Usage]:  # fmt: skip
    """Writes the keys and values of a step into one layer and attends.

    Args:
      layer: the layer's index; a Python int if the model's layers are a list.
      carry, state: as the module describes.
      q, k, v: after RoPE, in the model's dtype; tokens past `plan.lengths` are padding.
      evict: decisions by the token that computes them; None if they go to `commit`.
      logits: gate logits by the token that computes them, for a policy with `gate_stats`.

    Returns:
      (attended, carry, state, usage).
    """
    ...

  def commit(self, plan: Plan, carry: Any, states: Any, evict: Bool[Array, "L B K 1"] | None = None) -> Cache:
    """The cache after a step.

    Args:
      carry: after the last layer.
      states: the `state` of all layers, stacked [L, ...].
      evict: the decisions of a decode step whose layers got None.
    """
    ...

  def prune(self, policy: Policy, active: Bool[Array, "B"]) -> Cache:
    """The cache before a decode step, with the rows cut that are `active` and that the policy says are due.

    Archives stay in text order. Pages that become empty stay with their heads, for later tokens, until a chunk of a
    prompt gives them back: a head that was cut needs no more of them than before.
    """
    ...


@struct.dataclass
class Common:
  """The fields and methods that all caches share.

  Attributes:
    kv: [L, B, K, S, 2H], a key and a value in each slot, in the storage dtype; in a paged cache the rings alone.
    evicted: bool, decisions: [L, B, K, S] in a masked cache, [L, B, K, W + 1] in a cache with a ring.
    seen: int32 [B], tokens that each row has read.
    stats: the policy's statistics, name -> float32 [L, B, K, S].
    memory: the policy's memory, name -> float32 [L, B, K, own axes].
    window, lag: see `Cache`.
    sliding: the layers that slide; None if no layer does.
  """

  kv: jax.Array
  evicted: jax.Array
  seen: jax.Array
  stats: dict[str, jax.Array]
  memory: dict[str, jax.Array]
  window: int = struct.field(pytree_node=False)
  lag: int = struct.field(pytree_node=False)
  sliding: Sliding | None = struct.field(pytree_node=False)

  @property
  def slots(self) -> int:
    """Slots a head."""
    return self.kv.shape[-2]

  @property
  def slot_bytes(self) -> int:
    """Bytes of one token's key and value in `kv`."""
    return self.kv.shape[-1] * self.kv.dtype.itemsize

  def bytes_live(self) -> int:
    """Bytes of the keys and values held."""
    return int(np.asarray(self.live()).sum()) * self.slot_bytes

  @property
  def nbytes(self) -> int:
    """Bytes of all arrays."""
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(self))

  def with_capacity(self, capacity, longest):
    """The same tokens in a cache of `capacity` slots a head; only paged caches use `longest`.

    Raises:
      ValueError: the cache has more slots than `capacity`.
    """
    if capacity < self.slots:
      raise ValueError(f"capacity={capacity} is below the {self.slots} slots the conversation has")
    return self.grow(capacity)

  def ensure_capacity(self, policy, coming, most):
    """The cache, grown if a row might have no slots for its next `coming` tokens.

    Args:
      coming: int [B], numpy, tokens that each row will read.
      most: tokens of the longest text; a cache of so many slots never grows.
    """
    return self.resized(self.size_for(policy, coming, most), most)

  @property
  def size(self) -> int:
    """What grows: slots of a head, or pages of the pool."""
    return self.slots

  def size_for(self, policy, coming, most) -> int:
    """The size that `ensure_capacity` gives."""
    lack = int((coming - jax.device_get(self.free_tokens(policy))).max())
    if lack <= 0 or self.slots >= most:
      return self.slots
    return max(min(rounded(max(self.slots + lack, int(self.slots * GROWTH))), rounded(most)), self.slots)

  def resized(self, size, most):
    """The same tokens in a cache of this size, for texts of up to `most` tokens."""
    return self if size == self.slots else self.grow(size)

  def _in_force(self, layer: Int[Array, ""] | int | slice, evicted: Bool[Array, "*n"]) -> tuple[Bool[Array, "*n"], Any]:
    """`Sliding.in_force`, in a model without sliding layers, too."""
    return (evicted, self.window) if self.sliding is None else self.sliding.in_force(layer, evicted)

  def _last_visible(self, layer: Int[Array, ""] | int, evicted, position) -> Int[Array, "B K S"]:
    """`last_visible` in a layer."""
    evicted, window = self._in_force(layer, evicted)
    return last_visible(evicted, position, window)

  def _held(self) -> Int[Array, "L B K"]:
    """`live` of the layers where the policy decides, and 0 of others."""
    held = self.live()
    return held if self.sliding is None else jnp.where(self.sliding.heads, 0, held)

  def takes_chunk(self, policy: Policy, num_tokens: int, remaining: Int[Array, "B"] | None) -> bool:
    """Whether a step is a chunk of a prompt, not a decode step.

    Raises:
      ValueError: it is a chunk, and the policy reads prompts one token at a time.
    """
    if num_tokens > 1 and policy.exact_prefill:
      raise ValueError(f"{type(policy).__name__} reads one token at a time, and here are {num_tokens}")
    return num_tokens > 1 or (remaining is not None and policy.compacts)

  def can_decide_late(self, policy: Policy) -> bool:
    """Whether a decode step may pass its decisions to `commit` instead of `attend`."""
    return False

  def steps_in_parts(self, policy: Policy) -> bool:
    """Whether a decode step may be several programs of some layers each."""
    return False

  def begin_parts(self, plan: Plan, policy: Policy) -> tuple[Cache, Any]:
    """See `Cache`."""
    raise NotImplementedError

  def end_parts(self, plan: Plan, policy: Policy, unobserved: list) -> Cache:
    """See `Cache`."""
    raise NotImplementedError

  def check(self, policy: Policy) -> None:
    """Checks that the cache was made for a policy like `policy`.

    Raises:
      ValueError: the windows differ, or the names of the statistics or of the memory.
    """
    name = type(policy).__name__
    if policy.window != self.window:
      raise ValueError(f"policy window={policy.window}, but the cache has window={self.window}")
    if set(policy.stats) != set(self.stats):
      raise ValueError(f"{name} needs the statistics {sorted(policy.stats)}, but the cache stores {sorted(self.stats)}")
    if (names := sorted(policy.memory(1, self.kv.shape[4] // 2))) != sorted(self.memory):
      raise ValueError(f"{name} needs a memory of {names}, but the cache stores {sorted(self.memory)}")


@partial(jax.jit, static_argnames=("count", "axis"))
def padded(tree: Any, *, count: int, axis: int = 3) -> Any:
  """Arrays with `count` zeros after what they hold along an axis, by default that of slots or pages."""
  return jax.tree.map(lambda x: jnp.pad(x, [(0, count * (n == axis)) for n in range(x.ndim)]), tree)


def rounded(slots: int) -> int:
  """`slots`, rounded up to a multiple of SLOTS."""
  return -(-slots // SLOTS) * SLOTS


def storage_dtype(dtype) -> jnp.dtype:
  """The dtype in which a cache stores numbers of `dtype`: uint16 for bfloat16 under `Execution.bits_storage`."""
  bits = dtype == jnp.bfloat16 and Execution.choose().bits_storage
  return jnp.dtype(jnp.uint16) if bits else jnp.dtype(dtype)


def packed(rows: Float[Array, "*shape"], dtype) -> Shaped[Array, "*shape"]:
  """Numbers in the storage dtype `dtype`, where uint16 means the bits of bfloat16; `floats` is the inverse."""
  if dtype == jnp.uint16:
    return jax.lax.bitcast_convert_type(rows.astype(jnp.bfloat16), jnp.uint16)
  return rows.astype(dtype)


def rows_of(k: Float[Array, "B T K H"], v: Float[Array, "B T K H"], dtype) -> Shaped[Array, "B K T 2*H"]:
  """One row a KV head and token, its key and then its value, in the storage dtype `dtype`."""
  return packed(jnp.swapaxes(jnp.concatenate([k, v], axis=-1), 1, 2), dtype)


def blended(
  old: Shaped[Array, "*rows width"], new: Shaped[Array, "*rows width"], weight: Float[Array, "*rows"]
) -> Shaped[Array, "*rows width"]:
  """(1 - weight) old + weight new, in the storage dtype of `new`; at weight 1 `new`, bit for bit."""
  weight = weight[..., None]
  mixed = (1 - weight) * floats(old).astype(jnp.float32) + weight * floats(new).astype(jnp.float32)
  return jnp.where(weight >= 1, new, packed(mixed, new.dtype))


def group_mean(mass: Float[Array, "B K S"], q: Float[Array, "B T N H"]) -> Float[Array, "B K S"]:
  """The mean over the G query heads of each KV head; `mass` is their sum."""
  return mass * (mass.shape[1] / q.shape[2])


def empty_memory(policy: Policy, lead: tuple[int, int, int], group: int, head_dim: int) -> dict[str, jax.Array]:
  """`Common.memory` of a new cache; `lead` is (L, B, K)."""
  return {name: jnp.zeros((*lead, *axes), jnp.float32) for name, axes in policy.memory(group, head_dim).items()}


def queries_of(q: Float[Array, "B T N H"], heads: int) -> Float[Array, "B K G T H"]:
  """Queries by KV head, as `Policy.remember` and `Observation` have them."""
  b, t, n, h = q.shape
  return jnp.transpose(q.reshape(b, t, heads, n // heads, h), (0, 2, 3, 1, 4))


def observation(
  names: tuple[str, ...], *, mass, rows: Float[Array, "B K X width"] | None, q: Float[Array, "B T N H"], stats, live,
  lengths, remaining,
) -> Observation:  # fmt: skip
  """What a policy sees that observes `names`.

  Args:
    mass: summed over the query heads of a KV head, [B, K, X]; None unless observed.
    rows: keys and values of the X tokens, as numbers; None unless observed.
    q: the step's queries.
    stats: of the X tokens.
  """
  h = q.shape[3]
  return Observation(
    mass=None if mass is None else group_mean(mass, q),
    keys=rows[..., :h] if "keys" in names else None, values=rows[..., h:] if "values" in names else None,
    positions=stats["position"].astype(jnp.int32) if "positions" in names else None,
    queries=queries_of(q, live.shape[1]) if "queries" in names else None,
    live=live, lengths=lengths, remaining=remaining,
  )  # fmt: skip


def last_visible(
  evicted: Bool[Array, "B K S"], position: Int[Array, "B #K S"], window: int | Int[Array, ""]
) -> Int[Array, "B K S"]:
  """Position of the last query that sees each key: `position` + W if the key is evicted, else NEVER."""
  return jnp.where(evicted, position + window, NEVER)


def count_reads(first: Array, last: Array, start: Int[Array, "B"], stop: Int[Array, "B"]) -> Int[Array, "B K"]:
  """The number of (query, key) pairs in which the query sees the key.

  Args:
    first, last: int32 [B, K, S], positions of the first and the last query that see each key.
    start, stop: the queries' positions are start .. stop - 1.
  """
  low = jnp.maximum(first, start[:, None, None])
  high = jnp.minimum(last, stop[:, None, None] - 1)
  return jnp.sum(jnp.maximum(high - low + 1, 0), axis=-1, dtype=jnp.int32)
