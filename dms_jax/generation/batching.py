"""`Generator`: many requests at once, in rows that join and leave between compiled decode blocks, on one pool of pages.

    generator = dms_jax.Generator(model, width=16, budget=2**30)
    tickets = [generator.submit(prompt, chains=4, max_new_tokens=512, key=key) for prompt, key in ...]
    for ticket, row, tokens, text in generator.run():      # streams; `generator.results` has what is finished
      ...

The compiled width is fixed: a row's tokens are the same, bit by bit, whatever runs beside it, where, and however often
it has to wait; alone means at the same width with the other rows empty. Between two decode blocks the host looks at the
rows once: those that ended give their pages back, requests that wait move in as far as pages are really free, and where
pages ran out the pool grows if the budget allows, else the youngest row goes to the host and comes back later.
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
from dms_jax.cache import rows as cache_rows
from dms_jax.cache.base import GROWTH
from dms_jax.cache.host import HostRow, check_fits, offload_row, restore_row
from dms_jax.generation import decode as decoding
from dms_jax.generation.conversation import Continuation, Conversation, continuation
from dms_jax.generation.decode import CAPACITY, LENGTH, REASONS, RUNNING, Rows
from dms_jax.generation.generate import Output, fastest_form, read_prompts, stop_criteria_of
from dms_jax.generation.sampling import Sampling, row_keys
from dms_jax.model import Model, cached_forward, check_policy, decision_lag, last_logits
from dms_jax.policies import DMS, Policy, Vanilla


class BudgetError(ValueError):
  """A row needs more memory than the whole budget. `ticket`: whose it is; None for the empty rows of a generator."""

  def __init__(self, message: str, ticket: int | None = None):
    super().__init__(message if ticket is None else f"ticket {ticket}: {message}")
    self.ticket = ticket


@dataclasses.dataclass
class Result:
  """Of one ticket, a list entry for each chain. `text` None without a tokenizer; `stored`: caches to continue from, if
  they were asked for. `held`: tokens held at the end, the mean over layers and KV heads."""

  tokens: list[list[int]]
  logprobs: list[list[float]]
  finish_reason: list[str]
  text: list[str] | None
  held: list[float]
  stored: list[Continuation | None]

  @property
  def finished(self) -> bool:
    """Whether all chains have ended."""
    return all(reason != "running" for reason in self.finish_reason)


@dataclasses.dataclass
class _Chain:
  """One chain of a request: in a row, on the host, or waiting. `age` orders chains by admission."""

  ticket: int
  index: int
  age: int
  key: Any
  limit: int
  start: int  # tokens chosen in earlier turns
  prompt: np.ndarray
  temperature: float
  keep: bool = False
  row: int | None = None
  stored: tuple[HostRow, Any] | None = None  # (cache, its row of `Rows`) while it waits for pages


@partial(jax.jit, static_argnames="places", donate_argnames="cache")
def _read_chunk(
  model: Model, policy: Policy, cache: PagedCache, row: Int[Array, ""], tokens: Int[Array, "1 T"],
  length: Int[Array, "1"], *, places: int,
) -> tuple[PagedCache, Float[Array, "1 V"], Array]:  # fmt: skip
  """A chunk of one row's prompt: (cache, logits after it, whether there was no room)."""
  one = cache_rows.take_row(cache, row, places)
  out, one = cached_forward(model, policy, one, tokens, length)
  return cache_rows.put_row(cache, row, one), last_logits(model, out), out.stalled[0]


@jax.jit
def _usage(cache: PagedCache) -> tuple[Array, Array]:
  """(tokens held by all rows, the mean over layers and heads; pages in use, shared ones once)."""
  return jnp.sum(jnp.mean(cache.live().astype(jnp.float32), axis=(0, 2))), cache.pages - cache.table.pool.count


@partial(jax.jit, donate_argnames="rows")
def _with_row(rows: Rows, at, one) -> Rows:
  return jax.tree.map(lambda x, new: x.at[at].set(new), rows, one)


