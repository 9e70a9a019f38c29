"""Conversations in memory: the state that a later turn continues from.

    out = dms_jax.generate(model, ["Once upon a time"])
    more = dms_jax.generate(model, [" And then"], continue_from=out)       # or continue_from=out.conversation
    ticket = generator.submit(" And then", continue_from=out)              # a `Generator`, whatever its page size

`generation.files` saves them to disk.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
from flax import struct
from jaxtyping import Array, Int

from dms_jax.cache import Cache
from dms_jax.cache.host import HostRow, offload_row
from dms_jax.model import Model
from dms_jax.policies import Policy


@dataclasses.dataclass(frozen=True)
class Continuation:
  """One row of a conversation, on the host.

  `pending`: the last sampled token, which is not in `cache` yet; -1 for none. `generated`: tokens generated so far.
  `policy`: the policy that filled `cache`.
  """

  cache: HostRow
  pending: int
  generated: int
  policy: Policy


@struct.dataclass
class Conversation:
  """The state of B rows that a later turn continues from.

  `pending` int32 [B]: the last sampled token, which is not in `cache` yet; -1 for none. `generated` int32 [B]: tokens
  generated so far; a row's next random draw has this number. `policy`: the policy that filled `cache`.
  """

  cache: Cache
  pending: Int[Array, "B"]
  generated: Int[Array, "B"]
  policy: Policy

  @property
  def batch(self) -> int:
    """Rows."""
    return self.cache.seen.shape[0]

  def row(self, index: int) -> Continuation:
    """One row, on the host: for `Generator.submit`, or to save it alone.

    Raises:
      ValueError: no such row.
    """
    if not 0 <= index < self.batch:
      raise ValueError(f"row {index}: the conversation has {self.batch}")
    pending, generated = int(self.pending[index]), int(self.generated[index])
    return Continuation(offload_row(self.cache, index), pending, generated, self.policy)


def conversation_of(past: Any) -> Any:
  """The conversation of an `Output`; any other value unchanged."""
  return getattr(past, "conversation", past)


def continuation(past: Any) -> Continuation:
  """The one row of an `Output`, a `Conversation` or a `Continuation`.

  Raises:
    ValueError: there are several rows.
  """
  past = conversation_of(past)
  if not isinstance(past, Conversation):
    return past
  if past.batch != 1:
    raise ValueError(f"continue_from: a conversation of {past.batch} rows; pick one with .row(index)")
  return past.row(0)


def place_like(model: Model, tree):
  """Puts `tree` on the model's devices.

  An argument with a placement in one call and none in the next would compile the call twice.
  """
  sharding = model.params["embed"].sharding
  if isinstance(sharding, jax.sharding.NamedSharding):
    sharding = jax.sharding.NamedSharding(sharding.mesh, jax.sharding.PartitionSpec())
  return jax.device_put(tree, sharding)
