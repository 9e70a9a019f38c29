"""Sampling the next token: greedy, temperature, top-k and top-p, with one key a row.

Row b's n-th token is sampled with `fold_in(keys[b], n)`, so it does not depend on the other rows, on the row's place in
the batch, or on pauses.
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax import lax
from jaxtyping import Array, Bool, Float, Int, Key

from dms_jax import bisection
from dms_jax.execution import Execution

SMALLEST, LARGEST = float(np.finfo(np.float32).tiny), float(np.finfo(np.float32).max)
MOST_K = 2**24  # counts are exact in float32 up to here, beyond any vocabulary


def _number(name: str, value: Any, meaning: str) -> float:
  if isinstance(value, str | bytes) or np.ndim(value) or isinstance(value, bool | np.bool_):
    raise ValueError(f"{name}={value!r:.80} must be {meaning}")
  try:
    return float(value)
  except OverflowError:  # a whole number beyond all floats
    return math.inf if value > 0 else -math.inf
  except (TypeError, ValueError):
    raise ValueError(f"{name}={value!r:.80} must be {meaning}") from None


@struct.dataclass
class Sampling:
  """How to sample. `temperature` None means greedy; a float32 array [B] gives each row its own, 0 for greedy.

  The numbers are traced: another number does not recompile, a change to or from None does; `create` leaves no None but
  for greedy sampling under `Execution.skipped_filters`. Filters act in the order
  temperature, top-k, top-p, as in transformers. A filter also keeps every token that ties with its last kept token.
  """

  temperature: float | Float[Array, "B"] | None = None
  top_k: int | None = None
  top_p: float | None = None

  @classmethod
  def create(cls, temperature: Any = 0.0, top_k: Any = None, top_p: Any = None) -> Sampling:
    """Checked settings; temperature 0 is greedy, and top-k and top-p then change nothing.

    Raises:
      ValueError: a setting out of range.
    """
    number = _number("temperature", temperature, "0 (greedy) or a positive number")
    if not (math.isfinite(number) and number >= 0):
      raise ValueError(f"temperature={temperature} must be 0 (greedy) or a positive number")
    if top_k is not None:
      k = _number("top_k", top_k, "a whole number of 1 or more, or None for no limit")
      if not k >= 1 or (math.isfinite(k) and k % 1) or (isinstance(top_k, float) and math.isinf(top_k)):
        raise ValueError(f"top_k={top_k} must be a whole number of 1 or more, or None for no limit")
      top_k = int(min(k, MOST_K))
    if top_p is not None:
      p = _number("top_p", top_p, "above 0 and at most 1, or None for no limit")
      if not 0 < p <= 1:
        raise ValueError(f"top_p={top_p} must be above 0 and at most 1, or None for no limit")
      top_p = max(p, SMALLEST)
    if number == 0:
      return cls()
    if Execution.choose().skipped_filters:
      top_k, top_p = MOST_K if top_k is None else top_k, 1.0 if top_p is None else top_p
    return cls(min(max(number, SMALLEST), LARGEST), top_k, top_p)


def as_key(key: Any) -> jax.Array:
  """A key, or a batch of keys, of any kind that JAX has.

  Raises:
    ValueError: it is none.
  """
  if not isinstance(key, jax.Array | np.ndarray):
    raise ValueError(f"key={key!r:.80} is no key: pass jax.random.key(seed)")
  if jnp.issubdtype(key.dtype, jax.dtypes.prng_key):
    return jnp.asarray(key)
  try:
    return jax.random.wrap_key_data(key)
  except (TypeError, ValueError):
    raise ValueError(f"key: an array of {key.dtype} {key.shape} is no key: pass jax.random.key(seed)") from None


def row_keys(key: Any, batch: int) -> Key[Array, "B"]:
  """One key a row: `key` itself if it is already a batch of `batch` keys, else `fold_in(key, row)`.

  Raises:
    ValueError: no key, or a batch of keys of another length.
  """
  key = as_key(key)
  if key.ndim == 0:
    return _folded(key, batch)
  if key.shape != (batch,):
    raise ValueError(f"key has shape {key.shape}; pass one key, or one for each of the {batch} rows")
  return key


@partial(jax.jit, static_argnums=1)
def _folded(key: Key[Array, ""], batch: int) -> Key[Array, "B"]:
  return jax.vmap(lambda row: jax.random.fold_in(key, row))(jnp.arange(batch))


def chain_keys(key: jax.Array | None, chains: int) -> list[jax.Array | None]:
  """A key for each chain: its own of a batch of keys, else `fold_in(key, chain)`; a single chain has `key` itself.

  Raises:
    ValueError: no key, or a batch of keys of another length.
  """
  if key is None:
    return [None] * chains
  key = as_key(key)
  if chains == 1 and key.ndim == 0:
    return [key]
  return list(row_keys(key, chains))


def largest_threshold(values: Float[Array, "B V"], weights: Float[Array, "B V"], need) -> Bool[Array, "B V"]:
  """Marks the values of at least t, where t is the largest threshold whose marked weights sum to `need` or more.

  If all weights sum to less than `need`, all values are marked.
  """
  keys = bisection.keys(values)
  mass = lambda key: jnp.sum(jnp.where(keys >= key[:, None], weights, 0.0), axis=-1)
  return keys >= bisection.highest(lambda key: mass(key) >= need, len(values))[:, None]


def filtered(logits: Float[Array, "B V"], sampling: Sampling) -> Float[Array, "B V"]:
  """Logits less the row's largest, divided by the temperature; -inf for tokens that top-k or top-p excludes.

  The largest is 0, so no quotient overflows at a small temperature.
  """
  temperature = jnp.asarray(sampling.temperature, logits.dtype)
  if temperature.ndim:
    temperature = jnp.where(temperature > 0, temperature, 1.0)[:, None]
  logits = (logits - jnp.max(logits, axis=-1, keepdims=True)) / temperature

  def likeliest(logits):
    keep = largest_threshold(logits, jnp.ones_like(logits), jnp.asarray(sampling.top_k, logits.dtype))
    return jnp.where(keep, logits, -jnp.inf)

  def nucleus(logits):
    need = jnp.asarray(sampling.top_p, logits.dtype)
    keep = largest_threshold(logits, jax.nn.softmax(logits, axis=-1), need)
    return jnp.where(keep | (need >= 1), logits, -jnp.inf)  # a rounded sum may reach 1 too early

  skips = Execution.choose().skipped_filters
  act = lambda acts, filter_, x: lax.cond(acts, filter_, lambda x: x, x) if skips else filter_(x)
  if sampling.top_k is not None:
    logits = act(jnp.asarray(sampling.top_k) < logits.shape[-1], likeliest, logits)
  if sampling.top_p is not None:
    logits = act(jnp.asarray(sampling.top_p) < 1, nucleus, logits)
  return logits


def sample(
  logits: Float[Array, "B V"], keys: Key[Array, "B"] | None, count: Int[Array, "B"], sampling: Sampling
) -> tuple[Int[Array, "B"], Float[Array, "B"]]:
  """The next token of each row, and its log-probability.

  Args:
    logits: float32.
    keys: one a row; not read when greedy.
    count: tokens that each row has generated so far.

  Returns:
    Tokens int32, and each token's log-probability by the raw logits (temperature 1, no filter), in nats.
  """
  if sampling.temperature is None:
    token = jnp.argmax(logits, axis=-1)
  else:
    noise = jax.vmap(lambda key, n: jax.random.gumbel(jax.random.fold_in(key, n), logits.shape[1:]))(keys, count)
    token = jnp.argmax(filtered(logits, sampling) + noise, axis=-1)
    if jnp.ndim(sampling.temperature):
      token = jnp.where(sampling.temperature > 0, token, jnp.argmax(logits, axis=-1))
  chosen = jnp.take_along_axis(logits, token[:, None], axis=-1)[:, 0]
  return token.astype(jnp.int32), chosen - jax.nn.logsumexp(logits, axis=-1)
