"""A chunk of a prompt, layer by layer through one compiled function (`Execution.layers_apart`)."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from dms_jax.cache import Cache, ShardedCache
from dms_jax.cache.base import Plan, Usage
from dms_jax.execution import Execution
from dms_jax.generation import decode as decoding
from dms_jax.metrics import Counts, count
from dms_jax.model import Model, begin_chunk, chunk_layer, end_chunk
from dms_jax.policies import Policy

_begin = jax.jit(begin_chunk, donate_argnames="cache")
_layer = jax.jit(chunk_layer, donate_argnames=("cache", "x"))


def read_chunk(
  model: Model, policy: Policy, cache: Cache | ShardedCache, tokens: Int[np.ndarray, "B T"],
  lengths: Int[np.ndarray, "B"], remaining: Int[np.ndarray, "B"], logits: Float[Array, "B V"],
) -> tuple[Cache | ShardedCache, Float[Array, "B V"], Bool[Array, "B"], Counts]:  # fmt: skip
  """`decode.prefill_chunk`, layer by layer where `Execution` says so; consumes `cache` and `logits` as well."""
  apart = model.mesh is None and Execution.choose(model, *tokens.shape).layers_apart
  if policy.exact_prefill or not apart:
    return decoding.prefill_chunk(model, policy, cache, tokens, lengths, remaining, logits)
  head, cache, plan, x, layers = run_layers(model, policy, cache, tokens, lengths, remaining)
  return _end(head, cache, plan, x, layers, lengths, remaining, logits)


def run_layers(
  model: Model, policy: Policy, cache: Cache, tokens: Int[np.ndarray, "B T"], lengths: Int[np.ndarray, "B"],
  remaining: Int[np.ndarray, "B"],
) -> tuple[Model, Cache, Plan, Float[Array, "B T D"], list[tuple[Any, Usage]]]:  # fmt: skip
  """(the model without its layers, and what `model.end_chunk` takes) after all layers of a chunk."""
  layers = model.params["layers"]
  head = model.replace(params={**model.params, "layers": []})
  cache, plan, x = _begin(head, policy, cache, tokens, lengths, remaining)
  outs = []
  for index, layer in enumerate(layers):
    cache, x, out = _layer(head, policy, cache, plan, layer, np.int32(index), tokens, x)
    outs.append(out)
  return head, cache, plan, x, outs


@partial(jax.jit, donate_argnames=("cache", "logits"))
def _end(
  model: Model, cache: Cache, plan: Plan, x: Float[Array, "B T D"], layers: list[tuple[Any, Usage]],
  lengths: Int[Array, "B"], remaining: Int[Array, "B"], logits: Float[Array, "B V"],
) -> tuple[Cache, Float[Array, "B V"], Bool[Array, "B"], Counts]:  # fmt: skip
  out, cache = end_chunk(cache, plan, x, layers)
  return cache, decoding.chunk_logits(model, out, lengths, remaining, logits), out.stalled, count(out.seen)
