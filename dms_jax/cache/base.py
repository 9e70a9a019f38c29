"""What the model asks of a KV cache: three calls a step, the middle one in each layer.

    plan = cache.plan(policy, lengths, num_tokens)             # before the layers: where everything goes, who has room
    out, kv, state, seen = cache.attend(plan, policy, layer, kv, state, q, k, v, evict)      # in layer `layer`
    cache = cache.commit(plan, kv, states)                     # after the layers

`kv` is the big array; it is carried through the layers and updated in place. `state` is the layer's part of
`cache.layer_state()`, small arrays with a leading L. A row without room sits a step out, untouched: `plan.stalled`.
"""

from __future__ import annotations

from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Bool, Float, Int, Shaped

from dms_jax.attention import NEVER
from dms_jax.policies import Policy
from pallas_kernels.platform import platform


@struct.dataclass
class Plan:
  """Settled before the layers. `seen` [B]: tokens before this step; `lengths` [B]: real tokens of it (0: sits out)."""

  seen: Int[Array, "B"]
  lengths: Int[Array, "B"]
  stalled: Bool[Array, "B"]
  placement: Any = None  # what the kind of cache adds


@struct.dataclass
class Seen:
  """Of one layer and step: `live` slots after it, and `reads`, visible keys summed over its queries; int32 [B, K]."""

  live: Int[Array, "B K"]
  reads: Int[Array, "B K"]


@runtime_checkable
class Cache(Protocol):
  """A fixed-shape pytree. `seen` [B] counts the tokens of each row; `shift` is the gates'."""

  kv: Shaped[Array, "L B K S 2*H"]
  seen: Int[Array, "B"]
  window: int
  shift: int

  def room(self) -> Int[Array, "B"]: ...
  def grown(self, slots: int) -> Cache: ...
  def layer_state(self) -> Any: ...
  def plan(self, policy: Policy, lengths: Int[Array, "B"], num_tokens: int) -> Plan: ...
  def attend(
    self, plan: Plan, policy: Policy, layer: Int[Array, ""], kv: Array, state: Any,
    q: Float[Array, "B T N H"], k: Float[Array, "B T K H"], v: Float[Array, "B T K H"], evict: Bool[Array, "B K T"],
  ) -> tuple[Float[Array, "B T N H"], Array, Any, Seen]: ...  # fmt: skip
  def commit(self, plan: Plan, kv: Array, states: Any) -> Cache: ...


def storage_dtype(dtype) -> jnp.dtype:
  """What a cache of `dtype` is an array of: on a CPU, bfloat16 is kept as its bits in uint16.

  There XLA writes one row of a bfloat16 array by converting all of it to float32 and back: measured on a cache of 5 MB,
  700 us against 2 for its bits.
  """
  bits = dtype == jnp.bfloat16 and platform() == "cpu"
  return jnp.dtype(jnp.uint16) if bits else jnp.dtype(dtype)


def unpacked(rows: Shaped[Array, "*shape"]) -> Float[Array, "*shape"]:
  """Rows as numbers again, where they are stored as bits."""
  return jax.lax.bitcast_convert_type(rows, jnp.bfloat16) if rows.dtype == jnp.uint16 else rows


def rows_of(k: Float[Array, "B T K H"], v: Float[Array, "B T K H"], dtype) -> Shaped[Array, "B K T 2*H"]:
  """Keys and values side by side, one row of 2H a token, heads first, in a cache's storage `dtype`."""
  rows = jnp.swapaxes(jnp.concatenate([k, v], axis=-1), 1, 2)
  if dtype == jnp.uint16:
    return jax.lax.bitcast_convert_type(rows.astype(jnp.bfloat16), jnp.uint16)
  return rows.astype(dtype)


def last_visible(keep: Bool[Array, "B K S"], position: Int[Array, "B #K S"], window: int) -> Int[Array, "B K S"]:
  """The last query position that sees a key: never evicted, or its position + W."""
  return jnp.where(keep, NEVER, position + window)


def count_reads(first: Array, last: Array, start: Int[Array, "B"], stop: Int[Array, "B"]) -> Int[Array, "B K"]:
  """Visible (query, key) pairs for queries at positions start .. stop-1, keys [B, K, S] seen from first to last."""
  low = jnp.maximum(first, start[:, None, None])
  high = jnp.minimum(last, stop[:, None, None] - 1)
  return jnp.sum(jnp.maximum(high - low + 1, 0), axis=-1, dtype=jnp.int32)


def decided(evict: Bool[Array, "B K T"], lengths: Int[Array, "B"], shift: int) -> Bool[Array, "B K T"]:
  """A chunk's decisions re-indexed by the chunk's token they are about; the newest token is undecided (False)."""
  tokens = evict.shape[-1]
  about = jnp.concatenate([evict[..., shift:], jnp.zeros_like(evict[..., :shift])], axis=-1)
  return about & (jnp.arange(tokens) + shift < lengths[:, None])[:, None]
