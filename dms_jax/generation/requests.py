"""Requests of a `Generator`: their arguments checked, and their chains made."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from dms_jax.cache.host import check_fits
from dms_jax.decoder import Model
from dms_jax.generation.conversation import Continuation, Conversation, check_continues, continuation
from dms_jax.generation.detokenize import Detokenizer
from dms_jax.generation.generate import Output
from dms_jax.generation.pages import PagedRows
from dms_jax.generation.prompts import prompt_ids
from dms_jax.generation.results import Result
from dms_jax.generation.rows import Chain, key_data
from dms_jax.generation.sampling import Sampling, as_key
from dms_jax.generation.stops import StopStrings
from dms_jax.policies import Policy
from dms_jax.policies.base import is_whole, row_numbers


@dataclasses.dataclass(frozen=True)
class Request:
  """The arguments of `Generator.submit`."""

  prompt: str | Sequence[int] | None
  chains: int
  max_new_tokens: int
  key: jax.Array | None
  temperature: float | None
  keep: bool
  continue_from: Continuation | Conversation | Output | None
  numbers: Mapping[str, int | float]


@dataclasses.dataclass(frozen=True)
class Terms:
  """What the requests of a generator have in common.

  Attributes:
    model, tokenizer, stop_strings: of the generator.
    policy: with scalar numbers, the defaults of requests.
    temperature: the default; 0: every request is greedy.
    keys: sampling keys of the kind that requests must give; None if greedy.
    width, max_length: the most chains of a request, and tokens of a text. On a mesh the chains of a request lie on the
      devices of the same rows.
  """

  model: Model
  tokenizer: Any
  stop_strings: StopStrings | None
  policy: Policy
  temperature: float
  keys: jax.Array | None
  width: int
  max_length: int

  @property
  def numbers(self) -> dict[str, int | float]:
    """The policy's numbers that a request can set."""
    return row_numbers(self.policy)

  def chains(self, request: Request, ticket: int, memory: PagedRows) -> list[Chain]:
    """The chains of a request, which wait.

    Raises:
      ValueError: see `Generator.submit`.
    """
    chains, most = request.chains, request.max_new_tokens
    if not is_whole(chains) or not 1 <= chains <= self.width:
      split = "" if self.model.mesh is None else " of a device"
      raise ValueError(f"chains={chains!r:.80} must lie between 1 and the width {self.width}{split}")
    if not is_whole(most) or most < 1:
      raise ValueError(f"max_new_tokens={most!r:.80} must be 1 or more, a whole number")
    temperature = self.temperature if request.temperature is None else request.temperature
    own_keys = self._keys(request.key, temperature, chains)
    numbers = self._checked(request.numbers) if request.numbers else self.numbers
    past = None if request.continue_from is None else self._fitting(request.continue_from, numbers, memory)
    pending = None if past is None else np.array([past.pending])
    prompt = [] if request.prompt is None else request.prompt
    ids = prompt_ids(self.model, [prompt], None, self.tokenizer, pending)[0]
    # The last token is sampled and not read.
    total = len(ids) + most - 1 + (0 if past is None else int(past.cache.seen))
    if total > self.max_length:
      raise ValueError(f"prompt and max_new_tokens={most} need {total} positions; max_length={self.max_length}")
    start = 0 if past is None else past.generated
    goes_on = past is not None and past.pending >= 0 and len(ids) == 1
    result = Result.empty(chains, self.tokenizer is not None, memory.heads)
    group = [
      Chain(
        ticket, index, own, start + most, start, ids, temperature, numbers, request.keep, goes_on,
        lambda: Detokenizer.create(self.tokenizer, self.stop_strings, ids), result,
      )
      for index, own in enumerate(own_keys)
    ]  # fmt: skip
    if past is not None:
      group[0].stored = past.cache
    return group

  def _keys(self, key: jax.Array | None, temperature: float, chains: int) -> list[np.ndarray | None]:
    """The data of each chain's sampling key; a ValueError if the key or the temperature is bad."""
    Sampling.create(temperature)
    if temperature and self.keys is None:
      raise ValueError(f"temperature={temperature}: this generator is greedy; give it a temperature, then requests too")
    if temperature and key is None:
      raise ValueError("sampling at temperature > 0 needs key=jax.random.key(seed)")
    own_keys = key_data(key, chains)
    if key is not None and self.keys is not None:
      given, kind = (jax.random.key_impl(each) for each in (as_key(key), self.keys))
      if given != kind:
        raise ValueError(f"key: it is of kind {given}, and this generator samples with keys of kind {kind}")
    return own_keys

  def _checked(self, numbers: Mapping[str, int | float]) -> dict[str, int | float]:
    """The policy's numbers for a request: the defaults, replaced by `numbers`; a ValueError if one is bad."""
    name = type(self.policy).__name__
    for number, value in numbers.items():
      if number not in self.numbers:
        there = ", ".join(self.numbers) or "none"
        remedy = f"; {self.policy.remedy}" if self.policy.remedy else ""
        raise ValueError(
          f"{number}={value}: not a number of this {name} that a request can set; there are: {there}{remedy}"
        )
      if np.asarray(value).dtype.kind not in "iuf" or np.ndim(value) or np.isnan(value):
        raise ValueError(f"{number}={value} must be one number")
    found = {**self.numbers, **numbers}
    self.policy.replace(**found).resolved(None)
    return found

  def _fitting(self, given: Any, numbers: Mapping[str, int | float], memory: PagedRows) -> Continuation:
    """The continuation `given` with pages of the pool's size; a ValueError if it cannot go on here with `numbers`."""
    past, cache = continuation(given), memory.own
    row = past.cache
    archived = row.archived[self.model.config.global_layers]
    tokens = np.array([min(int(row.seen), row.window + 1) + int(archived.max(initial=0))])
    try:
      check_continues(self.policy.replace(**numbers), past.policy, tokens, np.array([int(row.seen)]))
      check_fits(memory.cache, row)
    except ValueError as error:
      raise ValueError(f"continue_from: {error}") from None
    return dataclasses.replace(past, cache=past.cache.repaged(cache.page_size))
