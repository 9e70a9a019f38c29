"""The metrics of a run, one definition each, counted in the graph; and the KL of two models.

A *token held* is one slot of one layer and KV head. Numbers are means over layers and heads unless stated otherwise, so
a dense cache of T tokens holds T. *Achieved CR* is tokens seen / tokens held, always reported with its T. *KV reads* of
a decode step are the live tokens that it attends to, the newest included. *Peak tokens* is the largest number of tokens
held after any step or prefill chunk.
"""

from __future__ import annotations

import math
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Array, Float, Int

from dms_jax.cache.base import Usage
from dms_jax.processes import fetch


def held_share(held, seen):
  """Mean over rows, layers and heads of tokens held / tokens seen.

  Args:
    held: [L, B, K], tokens held, numpy or JAX.
    seen: [B], tokens that each row has seen, at least 1.
  """
  return (held / seen[:, None]).mean()


def achieved_cr(held, seen):
  """Tokens seen over tokens held: 1 / `held_share`."""
  return 1 / held_share(held, seen)


def kl_divergence(
  student: Float[Array, "*rows V"], teacher: Float[Array, "*rows V"], direction: Literal["reverse", "forward"]
) -> Float[Array, "*rows"]:
  """Nats per position, float32: "reverse" KL(student || teacher), "forward" KL(teacher || student), from logits."""
  log_s, log_t = (jax.nn.log_softmax(x.astype(jnp.float32), axis=-1) for x in (student, teacher))
  p, q = (log_s, log_t) if direction == "reverse" else (log_t, log_s)
  return jnp.sum(jnp.exp(p) * (p - q), axis=-1)


@struct.dataclass
class Counts:
  """Raw counts of one compiled call, int32.

  `live` [L, B, K]: tokens held after the call. `reads` [L, B, K]: keys read by it. `held` [steps, B]: tokens held after
  each step, summed over layers and heads. `history` [steps, L, B, K]: tokens held after each step, if asked for.
  `step_reads` [steps, B]: keys read by each decode step, summed over layers and heads; None for a chunk of a prompt.
  """

  live: Int[Array, "L B K"]
  reads: Int[Array, "L B K"]
  held: Int[Array, "steps B"]
  history: Int[Array, "steps L B K"] | None = None
  step_reads: Int[Array, "steps B"] | None = None


def count(seen: Usage) -> Counts:
  """Counts of one `cached_forward`."""
  return Counts(seen.live, seen.reads, jnp.sum(seen.live, axis=(0, 2))[None])


@struct.dataclass
class Metrics:
  """Counts of a whole call of `generate`, numpy, exact.

  Attributes:
    seen: int64 [B], T: tokens that each row's cache has seen, earlier turns included.
    live: int64 [L, B, K], tokens held at the end.
    decode_reads, prompt_reads: int64 [L, B, K], keys read by this call in decode steps and for prompts.
    peak: float64 [B], peak tokens of each row.
    peak_total: the most tokens that all rows held together.
    new_tokens: int64 [B], tokens generated.
    bytes_live: bytes of the keys and values held.
    bytes_allocated: bytes of the whole cache.
    history: int32 [steps, L, B, K], tokens held after each decode step, if asked for.
  """

  seen: np.ndarray
  live: np.ndarray
  decode_reads: np.ndarray
  prompt_reads: np.ndarray
  peak: np.ndarray
  peak_total: float = 0.0
  new_tokens: np.ndarray | None = None
  bytes_live: int = 0
  bytes_allocated: int = 0
  history: np.ndarray | None = None

  @classmethod
  def zero(cls, layers: int, batch: int, heads: int) -> Metrics:
    """The metrics of a call that has read nothing yet."""
    zeros = np.zeros((layers, batch, heads), np.int64)
    return cls(np.zeros(batch, np.int64), zeros, zeros, zeros, np.zeros(batch), new_tokens=np.zeros(batch, np.int64))

  def add(self, counts: Counts, *, decode: bool) -> Metrics:
    """These metrics plus the counts of a decode block if `decode`, else of a chunk of a prompt."""
    counts = fetch(counts)
    reads = "decode_reads" if decode else "prompt_reads"
    mean = counts.held.astype(np.float64) / (counts.live.shape[0] * counts.live.shape[2])
    history = self.history
    if counts.history is not None:
      history = counts.history if history is None else np.concatenate([history, counts.history])
    return self.replace(
      live=counts.live.astype(np.int64),
      peak=np.maximum(self.peak, mean.max(axis=0, initial=0.0)),
      peak_total=float(max(self.peak_total, mean.sum(axis=1).max(initial=0.0))),
      history=history,
      **{reads: getattr(self, reads) + counts.reads},
    )

  @property
  def held_tokens(self) -> np.ndarray:
    """Tokens each row holds, float64 [B]."""
    return self.live.mean(axis=(0, 2))

  @property
  def achieved_cr(self) -> float:
    """`achieved_cr` of the rows that have begun, at T = `seen`; nan before the first token."""
    started = self.seen > 0
    return float(achieved_cr(self.live[:, started], self.seen[started])) if started.any() else math.nan

  @property
  def kv_reads(self) -> float:
    """KV reads of decoding, summed over steps and rows."""
    return float(self.decode_reads.mean(axis=(0, 2)).sum())

  @property
  def prefill_reads(self) -> float:
    """KV reads of the prompts, summed over tokens and rows."""
    return float(self.prompt_reads.mean(axis=(0, 2)).sum())

  @property
  def peak_tokens(self) -> float:
    """The largest of the rows' peaks; `peak_total` is the peak of their sum."""
    return float(self.peak.max(initial=0.0))

  def to_json(self) -> dict:
    """The summary as plain numbers."""
    return {
      "rows": int(self.seen.size), "seen_tokens": self.seen.tolist(), "new_tokens": self.new_tokens.tolist(),
      "achieved_cr": self.achieved_cr, "kv_reads": self.kv_reads, "prefill_reads": self.prefill_reads,
      "held_tokens": self.held_tokens.tolist(), "peak_tokens": self.peak_tokens, "peak_tokens_total": self.peak_total,
      "bytes_allocated": self.bytes_allocated, "bytes_live": self.bytes_live,
    }  # fmt: skip
