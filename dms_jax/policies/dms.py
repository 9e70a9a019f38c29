"""Dynamic Memory Sparsification's own policy: the gates decide, within a budget if one is given."""

from __future__ import annotations

from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax.scipy.special import logit
from jaxtyping import Array, Float

from dms_jax.collectives import devices, summed
from dms_jax.levels import Levels
from dms_jax.policies.base import Leaving, Policy, Retired, is_whole, per_row, register
from dms_jax.policies.budget import Budgeted

GAIN, REACH = 6.0, 0.75  # of a steady threshold, see `DMS.steered`
LEAST = 0.25  # of the tokens asked for by the ratio alone, those outside a window that is itself too large


@register
@struct.dataclass
class DMS(Budgeted):
  """Evicts a token whose gate logit exceeds `threshold`, once it has left the window (arXiv 2506.05345).

  `window` None takes the window that the gates were trained with. A higher threshold keeps more, without retraining; it
  may be one number a row [B].

  `cr` sets the threshold for gates that were trained for a range of compression ratios (`DMSConfig.elastic`): the share
  1 - 1/cr of the tokens is evicted, more of them in some texts, heads and layers and fewer in others. It is one number
  or one a row [B], default 4 or the nearest end of the range. Gates for one ratio have no such dial.

  `steady` holds each row to its `cr`: every `steady` tokens, such as 128, its threshold is set by what the row has
  evicted so far (`steered`). That is counted over all layers and heads, which still differ. Prompts are then read in
  chunks of at most so many tokens; the result does not depend on the chunks.

  `budget` (tokens a head, the window's W + 1 included) adds a hard limit, which the paper does not have; with `hard`
  `cr` is one too, of any gates: tokens seen for each one allowed. The score is then the negative logit in bfloat16's
  precision: where the archive is full, the token with the highest logit goes, of equal ones the later token.
  `threshold=inf` leaves the choice to the limit alone: no token is evicted before the archive is full. Logits do not
  depend on attention, so in a prompt read in chunks each query sees exactly what it would see if the prompt were read
  one token at a time. With a limit, W must be at least the gates' lag (1 for `shift` 1), because a token needs its
  logit when it leaves the window.

  `limit_over` says whose limit it is: with "head" no head ever holds more; with "layer" the KV heads of a layer share
  theirs, so that their mean is never more, and the highest logit of all of them goes. A limit over layers cannot be
  kept within a chunk, as a layer does not know the logits of later ones.

  `scored` stores the logit of each token held, 4 bytes for each slot, so that a row can give tokens up later in the
  order of their logits (`Generator(on_pressure="compress")`). Without it, and without a limit, no logit is stored.

  Attributes:
    threshold: a token whose gate logit exceeds it is evicted once outside the window.
    hard: make cr a hard limit, of any gates.
    steady: tokens after which a row's threshold moves to hold it to its cr; 0: never.
    limit_over: whose limit a budget is: each head's, or shared by the heads of a layer.
    scored: store the logit of each token held, for on_pressure=compress.
  """

  window: int | None = struct.field(pytree_node=False, default=None)
  threshold: float = 0.0
  hard: bool = struct.field(pytree_node=False, default=False)
  steady: int = struct.field(pytree_node=False, default=0)
  limit_over: Literal["head", "layer"] = struct.field(pytree_node=False, default="head")
  kv_heads: int | None = struct.field(pytree_node=False, default=None, metadata={"flag": False})
  scored: bool = struct.field(pytree_node=False, default=False)
  levels: Levels | None = struct.field(pytree_node=False, default=None, metadata={"flag": False})
  moved: Float[Array, "B T"] | None = struct.field(default=None, metadata={"flag": False})  # of one step, by `steered`

  uses_gates = True

  @property
  def steers(self):  # type: ignore[override]
    return self.steady > 0

  @property
  def by_level(self) -> bool:
    """Whether `cr` sets the threshold."""
    return self.cr is not None and not self.hard

  @property
  def limit(self) -> float | Float[Array, "*rows"]:
    """The threshold in force."""
    return self.levels.threshold(self.cr) if self.by_level else self.threshold

  @property
  def target(self):  # type: ignore[override]
    if self.cr is not None or self.levels is None:
      return 1.0 if self.cr is None else self.cr
    return self.levels.cr(self.threshold)

  @property
  def numbers(self):
    return ("budget", "cr") if self.by_level else super().numbers

  @property
  def bounded(self):  # type: ignore[override]
    return self.budget is not None or (self.cr is not None and self.hard)

  @property
  def overwrites(self):  # type: ignore[override]
    return self.bounded

  @property
  def shares(self) -> bool:
    """Whether the heads of a layer share a limit."""
    return self.bounded and self.limit_over == "layer"

  @property
  def joins_heads(self):  # type: ignore[override]
    return self.shares

  @property
  def removes(self):  # type: ignore[override]
    return self.shares

  @property
  def replays(self):  # type: ignore[override]
    return self.bounded

  @property
  def stats(self):  # type: ignore[override]
    return Budgeted.stats if self.bounded else self.gate_stats

  @property
  def gate_stats(self):  # type: ignore[override]
    return ("score",) if self.bounded or self.scored else ()

  @property
  def compacts(self):
    return self.bounded and not self.exact_prefill

  def fitted(self, config):
    return self.replace(kv_heads=config.num_kv_heads) if self.shares else self

  def for_gates(self, dms):
    policy = self.replace(levels=dms.levels)
    plain = not self.hard and self.cr is None and np.ndim(self.threshold) == 0 and self.threshold == 0
    return policy.replace(cr=dms.levels.usual) if dms.elastic and plain else policy

  def resolved(self, window):
    if self.limit_over not in ("head", "layer"):
      raise ValueError(f'DMS: limit_over={self.limit_over!r:.80} must be "head" or "layer"')
    if not is_whole(self.steady) or self.steady < 0:
      raise ValueError(f"DMS: steady={self.steady!r:.80} must be a whole number of tokens, 0 for never")
    if self.steady and self.bounded:
      raise ValueError(f"DMS: steady={self.steady} holds rows to their cr, budget= or hard=True to a limit: give one")
    if self.by_level:
      self._check_level()
    elif self.steady:
      raise ValueError("DMS: steady holds rows to cr= of gates for a range of ratios (dms.elastic): give it")
    elif self.hard and self.cr is None:
      raise ValueError("DMS: hard=True makes a limit of cr=: give it too")
    resolve = Budgeted.resolved if self.bounded else Policy.resolved
    limits = self.replace(cr=None) if self.by_level else self
    return resolve(limits, window).replace(cr=self.cr)

  def lowered(self, threshold: Float[Array, "*rows"]) -> DMS:
    """This policy with `threshold`, unless its own is lower; for elastic gates at the nearest level that they have."""
    if self.by_level:
      return self.replace(cr=jnp.maximum(self.cr, self.levels.cr(threshold)))
    return self.replace(threshold=jnp.minimum(self.threshold, threshold))

  def _check_level(self) -> None:
    """A ValueError unless the gates were trained for every `cr`, and no threshold is given beside it."""
    if self.levels is None:
      raise ValueError(
        f"DMS: cr={self.cr} needs gates trained for a range of ratios (dms.elastic), and these were trained for one: "
        f"give threshold=, budget= (tokens), or hard=True for a limit of tokens seen / cr"
      )
    if np.any(np.asarray(self.threshold) != 0):
      raise ValueError(f"DMS: cr={self.cr} sets the threshold: leave threshold={self.threshold} out")
    cr, low, high = np.asarray(self.cr), self.levels.low, self.levels.high
    if cr.dtype.kind not in "iuf" or cr.ndim > 1 or not cr.size:
      raise ValueError(f"DMS: cr={self.cr} must be a number, or an array of one a row")
    cr = cr.astype(np.float32)
    if not ((cr >= np.float32(low)) & (cr <= np.float32(high))).all():
      raise ValueError(f"DMS: cr={self.cr} must lie between {low:g} and {high:g}, for which these gates were trained")

  def decide(self, logits, layer, position, keys=None):
    limit = per_row(self.limit, 2)
    limit = limit if self.moved is None else limit + self.moved[:, None]
    return logits > limit.astype(logits.dtype)

  def chunk(self, tokens):
    return min(tokens, self.steady) if self.steady else tokens

  def memory(self, group, head_dim):
    """Decisions to evict, by the tokens up to the end of each block of `steady` tokens, block n in place n mod 4."""
    return {"evicted": (4,)} if self.steady else {}

  def tally(self, memory, layer, evicts, start, lengths):
    width, size, evicted = evicts.shape[-1], self.steady, memory["evicted"]
    if width > size:
      raise ValueError(f"DMS: steady={size} reads prompts in chunks of at most {size} tokens, not of {width}")
    column = lambda x: x[:, None, None]
    place = lambda number: column(number % 4) == jnp.arange(4)
    own, block, token = evicted[layer], start // size, jnp.arange(width)
    made = evicts & (token < column(lengths))
    inside = column(start % size) + token < size  # a step reaches into one more block at most
    last = jnp.where(start % size == 0, block - 1, block)  # the last block with tokens before this step
    before = jnp.sum(jnp.where(place(last) & column(last >= 0), own, 0.0), axis=-1)
    first = before + jnp.sum(made & inside, axis=-1, dtype=own.dtype)
    second = first + jnp.sum(made & ~inside, axis=-1, dtype=own.dtype)
    new = jnp.where(place(block), first[..., None], own)
    new = jnp.where(place(block + 1) & column(start % size + lengths > size), second[..., None], new)
    return memory | {"evicted": evicted.at[layer].set(jnp.where(column(lengths > 0), new, own))}

  def steered(self, memory, start, width):
    """This policy with thresholds moved against what the row has kept too much or too little of.

    In block n the tokens of the blocks up to n - 2 count: a chunk of at most `steady` tokens with a token of block n
    has none of them, so that every way to read a text finds the same thresholds. What the row should have kept of them,
    beside its window, is what makes its ratio cr. The threshold moves by GAIN times the difference of both log-odds, in
    units of the levels' slope; by REACH of these units at most. Two blocks of what is asked for are added to both, so
    that little is moved while little is known.
    """
    layers, _, heads, _ = memory["evicted"].shape
    counts = summed(jnp.sum(memory["evicted"], axis=(0, 2))) / (layers * heads * devices())  # [B, 4], mean of heads
    size, share = self.steady, 1.0 / per_row(jnp.asarray(self.cr, jnp.float32), 1)
    block = (start[:, None] + jnp.arange(width)) // size
    seen = (jnp.maximum(block - 1, 0) * size).astype(jnp.float32)
    kept = seen - jnp.take_along_axis(counts, (block - 2) % 4, axis=1)
    asked = jnp.maximum(seen * share - self.window * (1.0 - share), seen * share * LEAST)
    odds = lambda tokens: logit((tokens + 2 * size * share) / (seen + 2 * size))
    off = jnp.clip(GAIN * (odds(kept) - odds(asked)), -REACH, REACH)
    return self.replace(moved=jnp.where(block >= 2, self.levels.slope * off, 0.0))

  def rate(self, logits):
    # In the first layer equal tokens have equal logits, but for the rounding of programs of other shapes. At bfloat16's
    # precision they stay equal, so that their order, and which of them goes, depends on no shape.
    return {"score": -(jax.lax.reduce_precision(logits, 8, 7) if self.bounded else logits)}

  def retire(self, leaving):
    if self.shares:
      return self._retired_together(leaving)
    return super().retire(leaving) if self.bounded else Policy.retire(self, leaving)

  def _retired_together(self, leaving: Leaving) -> Retired:
    """`retire` where heads share a limit: of a layer's tokens that exceed it, those with the highest logits go.

    Of equal ones the later token goes, then that of the first head. As many go in a step as enter, K at most.
    """
    heads, slots = leaving.live.shape[2:]
    enters, most = ~leaving.evicted, heads * (super().least(leaving.tokens) - (self.window + 1))[:, 0]
    excess = jnp.sum(leaving.archived + enters.astype(jnp.int32), axis=-1) - most  # [L, B]
    every = lambda x, own: jnp.concatenate([x, own[..., None]], axis=-1).reshape(*x.shape[:2], -1)
    scores = every(
      jnp.where(leaving.live, leaving.archive_stats["score"], jnp.inf),
      jnp.where(enters, leaving.stats["score"], jnp.inf),
    )
    position, gone = every(leaving.archive_stats["position"], leaving.stats["position"]), []
    for count in range(heads):
      least = jnp.min(scores, axis=-1, keepdims=True)
      latest = jnp.argmax(jnp.where(scores == least, position, -1), axis=-1)
      gone.append(jnp.where(count < excess, latest, scores.shape[-1]))
      scores = jnp.where(jnp.arange(scores.shape[-1]) == gone[-1][..., None], jnp.inf, scores)
    head, slot = jnp.divmod(jnp.stack(gone, axis=-1).astype(jnp.int32)[:, :, None], slots + 1)
    slot = jnp.where(head == jnp.arange(heads)[:, None], slot, slots + 1)  # [L, B, K, K]
    keep, removed = enters & ~jnp.any(slot == slots, axis=-1), jnp.sort(jnp.minimum(slot, slots), axis=-1)
    over = keep & (removed[..., 0] < slots)  # the leaving token takes the first of the places
    rest = jnp.pad(removed[..., 1:], ((0, 0),) * 3 + ((0, 1),), constant_values=slots)
    return Retired(keep, jnp.where(over, removed[..., 0], -1), removed=jnp.where(over[..., None], rest, removed))

  def least(self, tokens):
    own, ring = super().least(tokens), self.window + 1
    return ring + self.kv_heads * (own - ring) if self.shares else own

  def capacity(self, tokens):
    return super().capacity(tokens) if self.bounded else Policy.capacity(self, tokens)

  def mean_capacity(self, tokens):
    tokens = jnp.asarray(tokens, jnp.int32)
    return jnp.minimum(tokens, super().least(tokens)) if self.shares else self.capacity(tokens)

  def reach(self, slots):
    return super().reach(slots) if self.bounded else Policy.reach(self, slots)
