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
import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Array, Int

from dms_jax import cache as caches
from dms_jax.cache import Cache, ShardedCache
from dms_jax.cache.host import HostRow, device_pages, offload_row, restore_row
from dms_jax.decoder import Model
from dms_jax.policies import Policy
from dms_jax.processes import fetch
from dms_jax.spmd import place_rows
from pallas_kernels.paged import FORMATS


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

  cache: Cache | ShardedCache
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
    pending, generated = (int(x[index]) for x in fetch((self.pending, self.generated)))
    return Continuation(offload_row(self.cache, index), pending, generated, self.policy)


def conversation_of(past: Any) -> Any:
  """The conversation of an `Output`; any other value unchanged."""
  return getattr(past, "conversation", past)


def continuation(past: Any) -> Continuation:
  """The one row of an `Output`, a `Conversation` or a `Continuation`.

  Raises:
    ValueError: there are several rows, or it is none of these.
  """
  past = conversation_of(past)
  if isinstance(past, Continuation):
    return past
  if not isinstance(past, Conversation):
    raise ValueError(f"continue_from={past!r:.80} must be an earlier chain, output or conversation")
  if past.batch != 1:
    raise ValueError(f"continue_from: a conversation of {past.batch} rows; pick one with .row(index)")
  return past.row(0)


def moved(model: Model, past: Conversation) -> Conversation:
  """The same conversation on the model's devices, by way of host memory if it lies on others.

  Raises:
    ValueError: the mesh does not divide the rows, or the cache is of another model.
  """
  mesh = past.cache.mesh if isinstance(past.cache, ShardedCache) else None
  if mesh == model.mesh:
    return past
  own, kind = caches.of_device(past.cache), caches.kind_of(past.cache)
  options = {}
  if kind == "paged":
    formats = {form.dtype.name: name for name, form in FORMATS.items()}
    options = dict(page_size=own.page_size, page_format=formats.get(own.store.pages.dtype.name))
  rows, capacity = [offload_row(past.cache, row) for row in range(past.batch)], own.slots
  least = past.policy.window + 2 if kind == "paged" else capacity
  cache = caches.for_model(
    model, past.policy, batch=past.batch, capacity=least, kind=kind, longest=capacity, **options
  )  # fmt: skip
  if kind == "paged":
    cache = cache.with_pages(max(caches.of_device(cache).pages, device_pages(cache, rows)))
  for index, row in enumerate(rows):
    cache, _ = restore_row(cache, index, row)
  column = lambda x: jnp.asarray(fetch(x))
  cache, (pending, generated) = (
    place_like(model, tree) for tree in (cache, (column(past.pending), column(past.generated)))
  )
  return Conversation(cache, pending, generated, past.policy)


def check_continues(policy: Policy, held: Policy, tokens: Int[np.ndarray, "B"], seen: Int[np.ndarray, "B"]) -> None:
  """Checks that `policy` can go on where the policy `held` stopped.

  Args:
    tokens: that the fullest head of each row holds.
    seen: tokens that each row has read.

  Raises:
    ValueError: their caches hold other tokens, or `policy` would need a larger budget for what is held.
  """
  names = [type(p).__name__ for p in (held, policy)]
  if not policy.continues(held):
    how = [" with a budget" if p.limited else " without a budget" for p in (held, policy)]
    how = how if names[0] == names[1] else ["", ""]
    raise ValueError(
      f"a conversation held under {names[0]}{how[0]} cannot go on under {names[1]}{how[1]}, as their caches hold "
      "different tokens"
    )
  if held.window != policy.window:
    raise ValueError(
      f"policy window={policy.window}, but the conversation has window={held.window}; its own policy is that of "
      "`conversation.policy`"
    )
  if policy.prunes or not policy.bounded:
    return
  limit = lambda policy: np.broadcast_to(np.asarray(policy.mean_capacity(jnp.asarray(seen, jnp.int32))), seen.shape)
  if held.removes:  # a full head says nothing about the others
    tokens = limit(held)
  allowed = limit(policy)
  if (over := np.flatnonzero(tokens > allowed)).size:
    row = over[0]
    raise ValueError(
      f"a conversation that holds {tokens[row]} tokens a head after {seen[row]} cannot go on under {names[1]} with "
      f"{allowed[row]}: give a budget of {tokens[row]} or more"
    )


def place_like(model: Model, tree):
  """Puts `tree` on the model's devices.

  An argument with a placement in one call and none in the next would compile the call twice. On a mesh the arrays of
  `tree` begin with an axis of rows; a cache lies there already.
  """
  if model.mesh is not None:
    return tree if isinstance(tree, ShardedCache) else place_rows(model, tree)
  sharding = model.params["embed"].sharding
  if isinstance(sharding, jax.sharding.NamedSharding):
    sharding = jax.sharding.NamedSharding(sharding.mesh, jax.sharding.PartitionSpec())
  return jax.device_put(tree, sharding)
