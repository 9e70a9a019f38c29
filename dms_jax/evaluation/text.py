"""Quality on a text under a policy: perplexity, divergence from the original, cache size.

On a mesh each device reads its own rows and heads (`dms_jax.spmd`); a last block of rows is padded to a whole number
for each.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int

from dms_jax import cache as caches
from dms_jax import masks, spmd
from dms_jax.cache.base import Usage
from dms_jax.decoder import Model, unembed
from dms_jax.metrics import achieved_cr, kl_divergence
from dms_jax.model import Eviction, cached_forward, check_policy, evicted_keys, forward
from dms_jax.policies import Policy, check_rows
from dms_jax.processes import fetch
from dms_jax.spmd import on_mesh, rounded_rows, row_parts

POSITIONS = 1024  # positions whose logits [V] are in memory at once

Score = tuple[dict[str, Array], Array | None, Array | None]


@partial(jax.jit, static_argnames=("window",))
@on_mesh(spmd.ROWS, spmd.HEADS, spmd.HEADS)
def _score(original: Model, model: Model | None, tokens: Int[Array, "B T"], threshold, *, window: int | None) -> Score:
  """(sums over scored positions, see `_sums`; tokens held at the end of rows and keys read, [L, B, K] each)."""
  hidden = [forward(original, tokens)[0]]
  held = reads = None
  if model is not None:
    eviction = Eviction(threshold=threshold, window=window) if model.dms else None
    states, logits = forward(model, tokens, eviction=eviction)
    hidden.append(states)
    if logits is not None:
      evicted, windows = evicted_keys(model, logits, threshold, window)
      held, reads = masks.held_tokens(evicted, windows), masks.keys_read(evicted, windows)
  return _sums([original, model][: len(hidden)], hidden, tokens), held, reads


@partial(jax.jit, static_argnames=("chunk",))
@on_mesh(spmd.ROWS, spmd.HEADS, spmd.HEADS)
def _score_policy(
  original: Model, model: Model, policy: Policy, cache: caches.Cache, tokens: Int[Array, "B T"], *, chunk: int
) -> Score:
  """`_score` with `model` reading `tokens` into `cache` under `policy`."""
  lengths = jnp.full(tokens.shape[:1], tokens.shape[1], jnp.int32)
  states, usage = decode_text(model, policy, cache, tokens, lengths, chunk=chunk)
  return _sums([original, model], [forward(original, tokens)[0], states], tokens), usage.live, usage.reads


def _sums(models: list[Model], hidden: list[Float[Array, "B T D"]], tokens: Int[Array, "B T"]) -> dict[str, Array]:
  """Negative log-likelihoods of one or two models and KL(first || second), [B], summed over scored positions."""
  chunk = min(POSITIONS, tokens.shape[1] - 1)
  pad = -(tokens.shape[1] - 1) % chunk
  split = lambda x: jnp.moveaxis(
    jnp.pad(x, ((0, 0), (0, pad)) + ((0, 0),) * (x.ndim - 2)).reshape(x.shape[0], -1, chunk, *x.shape[2:]), 1, 0
  )
  real = jnp.pad(jnp.ones((tokens.shape[1] - 1,), jnp.float32), (0, pad)).reshape(-1, 1, chunk)

  def part(args):
    states, target, weight = args
    logits = [unembed(m, h) for m, h in zip(models, states, strict=True)]
    log_p = [jax.nn.log_softmax(x, axis=-1) for x in logits]
    nll = [-jnp.take_along_axis(x, target[..., None], axis=-1)[..., 0] for x in log_p]
    total = lambda values: jnp.sum(values * weight, axis=-1)
    sums = {"nll_original": total(nll[0])}
    if len(models) > 1:
      sums |= {"nll": total(nll[1]), "kl": total(kl_divergence(logits[1], logits[0], "forward"))}
    return sums

  sums = jax.lax.map(part, ([split(h[:, :-1]) for h in hidden], split(tokens[:, 1:]), real))
  return jax.tree.map(lambda values: jnp.sum(values, axis=0), sums)


def cache_for_text(model: Model, policy: Policy, batch: int, length: int) -> caches.Cache | caches.ShardedCache:
  """An empty cache with one slot for each of `length` tokens, whatever the budget, so budgets share a compilation.

  Raises:
    ValueError: the model's mesh cannot split the rows, or the heads under this policy.
  """
  if model.mesh is not None:
    spmd.check(model, model.mesh, policy)
  return caches.for_model(model, policy, batch=batch, capacity=max(length, policy.window + 1), kind="contiguous")


def decode_text(
  model: Model, policy: Policy, cache: caches.Cache, tokens: Int[Array, "B T"], lengths: Int[Array, "B"],
  chunk: int = 1,
) -> tuple[Float[Array, "B T D"], Usage]:  # fmt: skip
  """Decodes given texts token by token, as generation does, or reads them in chunks; for use inside `jit`.

  Args:
    policy: resolved (`check_policy`).
    cache: a cache of B rows, which may hold earlier tokens.
    tokens: T is 1 or more; right-padded; row b's first `lengths[b]` are real.
    chunk: tokens read at once. More than 1: as a prompt, after each chunk of which the policy compacts the cache.

  Returns:
    Hidden states before the final norm, and int32 [L, B, K] each: tokens that each head holds at the end, and keys that
    the tokens read.
  """
  length = tokens.shape[1]
  steps = -(-length // chunk)
  parts = jnp.pad(tokens, ((0, 0), (0, steps * chunk - length))).reshape(-1, steps, chunk)

  def step(cache, inputs):
    index, part = inputs
    left = jnp.maximum(lengths - index * chunk, 0)
    count = jnp.minimum(left, chunk).astype(jnp.int32)
    remaining = None if chunk == 1 else left - count  # without it the tokens are decode steps
    out, cache = cached_forward(model, policy, cache, part, count, remaining=remaining)
    return cache, (out.hidden, out.seen)

  _, (states, seen) = jax.lax.scan(step, cache, (jnp.arange(steps), jnp.moveaxis(parts, 1, 0)))
  states = jnp.moveaxis(states, 0, 1).reshape(tokens.shape[0], steps * chunk, -1)[:, :length]
  return states, Usage(seen.live[-1], jnp.sum(seen.reads, axis=0))


def text_quality(
  original: Model,
  model: Model | None,
  tokens: Int[np.ndarray, "n"],
  length: int,
  *,
  threshold: float = 0.0,
  window: int | None = None,
  policy: Policy | None = None,
  chunk: int = 1,
  batch: int = 1,
  progress: Callable[[Iterable], Iterable] = lambda items: items,
) -> dict[str, Any]:
  """Scores a text in chunks of `length` tokens, every position but a chunk's first; a shorter last chunk is dropped.

  Args:
    model: the retrofit, scored with hard decisions, or dense if it has no gates. None scores only the original.
    threshold: a token is evicted if its gate logit exceeds it.
    window: W of the eviction; None takes the model's.
    policy: if given, the model (the original if `model` is None) decodes every token through a cache under this policy.
    chunk: under a policy, tokens read at once; more than 1 reads them as a prompt instead, which is quicker and tests
      what the policy does to prompts.
    batch: chunks at a time, on a mesh as many more as its devices need for equal parts.
    progress: wraps the iteration over batches.

  Returns:
    `perplexity_original`, `perplexity`, `perplexity_change` (a share), `kl` = KL(original || model) in nats per token,
    `achieved_cr` at T = `length`, `held_per_head` float [L, K] (mean tokens held), `reads_cr` (keys read by dense
    attention over keys read), `chunks`. `by_chunk`: arrays [chunks] of `nll_original`, `nll` and `kl` in nats per
    token, and, mean over layers and heads, `held`, tokens held at the end, and `reads`, keys read by all tokens.

  Raises:
    ValueError: the text is shorter than one chunk of `length`, or `chunk` is no positive number or has no policy;
      or the models are on different meshes.
  """
  if chunk < 1 or (chunk > 1 and policy is None):
    raise ValueError(f"chunk={chunk} must be 1 or more, and 1 without a policy: the whole text is then read at once")
  if model is not None and model.mesh != original.mesh:
    raise ValueError("original and model must be on the same mesh: load both with the same mesh=, or both without")
  chunks = len(tokens) // length
  if not chunks or length < 2:
    raise ValueError(f"the text has {len(tokens)} tokens: too short for a chunk of {length} (at least 2)")
  if policy is not None:
    model = original if model is None else model
    policy = check_policy(model, policy)
    check_rows(policy, None)
  rows, batch = np.asarray(tokens[: chunks * length], np.int32).reshape(chunks, length), rounded_rows(original, batch)
  sums: dict[str, list[np.ndarray]] = {}
  held, reads = [], []
  for start in progress(range(0, chunks, batch)):
    own = rows[start : start + batch]
    part = _padded(original, own)
    if policy is None:
      found = _score(original, model, part, threshold, window=window)
    else:
      cache = cache_for_text(model, policy, len(part), length)
      found = _score_policy(original, model, policy, cache, part, chunk=chunk)
    its_sums, its_held, its_reads = fetch(found)
    for name, values in its_sums.items():
      sums.setdefault(name, []).append(np.asarray(values[: len(own)], np.float64))
    if its_held is not None:
      held.append(its_held[:, : len(own)])
      reads.append(np.asarray(its_reads[:, : len(own)], np.float64))
  totals = {name: float(sum(part.sum() for part in parts)) for name, parts in sums.items()}
  scored = chunks * (length - 1)
  result: dict[str, Any] = {
    "length": length,
    "chunks": chunks,
    "perplexity_original": float(np.exp(totals["nll_original"] / scored)),
    "by_chunk": {
      name: np.concatenate(sums[name]) / (length - 1) for name in ("nll_original", "nll", "kl") if name in sums
    },
  }
  if "kl" in totals:
    result["perplexity"] = float(np.exp(totals["nll"] / scored))
    result["perplexity_change"] = result["perplexity"] / result["perplexity_original"] - 1
    result["kl"] = totals["kl"] / scored
  if held:
    all_held = np.concatenate(held, axis=1)  # [L, chunks, K]
    result["achieved_cr"] = float(achieved_cr(all_held, np.full(chunks, length)))
    result["held_per_head"] = all_held.mean(axis=1)
    read = np.concatenate(reads, axis=1).mean(axis=(0, 2))
    result["by_chunk"] |= {"held": all_held.mean(axis=(0, 2)), "reads": read}
    result["reads_cr"] = masks.causal_reads(length) / read.mean()
  return result


def _padded(model: Model, rows: Int[np.ndarray, "n T"]) -> Int[np.ndarray, "B T"]:
  """`rows`, and rows of zeros up to a number that the model's devices split evenly."""
  return np.pad(rows, ((0, rounded_rows(model, len(rows)) - len(rows)), (0, 0)))


