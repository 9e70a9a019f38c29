"""The compiled part of generation: a prompt's chunk, the first token, and a decode block of decode steps.

Nothing here calls back to the host. A decode block has a static trip count and rows that are done sit its steps out; to skip
a step for which no row is left, by `lax.cond`, would copy the cache twice a step on a CPU. A token is fed only by the
step after the one that chose it: the last token of a row is never fed, it stays *pending*, and a later turn puts it
before its own prompt.
"""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
from flax import struct
from jax import lax
from jaxtyping import Array, Bool, Float, Int, Key

from dms_jax.cache import Cache
from dms_jax.generation.sampling import Sampling, sample
from dms_jax.metrics import Counts, count
from dms_jax.model import Model, cached_forward, last_logits
from dms_jax.policies import Policy

RUNNING, STOP, EOS, LENGTH, CAPACITY = range(5)
REASONS = ("running", "stop", "eos", "length", "capacity")


@struct.dataclass
class StopCriteria:
  """What ends a row: token ids, and stop strings as `stops.token_table` (None: none)."""

  eos: Int[Array, "ids"]
  table: Int[Array, "states V"] | None = None


@struct.dataclass
class Rows:
  """Where each row of a batch stands.

  `token` int32 [B] is pending: chosen and not yet fed. `keys` [B] or None (greedy). `count` int32 [B] tokens generated,
  `limit` [B] when to end. `state` int32 [B] of the stop strings' automaton. `reason` int32 [B], why the row ended.
  """

  token: Int[Array, "B"]
  keys: Key[Array, "B"] | None
  count: Int[Array, "B"]
  limit: Int[Array, "B"]
  state: Int[Array, "B"]
  reason: Int[Array, "B"]


@struct.dataclass
class Emitted:
  """Tokens of a decode block [steps, B], their log-probabilities, and which of them are there."""

  tokens: Int[Array, "steps B"]
  logprobs: Float[Array, "steps B"]
  valid: Bool[Array, "steps B"]


def choose(
  rows: Rows, logits: Float[Array, "B V"], active: Bool[Array, "B"], sampling: Sampling, stop_criteria: StopCriteria
) -> tuple[Rows, Emitted]:
  """Draws the next token of the active rows, and ends those whose token, stop string or limit says so."""
  token, logprob = sample(logits, rows.keys, rows.count, sampling)
  token = jnp.where(active, token, rows.token)
  total = rows.count + active.astype(jnp.int32)
  reason = jnp.where(total >= rows.limit, LENGTH, RUNNING)
  reason = jnp.where(jnp.any(token[:, None] == stop_criteria.eos, axis=-1), EOS, reason)
  state = rows.state
  if stop_criteria.table is not None:
    following = stop_criteria.table[state, token].astype(jnp.int32)
    reason = jnp.where(following < 0, STOP, reason)
    state = jnp.where(active, jnp.maximum(following, 0), state)
  rows = rows.replace(token=token, count=total, state=state, reason=jnp.where(active, reason, rows.reason))
  return rows, Emitted(token[None], logprob[None], active[None])


@partial(jax.jit, donate_argnames=("cache", "logits"))
def prefill_chunk(
  model: Model,
  policy: Policy,
  cache: Cache,
  tokens: Int[Array, "B T"],
  lengths: Int[Array, "B"],
  last: Bool[Array, "B"],
  logits: Float[Array, "B V"],
) -> tuple[Cache, Float[Array, "B V"], Bool[Array, "B"], Counts]:
  """Takes up to T prompt tokens a row; where `last`, the row's prompt ends here and its logits are written.

  Returns the cache, the logits, which rows had no room, and counts.
  """
  out, cache = cached_forward(model, policy, cache, tokens, lengths)
  logits = jnp.where(last[:, None], last_logits(model, out), logits)
  return cache, logits, out.stalled, count(out.seen)


@jax.jit
def first_token(
  rows: Rows, logits: Float[Array, "B V"], sampling: Sampling, stop_criteria: StopCriteria
) -> tuple[Rows, Emitted]:
  """The token after the prompt, of the rows still running."""
  return choose(rows, logits, rows.reason == RUNNING, sampling, stop_criteria)


@partial(jax.jit, static_argnames=("steps", "history"), donate_argnames=("cache", "rows"))
def decode_block(
  model: Model,
  policy: Policy,
  cache: Cache,
  rows: Rows,
  sampling: Sampling,
  stop_criteria: StopCriteria,
  *,
  steps: int,
  history: bool,
) -> tuple[Cache, Rows, Emitted, Counts]:
  """`steps` decode steps. A row without room ends with reason CAPACITY, its token still pending, nothing lost."""

  def step(state, _):
    cache, rows, reads, _ = state
    running = rows.reason == RUNNING
    out, cache = cached_forward(model, policy, cache, rows.token[:, None], running.astype(jnp.int32))
    fed = running & ~out.stalled
    rows = rows.replace(reason=jnp.where(running & out.stalled, CAPACITY, rows.reason))
    rows, emitted = choose(rows, last_logits(model, out), fed, sampling, stop_criteria)
    now = count(out.seen)
    emitted = jax.tree.map(lambda x: x[0], emitted)
    return (cache, rows, reads + now.reads, now.live), (emitted, now.held[0], now.live if history else None)

  zeros = jnp.zeros((model.config.num_layers, rows.token.shape[0], model.config.num_kv_heads), jnp.int32)
  state = (cache, rows, zeros, zeros)
  (cache, rows, reads, live), (emitted, held, history) = lax.scan(step, state, length=steps)
  return cache, rows, emitted, Counts(live, reads, held, history)
