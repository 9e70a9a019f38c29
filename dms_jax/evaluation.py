"""Quality of a retrofit on a text: perplexity, divergence from the original, and what the cache would hold."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from dms_jax import masks
from dms_jax.metrics import achieved_cr
from dms_jax.model import Eviction, Model, forward, unembed
from dms_jax.retrofit.losses import kl_divergence

POSITIONS = 1024  # positions whose vocabulary-wide logits stand in memory at once


@partial(jax.jit, static_argnames=("window",))
def _score(original: Model, model: Model | None, tokens: Int[Array, "B T"], threshold, window: int | None) -> dict:
  """Sums over the rows' scored positions, and tokens held at the end of each row."""
  hidden = [forward(original, tokens)[0]]
  held = None
  if model is not None:
    eviction = Eviction(threshold=threshold, window=window) if model.dms else None
    states, logits = forward(model, tokens, eviction=eviction)
    hidden.append(states)
    if logits is not None:
      evicted = masks.about_key(logits > threshold, model.dms.lag(window), False)
      held = masks.held_tokens(evicted, model.dms.window if window is None else window)
  models = [original, model][: len(hidden)]
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
    nll = [-jnp.take_along_axis(x, target[..., None], axis=-1)[..., 0] * weight for x in log_p]
    sums = {"nll_original": nll[0].sum()}
    if model is not None:
      sums |= {"nll": nll[1].sum(), "kl": (kl_divergence(logits[1], logits[0], "forward") * weight).sum()}
    return sums

  sums = jax.lax.map(part, ([split(h[:, :-1]) for h in hidden], split(tokens[:, 1:]), real))
  return {**jax.tree.map(jnp.sum, sums), "held": held}


def text_quality(
  original: Model,
  model: Model | None,
  tokens: Int[np.ndarray, "n"],
  length: int,
  *,
  threshold: float = 0.0,
  window: int | None = None,
  batch: int = 1,
  progress: Callable[[Iterable], Iterable] = lambda items: items,
) -> dict[str, Any]:
  """Scores a text in chunks of `length` tokens, every position but a chunk's first; a shorter rest is left out.

  Args:
    model: the retrofit, under hard decisions; without gates it is scored dense; None scores the original alone.
    threshold, window: of the eviction; None takes the model's window.
    batch: chunks at a time.
    progress: wraps the iteration over batches.

  Returns:
    `perplexity_original`, `perplexity`, `perplexity_change` (a share), `kl` = KL(original || model) in nats per token,
    `achieved_cr` at T = `length`, `held_per_head` float [L, K] (mean tokens held), `chunks`.

  Raises:
    ValueError: the text is shorter than one chunk.
  """
  chunks = len(tokens) // length
  if not chunks or length < 2:
    raise ValueError(f"the text has {len(tokens)} tokens: too short for a chunk of {length} (at least 2)")
  rows = np.asarray(tokens[: chunks * length], np.int32).reshape(chunks, length)
  totals: dict[str, float] = {}
  held = []
  for start in progress(range(0, chunks, batch)):
    out = jax.device_get(_score(original, model, rows[start : start + batch], threshold, window))
    if out["held"] is not None:
      held.append(out["held"])
    for name in set(out) - {"held"}:
      totals[name] = totals.get(name, 0.0) + float(out[name])
  scored = chunks * (length - 1)
  result: dict[str, Any] = {
    "length": length, "chunks": chunks, "perplexity_original": float(np.exp(totals["nll_original"] / scored)),
  }  # fmt: skip
  if model is not None:
    result["perplexity"] = float(np.exp(totals["nll"] / scored))
    result["perplexity_change"] = result["perplexity"] / result["perplexity_original"] - 1
    result["kl"] = totals["kl"] / scored
  if held:
    all_held = np.concatenate(held, axis=1)  # [L, chunks, K]
    result["achieved_cr"] = float(achieved_cr(all_held, np.full(chunks, length)))
    result["held_per_head"] = all_held.mean(axis=1)
  return result
