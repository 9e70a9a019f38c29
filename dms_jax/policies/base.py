"""Eviction policies: the interface that caches call, and the registry that finds a policy by name.

The *window* is the newest token and the W tokens before it, in most caches a ring of W + 1 slots. Its tokens stay
visible whatever the policy decides. The *archive* holds the older tokens that are kept. A policy acts at these points:

    decide     as a token is read: is it evicted once it leaves the window?
    admit      as a token is read: its first value of each per-slot statistic               (`stats`)
    rate       as a token is decided: statistics that its gate logit gives it               (`gate_stats`)
    observe    after attention in a layer: the statistics, given what `observes` and `prompt_observes` name
    remember   after attention in a layer: the policy's memory, given the queries           (`remembers`)
    tally      after attention in a layer: the policy's memory, given the step's decisions  (`steers`)
    steered    before a step's layers: the policy for this step, given its memory           (`steers`)
    retire     as a token leaves the window in a decode step: forget, append, overwrite or merge it
    due        before a decode step: the rows that are pruned, which `compact` does         (`prunes`)
    compact    after a chunk of a prompt, and where due: which tokens outside the window stay  (`compacts`)
    select     in a decode step: the archive pages that the query reads                     (`page` > 0)

Policies do not know the memory layout of a cache. They see arrays with leading axes [L, B, K] or [B, K], and archive
slots and pages by index. In layers that slide (`cache.sliding`) no answer of theirs counts: a budget is that of each
head of the other layers. Budgets and thresholds are traced leaves, scalars or one number a row [B]; `window` and `page`
are shapes.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Array, Bool, Float, Int

from dms_jax.config import DMSConfig

REGISTRY: dict[str, type[Policy]] = {}
Stats = dict[str, Array]  # name -> float32 [..., slots]
Memory = dict[str, Array]  # name -> float32 [..., B, K, own axes]
NUMBERS = ("budget", "cr", "threshold", "sinks")  # fields that bound a cache; "threshold" only of gate logits


def register(cls: type[Policy]) -> type[Policy]:
  """Class decorator: makes a policy available by its lower-case class name.

  Raises:
    TypeError: it observes positions and has no statistic "position".
  """
  if "positions" in (*cls.observes, *cls.prompt_observes) and "position" not in cls.stats:
    raise TypeError(f'{cls.__name__} observes positions, so its stats must name "position"')
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


def _too_large(number: Any) -> bool:
  """Whether a whole number, or one of an array of them, is none of int32."""
  limits, values = np.iinfo(np.int32), np.asarray(number)
  return values.dtype.kind in "iuO" and bool(((values < limits.min) | (values > limits.max)).any())


def is_whole(number) -> bool:
  """Whether `number` is an integer and no bool, as a shape must be."""
  return isinstance(number, int | np.integer) and not isinstance(number, bool)


def check_rows(policy: Policy, batch: int | None) -> None:
  """Raises ValueError unless each number of `policy` is a scalar or [batch]; `batch` None allows scalars alone.

  Arrays of more axes are a policy's own tables, which have no axis of rows.
  """
  for field in dataclasses.fields(policy):
    value = getattr(policy, field.name)
    if value is None or np.ndim(value) != 1 or np.size(value) == batch:
      continue
    wanted = "one number: rows come and go" if batch is None else f"one number, or one for each of {batch} rows"
    raise ValueError(f"{type(policy).__name__}: {field.name} has shape {np.shape(value)}, and must be {wanted}")


def check_kind(policy: Any) -> Policy:
  """`policy`; a ValueError if it is something else, such as a policy's name or class."""
  if not isinstance(policy, Policy):
    raise ValueError(f"policy={policy!r:.80} must be a policy, such as dms_jax.DMS()")
  return policy


def row_numbers(policy: Policy) -> dict[str, Any]:
  """Those of NUMBERS that are traced leaves of `policy` and not None, by name: each row may have its own."""
  traced = [field.name for field in dataclasses.fields(policy) if field.metadata.get("pytree_node", True)]
  found = {name: getattr(policy, name) for name in policy.numbers if name in traced}
  if not policy.uses_gates:
    found.pop("threshold", None)
  return {name: value for name, value in found.items() if value is not None}


def of_rows(policy: Policy, batch: int, rows: Sequence[int]) -> Policy:
  """`policy` for some of `batch` rows, which may repeat; scalar numbers stay as they are.

  Raises:
    ValueError: numbers of other than `batch` rows.
  """
  check_rows(policy, batch)
  numbers = {name: value for name, value in row_numbers(policy).items() if np.ndim(value)}
  return policy.replace(**{name: jnp.asarray(value)[np.asarray(rows)] for name, value in numbers.items()})


