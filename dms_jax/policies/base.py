"""Eviction policies: the interface that caches call, and the registry that finds a policy by name.

The *window* is the newest token and the W tokens before it, in most caches a ring of W + 1 slots. Its tokens stay
visible whatever the policy decides. The *archive* holds the older tokens that are kept. A policy acts at six points:

    decide     as a token is read: is it evicted once it leaves the window?
    admit      as a token is read: its first value of each per-slot statistic               (`stats`)
    observe    after attention in a layer: the statistics, given attention mass or keys  (`observes`, `prompt_observes`)
    retire     as a token leaves the window in a decode step: forget, append, overwrite or merge it
    compact    after a chunk of a prompt: which tokens outside the window stay              (`compacts`)
    select     in a decode step: the archive pages that the query reads                     (`page` > 0)

Policies do not know the memory layout of a cache. They see arrays with leading axes [L, B, K] or [B, K], and archive
slots and pages by index. Budgets and thresholds are traced leaves, scalars or one number a row [B]; `window` and `page`
are shapes.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Array, Bool, Float, Int

REGISTRY: dict[str, type[Policy]] = {}
Stats = dict[str, Array]  # name -> float32 [..., slots]
NUMBERS = ("budget", "cr", "threshold")  # what bounds a policy's cache, by name; the threshold is that of gates


def register(cls: type[Policy]) -> type[Policy]:
  """Class decorator: makes a policy available by its lower-case class name."""
  REGISTRY[cls.__name__.lower()] = cls
  return cls


def get(name: str) -> type[Policy]:
  """The policy class called `name`, in any case.

  Raises:
    ValueError: no policy has this name; the message lists those there are.
  """
  try:
    return REGISTRY[name.lower()]
  except KeyError:
    raise ValueError(f"unknown policy {name!r}; there are {sorted(REGISTRY)}") from None


def per_row(number, trailing: int) -> Array:
  """A policy's number, scalar or [B], shaped to broadcast against arrays [..., B, *trailing axes]."""
  number = jnp.asarray(number)
  return number.reshape(number.shape + (1,) * trailing) if number.ndim else number


def is_whole(number) -> bool:
  """Whether a number that is a shape is an integer."""
  return isinstance(number, int | np.integer) and not isinstance(number, bool)


def check_rows(policy: Policy, batch: int | None) -> None:
  """Raises ValueError unless each number of `policy` is one, or one for each of `batch` rows; None: one alone.

  Arrays of more axes are a policy's own tables, which no row indexes.
  """
  for field in dataclasses.fields(policy):
    value = getattr(policy, field.name)
    if value is None or np.ndim(value) != 1 or np.size(value) == batch:
      continue
    wanted = "one number: rows come and go" if batch is None else f"one number, or one for each of {batch} rows"
    raise ValueError(f"{type(policy).__name__}: {field.name} has shape {np.shape(value)}, and must be {wanted}")


def row_numbers(policy: Policy) -> dict[str, Any]:
  """The numbers among NUMBERS that `policy` has as traced leaves, so that each row may have its own."""
  traced = [field.name for field in dataclasses.fields(policy) if field.metadata.get("pytree_node", True)]
  found = {name: getattr(policy, name) for name in NUMBERS if name in traced}
  if not policy.uses_gates:
    found.pop("threshold", None)
  return {name: value for name, value in found.items() if value is not None}


def of_rows(policy: Policy, batch: int, rows: Sequence[int]) -> Policy:
  """`policy` for some of `batch` rows, which may repeat; numbers that are one for all rows stay as they are.

  Raises:
    ValueError: numbers of other than `batch` rows.
  """
  check_rows(policy, batch)
  numbers = {name: value for name, value in row_numbers(policy).items() if np.ndim(value)}
  return policy.replace(**{name: jnp.asarray(value)[np.asarray(rows)] for name, value in numbers.items()})


def with_numbers(policy: Policy, numbers: Mapping[str, Sequence[int | float]]) -> Policy:
  """`policy` with one number for each row: {name: [B]}; a name's dtype never changes, so nothing is compiled anew."""
  dtypes = {name: jnp.int32 if name == "budget" else jnp.float32 for name in numbers}
  return policy.replace(**{name: jnp.asarray(values, dtypes[name]) for name, values in numbers.items()})


