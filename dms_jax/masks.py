"""Visibility of keys to queries: the mask and the soft training bias, from decisions.

Source: arXiv 2506.05345, section 3.1 and figure 2. With W = 1 and token 1 evicted (x = visible, rows are queries):

    x . . . .
    x x . . .
    x x x . .      token 1 is still in the window of token 2
    x . x x .      and evicted for token 3
    x . x x x
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int


def about_key(computed: Array, lag: int, fill) -> Array:
  """Re-indexes the last axis, T, from the token that computed a decision to the one it is about, `lag` tokens earlier.

  The last `lag` tokens are undecided and get `fill`. The decisions of the first `lag` tokens are about no token and are
  dropped. The lag is the gates' shift, plus W under immediate eviction (`DMSConfig.lag`).
  """
  if lag == 0:
    return computed
  return jnp.concatenate([computed[..., lag:], jnp.full_like(computed[..., :lag], fill)], axis=-1)


def visible(evicted: Bool[Array, "*batch T"], window: int) -> Bool[Array, "*batch T T"]:
  """Entry [..., i, j] says whether query i sees key j: `j <= i and (i - j <= W or not evicted[j])`.

  `evicted` is indexed by the key a decision is about.
  """
  i, j = jnp.arange(evicted.shape[-1])[:, None], jnp.arange(evicted.shape[-1])
  return (j <= i) & ((i - j <= window) | ~evicted[..., None, :])


def hard_bias(evicted: Bool[Array, "B K T"]) -> Float[Array, "B K T"]:
  """Bias of keys outside the window, float32: -inf where evicted, else 0."""
  return jnp.where(evicted, -jnp.inf, 0.0)


def soft_bias(z: Float[Array, "B K T"], lag: int) -> Float[Array, "B K T"]:
  """Bias of keys outside the window in training (arXiv 2506.05345, figure 2b).

  It is log(1 - sigmoid(z[j + lag])), in z's dtype, and 0 for keys not decided yet.
  """
  return about_key(jax.nn.log_sigmoid(-z), lag, 0.0)


def held_tokens(
  evicted: Bool[Array, "*batch T"], window: int | Int[Array, "..."], lengths: Int[Array, "..."] | None = None
) -> Array:
  """Tokens in the cache after T tokens, int32 [...]: the last W + 1, and the earlier ones that are not evicted.

  Args:
    window: W in tokens, or an array that broadcasts against `evicted`.
    lengths: real tokens of each row, from the first on, broadcast against the batch; default T.
  """
  index = jnp.arange(evicted.shape[-1])
  end = evicted.shape[-1] if lengths is None else lengths[..., None]
  outside = index < end - (window + 1)
  return jnp.sum((index < end) & ~(outside & evicted), axis=-1, dtype=jnp.int32)


def causal_reads(length):
  """Keys that T queries see together where nothing is evicted, T (T + 1) / 2."""
  return length * (length + 1) / 2


def keys_read(evicted: Bool[Array, "*batch T"], window: int | Int[Array, "..."]) -> Float[Array, "*batch"]:
  """Keys that T queries see together, the sum of `visible`, float32; `window` as in `held_tokens`."""
  length = evicted.shape[-1]
  blind = jnp.maximum(length - 1 - window - jnp.arange(length), 0)  # queries that do not see an evicted key
  return causal_reads(length) - jnp.sum(jnp.where(evicted, blind, 0), axis=-1, dtype=jnp.float32)