def of_places(policy: Policy, rows: Int[Array, "R"]) -> Policy:
  """`of_rows` in compiled code; a number past the last row gets that of the last. Tables have more axes than one."""
  return jax.tree.map(lambda x: jnp.take(x, rows, mode="clip") if jnp.ndim(x) == 1 else x, policy)


def with_numbers(policy: Policy, numbers: Mapping[str, Sequence[int | float]]) -> Policy:
  """`policy` with the numbers {name: [B]}, int32 for tokens, else float32; so nothing is compiled anew."""
  dtypes = {name: np.int32 if name in ("budget", "sinks") else np.float32 for name in numbers}
  return policy.replace(**{name: np.asarray(values, dtypes[name]) for name, values in numbers.items()})


@struct.dataclass
class Leaving:
  """The token of each [L, B, K] that leaves the window in a decode step, and the archive it may enter.

  The leaving token is at position `tokens - W - 2`. A row whose window is not full has none, and the answer for it is
  ignored. A is the number of archive slots; the `live` ones need not be a prefix.
  """

  evicted: Bool[Array, "L B K"]  # the decision about the leaving token
  tokens: Int[Array, "B 1"]  # tokens seen by the row, the incoming one included
  archived: Int[Array, "L B K"]  # tokens in the archive
  live: Bool[Array, "L B K A"]  # archive slots in use
  stats: dict[str, Float[Array, "L B K"]]  # of the leaving token
  archive_stats: dict[str, Float[Array, "L B K A"]]  # of the archive slots; arbitrary where not live


@struct.dataclass
class Retired:
  """What happens to the leaving tokens: those with `keep` enter the archive, the others are forgotten.

  Attributes:
    slot: the archive slot to overwrite or to merge into, or -1 to append; None appends all.
    merge: m in 0 .. 1: key and value of `slot` become (1 - m) old + m leaving, its statistics their sums. None: the
      slot is overwritten.
    removed: other archive slots whose tokens are forgotten, each once, in any order, A for none; the archive's last
      tokens take their places. None: none are.
  """

  keep: Bool[Array, "L B K"]
  slot: Int[Array, "L B K"] | None = None
  merge: Float[Array, "L B K"] | None = None
  removed: Int[Array, "L B K R"] | None = None


@struct.dataclass
class Observation:
  """What a policy sees of X tokens after attention in one layer, in a decode step or a chunk of a prompt.

  Attributes:
    mass: float32 [B, K, X], the attention that each token received: summed over queries with `query_weights`, averaged
      over the G query heads of a KV head. None unless "mass" is observed.
    keys, values: [B, K, X, H], in the model's dtype, keys after RoPE; None unless observed.
    positions: int32 [B, K, X], in the text, from the statistic "position"; None unless observed.
    queries: [B, K, G, T, H], of the step's T tokens, padding included, after RoPE; None unless observed.
    live: bool [B, K, X], whether there is a token; what the other arrays hold elsewhere is arbitrary.
    lengths: int32 [B], tokens that each row reads in this step.
    remaining: int32 [B], tokens of the prompt still to come; 0 in a decode step.
  """

  mass: Float[Array, "B K X"] | None
  keys: Float[Array, "B K X H"] | None
  values: Float[Array, "B K X H"] | None
  positions: Int[Array, "B K X"] | None
  queries: Float[Array, "B K G T H"] | None
  live: Bool[Array, "B K X"]
  lengths: Int[Array, "B"]
  remaining: Int[Array, "B"]


@struct.dataclass
class Candidates:
  """X tokens of one layer of each row before a cut: after a chunk of a prompt, or where pruning is due.

  Their order is archive, window, chunk: text order, unless the policy `overwrites`.

  Attributes:
    layer: int32 [], the layer's index; [B], that of each row, where pruning is due.
    stats: float32 [B, K, X] each, statistics of the tokens.
    live: bool [B, K, X], tokens outside the window that are not evicted; the answer for others is ignored.
    held: bool [B, K, X], the same tokens and those of the window; the other arrays are arbitrary elsewhere.
    tokens: int32 [B], tokens that each row has read, the chunk included.
    remaining: int32 [B], tokens of the prompt still to come; 0 if the prompt ends with this chunk, and where due.
    keys, values: [B, K, X, H], in the model's dtype, keys after RoPE; None unless in `compact_observes`.
    memory: [B, K, own axes] each, the layer's part of the policy's memory.
  """

  layer: int | Int[Array, ""] | Int[Array, "B"]
  stats: dict[str, Float[Array, "B K X"]]
  live: Bool[Array, "B K X"]
  held: Bool[Array, "B K X"]
  tokens: Int[Array, "B"]
  remaining: Int[Array, "B"]
  keys: Float[Array, "B K X H"] | None = None
  values: Float[Array, "B K X H"] | None = None
  memory: dict[str, Float[Array, "B K ..."]] = struct.field(default_factory=dict)


