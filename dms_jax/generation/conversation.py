"""Conversations in memory: what a later turn needs.

    out = dms_jax.generate(model, ["Once upon a time"])
    more = dms_jax.generate(model, [" And then"], continue_from=out)       # or continue_from=out.conversation
    ticket = generator.submit(" And then", continue_from=out)              # a `Generator`, whose pool has another size

`generation.files` keeps them on disk.
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

  `pending`: the token sampled last, which is not in `cache` yet, -1 for none. `generated`: tokens generated so far.
  `policy`: the one that filled `cache`.
  """

  cache: HostRow
  pending: int
  generated: int
  policy: Policy


@struct.dataclass
class Conversation:
  """What a later turn needs, of B rows.

  `pending` int32 [B]: the token sampled last, which is not in `cache` yet, -1 for none. `generated` int32 [B]: tokens
  generated so far, which number the random draws of a row. `policy`: the one that filled `cache`.
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
  """The conversation of an `Output`; anything else as it is."""
  return getattr(past, "conversation", past)


def continuation(past: Any) -> Continuation:
  """The one row of an `Output`, a `Conversation` or a `Continuation`.

  Raises:
    ValueError: there are several.
  """
  past = conversation_of(past)
  if not isinstance(past, Conversation):
    return past
  if past.batch != 1:
    raise ValueError(f"continue_from: a conversation of {past.batch} rows; pick one with .row(index)")
  return past.row(0)


def place_like(model: Model, tree):
  """`tree` placed where the model is: an argument placed in one call and not in the next would compile it twice."""
  sharding = model.params["embed"].sharding
  if isinstance(sharding, jax.sharding.NamedSharding):
    sharding = jax.sharding.NamedSharding(sharding.mesh, jax.sharding.PartitionSpec())
  return jax.device_put(tree, sharding)
