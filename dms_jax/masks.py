"""Which key is visible to which query, and the bias that says so softly: pure functions of positions and decisions.

With W = 1 and token 1 evicted (x = visible, rows are queries):

    x . . . .
    x x . . .
    x x x . .      token 1 is still in the window of token 2
    x . x x .      and gone for token 3
    x . x x x
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int


def about_key(computed: Array, lag: int, fill) -> Array:
  """Re-indexes the last axis from the token that computed a decision to the token it is about, `lag` places before.

  The last `lag` tokens are not decided yet and get `fill`; what the first `lag` tokens computed is about nothing. The
  lag is the gates' shift, and W more under immediate eviction (`DMSConfig.lag`).
  """
  if lag == 0:
    return computed
  return jnp.concatenate([computed[..., lag:], jnp.full_like(computed[..., :lag], fill)], axis=-1)


def visible(evicted: Bool[Array, "*batch T"], window: int) -> Bool[Array, "*batch T T"]:
  """[..., i, j]: `j <= i and (i - j <= W or not evicted[j])`; `evicted` is indexed by the key it is about."""
  i, j = jnp.arange(evicted.shape[-1])[:, None], jnp.arange(evicted.shape[-1])
  return (j <= i) & ((i - j <= window) | ~evicted[..., None, :])


def hard_bias(evicted: Bool[Array, "B K T"]) -> Float[Array, "B K T"]:
  """Bias of keys beyond the window: -inf where evicted, else 0."""
  return jnp.where(evicted, -jnp.inf, 0.0)


def soft_bias(z: Float[Array, "B K T"], lag: int) -> Float[Array, "B K T"]:
  """log(1 - sigmoid(z[j + lag])), 0 for keys not decided yet (arXiv 2506.05345, figure 2b)."""
  return about_key(jax.nn.log_sigmoid(-z), lag, 0.0)


def held_tokens(evicted: Bool[Array, "*batch T"], window: int, lengths: Int[Array, "..."] | None = None) -> Array:
  """Tokens held after T tokens, int32 [...]: the last W + 1, and of the earlier ones those not evicted.

  `lengths` [...], broadcast against the batch: how many of each row are real, from the first on; default all T.
  """
  index = jnp.arange(evicted.shape[-1])
  end = evicted.shape[-1] if lengths is None else lengths[..., None]
  outside = index < end - (window + 1)
  return jnp.sum((index < end) & ~(outside & evicted), axis=-1, dtype=jnp.int32)
