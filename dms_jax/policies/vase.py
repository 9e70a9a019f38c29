"""VaSE: tokens of large values stay, the others are sampled by attention (arXiv 2606.03928)."""

from __future__ import annotations

import jax.numpy as jnp
from flax import struct
from jax import lax

from dms_jax.collectives import head_numbers
from dms_jax.policies.base import per_row, register
from dms_jax.policies.budget import allowance, check_number, check_sinks, largest
from dms_jax.policies.periodic import WatchesWindow, closed_ranks, shares
from dms_jax.policies.random import uniform

SMOOTHED = 5  # neighbouring tokens over which the released code averages attention


@register
@struct.dataclass
class VaSE(WatchesWindow):
  """Keeps the tokens of the largest values, and a sample of the others by the attention they receive (section 3.2).

  This is the paper's VaSE-AttnV. The window's W + 1 = 64 tokens stay. Before them `large` x budget tokens stay: the
  first `sinks` of the text, then those whose values have the largest range (greatest minus least channel). The others
  are sampled without replacement until the budget is full. A token's probability is the attention that it receives from
  the window's queries: softmax over the tokens before the window, mean over the queries, mean over 5 neighbouring
  tokens, mean over the query heads of a KV head.

  Sampling takes the largest sums of log-probability and Gumbel noise, which is the same as drawing one by one. The
  noise is a hash of (`seed`, layer, KV head, position, tokens read), so each cut draws anew and does not depend on the
  row or the cache. Rows may have seeds of their own.

  A `budget` must have places for the sinks. With `cr` it grows with the text, and the first sinks come first.

  From the released code, where the paper is open: 4 sinks, 64 recent tokens, a cut every 64 tokens, and a quarter of
  the budget for large values (1,024 of 4,096). The variant VaSE-DKV is not part of this.

  Attributes:
    large: share of the budget for sinks and the tokens of largest values.
    sinks: first tokens that stay.
    seed: of the sampling.
  """

  window: int | None = struct.field(pytree_node=False, default=63)
  buffer: int = 64
  large: float = 0.25
  sinks: int = 4
  seed: int = 0

  stats = ("position",)
  compact_observes = ("keys", "values")

  def resolved(self, window):
    policy = super().resolved(window)
    check_number(policy, "large", 0.0, 1.0)
    check_sinks(policy, policy.large)
    return policy

  def scores(self, candidates):
    live, position = candidates.live, candidates.stats["position"].astype(jnp.int32)
    spread = jnp.max(candidates.values, axis=-1) - jnp.min(candidates.values, axis=-1)
    spread = jnp.where(position < per_row(self.sinks, 2).astype(jnp.int32), jnp.inf, spread.astype(jnp.float32))
    budget = allowance(self, candidates.tokens)
    share = per_row(self.large, 0).astype(jnp.float32)
    count = jnp.minimum((budget.astype(jnp.float32) * share).astype(jnp.int32), budget - (self.window + 1))
    protected = largest(spread, live, count)

    attention = jnp.mean(shares(self.logits(candidates)), axis=(2, 3))  # averaging is linear, so the order is free
    front, place = closed_ranks(attention, live, 0.0)
    front = lax.reduce_window(front, 0.0, lax.add, (1, 1, SMOOTHED), (1, 1, 1), "SAME") / SMOOTHED
    attention = jnp.take_along_axis(front, place, axis=-1)
    head = head_numbers(live.shape[1])[:, None]
    noise = uniform(per_row(self.seed, 2), candidates.layer, head, position, candidates.tokens[:, None, None])
    noise = jnp.minimum(noise + jnp.float32(2**-25), jnp.float32(1 - 2**-24))  # float32 rounds the largest to 1
    gumbel = -jnp.log(-jnp.log(noise))
    return jnp.where(protected, jnp.inf, jnp.log(attention) + gumbel)
