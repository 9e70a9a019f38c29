"""Levels: the threshold at which gates for a range of compression ratios (CR) are read."""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Float


@dataclasses.dataclass(frozen=True)
class Levels:
  """Thresholds of gates that were trained for every CR c from `low` to `high`; no paper has them.

      threshold(c) = slope * (logit(1/c) - logit(1/pivot)) = -slope * log((c - 1) / (pivot - 1))

  A gate that evicts the share 1 - 1/c of its tokens at threshold(c), for every c, has logits of a logistic
  distribution of scale `slope`: the logit of a token is its calibrated rank. Noise in training is logistic of scale 1,
  so that `slope` is the spread of the ranks against the noise. The threshold falls from infinity at c = 1, where every
  token stays, to minus infinity. It is 0 at `pivot`.
  """

  low: float
  high: float
  slope: float
  pivot: float

  @property
  def ranged(self) -> bool:
    """Whether there is more than one CR; where not, training is that for one CR, read at 0."""
    return self.low < self.high

  def threshold(self, cr: ArrayLike) -> Float[Array, "*rows"]:
    """The threshold of each CR, float32; outside `low` .. `high` that of the nearer end. At `pivot` it is exactly 0."""
    cr = jnp.clip(jnp.asarray(cr, jnp.float32), jnp.float32(self.low), jnp.float32(self.high))
    pivot = jnp.float32(self.pivot)
    return jnp.where(cr == pivot, jnp.float32(0.0), -self.slope * jnp.log((cr - 1.0) / (pivot - 1.0)))

  def cr(self, threshold: ArrayLike) -> Float[Array, "*rows"]:
    """The CR of each threshold, float32, within `low` .. `high`: the inverse of `threshold`, but for rounding."""
    low, high = jnp.float32(self.low), jnp.float32(self.high)
    if not self.slope:  # every CR has the same threshold
      return jnp.broadcast_to(high, jnp.shape(threshold))
    threshold = jnp.asarray(threshold, jnp.float32)
    return jnp.clip(1.0 + (self.pivot - 1.0) * jnp.exp(-threshold / self.slope), low, high)
