"""Expected Attention: tokens that future queries are expected to attend to (arXiv 2510.00636)."""

from __future__ import annotations

import jax.numpy as jnp
from flax import struct
from jax import lax
from jaxtyping import Array, Bool, Float

from dms_jax.policies.base import per_row, register
from dms_jax.policies.budget import check_number, check_sinks
from dms_jax.policies.periodic import Periodic, shares
from dms_jax.policies.rotation import conjugate, frequencies, mean_rotation, rotation, turned
from pallas_kernels.common.xla_dot import einsum


@register
@struct.dataclass
class ExpectedAttention(Periodic):
  """Keeps the tokens with the largest expected attention of future queries times the norm of values (section 2.2).

  Queries before RoPE are taken as normal with mean m and covariance C, estimated for each query head. With R the mean
  of RoPE's rotations at the next `future` positions, a key k has the weight exp(k' R m / sqrt(H) + k' R C R' k / 2H)
  (equation 7). Weights are normalised over the held tokens and averaged over the query heads of a KV head. The score is
  (weight + `epsilon`) x |v|. The first `sinks` tokens always stay, and their queries are not part of the statistics.

  m and C are those of the queries read since the last cut: of the whole prompt at its end, and of the `buffer` tokens
  before each later cut. The paper's decoding experiments take the last 128 tokens and cut every 512. The policy's
  memory is a sum and a sum of products, G (H + H^2) numbers a KV head. `covariance` False drops C and the H^2.

  As in the paper's experiments, |v| replaces the norm of v after the output projection. The defaults are those of the
  released code (kvpress); most experiments of the paper have `epsilon` 0.02. Budgets that differ between heads
  (head-adaptive compression) are not part of this. Queries are un-rotated, so their norm, if a model has one, counts.

  Attributes:
    future: positions ahead over which RoPE's rotations are averaged.
    epsilon: added to the attention weight before the norm of the value.
  """

  future: int = 512
  epsilon: float = 0.0
  sinks: int = 4
  covariance: bool = struct.field(pytree_node=False, default=True)
  frequencies: Float[Array, "1 half"] | None = struct.field(default=None, metadata={"flag": False})  # RoPE's

  remembers = True
  stats = ("position",)
  compact_observes = ("keys", "values")

  def fitted(self, config):
    return self.replace(frequencies=frequencies(config, "ExpectedAttention"))

  def resolved(self, window):
    policy = super().resolved(window)
    check_number(policy, "future", 1.0, whole=True)
    check_number(policy, "epsilon", 0.0)
    check_sinks(policy)
    return policy

  def memory(self, group, head_dim):
    sums = {"count": (), "sum": (group, head_dim)}
    return {**sums, "products": (group, head_dim, head_dim)} if self.covariance else sums

  def remember(self, memory, layer, queries, start, lengths):
    index = jnp.arange(queries.shape[3])
    position = start[:, None] + index
    counted = (index < lengths[:, None]) & (position >= per_row(self.sinks, 1).astype(jnp.int32))
    back = tuple(x[:, None, None] for x in conjugate(rotation(self.frequencies, position)))
    queries = jnp.where(counted[:, None, None, :, None], turned(queries, back), 0)
    added = {"count": jnp.sum(counted, axis=1, dtype=jnp.float32)[:, None], "sum": jnp.sum(queries, axis=3)}
    if self.covariance:
      added["products"] = einsum("bkgth,bkgti->bkghi", queries, queries)
    starts = (start == 0) & (lengths > 0)  # a row's first tokens: the memory is what an earlier row left
    return {name: x.at[layer].set(_kept(x[layer], ~starts) + added[name]) for name, x in memory.items()}

  def renew(self, memory, layer, rows):
    return {name: x.at[layer].set(_kept(x[layer], ~rows)) for name, x in memory.items()}

  def scores(self, candidates):
    position = candidates.stats["position"].astype(jnp.int32)
    sink = position < per_row(self.sinks, 2).astype(jnp.int32)
    known = candidates.held[..., None]
    values, keys = (jnp.where(known, x, 0).astype(jnp.float32) for x in (candidates.values, candidates.keys))
    ahead = mean_rotation(self.frequencies, candidates.tokens, per_row(self.future, 0))
    keys = turned(keys, tuple(x[:, None, None] for x in conjugate(ahead)))
    h, count = keys.shape[-1], jnp.maximum(candidates.memory["count"], 1)[..., None, None]
    mean = candidates.memory["sum"] / count
    logits = einsum("bkgh,bkxh->bkgx", mean, keys) * h**-0.5
    if self.covariance:
      spread = candidates.memory["products"] / count[..., None] - mean[..., :, None] * mean[..., None, :]
      # One query head of each group at a time, because a product of keys is as large as the keys.
      form = lambda c: jnp.sum(einsum("bkhi,bkxi->bkxh", c, keys) * keys, axis=-1)
      logits = logits + jnp.moveaxis(lax.map(form, jnp.moveaxis(spread, 2, 0)), 0, 2) / (2 * h)
    weights = jnp.mean(shares(jnp.where((candidates.held & ~sink)[:, :, None], logits, -jnp.inf)), axis=2)
    norm = jnp.sqrt(jnp.sum(values * values, axis=-1))
    return jnp.where(sink, jnp.inf, (weights + per_row(self.epsilon, 2).astype(jnp.float32)) * norm)


def _kept(x: Float[Array, "B *own"], rows: Bool[Array, "B"]) -> Float[Array, "B *own"]:
  """`x` with 0 in the rows that are not marked."""
  return jnp.where(rows.reshape(-1, *(1,) * (x.ndim - 1)), x, 0)