@struct.dataclass
class Leaving:
  """The token of each [L, B, K] that leaves the window in a decode step, and the archive it may enter.

  The leaving token is number `tokens - W - 2`, counted from 0. A row whose window is not full has none, and the answer
  for it is ignored. A is the number of archive slots; the `live` ones need not be a prefix.
  """

  evicted: Bool[Array, "L B K"]  # the decision about the leaving token
  tokens: Int[Array, "B 1"]  # tokens seen by the row, the incoming one included
  archived: Int[Array, "L B K"]  # tokens in the archive
  live: Bool[Array, "L B K A"]  # archive slots in use
  stats: dict[str, Float[Array, "L B K"]]  # of the leaving token
  archive_stats: dict[str, Float[Array, "L B K A"]]  # of the archive slots; arbitrary where not live


@struct.dataclass
class Retired:
  """What happens to the leaving tokens: they are forgotten unless `keep`, else written to the archive.

  Attributes:
    slot: the archive slot to overwrite or to merge into, or -1 to append; None appends all.
    merge: m in 0 .. 1; key and value of `slot` become (1 - m) old + m leaving, its statistics the sums of both. None:
      the slot is overwritten.
  """

  keep: Bool[Array, "L B K"]
  slot: Int[Array, "L B K"] | None = None
  merge: Float[Array, "L B K"] | None = None


@struct.dataclass
class Observation:
  """What a policy sees of X tokens after attention in one layer, in a decode step or a chunk of a prompt.

  Attributes:
    mass: float32 [B, K, X], the attention that each token received: summed over queries with `query_weights`, averaged
      over the G query heads of a KV head. None unless "mass" is observed.
    keys: [B, K, X, H], after RoPE, in the model's dtype; None unless "keys" is observed.
    live: bool [B, K, X], whether there is a token; `mass` and `keys` of others are arbitrary.
    lengths: int32 [B], tokens that each row reads in this step.
    remaining: int32 [B], tokens of the prompt still to come; 0 in a decode step.
  """

  mass: Float[Array, "B K X"] | None
  keys: Float[Array, "B K X H"] | None
  live: Bool[Array, "B K X"]
  lengths: Int[Array, "B"]
  remaining: Int[Array, "B"]


@struct.dataclass
class Candidates:
  """X tokens of one layer after a chunk of a prompt, in the order archive, window, chunk.

  That is text order, unless the policy `overwrites`.

  Attributes:
    stats: float32 [B, K, X] each, statistics of the tokens.
    live: bool [B, K, X], tokens outside the window that are not evicted; the answer for others is ignored.
    tokens: int32 [B], tokens that each row has read, the chunk included.
    remaining: int32 [B], tokens of the prompt still to come; 0 if the prompt ends with this chunk.
  """

  stats: dict[str, Float[Array, "B K X"]]
  live: Bool[Array, "B K X"]
  tokens: Int[Array, "B"]
  remaining: Int[Array, "B"]