class Generator:
  """Runs requests on a model. See the module's docstring.

  Args:
    model: as from `dms_jax.load`.
    policy: as for `generate`.
    width: rows decoded together.
    budget: bytes that the cache may take in all; None: as much as is needed.
    budget_tokens: the same, as tokens that a head may hold on the average beside the windows of all rows.
    pages: of the pool at first; default all that the budget pays for, or one a head of each row without a budget.
    max_length: the longest text, prompt and answer; default the model's context.
    temperature, top_k, top_p, stop, eos: of all requests, as for `generate`; where the temperature is not 0, a request
      may have its own.
    page, archive: of the cache, see `PagedCache.create`.
    prefill_chunk, decode_block: tokens a prompt is read by, and decode steps between two looks at the rows.

  Raises:
    ValueError: bad arguments.
    BudgetError: a budget too small for `width` empty rows and a page a head.
  """

  def __init__(
    self, model: Model, *, policy: Policy | None = None, width: int = 8, budget: int | None = None,
    budget_tokens: int | None = None, max_length: int | None = None, temperature: float = 0.0, top_k: int | None = None,
    top_p: float | None = None, stop: str | Sequence[str] = (), eos: bool | Sequence[int] = True,
    page: int | None = None, pages: int | None = None, archive: str | None = None, prefill_chunk: int = 256,
    decode_block: int = 32, tokenizer: Any = None,
  ):  # fmt: skip
    for name, value in (("width", width), ("prefill_chunk", prefill_chunk), ("decode_block", decode_block)):
      if value < 1:
        raise ValueError(f"{name}={value} must be 1 or more")
    self.tokenizer = model.tokenizer if tokenizer is None else tokenizer
    self.model = fastest_form(model.replace(tokenizer=None))
    self.policy = check_policy(model, policy or (DMS() if model.dms is not None else Vanilla()))
    self.width, self.budget, self.chunk, self.decode_block = width, budget, prefill_chunk, decode_block
    longest = model.config.max_position_embeddings
    self.max_length = longest if max_length is None else max_length
    if not 0 < self.max_length <= longest:
      raise ValueError(f"max_length={max_length} must lie between 1 and the model's {longest} positions")
    self.sampling = Sampling.create(temperature, top_k, top_p)
    stops = (stop,) if isinstance(stop, str) else tuple(stop)
    self.reader, self.stop_criteria = stop_criteria_of(self.model, self.tokenizer, stops, eos)
    cache = caches.create(
      "paged", model.config, batch=width, capacity=self.policy.window + 2, longest=self.max_length, policy=self.policy,
      lag=decision_lag(model, self.policy.window), dtype=model.dtype, page=page, archive=archive,
    )  # fmt: skip
    if budget is not None and budget_tokens is not None:
      raise ValueError("give either budget= (bytes) or budget_tokens=")
    if budget_tokens is not None:
      pages_paid = budget_tokens * self._heads_of(cache) // cache.page_size
      self.budget = budget = cache.fixed_bytes + pages_paid * cache.page_bytes
    # Pages that the budget pays for beside everything else; None: any number.
    self._most = None if budget is None else max((budget - cache.fixed_bytes) // cache.page_bytes, 0)
    if self._most is not None and self._most < max(cache.pages, pages or 0):
      raise BudgetError(
        f"budget={budget} bytes: {width} rows and {max(cache.pages, pages or 0)} pages (one a head, or pages=) take "
        f"{cache.with_pages(max(cache.pages, pages or 0)).nbytes}; give a larger budget or a smaller width"
      )
    self.cache: PagedCache = cache.with_pages(max(pages or self._most or 0, cache.pages))
    keys = None
    if self.sampling.temperature is not None:
      keys = jax.random.split(jax.random.key(0), width)
      self.sampling = self.sampling.replace(temperature=jnp.full(width, self.sampling.temperature, jnp.float32))
    self.temperature = temperature
    column = lambda value: jnp.full(width, value, jnp.int32)
    self.rows = Rows(column(0), keys, column(0), column(0), column(0), column(LENGTH))
    self.chains: list[_Chain | None] = [None] * width
    self.waiting: collections.deque[list[_Chain]] = collections.deque()
    self.preempted: list[_Chain] = []
    self.results: dict[int, Result] = {}
    self.preemptions = self.tickets = self._ages = self.peak_pages = 0
    self.peak_tokens = 0.0  # held at once by all rows, the mean over layers and heads

  # Requests -----------------------------------------------------------------------------------------------------------

  def submit(
    self, prompt: str | Sequence[int] | None = None, *, chains: int = 1, max_new_tokens: int = 256,
    key: jax.Array | None = None, temperature: float | None = None, keep: bool = False,
    continue_from: Continuation | Conversation | Output | None = None,
  ) -> int:  # fmt: skip
    """Queues a request; returns its ticket, the key of `results`.

    Args:
      prompt: text or ids; read once, whatever the number of chains.
      chains: continuations of it, which share the pages of what they have in common.
      key: needed if temperature > 0; chain i draws from `fold_in(key, i)`, or from `key` itself if it is alone.
      temperature: of this request alone, where the generator's own is not 0; 0 is greedy.
      keep: leave each finished chain's cache in `Result.stored`, to continue from.
      continue_from: an earlier chain's, or a conversation of one row, as `load_conversation` gives it; the prompt is the next
        turn.

    Raises:
      ValueError: bad arguments, a text longer than `max_length`, or one held by another model or policy.
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
    past = None if continue_from is None else self._fitting(continuation(continue_from))
    ids = read_prompts(
      self.model, [[] if prompt is None else prompt], None, self.tokenizer, None if past is None else [past.pending]
    )[0]
    total = len(ids) + max_new_tokens + (0 if past is None else int(past.cache.seen))
    if total > self.max_length:
      raise ValueError(
        f"prompt and max_new_tokens={max_new_tokens} need {total} positions; max_length={self.max_length}"
      )
    start = 0 if past is None else past.generated
    group = []
    for index in range(chains):
      own = None if key is None else (key if chains == 1 else jax.random.fold_in(key, index))
      chain = _Chain(self.tickets, index, 0, own, start + max_new_tokens, start, ids, temperature, keep)
      group.append(chain)
    if past is not None:
      group[0].stored = (past.cache, None)
    none = [[] for _ in range(chains)]
    self.results[self.tickets] = Result(
      none, [[] for _ in none], ["running"] * chains, None if self.reader is None else [""] * chains,
      [0.0] * chains, [None] * chains,
    )  # fmt: skip
    self.waiting.append(group)
    self.tickets += 1
    return self.tickets - 1

  def _fitting(self, past: Continuation) -> Continuation:
    """`past` with pages of this pool's size; ValueError where it cannot go on here."""
    if not self.policy.continues(type(past.policy)):
      names = [type(p).__name__ for p in (past.policy, self.policy)]
      raise ValueError(
        f"continue_from: held under {names[0]}, cannot go on under {names[1]}: they hold different tokens"
      )
    try:
      check_fits(self.cache, past.cache)
    except ValueError as error:
      raise ValueError(f"continue_from: {error}") from None
    return dataclasses.replace(past, cache=past.cache.repaged(self.cache.page_size))

  def cancel(self, ticket: int) -> None:
    """StopCriteria all chains of a ticket with reason "cancelled"; what they have generated stays in its result."""
    if ticket not in self.results:
      raise ValueError(f"ticket={ticket}: there is none")
    self.waiting = collections.deque(group for group in self.waiting if group[0].ticket != ticket)
    self.preempted = [chain for chain in self.preempted if chain.ticket != ticket]
    self._release([chain for chain in self.chains if chain is not None and chain.ticket == ticket])
    result = self.results[ticket]
    result.finish_reason = ["cancelled" if r == "running" else r for r in result.finish_reason]

  @property
  def busy(self) -> bool:
    """Whether anything is left to do."""
    return bool(self.waiting or self.preempted or any(chain is not None for chain in self.chains))

  def run(self) -> Iterator[tuple[int, int, list[int], str]]:
    """Works until nothing is left; yields (ticket, chain, new tokens, new text) after each decode block."""
    while self.busy:
      yield from self.step()

  def step(self) -> list[tuple[int, int, list[int], str]]:
    """Admits what fits, and decodes one decode block."""
    news = self._admit()
    if any(chain is not None for chain in self.chains):
      self.cache, self.rows, emitted, _ = decoding.decode_block(
        self.model,
        self.policy,
        self.cache,
        self.rows,
        self.sampling,
        self.stop_criteria,
        steps=self.decode_block,
        history=False,
      )
      tokens, pages = jax.device_get(_usage(self.cache))
      self.peak_tokens, self.peak_pages = max(self.peak_tokens, float(tokens)), max(self.peak_pages, int(pages))
      news += self._collect(emitted)
      self._make_room()
    return news

  # Between decode blocks --------------------------------------------------------------------------------------------------

  def _admit(self) -> list:
    """Moves rows in from the host, oldest first, then new requests, as far as rows and pages are free."""
    for chain in sorted(self.preempted, key=lambda chain: chain.age):
      if None not in self.chains or not self._restore(chain):
        return []
      self.preempted.remove(chain)
    news = []
    while self.waiting and self.chains.count(None) >= len(self.waiting[0]):
      logits = self._begin(self.waiting[0])
      if logits is None:
        break
      news += self._first_tokens(self.waiting.popleft(), logits)
    return news

  def _begin(self, group: list[_Chain]) -> Float[Array, "1 V"] | None:
    """Reads a request's prompt into a row and forks it; the logits after it.

    None where pages are lacking: then nothing of it is left behind, and it is tried again later.
    """
    first = group[0]
    first.row = row = self.chains.index(None)
    others = [r for r, chain in enumerate(self.chains) if chain is None and r != row][: len(group) - 1]
    if first.stored is not None and not self._fill(row, first.stored[0]):
      return self._give_up(first)
    taken, size = 0, self.chunk
    while taken < len(first.prompt):
      length = min(size, len(first.prompt) - taken)
      tokens = np.zeros((1, self.chunk), np.int32)
      tokens[0, :length] = first.prompt[taken : taken + length]
      seen = int(self.cache.seen[row]) + length
      places = self._places(seen)
      self.cache, logits, stalled = _read_chunk(
        self.model, self.policy, self.cache, jnp.int32(row), tokens, np.array([length], np.int32), places=places
      )
      if not bool(stalled):
        taken += length
      elif not self._grown(self._heads * -(-length // self.cache.page_size)):
        if length == 1:
          return self._give_up(first)
        size = length // 2  # a chunk asks for pages as if it evicted nothing: a smaller one asks for fewer
    while others:
      rows = np.isin(np.arange(self.width), others)
      self.cache, enough = cache_rows.fork_row(self.cache, jnp.int32(row), rows, whole=self.policy.overwrites)
      if bool(enough):
        break
      whole = int(np.asarray(self.cache.table.owned[:, row]).sum()) if self.policy.overwrites else self._heads
      if not self._grown(len(others) * whole):
        return self._give_up(first)
    for chain, place in zip(group, [row, *others], strict=True):
      self._ages += 1
      chain.row, chain.age, chain.stored = place, self._ages, None
      key = None
      if self.sampling.temperature is not None:
        key = jax.random.key(0) if chain.key is None else row_keys(chain.key, 1)[0]
      one = Rows(jnp.int32(0), key, jnp.int32(chain.start), jnp.int32(chain.limit), jnp.int32(0), jnp.int32(RUNNING))
      self._place(chain, one)
    return logits

  def _place(self, chain: _Chain, one: Rows) -> None:
    """Puts a chain's state into its row."""
    self.chains[chain.row], self.rows = chain, _with_row(self.rows, chain.row, one)
    if self.sampling.temperature is not None:
      temperatures = self.sampling.temperature.at[chain.row].set(chain.temperature)
      self.sampling = self.sampling.replace(temperature=temperatures)

  def _give_up(self, chain: _Chain) -> None:
    """Empties the row that a request could not begin in; an error if it had the whole pool to itself."""
    row, chain.row = chain.row, None
    self.cache = cache_rows.free_rows(self.cache, jnp.arange(self.width) == row)
    if not any(other is not None for other in self.chains) and not self.preempted:
      raise BudgetError(
        f"{len(chain.prompt)} tokens of prompt and its chains do not fit budget={self.budget} bytes "
        f"({self.cache.pages} pages of {self.cache.page_size} slots for {self._heads} heads), even alone",
        chain.ticket,
      )

  def _first_tokens(self, group: list[_Chain], logits: Float[Array, "1 V"]) -> list:
    """The token after the prompt, of the rows that have just moved in."""
    new = np.isin(np.arange(self.width), [chain.row for chain in group])
    resting = jnp.where(new, self.rows.reason, LENGTH)  # the other rows have theirs
    logits = jnp.broadcast_to(logits, (self.width, logits.shape[-1]))
    rows, emitted = decoding.first_token(self.rows.replace(reason=resting), logits, self.sampling, self.stop_criteria)
    self.rows = rows.replace(reason=jnp.where(new, rows.reason, self.rows.reason))
    return self._collect(emitted)

  def _collect(self, emitted) -> list:
    """Notes what has been generated, and empties the rows that ended."""
    emitted, reasons = jax.device_get((emitted, self.rows.reason))
    news, ended = [], []
    for row, chain in enumerate(self.chains):
      if chain is None:
        continue
      result, valid = self.results[chain.ticket], emitted.valid[:, row]
      new = emitted.tokens[valid, row].tolist()
      result.tokens[chain.index] += new
      result.logprobs[chain.index] += emitted.logprobs[valid, row].tolist()
      over = reasons[row] not in (RUNNING, CAPACITY)
      text = ""
      if self.reader is not None:
        whole = self.reader.text(result.tokens[chain.index], REASONS[reasons[row]] if over else "running")
        text, result.text[chain.index] = whole[len(result.text[chain.index]) :], whole
      if new or text:
        news.append((chain.ticket, chain.index, new, text))
      if over:
        result.finish_reason[chain.index] = REASONS[reasons[row]]
        result.held[chain.index] = float(np.asarray(self.cache.live()[:, row]).mean())
        if chain.keep:
          pending, count = int(self.rows.token[row]), int(self.rows.count[row])
          result.stored[chain.index] = Continuation(offload_row(self.cache, row), pending, count, self.policy)
        ended.append(chain)
    self._release(ended)
    return news

  def _release(self, chains: list[_Chain]) -> None:
    if not chains:
      return
    gone = np.isin(np.arange(self.width), [chain.row for chain in chains])
    self.cache = cache_rows.free_rows(self.cache, gone)
    self.rows = self.rows.replace(reason=jnp.where(gone, LENGTH, self.rows.reason))
    for chain in chains:
      self.chains[chain.row], chain.row = None, None

  # Pages --------------------------------------------------------------------------------------------------------------

  @property
  def _heads(self) -> int:
    return self._heads_of(self.cache)

  @staticmethod
  def _heads_of(cache: PagedCache) -> int:
    layers, _, heads = cache.archived.shape
    return layers * heads

  def _places(self, tokens: int) -> int:
    """Pages a head may need for a text of `tokens`, rounded up to a power of two: few programs are compiled."""
    most = self.cache.table.pages.shape[3]
    needed = max(-(-tokens // self.cache.page_size), 1)
    return min(1 << (needed - 1).bit_length(), most)

  def _grown(self, lacking: int) -> bool:
    """Grows the pool by `lacking` pages at least, where the old pool and the new one fit the budget together."""
    pages = max(self.cache.pages + lacking, int(self.cache.pages * GROWTH))
    if self._most is not None:
      pages = min(pages, self._most - self.cache.pages)  # while it is copied the old pool is still there
      if pages < self.cache.pages + lacking:
        return False
    self.cache = self.cache.with_pages(pages)
    return True

  def _make_room(self) -> None:
    """Lets rows that found no page go on: a larger pool, or the youngest row on the host until others have ended."""
    stalled = np.asarray(self.rows.reason) == CAPACITY
    stalled &= np.array([chain is not None for chain in self.chains])
    if not stalled.any():
      return
    if not self._grown(int(stalled.sum()) * self._heads):
      running = [chain for chain in self.chains if chain is not None]
      if len(running) == 1:
        chain = running[0]
        raise BudgetError(
          f"a text of {int(self.cache.seen[chain.row])} tokens fills budget={self.budget} bytes ({self.cache.pages} "
          f"pages of {self.cache.page_size} slots for {self._heads} heads), even alone; its tokens so far are in "
          "`results`, and cancel(ticket) lets the others go on",
          chain.ticket,
        )
      self._preempt(max(running, key=lambda chain: chain.age))
    self.rows = self.rows.replace(
      reason=jnp.where(stalled & np.array([chain is not None for chain in self.chains]), RUNNING, self.rows.reason)
    )

  def _preempt(self, chain: _Chain) -> None:
    row = chain.row
    one = jax.tree.map(lambda x: x[row], self.rows)
    chain.stored = (offload_row(self.cache, row), one.replace(reason=jnp.int32(RUNNING)))
    self._release([chain])
    self.preempted.append(chain)
    self.preemptions += 1

  def _restore(self, chain: _Chain) -> bool:
    """A row back from the host; only where a page a head more than it had is free, or it would soon be back there."""
    stored, one = chain.stored
    row = self.chains.index(None)
    alone = all(other is None for other in self.chains)
    spare = 0 if alone else self._heads
    if int(self.cache.table.pool.count) < len(stored.pages) + spare or not self._fill(row, stored):
      return False
    chain.row, chain.stored = row, None
    self._place(chain, one)
    return True

  def _fill(self, row: int, stored: HostRow) -> bool:
    """`stored` into an empty row; False where pages are lacking."""
    while True:
      self.cache, enough = restore_row(self.cache, row, stored)
      if enough or not self._grown(len(stored.pages)):
        return enough