@struct.dataclass
class Policy:
  """Decides which tokens a cache keeps and reads; this base class keeps and reads every token."""

  window: int | None = struct.field(pytree_node=False, default=0)

  uses_gates = False  # `decide` or `rate` needs gate logits
  objective = "dms"  # what these gates must have been trained for (`DMSConfig.objective`)
  uses_keys = False  # `decide` needs keys
  evicts = True  # False: every token is kept, so the length of a text determines the slots it needs
  bounded = False  # `capacity` is less than one slot a token
  stats = ()  # names of the per-slot statistics, float32, that the cache stores; "position" is the token's in the text
  gate_stats = ()  # those that `rate` computes from gate logits; W must be the gates' lag or more
  observes = ()  # inputs of `observe` in decode steps: "mass", "keys", "values", "positions", "queries"
  prompt_observes = ()  # inputs of `observe` in chunks of a prompt
  compact_observes = ()  # inputs of `compact` beside the statistics: "keys", "values"
  remembers = False  # the policy has a memory of its own, arrays for each layer, row and KV head
  steers = False  # its decisions depend on earlier ones, which `tally` counts in its memory
  prunes = False  # before a decode step, `compact` cuts the rows that are `due`; the archive stays in text order
  overwrites = False  # `retire` may overwrite archived tokens or merge into them, so chains cannot share pages
  merges = False  # `retire` may merge into archived tokens
  removes = False  # `retire` may remove archived tokens besides; such a policy overwrites, too
  replays = False  # a chunk of a prompt calls `retire` for one token after another, and equals as many decode steps
  exact_prefill = False  # prompts are read one token at a time, by decode steps inside one compiled loop
  page = 0  # slots of a page that is selected as a whole; 0: everything is read
  joins_heads = False  # the KV heads of a layer decide together, so "tensor" cannot split them

  @property
  def compacts(self) -> bool:
    """Whether `compact` is called after chunks of a prompt."""
    return False

  @property
  def limited(self) -> bool:
    """Whether it keeps to a budget: never exceeds one, or cuts what does."""
    return self.bounded or self.prunes

  @property
  def rewrites(self) -> bool:
    """Whether tokens that are archived change their slots while a row decodes, so that chains cannot share pages."""
    return self.overwrites or self.prunes

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
    for field in dataclasses.fields(policy):
      if field.name in ("budget", "cr"):
        continue  # `check_budget` says more
      value = getattr(policy, field.name)
      if isinstance(field.default, int | float) and (value is None or isinstance(value, str | bytes)):
        raise ValueError(f"{type(policy).__name__}: {field.name}={value!r:.80} must be a number")
      if not isinstance(value, int | float | np.ndarray | np.generic | jax.Array) or np.ndim(value) > 1:
        continue
      if (large := _too_large(value)) or np.isnan(np.asarray(value, float)).any():
        most = f"at most {np.iinfo(np.int32).max}" if large else "a number"
        raise ValueError(f"{type(policy).__name__}: {field.name}={value} must be {most}")
    return policy

  def fitted(self, config: Any) -> Policy:
    """This policy with the tables that it needs for a model of this `ModelConfig`; called before `resolved`.

    Raises:
      ValueError: the tables are of another model.
    """
    return self

  def for_gates(self, dms: DMSConfig) -> Policy:
    """This policy with what it needs to know of the gates that it reads; called before `resolved`."""
    return self

  def chunk(self, tokens: int) -> int:
    """Tokens of a prompt that can be read at once, of `tokens` that one would."""
    return tokens

  @property
  def target(self) -> float | Float[Array, "*rows"]:
    """The CR that each row asks of a model whose low-rank updates depend on it; 1, none of them, without its gates."""
    return 1.0

  @property
  def numbers(self) -> tuple[str, ...]:
    """The names of NUMBERS that may act."""
    return NUMBERS

  @property
  def remedy(self) -> str:
    """What a request that asks for a number that is none of `row_numbers` is told to do; "" if nothing helps."""
    return ""

  def by_row(self) -> Policy:
    """This policy in a form whose window follows from none of its numbers, so that each row can have its own."""
    return self

  def continues(self, held: Policy | None) -> bool:
    """Whether this policy can continue a conversation that the policy `held` has filled (None: unknown).

    A policy that keeps to a budget continues what its own class has held within one, maybe another. One that keeps to
    none continues what any such policy has held.
    """
    if held is None or self.limited != held.limited:
      return False
    return type(held) is type(self) or not self.limited

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
    """The first value of each statistic in `stats`, for the tokens at `position` of layer `layer`.

    It is 0 by default, but for "position". Positions up to 2^24 are exact.
    """
    first = {"position": position.astype(jnp.float32)}
    return {name: first.get(name, jnp.zeros(position.shape, jnp.float32)) for name in self.stats}

  def memory(self, group: int, head_dim: int) -> dict[str, tuple[int, ...]]:
    """The own axes of each array of the memory; a cache stores it as float32 [L, B, K, own axes], 0 at first.

    Args:
      group: G, query heads of a KV head.
      head_dim: H.
    """
    return {}

  def remember(
    self,
    memory: dict[str, Float[Array, "L B K ..."]],
    layer: int | Int[Array, ""],
    queries: Float[Array, "B K G T H"],
    start: Int[Array, "B"],
    lengths: Int[Array, "B"],
  ) -> Memory:
    """The memory after a step of T tokens in one layer, a decode step or a chunk of a prompt.

    Args:
      memory: of all layers, to be changed at `layer` alone; an emptied row still holds what the row before left.
      queries: of the step's tokens, after RoPE; those past `lengths` are arbitrary.
      start: tokens that each row has read before.
      lengths: tokens that each row reads now; the memory of a row that reads none stays as it is.

    Raises:
      NotImplementedError: the policy remembers but does not define this.
    """
    raise NotImplementedError(f"{type(self).__name__} remembers but has no remember")

  def tally(
    self, memory: Memory, layer: int | Int[Array, ""], evicts: Bool[Array, "B K T"], start: Int[Array, "B"],
    lengths: Int[Array, "B"],
  ) -> Memory:  # fmt: skip
    """The memory after the decisions `evicts` of a step's tokens in one layer; the arguments are those of `remember`.

    Raises:
      NotImplementedError: the policy steers but does not define this.
    """
    raise NotImplementedError(f"{type(self).__name__} steers but has no tally")

  def steered(self, memory: dict[str, Float[Array, "L B K ..."]], start: Int[Array, "B"], width: int) -> Policy:
    """The policy that decides in a step of `width` tokens a row, the first of them at `start`.

    Args:
      memory: of all layers. Some layers may have been through `tally` in this step.

    Raises:
      NotImplementedError: the policy steers but does not define this.
    """
    raise NotImplementedError(f"{type(self).__name__} steers but has no steered")

  def renew(self, memory: Memory, layer: int | Int[Array, ""], rows: Bool[Array, "B"]) -> Memory:
    """The memory after `compact` has acted on `rows`, at the end of a prompt or where due; by default unchanged."""
    return memory

  def rate(self, logits: Float[Array, "B K T"]) -> dict[str, Float[Array, "B K T"]]:
    """The statistics `gate_stats`, float32, of the tokens that the gate logits `logits` are about.

    Raises:
      NotImplementedError: the policy has such statistics but does not define this.
    """
    raise NotImplementedError(f"{type(self).__name__} has gate_stats but no rate")

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

  def due(self, tokens: Int[Array, "B"], held: Int[Array, "L B K"]) -> Bool[Array, "B"]:
    """The rows that `compact` acts on before a decode step.

    Args:
      tokens: that each row has read.
      held: tokens that each head holds.

    Raises:
      NotImplementedError: the policy prunes but does not define this.
    """
    raise NotImplementedError(f"{type(self).__name__} prunes but has no due")

  def compact(self, candidates: Candidates) -> Bool[Array, "B K X"]:
    """Which tokens outside the window stay, in one layer: after a chunk of a prompt, and in rows that are `due`.

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
    """The most slots that a head needs for a text of `tokens` tokens, the window's W + 1 included; int32."""
    return jnp.asarray(tokens, jnp.int32)

  def mean_capacity(self, tokens: int | Int[Array, "..."]) -> Int[Array, "..."]:
    """`capacity`, but the mean over the heads of a layer where they share it."""
    return self.capacity(tokens)

  def reach(self, slots: int) -> Int[Array, "..."]:
    """The inverse of `capacity`: tokens of the longest text for which `slots` slots a head suffice; int32."""
    return jnp.int32(slots)


@jax.jit
def capacity_of(policy: Policy, tokens: int | Int[Array, "..."]) -> Int[Array, "..."]:
  """`Policy.capacity`, called by the host: one program, not one for each of its operations."""
  return policy.capacity(tokens)