@struct.dataclass
class Policy:
  """Decides which tokens a cache keeps and reads; this base class keeps and reads every token."""

  window: int | None = struct.field(pytree_node=False, default=0)

  uses_gates = False  # `decide` needs gate logits
  uses_keys = False  # `decide` needs keys
  evicts = True  # False: every token is kept, so the length of a text determines the slots it needs
  bounded = False  # `capacity` is less than one slot a token
  stats = ()  # names of the per-slot statistics, float32, that the cache stores
  observes = ()  # inputs of `observe` in decode steps: "mass", "keys"
  prompt_observes = ()  # inputs of `observe` in chunks of a prompt
  overwrites = False  # `retire` may overwrite archived tokens, so chains cannot share pages
  exact_prefill = False  # prompts are read one token at a time, by decode steps inside one compiled loop
  page = 0  # slots of a page that is selected as a whole; 0: everything is read

  @property
  def compacts(self) -> bool:
    """Whether `compact` is called after chunks of a prompt."""
    return False

  @property
  def data_dependent(self) -> bool:
    """Whether the number of tokens a head holds depends on the text, not on its length alone."""
    return self.evicts and not self.bounded

  @property
  def known_ahead(self) -> bool:
    """Whether `decide` needs nothing that a layer computes."""
    return not (self.uses_gates or self.uses_keys)

  def resolved(self, window: int | None) -> Policy:
    """This policy with its numbers checked and `window` in place of a window of None.

    Args:
      window: W of the model's gates, in tokens; None without gates.

    Raises:
      ValueError: a number is out of range, or no window is known.
    """
    policy = self if self.window is not None else self.replace(window=window)
    if policy.window is None:
      raise ValueError(f"{type(self).__name__}: give window=")
    if not is_whole(policy.window) or policy.window < 0:
      raise ValueError(f"policy window={policy.window} must be 0 or more tokens, a whole number")
    return policy

  def continues(self, held: type[Policy] | None) -> bool:
    """Whether this policy can continue a conversation held by a policy of class `held` (None: unknown).

    It can if `held` is its own class, or if neither class is `bounded`.
    """
    return held is type(self) or not (self.bounded or held is None or held.bounded)

  def decide(
    self,
    logits: Float[Array, "*L B K T"] | None,
    layer: int | Int[Array, "..."],
    position: Int[Array, "*L B K T"],
    keys: Float[Array, "B K T H"] | None = None,
  ) -> Bool[Array, "*L B K T"]:
    """Whether the token at each `position` is evicted once it has left the window; a position below 0 is no token.

    Args:
      logits: gate logits about these tokens; None without gates, and where a policy that is `known_ahead` is asked
        before the layers.
      layer: broadcasts against `position`, which may cover all layers. The KV head is the index on the axis before the
        last.
      keys: of the tokens that compute the decisions (`lag` tokens after those at `position`); None unless `uses_keys`.
    """
    return jnp.zeros(position.shape, bool)

  def admit(self, layer: int | Int[Array, ""], position: Int[Array, "B K T"]) -> dict[str, Float[Array, "B K T"]]:
    """The first value of each statistic in `stats`, for the tokens at `position` of layer `layer`."""
    return {name: jnp.zeros(position.shape, jnp.float32) for name in self.stats}

  def query_weights(self, lengths: Int[Array, "B"], remaining: Int[Array, "B"], width: int) -> Float[Array, "B T"]:
    """The weight of each query of a chunk in the observed mass, float32; by default every real query weighs 1.

    Args:
      lengths: real tokens of the chunk.
      remaining: tokens of the prompt that come after it.
      width: T, tokens of the chunk, padding included.
    """
    return (jnp.arange(width) < lengths[:, None]).astype(jnp.float32)

  def observe(self, stats: Stats, seen: Observation) -> Stats:
    """The statistics of one layer after a step, float32 [B, K, X] each.

    Args:
      stats: the same before the step; those of new tokens are from `admit`.

    Raises:
      NotImplementedError: the policy observes but does not define this.
    """
    raise NotImplementedError(f"{type(self).__name__} observes but has no observe")

  def retire(self, leaving: Leaving) -> Retired:
    """What happens to the tokens that leave the window in a decode step; asked once, before the layers run."""
    return Retired(~leaving.evicted)

  def compact(self, candidates: Candidates) -> Bool[Array, "B K X"]:
    """Which tokens outside the window stay after a chunk of a prompt, in one layer.

    Raises:
      NotImplementedError: the policy compacts but does not define this.
    """
    raise NotImplementedError(f"{type(self).__name__} compacts but has no compact")

  def summarise(self, keys: Float[Array, "*P page H"], live: Bool[Array, "*P page"]) -> Float[Array, "*P 2*H"]:
    """Summaries of pages for `select`, two vectors of H numbers a page; recomputed when a slot of the page is written.

    Args:
      keys: after RoPE; arbitrary where not `live`.
      live: slots in use.

    Raises:
      NotImplementedError: the policy selects but does not define this.
    """
    raise NotImplementedError(f"{type(self).__name__} selects but has no summarise")

  def select(
    self,
    layer: int | Int[Array, ""],
    q: Float[Array, "B K G H"],
    summaries: Float[Array, "B K P 2*H"],
    live: Bool[Array, "B K P"],
    tokens: Int[Array, "B"],
  ) -> Bool[Array, "B K P"]:
    """The archive pages that a decode step of one layer reads, among those with a `live` token.

    The window is always read.

    Args:
      q: queries after RoPE, G for each KV head.
      summaries: of `summarise`.
      live: pages that hold a token.
      tokens: tokens that each row has read, the query's own included.

    Raises:
      NotImplementedError: the policy selects but does not define this.
    """
    raise NotImplementedError(f"{type(self).__name__} selects but has no select")

  def capacity(self, tokens: int | Int[Array, "..."]) -> Int[Array, "..."]:
    """The most slots that a head needs for a text of `tokens` tokens, int32, the window's W + 1 included."""
    return jnp.asarray(tokens, jnp.int32)

  def reach(self, slots: int) -> Int[Array, "..."]:
    """The inverse of `capacity`, int32: tokens of the longest text for which `slots` slots a head are always enough."""
    return jnp.int32(slots)
