"""What every softmax shares: scores in units of log 2, soft-capped scores, attention sinks.

All kernels keep scores in units of log 2: exp2 is what hardware has.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
from jax import lax

LOG2E = math.log2(math.e)
# A finite stand-in for -inf as the maximum of no scores: exp2(-inf - LOWEST) is 0, not NaN.
LOWEST = -1e30


def soft_capped(scores: jax.Array, softcap: float | None) -> jax.Array:
  """Scores within -softcap .. softcap, both in one unit: softcap tanh(scores / softcap); None leaves them."""
  return scores if softcap is None else softcap * jnp.tanh(scores * (1 / softcap))


def soft_capped_by_exp2(scores: jax.Array, softcap: float | None) -> jax.Array:
  """`soft_capped` by tanh(x) = 1 - 2 / (1 + exp(2x)), for Hopper GPUs.

  Their exp2 and rsqrt are off by 2^-22, their tanh by 2^-11 (PTX manual): at a cap of 50 that changes a weight by 2 %.
  """
  if softcap is None:
    return scores
  root = lax.rsqrt(1.0 + jnp.exp2(scores * (2 * LOG2E / softcap)))
  return softcap - (2 * softcap) * (root * root)


def before_cap(gradient: jax.Array, capped: jax.Array | None, softcap: float | None) -> jax.Array:
  """The gradient of scores from that of the `capped` ones, whose slope is 1 - tanh^2; without a cap the same."""
  return gradient if softcap is None else gradient * (1.0 - jnp.square(capped * (1 / softcap)))


def in_log2(softcap: float | None) -> float | None:
  """A cap of natural scores as one of scores in units of log 2."""
  return None if softcap is None else softcap * LOG2E


def with_sinks(out: jax.Array, logs: jax.Array, sinks: jax.Array | None) -> tuple[jax.Array, jax.Array]:
  """(output, log-sum-exp) of a softmax whose sums also have each query head's sink; None changes nothing.

  A sink has no value. So it scales an output by the share of the sum that scores have,
  exp(logs) / (exp(logs) + exp(sink)) = sigmoid(logs - sink).

  Args:
    out: [..., N, H], of scores alone; zeros where there are none.
    logs: float32 [..., N], the log-sum-exp of scores; -inf where there are none.
    sinks: [N], or more axes that broadcast against `logs`.
  """
  if sinks is None:
    return out, logs
  sinks = sinks.astype(jnp.float32)
  share = jnp.where(logs == -jnp.inf, 0.0, jax.nn.sigmoid(logs - sinks))
  return (out.astype(jnp.float32) * share[..., None]).astype(out.dtype), jnp.logaddexp(logs, sinks)
