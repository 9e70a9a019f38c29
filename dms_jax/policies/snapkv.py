"""SnapKV: a prompt is cut to the tokens its last queries attend to (arXiv 2404.14469)."""

from __future__ import annotations

import jax.numpy as jnp
from flax import struct
from jax import lax

from dms_jax.policies.base import Policy, is_whole, register
from dms_jax.policies.budget import allowance, check_budget, largest
from dms_jax.policies.periodic import closed_ranks


@register
@struct.dataclass
class SnapKV(Policy):
  """Keeps the prompt's last W + 1 tokens and the tokens before them with the largest pooled attention.

  The last W + 1 tokens of the prompt are its *observation window*. The score of an earlier token is the attention it
  receives from the window's queries: the sum over queries (section 4.1), the mean over the query heads of a KV head,
  then the maximum over `pool` neighbouring tokens (section 4.3). `budget` counts the tokens a head holds after the
  prompt, the observation window included; `cr` sets it to `tokens seen / cr`, rounded up. The whole prompt is held
  until its end, where compaction frees the rest. The paper and its code select for each query head.

  In a later turn of a conversation the new prompt's last tokens cut everything held so far.

  Attributes:
    budget: tokens a head after the prompt, the window included.
    pool: neighbouring tokens over which attention is maximal.
  """

  window: int | None = struct.field(pytree_node=False, default=31)
  budget: int | None = None
  cr: float | None = None
  pool: int = struct.field(pytree_node=False, default=7)

  stats = ("mass",)
  prompt_observes = ("mass",)
  compacts = True

  def resolved(self, window):
    policy = super().resolved(window)
    check_budget(policy, policy.window + 1)
    if not is_whole(self.pool) or self.pool < 1 or self.pool % 2 == 0:
      raise ValueError(f"SnapKV: pool={self.pool} must be an odd number of tokens")
    return policy

  def query_weights(self, lengths, remaining, width):
    after = remaining[:, None] + lengths[:, None] - 1 - jnp.arange(width)  # tokens of the prompt after each query
    return ((after >= remaining[:, None]) & (after <= self.window)).astype(jnp.float32)

  def observe(self, stats, seen):
    # Negative once its prompt has ended: another turn's window, however short its prompt, starts anew.
    mass = jnp.maximum(stats["mass"], 0.0) + seen.mass
    return {"mass": jnp.where((seen.remaining == 0)[:, None, None], -mass, mass)}

  def compact(self, candidates):
    live, mass = candidates.live, -candidates.stats["mass"]
    dense, place = closed_ranks(mass, live, -jnp.inf)
    dense = lax.reduce_window(dense, -jnp.inf, lax.max, (1, 1, self.pool), (1, 1, 1), "SAME")
    pooled = jnp.take_along_axis(dense, place, axis=-1)
    kept = largest(pooled, live, allowance(self, candidates.tokens) - (self.window + 1))
    return jnp.where((candidates.remaining == 0)[:, None, None], kept, live)
