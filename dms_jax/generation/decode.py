"""The compiled part of generation: prompt chunks, the first token, blocks of decode steps.

Nothing here calls back to the host. A decode block has a static trip count, and ended rows sit out its steps. Skipping
steps without rows by `lax.cond` would copy the cache twice a step on a CPU. A step samples a token and the next step
feeds it, so the last token of a row is never fed: it stays *pending*, and a later turn reads it before its prompt.
"""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
from flax import struct
from jax import lax
from jaxtyping import Array, Bool, Float, Int, Key

from dms_jax import spmd
from dms_jax.cache import Cache
from dms_jax.decoder import Model, for_steps
from dms_jax.generation.sampling import Sampling, sample
from dms_jax.generation.stops import StopCriteria
from dms_jax.metrics import Counts, count
from dms_jax.model import StepOutput, cached_forward, last_logits
from dms_jax.policies import Policy
from dms_jax.spmd import on_mesh

RUNNING, STOP, EOS, LENGTH, CAPACITY, NAN = range(6)
REASONS = ("running", "stop", "eos", "length", "capacity", "nan")
NOT_FINITE = "the logits are not finite"
NOT_FINITE_ADVICE = "weights hold NaN or infinity, or their dtype overflows: check the checkpoint, or load as float32"


@struct.dataclass
class DecodeState:
  """The state of each row of a batch.

  `token` int32 [B]: the pending token, sampled but not fed yet. `keys` [B]: sampling keys, None if greedy. `count`
  int32 [B]: tokens generated. `limit` int32 [B]: most tokens to generate. `stop_state` int32 [B]: the state of the stop
  strings' automaton. `reason` int32 [B]: why the row ended, an index into `REASONS`.
  """

  token: Int[Array, "B"]
  keys: Key[Array, "B"] | None
  count: Int[Array, "B"]
  limit: Int[Array, "B"]
  stop_state: Int[Array, "B"]
  reason: Int[Array, "B"]


@struct.dataclass
class Emitted:
  """Tokens of a decode block int32 [steps, B], their log-probabilities in nats, and which entries are valid."""

  tokens: Int[Array, "steps B"]
  logprobs: Float[Array, "steps B"]
  valid: Bool[Array, "steps B"]


def choose(
  rows: DecodeState, logits: Float[Array, "B V"], active: Bool[Array, "B"], sampling: Sampling, stop: StopCriteria
) -> tuple[DecodeState, Emitted]:
  """Samples the next token of the active rows; a row ends at an EOS token, a stop string or its limit.

  A row whose logits are not finite ends without a token, with reason NAN.
  """
  token, logprob = sample(logits, rows.keys, rows.count, sampling)
  broken, asked = ~jnp.isfinite(logprob), active
  active = active & ~broken
  token = jnp.where(active, token, rows.token)
  total = rows.count + active.astype(jnp.int32)
  reason = jnp.where(total >= rows.limit, LENGTH, RUNNING)
  reason = jnp.where(jnp.any(token[:, None] == stop.eos, axis=-1), EOS, reason)
  state = rows.stop_state
  if stop.table is not None:
    following = stop.table[state, token].astype(jnp.int32)
    reason = jnp.where(following < 0, STOP, reason)
    state = jnp.where(active, jnp.maximum(following, 0), state)
  reason = jnp.where(active, reason, jnp.where(asked, NAN, rows.reason))
  rows = rows.replace(token=token, count=total, stop_state=state, reason=reason)
  return rows, Emitted(token[None], logprob[None], active[None])


@partial(jax.jit, donate_argnames=("cache", "logits"))
@on_mesh(spmd.CACHE, spmd.ROWS, spmd.ROWS, spmd.COUNTS)
def prefill_chunk(
  model: Model,
  policy: Policy,
  cache: Cache,
  tokens: Int[Array, "B T"],
  lengths: Int[Array, "B"],
  remaining: Int[Array, "B"],
  logits: Float[Array, "B V"],
) -> tuple[Cache, Float[Array, "B V"], Bool[Array, "B"], Counts]:
  """Reads up to T prompt tokens of each row into the cache.

  Args:
    tokens: right-padded; row b's first `lengths[b]` are real.
    remaining: tokens of each row's prompt that come after these.
    logits: float32, replaced for the rows whose prompt ends in this chunk.

  Returns:
    The cache, the logits, which rows had no space and read nothing, and counts.
  """
  out, cache = cached_forward(model, policy, cache, tokens, lengths, remaining=remaining)
  return cache, chunk_logits(model, out, lengths, remaining, logits), out.stalled, count(out.seen)


def chunk_logits(
  model: Model, out: StepOutput, lengths: Int[Array, "B"], remaining: Int[Array, "B"], logits: Float[Array, "B V"]
) -> Float[Array, "B V"]:
  """`logits`, replaced for the rows whose prompt ends in this chunk."""
  return jnp.where(((lengths > 0) & (remaining == 0))[:, None], last_logits(model, out), logits)


@jax.jit
def first_token(
  rows: DecodeState, logits: Float[Array, "B V"], active: Bool[Array, "B"], sampling: Sampling, stop: StopCriteria
) -> tuple[DecodeState, Emitted]:
  """Samples the token after the prompt for the rows that are `active` and still running."""
  return choose(rows, logits, active & (rows.reason == RUNNING), sampling, stop)


@partial(jax.jit, static_argnames=("steps", "history"), donate_argnames=("cache", "rows"))
@on_mesh(spmd.CACHE, spmd.ROWS, spmd.STEPS, spmd.COUNTS, whole=("stop",))
def decode_block(
  model: Model,
  policy: Policy,
  cache: Cache,
  rows: DecodeState,
  sampling: Sampling,
  stop: StopCriteria,
  *,
  steps: int,
  history: bool,
) -> tuple[Cache, DecodeState, Emitted, Counts]:
  """Makes `steps` decode steps. A row without space ends with reason CAPACITY; its token stays pending.

  `history`: also return the tokens that each head holds after each step.
  """

  def step(state, _):
    cache, rows, reads, _ = state
    running = rows.reason == RUNNING
    out, cache = cached_forward(model, policy, cache, rows.token[:, None], running.astype(jnp.int32))
    rows, emitted, now = after_step(model, out, rows, sampling, stop)
    emitted, held, step_reads = jax.tree.map(lambda x: x[0], (emitted, now.held, now.step_reads))
    return (cache, rows, reads + now.reads, now.live), (emitted, held, step_reads, now.live if history else None)

  model = for_steps(model, rows.token.shape[0])
  zeros = jnp.zeros((model.config.num_layers, rows.token.shape[0], model.config.num_kv_heads), jnp.int32)
  state = (cache, rows, zeros, zeros)
  (cache, rows, reads, live), (emitted, held, step_reads, history) = lax.scan(step, state, length=steps)
  return cache, rows, emitted, Counts(live, reads, held, history, step_reads)


def after_step(
  model: Model, out: StepOutput, rows: DecodeState, sampling: Sampling, stop: StopCriteria
) -> tuple[DecodeState, Emitted, Counts]:
  """(rows, their new tokens, counts) after one decode step; a row without space ends with reason CAPACITY."""
  running = rows.reason == RUNNING
  fed = running & ~out.stalled
  rows = rows.replace(reason=jnp.where(running & out.stalled, CAPACITY, rows.reason))
  rows, emitted = choose(rows, last_logits(model, out), fed, sampling, stop)
  now = count(out.seen)
  return rows, emitted, now.replace(step_reads=jnp.sum(out.seen.reads, axis=(0, 2))[None])
