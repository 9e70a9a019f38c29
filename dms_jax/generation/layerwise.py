"""Prompt chunks and decode steps whose layers the host calls: few are compiled and serve all.

See `Execution.layers_apart` and `Execution.step_layers`.
"""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from functools import partial
from types import FrameType
from typing import Any

import jax
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from dms_jax.cache import Cache, ShardedCache
from dms_jax.cache.base import Plan, Usage
from dms_jax.decoder import Model
from dms_jax.execution import Execution
from dms_jax.generation import decode as decoding
from dms_jax.generation.conversation import place_like
from dms_jax.generation.decode import RUNNING, DecodeState, Emitted
from dms_jax.generation.growth import placed
from dms_jax.generation.sampling import Sampling
from dms_jax.generation.stops import StopCriteria
from dms_jax.metrics import Counts, count
from dms_jax.model import begin_chunk, chunk_layer, end_chunk, some_layers
from dms_jax.policies import Policy

SIGNALS = (signal.SIGINT, signal.SIGTERM)

_begin = jax.jit(begin_chunk, donate_argnames="cache")
_layer = jax.jit(chunk_layer, donate_argnames=("cache", "x"))


def read_chunk(
  model: Model, policy: Policy, cache: Cache | ShardedCache, tokens: Int[np.ndarray, "B T"],
  lengths: Int[np.ndarray, "B"], remaining: Int[np.ndarray, "B"], logits: Float[Array, "B V"],
) -> tuple[Cache | ShardedCache, Float[Array, "B V"], Bool[Array, "B"], Counts]:  # fmt: skip
  """`decode.prefill_chunk`, layer by layer where `Execution` says so; consumes `cache` and `logits` as well."""
  if not reads_apart(model, policy, tokens.shape):
    return decoding.prefill_chunk(model, policy, cache, tokens, lengths, remaining, logits)
  head, cache, plan, x, layers = run_layers(model, policy, cache, tokens, lengths, remaining)
  return _end(head, cache, plan, x, layers, lengths, remaining, logits)


def reads_apart(model: Model, policy: Policy, shape: tuple[int, int]) -> bool:
  """Whether a chunk of `shape` [B, T] is read layer by layer."""
  return not policy.exact_prefill and Execution.choose(model, *shape).layers_apart


@contextlib.contextmanager
def unbroken() -> Iterator[None]:
  """Holds back SIGINT and SIGTERM until the block ends: between two programs of a chunk no cache is whole.

  Only the main thread gets signals; elsewhere nothing changes.
  """
  if threading.current_thread() is not threading.main_thread():
    yield
    return
  before = {number: handler for number in SIGNALS if (handler := signal.getsignal(number)) is not None}
  caught: list[tuple[int, FrameType | None]] = []
  over = False

  def hold(number: int, frame: FrameType | None) -> None:
    handler = before[number]
    if over and callable(handler):
      handler(number, frame)
    else:
      caught.append((number, frame))

  try:
    for number in before:
      signal.signal(number, hold)
    yield
  finally:
    over = True
    for number, handler in before.items():
      signal.signal(number, handler)
    for number, frame in caught[:1]:
      if callable(own := before[number]):
        own(number, frame)
      elif own == signal.SIG_DFL:
        signal.raise_signal(number)


def run_layers(
  model: Model, policy: Policy, cache: Cache, tokens: Int[np.ndarray, "B T"], lengths: Int[np.ndarray, "B"],
  remaining: Int[np.ndarray, "B"],
) -> tuple[Model, Cache, Plan, Float[Array, "B T D"], list[tuple[Any, Usage]]]:  # fmt: skip
  """(the model without its layers, and what `model.end_chunk` takes) after all layers of a chunk."""
  head, layers = _apart(model)
  cache, plan, x = _begin(head, policy, cache, tokens, lengths, remaining)
  outs = []
  for index, layer in enumerate(layers):
    cache, x, out = _layer(head, policy, cache, plan, layer, np.int32(index), x)
    outs.append(out)
  return head, cache, plan, x, outs


@partial(jax.jit, donate_argnames=("cache", "logits"))
def _end(
  model: Model, cache: Cache, plan: Plan, x: Float[Array, "B T D"], layers: list[tuple[Any, Usage]],
  lengths: Int[Array, "B"], remaining: Int[Array, "B"], logits: Float[Array, "B V"],
) -> tuple[Cache, Float[Array, "B V"], Bool[Array, "B"], Counts]:  # fmt: skip
  out, cache = end_chunk(cache, plan, x, layers)
  return cache, decoding.chunk_logits(model, out, lengths, remaining, logits), out.stalled, count(out.seen)


def _apart(model: Model) -> tuple[Model, list[dict]]:
  """(the model without its layers, its layers)."""
  return model.replace(params={**model.params, "layers": []}), model.params["layers"]


# Decode steps ---------------------------------------------------------------------------------------------------------


def decode_block(
  model: Model, policy: Policy, cache: Cache, rows: DecodeState, sampling: Sampling, stop: StopCriteria, *, steps: int,
  history: bool,
) -> tuple[Cache, DecodeState, Emitted, Counts]:  # fmt: skip
  """`decode.decode_block`, in parts of each step where `Execution` says so; consumes `cache` and `rows` as well.

  An interrupt may lose both.
  """
  batch = rows.token.shape[0]
  if not steps_apart(model, policy, cache):
    return decoding.decode_block(model, policy, cache, rows, sampling, stop, steps=steps, history=history)
  size = Execution.choose(model, batch, 1).step_layers
  head, layers = _apart(model)
  made = place_like(model, _blank(model, batch, steps, history))
  for step in range(steps):
    cache, rows, made = _step(_run, head, policy, cache, rows, sampling, stop, layers, size, made, step)
  return cache, rows, *made


