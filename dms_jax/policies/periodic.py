"""The base of policies that let a head outgrow its budget and cut it every few decode steps."""

from __future__ import annotations

import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Bool, Float, Int

from dms_jax.policies.base import Candidates, Policy, per_row
from dms_jax.policies.budget import Limited, check_number, largest
from pallas_kernels.common.xla_dot import einsum


@struct.dataclass
class Periodic(Limited):
  """Cuts a head that holds `budget` + `buffer` tokens to its `budget`; the window's W + 1 tokens always stay.

  The cut comes before a decode step, so after the first cut a head holds `budget` + 1 to `budget` + `buffer` tokens
  while a token attends. `budget`, `cr` and `buffer` may be one number a row [B].

  Prompts: the prompt is read densely, in chunks, and cut to the budget at its end, as if pruning were due there; a head
  holds the whole prompt until then. In a later turn of a conversation the end of its prompt cuts everything held so
  far. `exact_prefill` reads prompts one token at a time and prunes them like generated text, so that a head never holds
  more than `budget` + `buffer` tokens, and turns of a conversation hold what one text in one go holds.

  A subclass defines `scores`.

  Attributes:
    buffer: tokens beyond the budget at which a head is cut.
  """

  window: int | None = struct.field(pytree_node=False, default=0)
  buffer: int = 128

  prunes = True

  @property
  def bounded(self):  # type: ignore[override]
    return self.exact_prefill

  def resolved(self, window):
    policy = super().resolved(window)
    check_number(policy, "buffer", 1.0, whole=True)
    return policy

  def scores(self, candidates: Candidates) -> Float[Array, "B K X"]:
    """The scores of the tokens outside the window, of which the largest stay; arbitrary for others.

    Raises:
      NotImplementedError: the subclass does not define this.
    """
    raise NotImplementedError(f"{type(self).__name__} has no scores")

  def spare(self, tokens):
    return per_row(self.buffer, max(jnp.ndim(tokens) - 1, 0)).astype(jnp.int32)

  def due(self, tokens, held):
    return jnp.any(held >= (self.least(tokens) + self.spare(tokens))[:, None], axis=(0, 2))

  def compact(self, candidates: Candidates) -> Bool[Array, "B K X"]:
    count = self.least(candidates.tokens) - (self.window + 1)
    kept = largest(self.scores(candidates), candidates.live, count)
    return jnp.where((candidates.remaining == 0)[:, None, None], kept, candidates.live)

  def capacity(self, tokens):
    return super().capacity(tokens) if self.exact_prefill else Policy.capacity(self, tokens)

  def reach(self, slots):
    return super().reach(slots) if self.exact_prefill else Policy.reach(self, slots)


def recent_queries(
  ring: Float[Array, "L B K G R H"],
  layer: int | Int[Array, ""],
  queries: Float[Array, "B K G T H"],
  start: Int[Array, "B"],
  lengths: Int[Array, "B"],
) -> Float[Array, "L B K G R H"]:
  """A memory of the latest R queries after a step, for `Policy.remember`: token t's is in place t mod R.

  The arguments are those of `remember`. Places without a token yet are arbitrary.
  """
  b, heads, group, width, _ = queries.shape
  places = ring.shape[4]
  rows, head, of_group = (
    jnp.arange(b)[:, None, None, None],
    jnp.arange(heads)[:, None, None],
    jnp.arange(group)[:, None],
  )
  if width == 1:
    place = jnp.where(lengths > 0, start % places, places)[:, None, None, None]
    return ring.at[layer, rows, head, of_group, place].set(queries.astype(ring.dtype), mode="drop")
  # The newest token of each place, and whether it is one of this step's.
  newest = (start + lengths - 1)[:, None]
  token = newest - (newest - jnp.arange(places)) % places - start[:, None]
  place = jnp.where((token >= 0) & (lengths > 0)[:, None], jnp.arange(places), places)[:, None, None]
  taken = jnp.take_along_axis(queries, jnp.clip(token, 0, width - 1)[:, None, None, :, None], axis=3)
  return ring.at[layer, rows, head, of_group, place].set(taken.astype(ring.dtype), mode="drop")


@struct.dataclass
class WatchesWindow(Periodic):
  """The base of periodic policies whose scores need the queries of the window: the last W + 1, after RoPE.

  The memory "queries", [B, K, G, W + 1, H], holds them. Every token outside the window precedes all of them.
  """

  remembers = True

  def memory(self, group, head_dim):
    return {"queries": (group, self.window + 1, head_dim)}

  def remember(self, memory, layer, queries, start, lengths):
    return {"queries": recent_queries(memory["queries"], layer, queries, start, lengths)}

  def logits(self, candidates: Candidates) -> Float[Array, "B K G R X"]:
    """The attention logits of the window's queries, q . k / sqrt(H), float32; -inf where they see no candidate."""
    queries = candidates.memory["queries"]
    keys = jnp.where(candidates.live[..., None], candidates.keys, 0).astype(jnp.float32)
    logits = einsum("bkgrh,bkxh->bkgrx", queries, keys) * queries.shape[-1] ** -0.5
    return jnp.where(candidates.live[:, :, None, None], logits, -jnp.inf)


def shares(logits: Float[Array, "*rows X"]) -> Float[Array, "*rows X"]:
  """Softmax over the last axis; all 0 where every logit is -inf."""
  largest_logit = jnp.max(logits, axis=-1, keepdims=True)
  weights = jnp.exp(logits - jnp.where(jnp.isfinite(largest_logit), largest_logit, 0))
  total = jnp.sum(weights, axis=-1, keepdims=True)
  return weights / jnp.where(total > 0, total, 1)


def closed_ranks(x: Float[Array, "B K X"], live: Bool[Array, "B K X"], empty: float) -> tuple[Array, Array]:
  """(`x` with its live entries moved to the front in order and `empty` behind them, the places of these [B, K, X]).

  Tokens that are neighbours among the live ones become neighbours in the array, whatever free slots lie between them;
  `jnp.take_along_axis(of_front, places, -1)` brings them back.
  """
  place = jnp.cumsum(live, axis=-1) - 1
  rows, heads = jnp.arange(live.shape[0])[:, None, None], jnp.arange(live.shape[1])[:, None]
  at = jnp.where(live, place, live.shape[-1])
  return jnp.full(x.shape, empty, x.dtype).at[rows, heads, at].set(x, mode="drop"), jnp.maximum(place, 0)
