"""KeyDiff: keys that resemble the others are dropped (arXiv 2504.15364)."""

from __future__ import annotations

import jax.numpy as jnp
from flax import struct

from dms_jax.policies.base import register
from dms_jax.policies.budget import Budgeted


@register
@struct.dataclass
class KeyDiff(Budgeted):
  """Drops the token whose key is most similar to the anchor: the mean of the normalised keys that a head holds.

  The score is -cos(anchor, key), computed anew after each step from all held keys, after RoPE as they are cached; no
  attention is observed. At W = 0 the newest token alone is safe, in its own step; a larger `window` is the paper's
  variant with a sliding window. A chunk of a prompt is the paper's block: it is added to the cache, scored with it and
  cut to the budget. `exact_prefill` is a block of one token.

  Attributes:
    window: W, tokens before the newest one that stay whatever their keys.
  """

  observes = ("keys",)
  prompt_observes = ("keys",)

  def observe(self, stats, seen):
    # Sums over the keys as they lie in the cache: XLA reads them three times and copies them never.
    keys, live = seen.keys.astype(jnp.float32), seen.live[..., None]
    over = lambda x, axis: jnp.sum(jnp.where(live, x, 0.0), axis=axis)
    norm = jnp.sqrt(over(keys * keys, -1))
    inverse = 1 / jnp.where(norm > 0, norm, 1.0)
    anchor = over(keys * inverse[..., None], 2)  # its length does not matter to a cosine
    length = jnp.sqrt(jnp.sum(anchor * anchor, axis=-1))
    cosine = over(keys * anchor[:, :, None], -1) * inverse / jnp.where(length > 0, length, 1.0)[..., None]
    return {**stats, "score": -cosine}
