"""`Generator`: many requests on one pool, in rows that join and leave between decode blocks.

    generator = dms_jax.Generator(model, width=16, budget=2**30)
    tickets = [generator.submit(prompt, chains=4, max_new_tokens=512, key=key) for prompt, key in ...]
    for ticket, chain, tokens, text in generator.run():    # streams; `generator.results` holds all results
      ...

A request may have numbers of its own for the policy: `submit(prompt, budget=512)`, or `cr=`, `threshold=`.

The compiled width is fixed. A chain's tokens are bit-equal to those of its run alone at the same width and
`prefill_rows`: they do not depend on the other rows and their numbers, on its own row, or on preemptions. Between two
decode blocks the host learns which rows ended: their pages are free, and waiting requests begin while both rows and
pages are, their prompts read together (`generation.together`). When pages run out, the pool grows if the budget allows
it; otherwise the newest chain is preempted to host memory and restored later. With `on_pressure="compress"` running
chains give up tokens instead, as long as they can: `generation.pressure` states the rule, `Result.given_up` what each
chain lost. While pages last, it changes tokens by rounding at most, and on a CPU not at all: gates are then computed in
each layer (`Execution.late_gates` is off).

The next decode block starts before the host looks at the tokens of the last one, so lists and texts are made while the
device works. The device waits for which rows ended, and for requests to begin; at 2,048 rows the first takes the host
0.13 ms a block (one shared core of an AMD EPYC).
"""

from __future__ import annotations

import collections
import contextlib
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import jax
import numpy as np
from jaxtyping import Array, Float

from dms_jax import cache as caches
from dms_jax.cache import PagedCache, ShardedCache
from dms_jax.decoder import Model
from dms_jax.execution import fastest_form
from dms_jax.generation import decode as decoding
from dms_jax.generation import pressure, recording
from dms_jax.generation.conversation import Continuation, Conversation, place_like
from dms_jax.generation.decode import CAPACITY, REASONS, RUNNING
from dms_jax.generation.generate import Output
from dms_jax.generation.pages import BudgetError, PagedRows
from dms_jax.generation.recording import Begun, Flight, News
from dms_jax.generation.requests import Request, Terms
from dms_jax.generation.results import ChainUsage, Result
from dms_jax.generation.rows import Chain, Rows
from dms_jax.generation.sampling import Sampling
from dms_jax.generation.stops import StopStrings, stop_criteria
from dms_jax.generation.together import Prompt, PromptReader, default_rows
from dms_jax.model import check_policy
from dms_jax.policies import Policy, check_rows
from dms_jax.policies.base import check_kind, is_whole
from dms_jax.processes import fetch, replicated
from dms_jax.spmd import check as check_mesh
from dms_jax.spmd import row_parts