@partial(jax.jit, static_argnames=("window",))
@on_mesh(P(None, *spmd.HEADS), whole=("ends",))
def _held_at(
  model: Model, tokens: Int[Array, "B T"], ends: Int[Array, "P"], threshold, *, window: int | None
) -> tuple[Int[Array, "P L B K"]]:
  """Tokens that each head holds after the first `ends` tokens of each row."""
  _, logits = forward(model, tokens, eviction=Eviction(threshold=threshold, window=window))
  evicted, windows = evicted_keys(model, logits, threshold, window)
  before = jnp.cumsum(evicted, axis=-1, dtype=jnp.int32) - evicted.astype(jnp.int32)  # evicted before each token
  outside = jnp.broadcast_to(jnp.maximum(ends - 1 - windows, 0), (*before.shape[:3], len(ends)))
  return (ends[:, None, None, None] - jnp.moveaxis(jnp.take_along_axis(before, outside, axis=-1), -1, 0),)


def held_by_position(
  model: Model,
  tokens: Int[np.ndarray, "n"],
  length: int,
  points: int,
  *,
  threshold: float = 0.0,
  window: int | None = None,
  progress: Callable[[Iterable], Iterable] = lambda items: items,
) -> tuple[Int[np.ndarray, "P"], np.ndarray]:
  """The share of tokens that each head holds along chunks of `length` tokens (arXiv 2506.05345, figure 6).

  Returns:
    Positions int [P]: `points` of them, evenly spaced up to `length`. Shares float64 [P, L, K]: tokens held over tokens
    seen at each position, mean over chunks. The achieved CR at a position is 1 / the mean share of layers and heads.

  Raises:
    ValueError: the model has no gates, the text is shorter than one chunk, or there are more points than tokens.
  """
  chunks = len(tokens) // length
  if not chunks or not 0 < points <= length:
    raise ValueError(f"{points} positions of chunks of {length} tokens, in a text of {len(tokens)}: too few tokens")
  ends = np.linspace(length / points, length, points).round().astype(np.int32)
  rows, batch = np.asarray(tokens[: chunks * length], np.int32).reshape(chunks, length), row_parts(model)
  held = 0.0
  for start in progress(range(0, chunks, batch)):
    part = rows[start : start + batch]
    (found,) = fetch(_held_at(model, _padded(model, part), ends, threshold, window=window))
    held += found[:, :, : len(part)].sum(axis=2, dtype=np.float64)
  return ends, held / chunks / ends[:, None, None]
