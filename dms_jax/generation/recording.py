"""What a `Generator` records while the device works: tokens, texts, usage, how chains ended."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Mapping, Sequence

import jax
import numpy as np
from jaxtyping import Array

from dms_jax.generation.decode import NOT_FINITE, NOT_FINITE_ADVICE, Emitted
from dms_jax.generation.detokenize import Detokenizer
from dms_jax.generation.results import ChainUsage, Result
from dms_jax.generation.rows import Chain
from dms_jax.generation.together import account

News = tuple[int, int, list[int], str]  # ticket, chain, new tokens, new text


@dataclasses.dataclass
class Flight:
  """A decode block that was started, or tokens that no block made.

  Attributes:
    chains: that of each row.
    emitted, spent: its tokens, and tokens held and keys read by each step [steps, B], on the device; None for none.
    outcome: (reason [B], tokens held, pages in use, pages free), on the device.
    over: the reason of each chain that ended, by row.
  """

  chains: list[Chain | None]
  emitted: Emitted | None
  spent: tuple[Array, Array] | None
  outcome: tuple = ()
  over: dict[int, str] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass
class Begun:
  """Requests that have begun: their chains, first tokens (None for none), and what reading their prompts returned."""

  groups: list[tuple[list[Chain], ChainUsage]]
  emitted: Emitted | None
  pending: list


def extend(chains: Sequence[Chain | None], emitted: Emitted, spent: tuple[Array, Array] | None) -> dict[int, list[int]]:
  """Adds the tokens of a block, and their usage, to the results of its rows' chains; waits for the block.

  Args:
    spent: tokens held and keys read by each step [steps, B]; None for tokens that no step made.

  Returns:
    The new tokens of each row that has any.
  """
  emitted, spent = jax.device_get((emitted, spent))
  counts = emitted.valid.sum(axis=0)  # the valid steps of a row are its first
  rows = [row for row in np.flatnonzero(counts).tolist() if chains[row] is not None]
  tokens, logprobs = (x.T[rows].tolist() for x in (emitted.tokens, emitted.logprobs))
  used = [] if spent is None else [x.T[rows] for x in spent]
  new = {}
  for place, (row, count) in enumerate(zip(rows, counts[rows].tolist(), strict=True)):
    result, index = chains[row].result, chains[row].index
    new[row] = tokens[place][:count]
    result.tokens[index] += new[row]
    result.logprobs[index] += logprobs[place][:count]
    if used:
      result.usage[index].steps.append((used[0][place, :count], used[1][place, :count]))
  return new


def record(flight: Flight, stream: bool) -> list[News]:
  """Records a flight; returns its news.

  Args:
    stream: texts come piece by piece, not once their chain has ended.
  """
  new = {} if flight.emitted is None else extend(flight.chains, flight.emitted, flight.spent)
  news = []
  for row in new | flight.over:
    chain, tokens, reason, text = flight.chains[row], new.get(row, []), flight.over.get(row, "running"), ""
    result, index, over = chain.result, chain.index, row in flight.over
    if chain.detokenizer is not None and (stream or over):
      text = chain.detokenizer.advance(result.tokens[index], reason)
      result.text[index] = chain.detokenizer.text
    if tokens or text:
      news.append((chain.ticket, index, tokens, text))
    if over:
      result.finish_reason[index] = reason
      if reason == "nan":
        where = f"ticket {chain.ticket}, chain {index}"
        warnings.warn(f"{where}: {NOT_FINITE}; {NOT_FINITE_ADVICE}", RuntimeWarning, stacklevel=2)
      result.usage[index].join()
  return news


def cancel(result: Result, detokenizers: Mapping[int, Detokenizer | None]) -> None:
  """Ends the running chains of a result with reason "cancelled", with the texts of their tokens so far.

  Args:
    detokenizers: of these chains, by index.
  """
  for index, detokenizer in detokenizers.items():
    if result.finish_reason[index] != "running":
      continue
    if detokenizer is not None:
      detokenizer.advance(result.tokens[index], "cancelled")
      result.text[index] = detokenizer.text
    result.finish_reason[index] = "cancelled"
    result.usage[index].join()


def record_begun(begun: Begun, width: int, stream: bool) -> list[News]:
  """Records requests that have begun, whose chains are in their rows; returns the news of their first tokens."""
  account(begun.pending)
  chains: list[Chain | None] = [None] * width
  for group, usage in begun.groups:
    for chain in group:
      chain.result.usage[chain.index] = dataclasses.replace(usage, steps=[])
      chains[chain.row] = chain
  return [] if begun.emitted is None else record(Flight(chains, begun.emitted, None), stream)
