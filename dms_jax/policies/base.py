"""What a cache asks of an eviction policy, and the registry that finds policies by name."""

from __future__ import annotations

import abc

import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Bool, Float, Int

REGISTRY: dict[str, type[Policy]] = {}


def register(cls: type[Policy]) -> type[Policy]:
  """Class decorator: makes a policy available by its lower-case class name."""
  REGISTRY[cls.__name__.lower()] = cls
  return cls


def get(name: str) -> type[Policy]:
  """The policy class called `name`, whatever its case; an unknown name is a ValueError that lists the known ones."""
  try:
    return REGISTRY[name.lower()]
  except KeyError:
    raise ValueError(f"unknown policy {name!r}; there are {sorted(REGISTRY)}") from None


@struct.dataclass
class Policy(abc.ABC):
  """Decides what becomes of tokens. Numbers are traced leaves; `window` (W, tokens) is a shape.

  A token is readable for W further tokens whatever is decided; when it leaves the window it is retired.
  """

  window: int = struct.field(pytree_node=False, default=0)

  uses_gates = False  # whether the model must have gates
  evicts = True  # False: every token is kept, so how much room a text needs is known from its length

  @abc.abstractmethod
  def decide(self, logits: Float[Array, "B K T"] | None, shape: tuple[int, int, int]) -> Bool[Array, "B K T"]:
    """Evict or not, for the token `shift` places before each of T tokens; `logits` is None on a model without gates."""

  def retire(self, evicted: Bool[Array, "..."], position: Int[Array, "..."]) -> Bool[Array, "..."]:
    """True to append the token that leaves the window to the archive, False to forget it.

    Args: evicted: what `decide` said of it. position: its place in the text, counted from 0 (broadcasts).
    """
    return jnp.broadcast_to(~evicted, jnp.broadcast_shapes(evicted.shape, position.shape))
