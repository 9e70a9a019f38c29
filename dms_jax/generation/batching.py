"""`Generator`: many requests on one pool, in rows that join and leave between decode blocks.

    generator = dms_jax.Generator(model, width=16, budget=2**30)
    tickets = [generator.submit(prompt, chains=4, max_new_tokens=512, key=key) for prompt, key in ...]
    for ticket, chain, tokens, text in generator.run():    # streams; `generator.results` holds all results
      ...

A request may have numbers of its own for the policy: `submit(prompt, budget=512)`, or `cr=`, `threshold=`.

The compiled width is fixed. A chain's tokens are bit-equal to those of its run alone at the same width: they do not
depend on the other rows and their numbers, on its own row, or on preemptions. Between two decode blocks the host checks
the rows once: ended chains free their rows and pages, and waiting requests begin while both are free. When pages run
out, the pool grows if the budget allows it; otherwise the newest chain is preempted to host memory and restored later.
"""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from dms_jax import cache as caches
from dms_jax.cache import PagedCache
from dms_jax.cache.host import HostRow, check_fits
from dms_jax.execution import fastest_form
from dms_jax.generation import decode as decoding
from dms_jax.generation.conversation import Continuation, Conversation, check_continues, continuation
from dms_jax.generation.decode import CAPACITY, LENGTH, REASONS, RUNNING, DecodeState, Emitted
from dms_jax.generation.detokenize import Detokenizer
from dms_jax.generation.generate import Output
from dms_jax.generation.pages import BudgetError, PagedRows
from dms_jax.generation.prompts import prompt_ids
from dms_jax.generation.results import ChainUsage, Result
from dms_jax.generation.sampling import Sampling, chain_keys, row_keys
from dms_jax.generation.stops import StopStrings, stop_criteria
from dms_jax.metrics import Counts
from dms_jax.model import Model, check_policy
from dms_jax.policies import Policy, check_rows
from dms_jax.policies.base import row_numbers, with_numbers


@dataclasses.dataclass
class _Chain:
  """One chain of a request, in a row, on the host, or waiting. `age` numbers chains in the order of admission."""

  ticket: int
  index: int
  age: int
  key: Any
  limit: int
  start: int  # tokens generated in earlier turns
  prompt: np.ndarray
  temperature: float
  numbers: dict[str, int | float]  # of the policy
  keep: bool
  goes_on: bool  # without a prompt of this turn: its one token is that sampled last, which a decode step reads
  detokenizer: Detokenizer | None
  row: int | None = None
  stored: tuple[HostRow, DecodeState | None] | None = None  # the row on the host, to be restored


@partial(jax.jit, donate_argnames="state")
def _with_row(state: DecodeState, row: Int[Array, ""], one: DecodeState) -> DecodeState:
  return jax.tree.map(lambda x, new: x.at[row].set(new), state, one)


