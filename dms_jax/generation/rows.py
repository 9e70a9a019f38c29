"""The rows of a `Generator`: what compiled calls know of each, set for many rows at once."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from dms_jax.cache.host import HostRow
from dms_jax.generation import decode as decoding
from dms_jax.generation.decode import CAPACITY, LENGTH, RUNNING, DecodeState, Emitted
from dms_jax.generation.detokenize import Detokenizer
from dms_jax.generation.results import Result
from dms_jax.generation.sampling import Sampling, as_key, row_keys
from dms_jax.generation.stops import StopCriteria
from dms_jax.policies import Policy
from dms_jax.policies.base import row_numbers, with_numbers
from dms_jax.processes import fetch


@dataclasses.dataclass(eq=False)
class Chain:
  """One chain of a request, in a row, on the host, or waiting.

  Attributes:
    age: number of the chain in the order of admission.
    key: the data of its sampling key, None if greedy.
    limit: most tokens, those of earlier turns included.
    start: tokens generated in earlier turns.
    numbers: of the policy.
    compressed: times that it has given up tokens (`generation.pressure`).
    goes_on: without a prompt of this turn: its one token is that sampled last, which a decode step reads.
    new_detokenizer: makes the `detokenizer` of its text, None without a tokenizer.
    row: None while it waits.
    stored: the row on the host, to be restored.
    token, count, stop_state: of `DecodeState`, as the row starts or is restored.
    failed: the record whose text could not be made, and the error.
    silent: it was cancelled: no more texts and news.
  """

  ticket: int
  index: int
  key: np.ndarray | None
  limit: int
  start: int
  prompt: np.ndarray
  temperature: float
  numbers: dict[str, int | float]
  keep: bool
  goes_on: bool
  new_detokenizer: Callable[[], Detokenizer | None]
  result: Result
  age: int = 0
  compressed: int = 0
  row: int | None = None
  stored: HostRow | None = None
  token: int = 0
  count: int = 0
  stop_state: int = 0
  detokenizer: Detokenizer | None = None
  failed: tuple[Any, Exception] | None = None
  silent: bool = False

  def __post_init__(self):
    self.token, self.count = int(self.prompt[-1]), self.start


@partial(jax.jit, static_argnames=("chains", "single"))
def _key_data(key: jax.Array, *, chains: int, single: bool) -> jax.Array:
  keys = key[None] if single else row_keys(key, chains)
  return jax.random.key_data(jax.vmap(lambda key: jax.random.fold_in(key, 0))(keys))


def key_data(key: jax.Array | None, chains: int) -> list[np.ndarray | None]:
  """The data of the row's sampling key of each chain of a request; see `Generator.submit`.

  Chain i's own key is `fold_in(key, i)`, that of a single chain `key` itself, or entry i of a batch of keys. Its row
  samples with `fold_in(own, 0)`, as a batch of one row does in `generate`.

  Raises:
    ValueError: a batch of keys of another length.
  """
  if key is None:
    return [None] * chains
  key = as_key(key)
  return list(np.asarray(_key_data(key, chains=chains, single=chains == 1 and key.ndim == 0)))


@partial(jax.jit, donate_argnames="state")
def _placed(state: DecodeState, new: Bool[Array, "B"], data: Array | None, fields: dict[str, Array]) -> DecodeState:
  fields = {name: jnp.where(new, value, getattr(state, name)) for name, value in fields.items()}
  keys = state.keys
  if keys is not None:
    own = jnp.where(new[:, None], data, jax.random.key_data(keys))
    keys = jax.random.wrap_key_data(own, impl=jax.random.key_impl(keys))
  return state.replace(keys=keys, reason=jnp.where(new, RUNNING, state.reason), **fields)


@jax.jit
def _first_tokens(
  state: DecodeState, new: Bool[Array, "B"], logits: Float[Array, "B V"], source: Int[Array, "B"], sampling: Sampling,
  stop: StopCriteria,
) -> tuple[DecodeState, Emitted]:  # fmt: skip
  """`decode.first_token` for the rows `new`, from the logits of the rows `source`."""
  return decoding.first_token(state, logits[source], new, sampling, stop)


@jax.jit
def _reasons(state: DecodeState, rows: Bool[Array, "B"], reason: Int[Array, "*B"]) -> DecodeState:
  return state.replace(reason=jnp.where(rows, reason, state.reason))


@jax.jit
def _over(reason: Int[Array, "B"], keep: Bool[Array, "B"]) -> Bool[Array, "B"]:
  return (reason != RUNNING) & (reason != CAPACITY) & ~keep


class Rows:
  """The rows' sampling states, the numbers of their policies, and their temperatures.

  Args:
    policy: with scalar numbers, the defaults.
    sampling: its temperature, if not None, is the default.

  Attributes:
    state, policy, sampling: of all rows, for compiled calls.
    chains: the chain in each row, None in an empty one.
    occupied: bool [B], rows with a chain.
    pools: pools of pages that the rows are split over (`PagedRows.pools`).
    compressed: chains that have given up tokens, and what is to be reported about them (`generation.pressure`).
  """

  def __init__(self, policy: Policy, sampling: Sampling, width: int, pools: int = 1):
    self.width, self.pools = width, pools
    self.compressed: tuple[list[Chain], Any] = [], None
    self.chains: list[Chain | None] = [None] * width
    self.occupied, self._keep = np.zeros(width, bool), np.zeros(width, bool)
    self._numbers = {name: [value] * width for name, value in row_numbers(policy).items()}
    self.policy = with_numbers(policy, self._numbers)
    self.sampling, keys = sampling, None
    if sampling.temperature is not None:
      keys = jax.random.split(jax.random.key(0), width)
      self._temperature = np.full(width, sampling.temperature, np.float32)
      self.sampling = sampling.replace(temperature=jnp.asarray(self._temperature))
    column = lambda value: np.full(width, value, np.int32)
    self.state = DecodeState(column(0), keys, column(0), column(0), column(0), column(LENGTH))

  @property
  def running(self) -> list[Chain]:
    """The chains in rows."""
    return [chain for chain in self.chains if chain is not None]

  def pool_of(self, row: int) -> int:
    """The pool of a row."""
    return row // (self.width // self.pools)

  def empty(self, count: int, pool: int = 0) -> list[int]:
    """The first `count` rows of a pool without a chain."""
    first = pool * (self.width // self.pools)
    return (first + np.flatnonzero(~self.by_pool(self.occupied)[pool])[:count]).tolist()

  def by_pool(self, rows: np.ndarray) -> np.ndarray:
    """An array [B] as [pools, rows of a pool]."""
    return rows.reshape(self.pools, -1)

  @property
  def free(self) -> np.ndarray:
    """Rows of each pool without a chain, int [pools]."""
    return (~self.by_pool(self.occupied)).sum(axis=1)

  def marked(self, rows: Sequence[int]) -> Bool[np.ndarray, "B"]:
    """True for `rows`."""
    mask = np.zeros(self.width, bool)
    mask[list(rows)] = True
    return mask

  def only(self, chains: Sequence[Chain]) -> list[Chain | None]:
    """These chains, each at the place of its row."""
    found: list[Chain | None] = [None] * self.width
    for chain in chains:
      found[chain.row] = chain
    return found

  def place(self, chains: Sequence[Chain]) -> None:
    """Puts chains into their rows, to run."""
    rows = [chain.row for chain in chains]
    fields = {name: np.zeros(self.width, np.int32) for name in ("token", "count", "limit", "stop_state")}
    for name, values in fields.items():
      values[rows] = [getattr(chain, name) for chain in chains]
    data = None
    if self.state.keys is not None:
      data = np.zeros((self.width, *jax.random.key_data(self.state.keys).shape[1:]), np.uint32)
      for chain in chains:
        data[chain.row] = 0 if chain.key is None else chain.key
      self._temperature[rows] = [chain.temperature for chain in chains]
      self.sampling = self.sampling.replace(temperature=jnp.asarray(self._temperature.copy()))
    self.state = _placed(self.state, self.marked(rows), data, fields)
    for chain in chains:
      self.chains[chain.row], self._keep[chain.row] = chain, chain.keep
    self.renumber(chains)
    self.occupied[rows] = True

  def renumber(self, chains: Sequence[Chain]) -> None:
    """Gives rows the policy's numbers of their chains."""
    changed = False
    for chain in chains:
      for name, value in chain.numbers.items():
        changed |= self._numbers[name][chain.row] != value
        self._numbers[name][chain.row] = value
    if changed:
      self.policy = with_numbers(self.policy, self._numbers)

  def vacate(self, chains: Sequence[Chain]) -> None:
    """Takes chains out of their rows, whose state must not be that of a running row."""
    for chain in chains:
      self.occupied[chain.row], self._keep[chain.row] = False, False
      self.chains[chain.row], chain.row = None, None

  def first_tokens(
    self, rows: Sequence[int], sources: Sequence[int], logits: Float[Array, "B V"], stop: StopCriteria
  ) -> Emitted:
    """Samples the token after the prompt for `rows`, each from the logits of one of the rows `sources`."""
    new, source = self.marked(rows), np.arange(self.width, dtype=np.int32)
    source[list(rows)] = sources
    self.state, emitted = _first_tokens(self.state, new, logits, source, self.sampling, stop)
    return emitted

  def end(self, rows: Sequence[int]) -> None:
    """Makes rows sit out the steps to come."""
    self.state = _reasons(self.state, self.marked(rows), np.int32(LENGTH))

  def resume(self, rows: Bool[np.ndarray, "B"]) -> None:
    """Makes rows run again."""
    self.state = _reasons(self.state, rows, np.int32(RUNNING))

  def over(self) -> Bool[Array, "B"]:
    """The rows whose caches may be emptied, as their chains have ended and nothing is kept of them."""
    return _over(self.state.reason, self._keep.copy())

  def of(self, row: int) -> dict[str, Any]:
    """A row's `token`, `count` and `stop_state`."""
    state = self.state
    found = fetch({"token": state.token, "count": state.count, "stop_state": state.stop_state})
    return {name: int(values[row]) for name, values in found.items()}