class Generator:
  """Runs requests on a model. See the module's docstring.

  Args:
    model: as from `dms_jax.load`.
    policy: as for `generate`, with scalar numbers: the defaults of requests.
    width: rows decoded together. A mesh splits them over "data", and over "tensor" where that does not divide the KV
      heads; the chains of a request stay on one part.
    budget: most bytes of the cache on each device, not the policy's `budget` in tokens; None: unlimited.
    budget_tokens: the budget as tokens that a head may hold outside the windows, summed over a device's rows, mean over
      heads.
    on_pressure: what happens when pages run out: "preempt", or "compress", for DMS alone; it then stores the logit of
      each token held (`DMS.scored`).
    pages: initial pages of the pool, on a mesh of each device's; default as many as fit the budget, or one for each
      head of each row without a budget.
    max_length: most tokens of a text, prompt and answer; default the model's context.
    temperature, top_k, top_p, stop, eos: for all requests, as for `generate`. If the temperature is not 0, a request
      may set its own.
    page_size: slots of a page; `PagedCache.create` describes the default.
    page_format: "int8" or "float8" quantises the pages; default the model's dtype.
    prefill_chunk: tokens of a prompt that one compiled call reads.
    prefill_rows: prompts that one compiled call reads; fewer leave the rest of its work unused. Default a 64th of the
      width, at least 1 and at most 64.
    decode_block: decode steps of one compiled call; a chain that ends in it leaves its row idle until its end.
    stream: texts come piece by piece; false: the whole text of a chain once it ends, which takes less of the host's
      time. Tokens come after each block either way.
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
    prefill_rows: int | None = None, decode_block: int = 32, stream: bool = True, tokenizer: Any = None,
    on_pressure: str = "preempt",
  ):  # fmt: skip
    pools = row_parts(model)
    rows = default_rows(width // pools) if prefill_rows is None else prefill_rows
    for name, value in (
      ("width", width), ("prefill_chunk", prefill_chunk), ("prefill_rows", rows), ("decode_block", decode_block)
    ):  # fmt: skip
      if not is_whole(value) or value < 1:
        raise ValueError(f"{name}={value!r:.80} must be 1 or more, a whole number")
    self.tokenizer = model.tokenizer if tokenizer is None else tokenizer
    self.model = fastest_form(model.replace(tokenizer=None))
    policy = check_policy(model, None if policy is None else check_kind(policy).by_row())
    self.policy, self.on_pressure = pressure.prepared(model, policy, on_pressure), on_pressure
    check_rows(self.policy, None)
    if model.mesh is not None:
      check_mesh(model, model.mesh, self.policy)
    longest = model.config.max_position_embeddings
    self.max_length = longest if max_length is None else max_length
    if not 0 < self.max_length <= longest:
      raise ValueError(f"max_length={max_length} must lie between 1 and the model's {longest} positions")
    prefill_chunk, self.decode_block = min(prefill_chunk, self.max_length), min(decode_block, self.max_length)
    prefill_chunk = self.policy.chunk(prefill_chunk)
    self.width, self.stream = width, stream
    self.stop_strings = StopStrings.create(stop, self.tokenizer)
    self.stop_criteria = stop_criteria(self.model, self.tokenizer, self.stop_strings, eos)
    cache = caches.for_model(
      model, self.policy, batch=width, capacity=self.policy.window + 2, kind="paged", longest=self.max_length,
      page_size=page_size, page_format=page_format,
    )  # fmt: skip
    cache = place_like(self.model, cache)
    self.memory = PagedRows(cache, budget=budget, budget_tokens=budget_tokens, pages=pages)
    self.rows = Rows(self.policy, Sampling.create(temperature, top_k, top_p), width, pools)
    self.rows.state = place_like(self.model, self.rows.state)
    self.terms = Terms(
      self.model, self.tokenizer, self.stop_strings, self.policy, temperature, self.rows.state.keys,
      width // pools, self.max_length,
    )  # fmt: skip
    self.reader = PromptReader(self.model, self.policy, self.memory, prefill_chunk, rows)
    self.waiting: collections.deque[list[Chain]] = collections.deque()
    self.preempted: list[Chain] = []
    self.results: dict[int, Result] = {}
    self.preemptions = self.tickets = self._ages = self.peak_pages = 0
    self.peak_tokens = 0.0  # held at once by all rows, mean over layers and heads
    self._flight: Flight | None = None
    self._unrecorded: list[Begun | Flight] = []  # in order
    self._news: collections.deque[News] = collections.deque()
    self._stalled = np.zeros(width, bool)  # rows that found no free page
    self._alone = np.zeros(pools, bool)  # whether a pool had one row in the last block
    self._free: np.ndarray | None = None  # pages of each pool that are free for certain; None: not known
    self._refused = (-1, 0)  # the last request that was tried alone, and the pages that were free then

  @property
  def cache(self) -> PagedCache | ShardedCache:
    """The cache of all rows."""
    return self.memory.cache

  @cache.setter
  def cache(self, cache: PagedCache | ShardedCache) -> None:
    self.memory.cache = cache

  @property
  def budget(self) -> int | None:
    """Most bytes of the cache on each device; None: unlimited."""
    return self.memory.budget

  @property
  def numbers(self) -> dict[str, int | float]:
    """The policy's numbers that a request can set, with their defaults."""
    return self.terms.numbers

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
    request = Request(prompt, chains, max_new_tokens, key, temperature, keep, continue_from, numbers)
    group = self.terms.chains(request, self.tickets, self.memory)
    self.results[self.tickets] = group[0].result
    self.waiting.append(group)
    self.tickets += 1
    return self.tickets - 1

  def cancel(self, ticket: int) -> None:
    """Ends all chains of a ticket with reason "cancelled"; their tokens so far stay in the result."""
    if ticket not in self.results:
      raise ValueError(f"ticket={ticket}: there is none")
    self._land()
    groups = [*self.waiting, self.preempted, self._running, *(entry.chains for entry in self._unrecorded)]
    mine = {chain.index: chain for group in groups for chain in group if chain and chain.ticket == ticket}
    for chain in mine.values():
      chain.silent = True  # what is not recorded yet is recorded without texts and news
    self._news = collections.deque(news for news in self._news if news[0] != ticket)
    self.waiting = collections.deque(group for group in self.waiting if group[0].ticket != ticket)
    self.preempted = [chain for chain in self.preempted if chain.ticket != ticket]
    self._release([chain for chain in self._running if chain.ticket == ticket])
    self._record()  # an error is that of another request, and comes again with the next step
    recording.cancel(mine.values())

  @property
  def busy(self) -> bool:
    """Whether any request is unfinished, or `step` has anything left to return."""
    return bool(self.waiting or self.preempted or self.rows.occupied.any() or self._unrecorded or self._news)

  @property
  def chains(self) -> list[Chain | None]:
    """The chain in each row, None in an empty one."""
    return self.rows.chains

  @property
  def _running(self) -> list[Chain]:
    return self.rows.running

  def run(self) -> Iterator[News]:
    """Steps until every request has ended; yields (ticket, chain, new tokens, new text) after each decode block.

    What a loop that was left has not taken comes with the next `run` or `step`.
    """
    while self.busy:
      self._advance()
      while self._news:
        yield self._news.popleft()

  def step(self) -> list[News]:
    """Runs one decode block, after the requests that fit have begun; returns what `run` yields.

    When it returns, the next block is already running, with the requests that were waiting before; a later one begins
    with the block after that.

    An interrupt loses nothing, nor does an error of a text or of the budget: a later step goes on where this one
    stopped. If a request is the cause, the error names its ticket, and after `cancel(ticket)` the other requests
    continue. An error of the device, such as no memory, loses the cache.

    Raises:
      BudgetError: a row exceeds the whole budget.
      Exception: what the tokenizer raised for some text; the tokens are in `results`.
    """
    self._advance()
    news, self._news = self._news, collections.deque()
    return list(news)

  def _advance(self) -> None:
    """`step`, whose news are in `_news`."""
    failed, first = None, self._flight is None
    if self.rows.compressed[0]:  # left by an interrupt
      pressure.record(self.rows, self.memory)
    if first:
      self._launch()
    if first and self._flight is not None:
      failed = self._record()  # while the device works
    if self._flight is not None:
      self._settle()
      try:
        self._launch()
      finally:
        failed = self._record() or failed
    else:
      failed = self._record()
    if failed is not None:
      raise failed

  # Between decode blocks ----------------------------------------------------------------------------------------------

  def _launch(self) -> None:
    """Resumes stalled rows, begins requests, and starts a decode block if any row runs."""
    if not self._resume_stalled():  # their pages must not go to others
      self._admit()
    while self.rows.occupied.any():
      short = all(chain is None or (chain.limit - chain.start == 1 and not chain.goes_on) for chain in self.chains)
      emitted = spent = None
      if not short:
        self.cache, self.rows.state, emitted, counts = decoding.decode_block(
          self.model, self.rows.policy, self.cache, self.rows.state, self.rows.sampling, self.stop_criteria,
          steps=self.decode_block, history=False,
        )  # fmt: skip
        emitted, spent = replicated((emitted, (counts.held, counts.step_reads)))
      self._flight = Flight(list(self.chains), emitted, spent)
      outcome = self._outcome(self._flight)
      for array in jax.tree.leaves((emitted, spent, outcome)):
        array.copy_to_host_async()
      if not short:
        return
      self._settle()  # all ended with the token after their prompts
      self._admit()

  def _outcome(self, flight: Flight) -> tuple[Array, ...]:
    """`Flight.outcome`; the first call empties the rows that ended, as far as nothing is kept of them."""
    if not flight.outcome:
      flight.outcome = replicated((self.rows.state.reason, *self.memory.settle(self.rows.over())))
    return flight.outcome

  def _settle(self) -> None:
    """Waits for the block in flight, and empties the rows that ended in it; an interrupt loses nothing."""
    flight = self._flight
    reasons, *found = fetch(self._outcome(flight))
    tokens, pages, self._free = self.memory.settled(*found)
    self.peak_tokens, self.peak_pages = max(self.peak_tokens, tokens), max(self.peak_pages, pages)
    self._stalled = self.rows.occupied & (reasons == CAPACITY)
    self._alone = self.rows.by_pool(self.rows.occupied).sum(axis=1) == 1
    over = np.flatnonzero(self.rows.occupied & (reasons != RUNNING) & (reasons != CAPACITY)).tolist()
    ended = [flight.chains[row] for row in over]
    for row, chain in zip(over, ended, strict=True):
      if chain.keep:
        last = self.rows.of(row)
        policy = self.policy.replace(**chain.numbers)
        stored = Continuation(self.memory.offload(row), last["token"], last["count"], policy)
        chain.result.stored[chain.index] = stored
    if kept := [row for row, chain in zip(over, ended, strict=True) if chain.keep]:
      self.memory.free(kept)
      self._free = None
    flight.over |= {row: REASONS[reasons[row]] for row in over}
    self.rows.vacate(ended)
    self._unrecorded.append(flight)
    self._flight = None

  def _land(self) -> None:
    """Waits for the block in flight; no other is started."""
    if self._flight is not None:
      self._settle()

  def _record(self) -> Exception | None:
    """Records requests that have begun and blocks that have landed, in order; the error of one that could not be."""
    failed = None
    for some in self._unrecorded:
      failed = some.record(self.stream, self._news) or failed
    self._unrecorded = [some for some in self._unrecorded if not some.recorded]
    return failed

  def _admit(self) -> None:
    """Restores preempted chains, oldest first, then begins requests, until one finds no row or too few pages."""
    for chain in sorted(self.preempted, key=lambda chain: chain.age):
      if not self.rows.free.any() or not self._restore(chain):
        return
      self.preempted.remove(chain)
    while self.waiting and self.rows.free.max() >= len(self.waiting[0]):
      groups, pools = self._certain()
      with self._beginning(groups or [self.waiting[0]]):
        if groups:
          self._begin_together(groups, pools)
        elif not self._begin_alone(self.waiting[0]):
          return

  @contextlib.contextmanager
  def _beginning(self, groups: list[list[Chain]]) -> Iterator[None]:
    """Takes requests that have begun from those that wait; where an error keeps them from it, empties their rows."""
    try:
      yield
    finally:
      if self._unrecorded and groups[0][0] in self._unrecorded[-1].chains:
        for _ in groups:
          self.waiting.popleft()
      else:
        self._release([chain for group in groups for chain in group if chain.row is not None])

  def _certain(self) -> tuple[list[list[Chain]], list[int]]:
    """The first waiting requests that find rows, and for certain pages; and their pools, those with most empty rows."""
    for _ in range(2):  # what is known to be free may be less than what is
      exact = self._free is None
      if exact:
        self._free = self.memory.free_pages()
      groups, pools, rows = [], [], self.rows.free
      claims = [self.reader.claims(int(free)) for free in self._free]
      for group in self.waiting:
        if group[0].stored is not None:
          break
        sizes = len(group[0].prompt), len(group), group[0].numbers
        fitting = [pool for pool in np.argsort(-rows, kind="stable").tolist() if rows[pool] >= len(group)]
        pool = next((pool for pool in fitting if claims[pool].add(*sizes)), None)
        if pool is None:
          break
        groups.append(group)
        pools.append(pool)
        rows[pool] -= len(group)
      if groups or exact:
        break
      self._free = None
    self._free = self._free - [claim.taken for claim in claims]
    return groups, pools

  def _begin_together(self, groups: list[list[Chain]], pools: list[int]) -> None:
    """Reads the prompts of requests that are certain to find pages, and forks rows for their chains."""
    rows = [self.rows.empty(self.width, pool) for pool in range(self.rows.pools)]
    sources = np.arange(self.width, dtype=np.int32)
    prompts = []
    for group, pool in zip(groups, pools, strict=True):
      own, rows[pool] = rows[pool][: len(group)], rows[pool][len(group) :]
      for chain, row in zip(group, own, strict=True):
        chain.row = row
      sources[own] = own[0]
      usage = ChainUsage(self.memory.heads, prompt=len(group[0].prompt))
      prompts.append(Prompt(own[0], group[0].prompt, group[0].numbers, usage))
    logits, pending = self.reader.together(prompts, self.reader.no_logits(self.width))
    if (forked := sources != np.arange(self.width)).any():
      self.memory.fork_all(sources, forked, self.policy.rewrites)
    self._seat(list(zip(groups, (prompt.usage for prompt in prompts), strict=True)), logits, pending)

  def _begin_alone(self, group: list[Chain]) -> bool:
    """Reads a request's prompt into a row, and forks the row for its chains.

    False: pages ran out; the row is empty again, and the request is tried again later. While other rows run it is not
    tried where it would hardly fit: with fewer pages than a chunk and the chains take, or no more than last time.

    Raises:
      BudgetError: the request had the whole pool to itself.
    """
    first, pool = group[0], self._pool(len(group))
    rows = self.rows.empty(len(group), pool)
    self._free, free, others = None, int(self.memory.free_pages()[pool]), self._occupied(pool)
    if others and not self.memory.grows:
      again = self._refused[0] == first.ticket and free <= self._refused[1]
      least = self.reader.least(len(first.prompt), len(group))
      if (again or free < least) and not self._compress(pool, max(least, free + 1)):
        return False
    for chain, row in zip(group, rows, strict=True):
      chain.row = row
    if first.stored is not None and not self.memory.restore(rows[0], first.stored):
      return self._give_up(group)
    usage, before = ChainUsage(self.memory.heads, len(first.prompt), sampled=int(not first.goes_on)), 0
    if first.stored is not None:
      before, held = int(self.cache.seen[rows[0]]), int(np.asarray(self.cache.live()[:, rows[0]]).sum())
      usage.prompt = before + (0 if first.goes_on else len(first.prompt))
      usage.prompt_held = usage.prompt_peak = held
    logits, read = self.reader.no_logits(self.width), True
    if not first.goes_on:
      prompt = Prompt(rows[0], first.prompt, first.numbers, usage, before)
      logits, read = self.reader.alone(prompt, logits, partial(self._enlarge, pool), halve=not others)
    if not read or not self.memory.fork(rows[0], rows[1:], whole=self.policy.rewrites):
      return self._give_up(group)
    self._seat([(group, usage)], None if first.goes_on else logits, [])
    return True

  def _seat(self, begun: list[tuple[list[Chain], ChainUsage]], logits: Float[Array, "B V"] | None, pending: list):
    """Places the chains of requests that have been read, and samples their first tokens from `logits`.

    Args:
      logits: after the prompt, in the row of each request's first chain; None for a request without a prompt.
    """
    chains = [chain for group, _ in begun for chain in group]
    self.rows.place(chains)
    emitted = None
    if logits is not None:
      sources = [group[0].row for group, _ in begun for _ in group]
      emitted = self.rows.first_tokens([chain.row for chain in chains], sources, logits, self.stop_criteria)
    for chain in chains:
      self._ages += 1
      chain.age, chain.stored = self._ages, None
    self._unrecorded.append(Begun(begun, pending, Flight(self.rows.only(chains), replicated(emitted), None)))

  def _give_up(self, group: list[Chain]) -> bool:
    """Empties the row of a request that could not begin; False, or a BudgetError if it had the whole pool to itself."""
    pool = self.rows.pool_of(group[0].row)
    self.memory.free([group[0].row])
    # These include the pages that the pool has grown by.
    self._refused = group[0].ticket, int(self.memory.free_pages()[pool])
    for chain in group:
      chain.row = None
    if not self._occupied(pool) and not self.preempted:
      tokens = len(group[0].prompt)
      message = f"{tokens} tokens of prompt and its chains do not fit {self.memory.extent}, even alone"
      raise BudgetError(message, group[0].ticket)
    return False

  def _pool(self, rows: int) -> int:
    """Of the pools with `rows` empty rows, that with the most free pages."""
    return int(np.argmax(np.where(self.rows.free >= rows, self.memory.free_pages(), -1)))

  def _occupied(self, pool: int) -> bool:
    """Whether a row of a pool has a chain."""
    return bool(self.rows.by_pool(self.rows.occupied)[pool].any())

  def _release(self, chains: list[Chain]) -> None:
    """Empties the rows of chains that have not ended."""
    if chains:
      rows = [chain.row for chain in chains]
      self.memory.free(rows)
      self.rows.end(rows)
      self._stalled[rows], self._free = False, None
      self.rows.vacate(chains)

  # Preemption ---------------------------------------------------------------------------------------------------------

  def _resume_stalled(self) -> bool:
    """Resumes rows that found no free page, after the pool grew or the newest row was preempted; whether there were."""
    if not self._stalled.any():
      return False
    for pool, stalled in enumerate(self.rows.by_pool(self._stalled).sum(axis=1).tolist()):
      needed = stalled * self.memory.pool_heads
      running = [chain for chain in self._running if self.rows.pool_of(chain.row) == pool]
      last = len(running) == 1  # the pages of rows that ended beside it are free now
      if not stalled or (last and not self._alone[pool]) or self.memory.free_pages()[pool] >= needed:
        continue
      if not self._enlarge(pool, needed):
        newest = max(running, key=lambda chain: chain.age)
        if last:
          raise BudgetError(
            f"a text of {int(self.cache.seen[newest.row])} tokens fills {self.memory.extent}, even alone; its tokens "
            "so far are in `results`, and cancel(ticket) lets the others go on",
            newest.ticket,
          )
        self._preempt(newest)
    self._free = None
    self.rows.resume(self._stalled)
    self._stalled = np.zeros(self.width, bool)  # the old array may still be read
    return True

  def _enlarge(self, pool: int, lacking: int) -> bool:
    """Adds `lacking` pages to a pool, or compresses its chains until so many are free; whether pages came free."""
    return self.memory.grow(lacking) or self._compress(pool, lacking)

  def _compress(self, pool: int, needed: int) -> bool:
    """Compresses chains of a pool until `needed` pages are free or none can be; whether pages came free."""
    if self.on_pressure == "preempt" or not pressure.relieve(self.policy, self.rows, self.memory, pool, needed):
      return False
    self._free = None
    return True

  def _preempt(self, chain: Chain) -> None:
    """Moves a row to the host, unless its chain ends in the block in flight."""
    self._land()
    if chain.row is None:
      return
    last = self.rows.of(chain.row)
    chain.stored, chain.token, chain.count = self.memory.offload(chain.row), last["token"], last["count"]
    chain.stop_state = last["stop_state"]
    self._release([chain])
    self.preempted.append(chain)
    self.preemptions += 1

  def _restore(self, chain: Chain) -> bool:
    """Moves a row back from the host; false if too few pages are free.

    While other rows run it needs one spare page for each head: with fewer it would soon be preempted again.
    """
    pool = self._pool(1)
    (row,) = self.rows.empty(1, pool)
    needed = self.memory.pages_of(chain.stored) + (self.memory.pool_heads if self._occupied(pool) else 0)
    if self.memory.free_pages()[pool] < needed:
      self._compress(pool, needed)
    if self.memory.free_pages()[pool] < needed or not self.memory.restore(row, chain.stored):
      return False
    chain.row, chain.stored, self._free = row, None, None
    self.rows.place([chain])
    return True
