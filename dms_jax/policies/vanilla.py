"""The dense cache: nothing is ever evicted."""

from __future__ import annotations

from flax import struct

from dms_jax.policies.base import Policy, register


@register
@struct.dataclass
class Vanilla(Policy):
  """Keeps every token; `window` sets the size of the ring and changes no result."""

  evicts = False