def steps_apart(model: Model, policy: Policy, cache: Cache | ShardedCache) -> bool:
  """Whether decode steps of the rows of a cache are taken in parts."""
  return bool(Execution.choose(model, len(cache.seen), 1).step_layers) and cache.steps_in_parts(policy)


def lower_steps(
  model: Model, policy: Policy, cache: Cache, rows: DecodeState, sampling: Sampling, stop: StopCriteria, *, steps: int,
  history: bool,
) -> list[jax.stages.Lowered]:  # fmt: skip
  """The programs of `decode_block`, in parts, for a cache of shapes; a call finds them compiled if these were."""
  size, programs = Execution.choose(model, len(cache.seen), 1).step_layers, {}

  def shapes(function: Any, *arguments: Any) -> Any:
    kind = function, len(arguments[5]) if function is _step_layers else 0  # parts of as many layers share a program
    if kind not in programs:
      programs[kind] = function.lower(*arguments)
    return placed(jax.eval_shape(function, *arguments), cache)

  head, layers = _apart(model)
  made = place_like(model, _blank(model, len(cache.seen), steps, history))
  _step(shapes, head, policy, cache, rows, sampling, stop, layers, size, made, 0)
  return list(programs.values())


def _run(function: Any, *arguments: Any) -> Any:
  return function(*arguments)


def _step(call: Any, head, policy, cache, rows, sampling, stop, layers, size, made, step: int) -> Any:
  """(cache, rows, made) after one step, `size` layers at a time; `call` runs each program, or finds its shapes."""
  cache, plan, leaving, x = call(_begin_step, head, policy, cache, rows.token, rows.reason)
  outs, unobserved = [], []
  for first in range(0, len(layers), size):
    part = layers[first : first + size]
    cache, x, own, waiting = call(_step_layers, head, policy, cache, plan, leaving, part, np.int32(first), x)
    outs, unobserved = outs + own, unobserved + list(waiting)
  return call(_end_step, head, policy, cache, plan, x, outs, unobserved, rows, sampling, stop, made, np.int32(step))


def _blank(model: Model, batch: int, steps: int, history: bool) -> tuple[Emitted, Counts]:
  """The results of a block in which no step has been made."""
  heads = (model.config.num_layers, batch, model.config.num_kv_heads)
  zeros = lambda *shape, dtype=np.int32: np.zeros(shape, dtype)
  of_steps = lambda dtype=np.int32: zeros(steps, batch, dtype=dtype)
  tokens, logprobs, valid = place_like(model, (of_steps(), of_steps(np.float32), of_steps(bool)))
  counts = zeros(*heads), zeros(*heads), of_steps(), zeros(steps, *heads) if history else None, of_steps()
  return Emitted(tokens, logprobs, valid), Counts(*place_like(model, counts))


@partial(jax.jit, donate_argnames="cache")
def _begin_step(model: Model, policy: Policy, cache: Cache, token: Int[Array, "B"], reason: Int[Array, "B"]):
  """(cache, plan, what leaves the windows, embeddings) of the rows that run."""
  running = (reason == RUNNING).astype(np.int32)
  cache, plan, x = begin_chunk(model, policy, cache, token[:, None], running, None)
  cache, leaving = cache.begin_parts(plan, policy)
  return cache, plan, leaving, x


@partial(jax.jit, donate_argnames=("cache", "x"))
def _step_layers(
  model: Model, policy: Policy, cache: Cache, plan: Plan, leaving: Array, layers: list[dict], first: Int[Array, ""],
  x: Float[Array, "B 1 D"],
):  # fmt: skip
  """(cache, x, (state, usage) of each layer, what the policy has not observed yet)."""
  carry, x, outs = some_layers(model, policy, cache, plan, layers, first, x, cache.layer_carry(leaving))
  return cache.with_carry(carry), x, outs, carry.unobserved


@partial(jax.jit, donate_argnames=("cache", "rows", "made"))
def _end_step(
  model: Model, policy: Policy, cache: Cache, plan: Plan, x: Float[Array, "B 1 D"], layers: list[tuple[Any, Usage]],
  unobserved: list, rows: DecodeState, sampling: Sampling, stop: StopCriteria, made: tuple[Emitted, Counts],
  step: Int[Array, ""],
) -> tuple[Cache, DecodeState, tuple[Emitted, Counts]]:  # fmt: skip
  out, cache = end_chunk(cache.end_parts(plan, policy, unobserved), plan, x, layers)
  rows, emitted, now = decoding.after_step(model, out, rows, sampling, stop)
  before, counts = made
  put = lambda array, value: None if array is None else array.at[step].set(value)
  counts = Counts(
    now.live, counts.reads + now.reads, put(counts.held, now.held[0]), put(counts.history, now.live),
    put(counts.step_reads, now.step_reads[0]),
  )  # fmt: skip
  return cache, rows, (jax.tree.map(lambda array, value: put(array, value[0]), before, emitted), counts)
