"""What a cache asks of an eviction policy, and the registry that finds policies by name.

A token is readable for W further tokens whatever is decided (the *window*, in most caches a ring of W + 1 slots); what
is kept of older ones is the *archive*. A policy has its say at four points of a token's way, each with a default:

    decide     when the token is read: is it evicted once it leaves the window? By its gate, or by its place in the text
    observe    after each decode step: the scores of slots, by the attention they were just paid     (`observes`)
    retire     as the token leaves the window: forgotten, appended to the archive, or put in an archived token's place
    select     at each decode step: the pages of the archive that the query reads                    (`page` > 0)

Policies know nothing of how a cache lies in memory: they see arrays with leading [L, B, K] or [B, K], and archive slots
and pages by their number. Budgets and other numbers are traced leaves; `window` and `page` are shapes.
"""

from __future__ import annotations

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
class Leaving:
  """At a decode step, the token of each [L, B, K] that leaves the window, and the archive it may enter.

  Rows whose window is not full yet have no such token; whatever is answered for them is ignored. A is the number of
  archive slots; which of them are `live` need not be a prefix.
  """

  evicted: Bool[Array, "L B K"]  # what `decide` said of it
  tokens: Int[Array, "B 1"]  # seen by the row, the one coming in included: what leaves is number tokens - W - 2, from 0
  archived: Int[Array, "L B K"]  # tokens in the archive
  live: Bool[Array, "L B K A"]
  score: Float[Array, "L B K"] | None = (
    None  # of the leaving token, and of the archived ones, if the policy is `scored`
  )
  scores: Float[Array, "L B K A"] | None = None


@struct.dataclass
class Retired:
  """What becomes of it: forgotten where not `keep`, else put in archive slot `slot`, a new one where that is -1."""

  keep: Bool[Array, "L B K"]
  slot: Int[Array, "L B K"] | None = None  # None: always a new one


@struct.dataclass
class Policy:
  """Decides what becomes of tokens; as it stands, keeps them all."""

  window: int | None = struct.field(pytree_node=False, default=0)

  uses_gates = False  # whether the model must have gates
  evicts = True  # False: every token is kept, so how much room a text needs is known from its length
  bounded = False  # whether `capacity` says more than that a token needs a slot
  scored = False  # whether the cache keeps a score a slot; then `retire` is asked after every token, chunks too
  observes = False  # whether `observe` is to be called
  page = 0  # slots of a page that is selected as a whole; 0: everything is read

  @property
  def data_dependent(self) -> bool:
    """Whether what a head holds depends on what it reads: heads then differ, and a text's length is no measure."""
    return self.evicts and not self.bounded

  def resolved(self, window: int | None) -> Policy:
    """This policy with its window filled in where it was left open; `window` is the model's gates', None without any.

    Raises:
      ValueError: numbers that make no sense.
    """
    policy = self if self.window is not None else self.replace(window=window)
    if policy.window is None:
      raise ValueError(f"{type(self).__name__}: give window=")
    if policy.window < 0:
      raise ValueError(f"policy window={policy.window} must be 0 or more tokens")
    return policy

  def continues(self, held: type[Policy] | None) -> bool:
    """Whether it can go on with what a policy of kind `held` (None: unknown) holds: its own, or neither bounds it."""
    return held is type(self) or not (self.bounded or held is None or held.bounded)

  def decide(
    self, logits: Float[Array, "*L B K T"] | None, layer: int | Int[Array, "..."], position: Int[Array, "*L B K T"]
  ) -> Bool[Array, "*L B K T"]:
    """Evict or not, once it has left the window, the token at each `position`; below 0 there is none.

    Args:
      logits: gate logits about these tokens; None on a model without gates, and where a policy without gates is asked
        ahead of time.
      layer: broadcasts against `position`, which may be of all layers. The KV head is the index on the axis before the
        last.
    """
    return jnp.zeros(position.shape, bool)

  def retire(self, leaving: Leaving) -> Retired:
    """What becomes of the tokens that leave the window, settled for all layers and heads before the step."""
    return Retired(~leaving.evicted)

  def first_score(self, layer: int | Int[Array, ""], position: Int[Array, "B K"]) -> Float[Array, "B K"]:
    """The score a token comes in with."""
    return jnp.zeros(position.shape, jnp.float32)

  def observe(self, scores: Float[Array, "B K A"], mass: Float[Array, "B K A"]) -> Float[Array, "B K A"]:
    """Scores after a step of one layer. `mass`: attention to each slot, mean over the query heads of its group."""
    raise NotImplementedError(f"{type(self).__name__} observes but has no observe")

  def summarise(self, keys: Float[Array, "*P page H"], live: Bool[Array, "*P page"]) -> Float[Array, "*P 2*H"]:
    """What `select` is to know of a page: two vectors of H. Asked again whenever a slot of the page is written."""
    raise NotImplementedError(f"{type(self).__name__} selects but has no summarise")

  def select(
    self,
    layer: int | Int[Array, ""],
    q: Float[Array, "B K G H"],
    summaries: Float[Array, "B K P 2*H"],
    live: Bool[Array, "B K P"],
    tokens: Int[Array, "B"],
  ) -> Bool[Array, "B K P"]:
    """The pages of the archive that a step of one layer reads, of those with something `live` in them.

    `tokens`: seen by each row, the query's own included. The window is always read.
    """
    raise NotImplementedError(f"{type(self).__name__} selects but has no select")

  def capacity(self, tokens: int | Int[Array, "..."]) -> Int[Array, "..."]:
    """The most slots that a head needs while a text of `tokens` tokens is read, the window's W + 1 included."""
    return jnp.asarray(tokens, jnp.int32)

  def reach(self, slots: int) -> Int[Array, ""]:
    """The inverse: the longest text for which `slots` slots a head are surely enough."""
    return jnp.int32(slots)
