"""A baseline: keeps the window and a random sample of the older tokens."""

from __future__ import annotations

import jax.numpy as jnp
from flax import struct

from dms_jax.collectives import head_numbers
from dms_jax.policies.base import per_row, register
from dms_jax.policies.budget import Budgeted, check_sinks


@register
@struct.dataclass
class Random(Budgeted):
  """Keeps the tokens with the largest random numbers: at any time a uniform sample of those outside the window.

  The number is a hash of (`seed`, layer, KV head, position), so it does not depend on the row, the cache or the step in
  which a token is read. The first `sinks` tokens are always kept.

  Attributes:
    seed: of the random numbers.
  """

  seed: int = 0
  sinks: int = 0

  def resolved(self, window):
    policy = super().resolved(window)
    check_sinks(policy)
    return policy

  def admit(self, layer, position):
    head = jnp.broadcast_to(head_numbers(position.shape[1])[:, None], position.shape)
    score = uniform(per_row(self.seed, 2), layer, head, position)
    score = jnp.where(position < per_row(self.sinks, 2).astype(position.dtype), jnp.inf, score)
    return {**super().admit(layer, position), "score": score}


def uniform(*counters):
  """A hash of integers, which broadcast, to float32 numbers in [0, 1); every bit of each counter matters."""
  bits = jnp.uint32(0)
  for counter in counters:
    bits = bits + jnp.asarray(counter).astype(jnp.uint32) + jnp.uint32(0x9E3779B9)
    for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B)):
      bits = (bits ^ (bits >> shift)) * jnp.uint32(factor)
    bits = bits ^ (bits >> 16)
  return (bits >> 8).astype(jnp.float32) * jnp.float32(2**-24)
