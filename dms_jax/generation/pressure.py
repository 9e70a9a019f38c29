"""Pressure: rows of a `Generator` that give up tokens, so that others find pages.

Under `on_pressure="compress"` a pool is short when a row finds no free page, or when a waiting or preempted chain finds
a row but too few pages, and the budget lets the pool grow no further. Then the running chains that have been compressed
least often, all of them, are compressed once more:

1.  A chain gives up `SHARE` of its archived tokens, those with the highest gate logits, over all its layers and heads.
2.  Its new tokens are read at the threshold of the highest logit that it has kept; with elastic gates at the level of
    that threshold. Tokens of its window are decided anew at it.

It then holds the tokens whose logits lie below that threshold, and those in pages that it shares with other chains.
This is repeated until the pages needed are free: one a head for each row without, those of a preempted chain and one a
head, or those of the next chunk of a waiting prompt, while it is read. So no compression follows once pages suffice,
and the last one frees more than was needed by at most what those chains gave up. A chain is compressed at most `MOST`
times, and not beyond the highest level of elastic gates. If none is left to be compressed, the newest chain is
preempted, and what waits goes on waiting. A chain stays compressed until it ends.

On a mesh a pool that is short compresses its own chains alone. A row's tokens are given up in one order over the heads
of all its devices.

All chains of a compression are one program and one answer to the host. A prompt that is being read keeps what has been
read of it while others are compressed.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int

from dms_jax.cache import PagedCache
from dms_jax.cache.release import release, score_floor
from dms_jax.cache.rows import put_rows, take_rows
from dms_jax.cache.sharded import on_each
from dms_jax.decoder import Model
from dms_jax.generation.pages import PagedRows
from dms_jax.generation.results import GivenUp
from dms_jax.generation.rows import Chain, Rows
from dms_jax.model import check_policy
from dms_jax.policies import DMS, Policy
from dms_jax.policies.base import of_places, row_numbers
from dms_jax.processes import fetch

SHARE = 0.2  # of the archived tokens, in one compression: 1.25 times fewer are left
MOST = 6  # compressions of a chain: at most a factor of 1.25^6 = 3.8
TOGETHER = 4  # chains that one pass over the layers compresses, whose archives of a layer are read at once
MODES = ("preempt", "compress")


def prepared(model: Model, policy: Policy, on_pressure: str) -> Policy:
  """`policy`, checked; with what compression needs, if that is asked for.

  Raises:
    ValueError: an unknown mode, or a policy without gate logits to go by.
  """
  if on_pressure not in MODES:
    raise ValueError(f"on_pressure={on_pressure!r:.80} must be one of {MODES}")
  if on_pressure == "preempt":
    return policy
  if not isinstance(policy, DMS):
    raise ValueError(f'on_pressure="compress" goes by gate logits, which {type(policy).__name__} has not: use DMS')
  if policy.steady:
    raise ValueError(f'on_pressure="compress": steady={policy.steady} would let rows grow again')
  return check_policy(model, policy.replace(scored=True))


@partial(jax.jit, donate_argnames="cache")
@on_each
def _compressed(cache: PagedCache, policy: DMS, rows: Bool[Array, "B"], most: Int[Array, ""]):
  """Compresses the marked `rows`, TOGETHER at a time; `policy` is that of all rows.

  Args:
    most: how many rows are marked, of all devices: each makes as many passes, since those of one row meet in them.

  Returns:
    (cache, pages that are free afterwards, by row: its numbers, tokens that it gave up, tokens that it has seen).
  """
  batch, together = rows.size, min(TOGETHER, rows.size)
  marked, count = jnp.argsort(~rows, stable=True), jnp.sum(rows)
  found = row_numbers(policy), jnp.zeros(batch, jnp.int32)

  def some(index, state):
    cache, found = state
    place = index * together + jnp.arange(together)
    row = jnp.where(place < count, jnp.take(marked, place, mode="clip"), batch)
    part = take_rows(cache, row, cache.table.pages.shape[3])
    own: Any = of_places(policy, row)
    harder = own.lowered(-score_floor(part, SHARE))
    part, lost = release(part, -harder.limit, in_order=not policy.overwrites)
    found = jax.tree.map(lambda x, new: x.at[row].set(new, mode="drop"), found, (row_numbers(harder), lost))
    return put_rows(cache, row, part), found

  cache, (numbers, lost) = jax.lax.fori_loop(0, -(-most // together), some, (cache, found))
  return cache, (cache.table.pool.count, numbers, lost, cache.seen)


def _raisable(policy: DMS, chain: Chain) -> bool:
  """Whether a chain can be compressed once more."""
  highest = np.float32(policy.levels.high) if policy.by_level else np.inf  # a chain's numbers come from the device
  return chain.compressed < MOST and not (policy.by_level and chain.numbers["cr"] >= highest)


def compress(policy: DMS, rows: Rows, memory: PagedRows, pool: int) -> bool:
  """Compresses the running chains of a pool that have been least often, all of them; False if none can be.

  Args:
    policy: with scalar numbers.
  """
  chains = [chain for chain in rows.running if rows.pool_of(chain.row) == pool and _raisable(policy, chain)]
  least = min((chain.compressed for chain in chains), default=0)
  chains = [chain for chain in chains if chain.compressed == least]
  if chains:
    marked = rows.marked([chain.row for chain in chains])
    memory.cache, outcome = _compressed(memory.cache, rows.policy, marked, np.int32(len(chains)))
    rows.compressed = chains, outcome
  return bool(chains)


def record(rows: Rows, memory: PagedRows) -> Int[np.ndarray, "pools"]:
  """Gives compressed chains their new numbers, and reports what they gave up; after an interrupt, by the next step.

  Returns:
    Pages of each pool that are free.
  """
  pending, outcome = rows.compressed
  pending[:] = [chain for chain in pending if chain.row is not None]  # others were cancelled after an interrupt
  chains = list(pending)
  free, *by_row = fetch(outcome)
  numbers, lost, seen = jax.tree.map(memory.by_row, by_row)
  for chain in chains:
    chain.numbers = {name: values[chain.row].item() for name, values in numbers.items()}
  rows.renumber(chains)
  for chain in chains:
    pending.pop(0)
    chain.compressed += 1
    if lost[chain.row]:
      given = GivenUp(int(seen[chain.row]), int(lost[chain.row]) / memory.heads, chain.numbers)
      chain.result.given_up[chain.index].append(given)
  return memory.free_of(free)


def relieve(policy: DMS, rows: Rows, memory: PagedRows, pool: int, needed: int) -> bool:
  """Compresses chains of a pool until `needed` pages are free or none can be compressed; whether pages came free."""
  before = free = int(memory.free_pages()[pool])
  while free < needed and compress(policy, rows, memory, pool):
    free = int(record(rows, memory)[pool])
  return free > before
