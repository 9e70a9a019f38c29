"""What rows have used of their caches, step by step, and the results of a `Generator`."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Int

from dms_jax.generation.conversation import Continuation
from dms_jax.metrics import Counts


@dataclasses.dataclass
class ChainUsage:
  """The cache usage of one chain or row, step by step; counts are sums over `heads`, the KV heads of all layers.

  They are those of a masked cache: a token held is one that the newest query sees, a read one that a query sees.

  Attributes:
    heads: L * K.
    prompt: tokens read before the first decode step, earlier turns included; not summed over heads.
    prompt_held, prompt_peak: tokens held after the prompt, and the most held after any chunk of it.
    prompt_reads: keys read for the prompt, which chains of one request share.
    sampled: tokens generated without a decode step, from the prompt's logits: 1, or 0 for a chain without a prompt.
    steps: pairs of int32 [steps], one for each decode block until the chain ends, then one for all: tokens held after
      each step, keys read by it. Step s feeds token s + sampled - 1 of the generated ones.
  """

  heads: int
  prompt: int = 0
  prompt_held: int = 0
  prompt_peak: int = 0
  prompt_reads: int = 0
  sampled: int = 1
  steps: list[tuple[Int[np.ndarray, "_"], Int[np.ndarray, "_"]]] = dataclasses.field(default_factory=list)

  def until(self, new_tokens: int | None = None) -> dict[str, int | float]:
    """What the chain used until it had generated `new_tokens` tokens; None: until its end.

    A chain with a smaller `max_new_tokens` uses the same, if its budget does not depend on that number.

    Returns:
      `seen`: tokens read, all but the newest. `held`, `peak` and `reads`: tokens held then, the most held after any
      step or chunk, and KV reads of the decode steps, means over layers and KV heads.
    """
    none = np.zeros(0, np.int64)
    held, reads = (np.concatenate([none, *(block[part] for block in self.steps)]) for part in (0, 1))
    count = len(held) if new_tokens is None else min(max(new_tokens - self.sampled, 0), len(held))
    held, reads = held[:count], reads[:count]
    return {
      "seen": self.prompt + count,
      "held": float(held[-1] if count else self.prompt_held) / self.heads,
      "peak": float(max(self.prompt_peak, held.max(initial=0))) / self.heads,
      "reads": float(reads.sum()) / self.heads,
    }

  def join(self) -> None:
    """Makes one pair of all blocks, in arrays of its own."""
    if self.steps:
      held, reads = (np.concatenate([block[part] for block in self.steps]) for part in (0, 1))
      self.steps = [(held, reads)]


@dataclasses.dataclass(frozen=True)
class GivenUp:
  """What a chain gave up at once, so that others found pages (`Generator(on_pressure="compress")`).

  Attributes:
    seen: tokens that it had read.
    tokens: given up, mean over layers and KV heads.
    numbers: of its policy, from then on.
  """

  seen: int
  tokens: float
  numbers: dict[str, int | float]


def add_prompts(usages: Sequence[ChainUsage], counts: Counts) -> None:
  """Adds a chunk of the prompts of rows 0, 1, .. of a call to their usage; `counts` on the host."""
  live, reads = counts.live.sum(axis=(0, 2)), counts.reads.sum(axis=(0, 2), dtype=np.int64)
  for row, usage in enumerate(usages):
    usage.prompt_held = int(live[row])
    usage.prompt_peak = max(usage.prompt_peak, int(counts.held[:, row].max()))
    usage.prompt_reads += int(reads[row])


class Used:
  """Sums of `usage` by row or chain; means over layers and KV heads, without earlier turns' reads."""

  usage: list[ChainUsage]

  def _used(self, name: str) -> list[Any]:
    return [usage.until()[name] for usage in self.usage]

  @property
  def seen(self) -> list[int]:
    """Tokens that each chain has read."""
    return self._used("seen")

  @property
  def held(self) -> list[float]:
    """Tokens held at the end, mean over layers and KV heads."""
    return self._used("held")

  @property
  def peak(self) -> list[float]:
    """The most tokens held after any decode step or chunk of the prompt, mean over layers and KV heads."""
    return self._used("peak")

  @property
  def reads(self) -> list[float]:
    """KV reads of the decode steps, mean over layers and KV heads."""
    return self._used("reads")


@dataclasses.dataclass
class Result(Used):
  """The outcome of one ticket: each list has one entry a chain.

  `tokens` and `logprobs` (nats) as in `Output`. `finish_reason`: as in `Output`, "running", "cancelled", or "nan" where
  logits are not finite (with a warning). `text`: None without a tokenizer. `usage`: cache usage by step, and `seen`,
  `held`, `peak` and `reads` its sums. `stored`:
  with `keep=True` the chain's cache on the host, to continue from; else None. `given_up`: what it gave up under
  pressure, in order; empty if nothing. A chain of a thousand tokens takes about
  80 KB here, so a long run pops each result from `Generator.results` once it has ended.
  """

  tokens: list[list[int]]
  logprobs: list[list[float]]
  finish_reason: list[str]
  text: list[str] | None
  usage: list[ChainUsage]
  stored: list[Continuation | None]
  given_up: list[list[GivenUp]]

  @classmethod
  def empty(cls, chains: int, text: bool, heads: int) -> Result:
    """Nothing generated yet."""
    lists = [[] for _ in range(chains)]
    texts = [""] * chains if text else None
    usage = [ChainUsage(heads) for _ in lists]
    return cls(lists, [[] for _ in lists], ["running"] * chains, texts, usage, [None] * chains, [[] for _ in lists])

  @property
  def finished(self) -> bool:
    """Whether all chains have ended."""
    return all(reason != "running" for reason in self.finish_reason)
