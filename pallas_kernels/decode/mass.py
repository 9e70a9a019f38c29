"""The attention mass of slots, from the scores that a decode kernel has stored."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels.common.softmax import LOG2E


def slot_mass(
  scores: Float[Array, "P rows X"],
  logs: Float[Array, "P G"],
  sources: Sequence[tuple[int, int, Int[Array, "P"]] | None],
) -> tuple[jax.Array | None, ...]:
  """The attention mass of each slot, summed over the G query heads; P counts (row, KV head) pairs.

  Args:
    scores: float32, natural scores / log 2, the G query heads in the first rows; arbitrary for dead slots.
    logs: float32, natural log-sum-exp of each query head.
    sources: the slot arrays: (index of the first score, number of slots, live slots of each pair), or None.

  Returns:
    for each source float32 [P, slots], 0 for dead slots, or None.
  """

  def of(first, slots, live):
    here, tops = scores[:, :, first : first + slots], logs * LOG2E
    # One query head after the other: elementwise operations alone, which XLA fuses with what the policy does next.
    mass = sum(jnp.exp2(here[:, g] - tops[:, g, None]) for g in range(logs.shape[1]))
    return jnp.where(jnp.arange(slots) < live[:, None], mass, 0.0)

  return tuple(None if source is None else of(*source) for source in sources)
