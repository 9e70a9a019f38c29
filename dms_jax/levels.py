"""Levels: the threshold at which gates for a range of compression ratios (CR) are read."""

from __future__ import annotations

import dataclasses
import math

import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Array, Float


@dataclasses.dataclass(frozen=True)
class Levels:
  """Thresholds of gates that were trained for every CR c from `low` to `high`; no paper has them.

  `thresholds` are those of the CRs whose log(c - 1), the log-odds of evicting, are equally spaced from the lowest to
  the highest; between them they are linear in it. The threshold never rises with c. One CR alone has one threshold.
  """

  low: float
  high: float
  thresholds: tuple[float, ...]

  @classmethod
  def logistic(cls, low: float, high: float, slope: float, zero: float) -> Levels:
    """Thresholds -slope * log((c - 1) / (zero - 1)), at which logits of a logistic distribution evict 1 - 1/c."""
    if low == high:
      return cls(low, high, (0.0,))
    return cls(low, high, tuple(-slope * math.log((c - 1.0) / (zero - 1.0)) + 0.0 for c in (low, high)))

  @property
  def ranged(self) -> bool:
    """Whether there is more than one CR; where not, training is that for one CR, read at 0."""
    return self.low < self.high

  @property
  def usual(self) -> float:
    """The CR at which the gates are read where none is given: 4, or the nearest end."""
    return min(max(4.0, self.low), self.high)

  @staticmethod
  def ratios(low: float, high: float, count: int) -> list[float]:
    """The CRs of `count` thresholds."""
    odds = np.linspace(math.log(low - 1.0), math.log(high - 1.0), count)
    return [min(max(float(c), low), high) for c in 1.0 + np.exp(odds)]

  def threshold(self, cr: ArrayLike) -> Float[Array, "*rows"]:
    """The threshold of each CR, float32; outside `low` .. `high` that of the nearer end."""
    cr = jnp.clip(jnp.asarray(cr, jnp.float32), jnp.float32(self.low), jnp.float32(self.high))
    return jnp.interp(jnp.log(cr - 1.0), self._odds(), jnp.asarray(self.thresholds, jnp.float32))

  def cr(self, threshold: ArrayLike) -> Float[Array, "*rows"]:
    """The CR of each threshold, float32, within `low` .. `high`: the inverse of `threshold`, but for rounding.

    Rounding never makes the threshold of that CR the lower one: a token of that very logit stays. Where CRs share a
    threshold it is one of them; the highest if all do.
    """
    low, high = jnp.float32(self.low), jnp.float32(self.high)
    if len(set(self.thresholds)) == 1:
      return jnp.broadcast_to(high, jnp.shape(threshold))
    falling = -jnp.asarray(self.thresholds, jnp.float32)
    odds = jnp.interp(-jnp.asarray(threshold, jnp.float32), falling, self._odds())
    cr = jnp.clip(1.0 + jnp.exp(odds), low, high)
    return jnp.where(self.threshold(cr) < threshold, jnp.maximum(cr * (1 - 2**-20), low), cr)

  @property
  def slope(self) -> float:
    """By how much the threshold falls, on the average, where the log-odds of evicting rise by 1."""
    fall = self.thresholds[-1] - self.thresholds[0]
    return fall / (math.log(self.high - 1.0) - math.log(self.low - 1.0)) if self.ranged else 0.0

  def strength(self, cr: ArrayLike) -> Float[Array, "*rows"]:
    """The share of a low-rank update that a row of each CR has (`LoRAConfig.by_cr`), float32: 0 at 1, 1 at `high`."""
    return jnp.clip(jnp.log(jnp.asarray(cr, jnp.float32)) / jnp.log(jnp.float32(self.high)), 0.0, 1.0)

  def _odds(self) -> Float[Array, "S"]:
    """log(c - 1) of the thresholds' CRs."""
    ends = math.log(self.low - 1.0), math.log(self.high - 1.0)
    return jnp.asarray(np.linspace(*ends, len(self.thresholds)), jnp.float32)