class Generator:
  """Runs requests on a model. See the module's docstring.

  Args:
    model: as from `dms_jax.load`.
    policy: as for `generate`, with scalar numbers: the defaults of requests.
    width: rows decoded together.
    budget: most bytes of the cache, not the policy's `budget` in tokens; None: unlimited.
    budget_tokens: the budget as tokens that a head may hold outside the windows, summed over rows, mean over heads.
    pages: initial pages of the pool; default as many as fit the budget, or one for each head of each row without a
      budget.
    max_length: most tokens of a text, prompt and answer; default the model's context.
    temperature, top_k, top_p, stop, eos: for all requests, as for `generate`. If the temperature is not 0, a request
      may set its own.
    page_size: slots of a page; `PagedCache.create` describes the default.
    page_format: "int8" or "float8" quantises the pages; default the model's dtype.
    prefill_chunk: prompt tokens that one compiled call reads.
    decode_block: decode steps of one compiled call.
    tokenizer: default `model.tokenizer`.

  Raises:
    ValueError: bad arguments.
    BudgetError: the budget is too small for `width` empty rows with one page for each head.
  """

  def __init__(
    self, model: Model, *, policy: Policy | None = None, width: int = 8, budget: int | None = None,
    budget_tokens: int | None = None, max_length: int | None = None, temperature: float = 0.0, top_k: int | None = None,
    top_p: float | None = None, stop: str | Sequence[str] = (), eos: bool | Sequence[int] = True,
    page_size: int | None = None, pages: int | None = None, page_format: str | None = None, prefill_chunk: int = 256,
    decode_block: int = 32, tokenizer: Any = None,
  ):  # fmt: skip
    for name, value in (("width", width), ("prefill_chunk", prefill_chunk), ("decode_block", decode_block)):
      if value < 1:
        raise ValueError(f"{name}={value} must be 1 or more")
    self.tokenizer = model.tokenizer if tokenizer is None else tokenizer
    self.model = fastest_form(model.replace(tokenizer=None))
    self.policy = check_policy(model, None if policy is None else policy.by_row())
    check_rows(self.policy, None)
    self.numbers = row_numbers(self.policy)
    self._row_policy = with_numbers(self.policy, {name: [value] * width for name, value in self.numbers.items()})
    self.width, self.chunk, self.decode_block = width, prefill_chunk, decode_block
    longest = model.config.max_position_embeddings
    self.max_length = longest if max_length is None else max_length
    if not 0 < self.max_length <= longest:
      raise ValueError(f"max_length={max_length} must lie between 1 and the model's {longest} positions")
    self.sampling = Sampling.create(temperature, top_k, top_p)
    self.stop_strings = StopStrings.create(stop, self.tokenizer)
    self.stop_criteria = stop_criteria(self.model, self.tokenizer, self.stop_strings, eos)
    cache = caches.for_model(
      model, self.policy, batch=width, capacity=self.policy.window + 2, kind="paged", longest=self.max_length,
      page_size=page_size, page_format=page_format,
    )  # fmt: skip
    self.memory = PagedRows(cache, budget=budget, budget_tokens=budget_tokens, pages=pages)
    keys = None
    if self.sampling.temperature is not None:
      keys = jax.random.split(jax.random.key(0), width)
      self.sampling = self.sampling.replace(temperature=jnp.full(width, self.sampling.temperature, jnp.float32))
    self.temperature = temperature
    column = lambda value: jnp.full(width, value, jnp.int32)
    self.state = DecodeState(column(0), keys, column(0), column(0), column(0), column(LENGTH))
    self.chains: list[_Chain | None] = [None] * width
    self.waiting: collections.deque[list[_Chain]] = collections.deque()
    self.preempted: list[_Chain] = []
    self.results: dict[int, Result] = {}
    self.preemptions = self.tickets = self._ages = self.peak_pages = 0
    self.peak_tokens = 0.0  # held at once by all rows, mean over layers and heads

  @property
  def cache(self) -> PagedCache:
    """The cache of all rows."""
    return self.memory.cache

  @cache.setter
  def cache(self, cache: PagedCache) -> None:
    self.memory.cache = cache

  @property
  def budget(self) -> int | None:
    """Most bytes of the cache; None: unlimited."""
    return self.memory.budget

  # Requests -----------------------------------------------------------------------------------------------------------

  def submit(
    self, prompt: str | Sequence[int] | None = None, *, chains: int = 1, max_new_tokens: int = 256,
    key: jax.Array | None = None, temperature: float | None = None, keep: bool = False,
    continue_from: Continuation | Conversation | Output | None = None, **numbers: int | float,
  ) -> int:  # fmt: skip
    """Queues a request; returns its ticket, the key of `results`.

    Args:
      prompt: text or ids, read once for all chains.
      chains: number of continuations of the prompt. Chains share the pages of their common tokens.
      key: needed if temperature > 0. Chain i samples with `fold_in(key, i)`; a single chain samples with `key` itself.
        Or a batch of `chains` keys, one a chain.
      temperature: overrides the generator's, which must not be 0; 0 is greedy.
      keep: store a host copy of each finished chain's cache in `Result.stored`, to continue from.
      continue_from: an earlier chain (an entry of `Result.stored`), or an output or conversation of one row. The prompt
        is then the next turn.
      numbers: the policy's `budget` (tokens a head), `cr`, `threshold` or `sinks` (tokens) for this request, if the
        generator's policy has it; default the generator's. Other numbers compile nothing.

    Raises:
      ValueError: bad arguments, a number out of range, a text longer than `max_length`, or a conversation of another
        model or policy.
    """
    if not 1 <= chains <= self.width:
      raise ValueError(f"chains={chains} must lie between 1 and the width {self.width}")
    if max_new_tokens < 1:
      raise ValueError(f"max_new_tokens={max_new_tokens} must be 1 or more")
    temperature = self.temperature if temperature is None else temperature
    Sampling.create(temperature)
    if temperature and self.sampling.temperature is None:
      raise ValueError(f"temperature={temperature}: this generator is greedy; give it a temperature, then requests too")
    if temperature and key is None:
      raise ValueError("sampling at temperature > 0 needs key=jax.random.key(seed)")
    own_keys = chain_keys(key, chains)
    numbers = self._checked(numbers)
    past = None if continue_from is None else self._fitting(continuation(continue_from), numbers)
    pending = None if past is None else np.array([past.pending])
    ids = prompt_ids(self.model, [[] if prompt is None else prompt], None, self.tokenizer, pending)[0]
    total = len(ids) + max_new_tokens + (0 if past is None else int(past.cache.seen))
    if total > self.max_length:
      raise ValueError(
        f"prompt and max_new_tokens={max_new_tokens} need {total} positions; max_length={self.max_length}"
      )
    start = 0 if past is None else past.generated
    goes_on = past is not None and past.pending >= 0 and len(ids) == 1
    group = []
    for index, own in enumerate(own_keys):
      text = Detokenizer.create(self.tokenizer, self.stop_strings)
      limit = start + max_new_tokens
      group.append(_Chain(self.tickets, index, 0, own, limit, start, ids, temperature, numbers, keep, goes_on, text))
    if past is not None:
      group[0].stored = (past.cache, None)
    self.results[self.tickets] = Result.empty(chains, self.tokenizer is not None, self.memory.heads)
    self.waiting.append(group)
    self.tickets += 1
    return self.tickets - 1

  def _checked(self, numbers: dict[str, int | float]) -> dict[str, int | float]:
    """The policy's numbers for a request: the generator's, replaced by `numbers`; a ValueError if one is bad."""
    name = type(self.policy).__name__
    for number, value in numbers.items():
      if number not in self.numbers:
        there = ", ".join(self.numbers) or "none"
        raise ValueError(f"{number}={value}: not a number of this {name} that a request can set; there are: {there}")
      if np.asarray(value).dtype.kind not in "iuf" or np.ndim(value) or np.isnan(value):
        raise ValueError(f"{number}={value} must be one number")
    found = self.numbers | numbers
    self.policy.replace(**found).resolved(None)
    return found

  def _fitting(self, past: Continuation, numbers: dict[str, int | float]) -> Continuation:
    """`past` with pages of this pool's size; a ValueError if this generator cannot continue it with `numbers`."""
    row = past.cache
    tokens = np.array([min(int(row.seen), row.window + 1) + int(row.archived.max(initial=0))])
    try:
      check_continues(self.policy.replace(**numbers), past.policy, tokens, np.array([int(row.seen)]))
      check_fits(self.cache, row)
    except ValueError as error:
      raise ValueError(f"continue_from: {error}") from None
    return dataclasses.replace(past, cache=past.cache.repaged(self.cache.page_size))

  def cancel(self, ticket: int) -> None:
    """Ends all chains of a ticket with reason "cancelled"; their tokens so far stay in the result."""
    if ticket not in self.results:
      raise ValueError(f"ticket={ticket}: there is none")
    self.waiting = collections.deque(group for group in self.waiting if group[0].ticket != ticket)
    self.preempted = [chain for chain in self.preempted if chain.ticket != ticket]
    self._release([chain for chain in self.chains if chain is not None and chain.ticket == ticket])
    result = self.results[ticket]
    result.finish_reason = ["cancelled" if r == "running" else r for r in result.finish_reason]

  @property
  def busy(self) -> bool:
    """Whether any request is unfinished."""
    return bool(self.waiting or self.preempted or self._running)

  @property
  def _running(self) -> list[_Chain]:
    return [chain for chain in self.chains if chain is not None]

  def run(self) -> Iterator[tuple[int, int, list[int], str]]:
    """Steps until every request has ended; yields (ticket, chain, new tokens, new text) after each decode block."""
    while self.busy:
      yield from self.step()

  def step(self) -> list[tuple[int, int, list[int], str]]:
    """Admits the requests that fit, and runs one decode block; returns what `run` yields.

    Raises:
      BudgetError: a row exceeds the whole budget. After `cancel(ticket)` the other requests continue.
    """
    news = self._admit()
    if self._running:
      self.cache, self.state, emitted, counts = decoding.decode_block(
        self.model, self._row_policy, self.cache, self.state, self.sampling, self.stop_criteria,
        steps=self.decode_block, history=False,
      )  # fmt: skip
      tokens, pages = self.memory.usage()
      self.peak_tokens, self.peak_pages = max(self.peak_tokens, tokens), max(self.peak_pages, pages)
      news += self._collect(emitted, counts)
      self._resume_stalled()
    return news

  # Between decode blocks ----------------------------------------------------------------------------------------------

  def _admit(self) -> list:
    """Restores preempted chains, oldest first, then begins new requests, while rows and pages are free."""
    for chain in sorted(self.preempted, key=lambda chain: chain.age):
      if None not in self.chains or not self._restore(chain):
        return []
      self.preempted.remove(chain)
    news = []
    while self.waiting and self.chains.count(None) >= len(self.waiting[0]):
      begun = self._begin(self.waiting[0])
      if begun is None:
        break
      self.waiting.popleft()
      news += begun
    return news

  def _begin(self, group: list[_Chain]) -> list | None:
    """Reads a request's prompt into a row, forks the row for its chains, and returns the news of the first tokens.

    A request that goes on without a prompt has no news yet. None: pages ran out; the row is empty again, and the
    request is tried again later.
    """
    first = group[0]
    rows = [row for row, chain in enumerate(self.chains) if chain is None][: len(group)]
    first.row = rows[0]
    if first.stored is not None and not self.memory.restore(rows[0], first.stored[0]):
      return self._give_up(first)
    usage = ChainUsage(self.memory.heads, sampled=int(not first.goes_on))
    if first.stored is not None:
      usage.prompt, held = int(self.cache.seen[rows[0]]), int(np.asarray(self.cache.live()[:, rows[0]]).sum())
      usage.prompt_held = usage.prompt_peak = held
    logits = None
    if not first.goes_on:
      policy = with_numbers(self.policy, {name: [value] for name, value in first.numbers.items()})
      logits = self.memory.read(self.model, policy, rows[0], first.prompt, self.chunk, usage)
    if (logits is None and not first.goes_on) or not self.memory.fork(rows[0], rows[1:], whole=self.policy.rewrites):
      return self._give_up(first)
    for chain, row in zip(group, rows, strict=True):
      self._ages += 1
      chain.row, chain.age, chain.stored = row, self._ages, None
      self.results[chain.ticket].usage[chain.index] = dataclasses.replace(usage, steps=[])
      key = None
      if self.sampling.temperature is not None:
        key = jax.random.key(0) if chain.key is None else row_keys(chain.key, 1)[0]
      last, start, limit, zero = (jnp.int32(value) for value in (chain.prompt[-1], chain.start, chain.limit, 0))
      self._place(chain, DecodeState(last, key, start, limit, zero, jnp.int32(RUNNING)))
    return [] if logits is None else self._first_tokens(group, logits)

  def _place(self, chain: _Chain, one: DecodeState) -> None:
    """Puts a chain's state and its numbers into its row."""
    self.chains[chain.row], self.state = chain, _with_row(self.state, jnp.int32(chain.row), one)
    changed = {name: getattr(self._row_policy, name).at[chain.row].set(value) for name, value in chain.numbers.items()}
    self._row_policy = self._row_policy.replace(**changed)
    if self.sampling.temperature is not None:
      temperatures = self.sampling.temperature.at[chain.row].set(chain.temperature)
      self.sampling = self.sampling.replace(temperature=temperatures)

  def _give_up(self, chain: _Chain) -> None:
    """Empties the row of a request that could not begin; a BudgetError if the request had the whole pool to itself."""
    row, chain.row = chain.row, None
    self.memory.free([row])
    if not self._running and not self.preempted:
      message = f"{len(chain.prompt)} tokens of prompt and its chains do not fit {self.memory.extent}, even alone"
      raise BudgetError(message, chain.ticket)

  def _first_tokens(self, group: list[_Chain], logits: Float[Array, "1 V"]) -> list:
    """Samples the token after the prompt for the rows of a request that has just begun."""
    new = np.isin(np.arange(self.width), [chain.row for chain in group])
    resting = jnp.where(new, self.state.reason, LENGTH)  # the other rows sit out
    logits = jnp.broadcast_to(logits, (self.width, logits.shape[-1]))
    state, emitted = decoding.first_token(self.state.replace(reason=resting), logits, self.sampling, self.stop_criteria)
    self.state = state.replace(reason=jnp.where(new, state.reason, self.state.reason))
    return self._collect(emitted)

  def _collect(self, emitted: Emitted, counts: Counts | None = None) -> list:
    """Records the emitted tokens and the usage, and empties the rows that ended; returns what `run` yields.

    Args:
      counts: of the decode block; None for the tokens after prompts.
    """
    spent = None if counts is None else (counts.held, counts.step_reads)
    emitted, spent, reasons = jax.device_get((emitted, spent, self.state.reason))
    news, ended = [], []
    for row, chain in enumerate(self.chains):
      if chain is None:
        continue
      result, valid = self.results[chain.ticket], emitted.valid[:, row]
      new = emitted.tokens[valid, row].tolist()
      result.tokens[chain.index] += new
      result.logprobs[chain.index] += emitted.logprobs[valid, row].tolist()
      if spent is not None:
        result.usage[chain.index].steps.append(tuple(part[valid, row] for part in spent))
      over = reasons[row] not in (RUNNING, CAPACITY)
      text = ""
      if chain.detokenizer is not None:
        text = chain.detokenizer.advance(result.tokens[chain.index], REASONS[reasons[row]] if over else "running")
        result.text[chain.index] = chain.detokenizer.text
      if new or text:
        news.append((chain.ticket, chain.index, new, text))
      if over:
        result.finish_reason[chain.index] = REASONS[reasons[row]]
        if chain.keep:
          pending, count = int(self.state.token[row]), int(self.state.count[row])
          result.stored[chain.index] = Continuation(
            self.memory.offload(row), pending, count, self.policy.replace(**chain.numbers)
          )
        ended.append(chain)
    self._release(ended)
    return news

  def _release(self, chains: list[_Chain]) -> None:
    """Empties the rows of chains."""
    if not chains:
      return
    rows = [chain.row for chain in chains]
    self.memory.free(rows)
    gone = np.isin(np.arange(self.width), rows)
    self.state = self.state.replace(reason=jnp.where(gone, LENGTH, self.state.reason))
    for chain in chains:
      self.chains[chain.row], chain.row = None, None

  # Preemption ---------------------------------------------------------------------------------------------------------

  def _resume_stalled(self) -> None:
    """Resumes rows that found no free page, after the pool grew or the newest row was preempted."""
    stalled = np.asarray(self.state.reason) == CAPACITY
    stalled &= np.array([chain is not None for chain in self.chains])
    if not stalled.any():
      return
    if not self.memory.grow(int(stalled.sum()) * self.memory.heads):
      newest = max(self._running, key=lambda chain: chain.age)
      if len(self._running) == 1:
        raise BudgetError(
          f"a text of {int(self.cache.seen[newest.row])} tokens fills {self.memory.extent}, even alone; its tokens so "
          "far are in `results`, and cancel(ticket) lets the others go on",
          newest.ticket,
        )
      self._preempt(newest)
    stalled &= np.array([chain is not None for chain in self.chains])
    self.state = self.state.replace(reason=jnp.where(stalled, RUNNING, self.state.reason))

  def _preempt(self, chain: _Chain) -> None:
    """Moves a row to the host."""
    one = jax.tree.map(lambda x: x[chain.row], self.state)
    chain.stored = (self.memory.offload(chain.row), one.replace(reason=jnp.int32(RUNNING)))
    self._release([chain])
    self.preempted.append(chain)
    self.preemptions += 1

  def _restore(self, chain: _Chain) -> bool:
    """Moves a row back from the host; false if too few pages are free.

    While other rows run it needs one spare page for each head: with fewer it would soon be preempted again.
    """
    stored, one = chain.stored
    row = self.chains.index(None)
    spare = self.memory.heads if self._running else 0
    if self.memory.free_pages() < len(stored.pages) + spare or not self.memory.restore(row, stored):
      return False
    chain.row, chain.stored = row, None
    self._place(chain, one)
    return True
