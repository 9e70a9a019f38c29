"""The likelihood of continuations under a model and a policy: one scorer for all tasks.

Texts are tokenized as in lm-evaluation-harness. Rows of similar length are scored together, padded to a multiple of
`BUCKET`, so that few shapes are compiled. Every model gets the same batches. On a mesh each device scores its own rows
(`dms_jax.spmd`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from dms_jax import masks, spmd
from dms_jax.cache import Cache
from dms_jax.decoder import Model, unembed
from dms_jax.evaluation.text import cache_for_text, decode_text
from dms_jax.generation.conversation import place_like
from dms_jax.generation.layerwise import read_chunk
from dms_jax.generation.prefill import Chunk, read_prompts
from dms_jax.model import Eviction, check_policy, evicted_keys, forward
from dms_jax.policies import Policy
from dms_jax.policies.base import of_rows
from dms_jax.processes import fetch
from dms_jax.spmd import on_mesh, rounded_rows
from dms_jax.tokenizer import Tokenizer

BUCKET = 256  # tokens; row lengths are rounded up to a multiple of it
TARGETS = 64  # scored tokens of a row whose logits [V] are in memory at once


@dataclasses.dataclass(frozen=True)
class Question:
  """A text `context` and the continuations `choices` to score; `choices[answer]` is the right one.

  Each choice follows `context` and one space. A question with one choice only asks for its likelihood.
  """

  context: str
  choices: tuple[str, ...]
  answer: int = 0


Span = tuple[int, slice]  # a row's number and a range of its targets


@dataclasses.dataclass(frozen=True)
class Passage:
  """A row to score: `tokens` int32 [n] are read, and target i is scored after the token at position i.

  `positions` and `targets`: int32 [c].
  """

  tokens: np.ndarray
  positions: np.ndarray
  targets: np.ndarray


@dataclasses.dataclass(frozen=True)
class Scored:
  """The scores of a row.

  `logprobs` float64 [c]: log-probabilities of its targets, nats. `greedy` bool [c]: whether each target is the
  likeliest token. `held` int [L, K]: tokens that each head holds at the end; None if the row was scored dense.
  """

  logprobs: np.ndarray
  greedy: np.ndarray
  held: np.ndarray | None


def cut(tokenizer: Tokenizer, context: str, continuation: str) -> tuple[list[int], list[int]]:
  """Ids of (context, continuation): the whole text is tokenized, then split after as many tokens as the context has.

  Raises:
    ValueError: one of the two has no tokens.
  """
  bare = context.rstrip()
  whole = tokenizer.encode(context + continuation)
  before = tokenizer.encode(bare)
  if not before or len(whole) <= len(before):
    raise ValueError(f"nothing to score: {continuation!r} after {context[-40:]!r}")
  return before, whole[len(before) :]


def rows_of(question: Question, tokenizer: Tokenizer) -> tuple[list[Passage], list[Span]]:
  """The rows of a question, and the span of each choice: its row and its targets there.

  Choices of one token each, such as letters, share one row, which ends with the context.
  """
  pairs = [cut(tokenizer, question.context, f" {choice}") for choice in question.choices]
  array = lambda ids: np.asarray(ids, np.int32)
  if all(len(after) == 1 for _, after in pairs):
    before = pairs[0][0]
    row = Passage(array(before), array([len(before) - 1] * len(pairs)), array([after[0] for _, after in pairs]))
    return [row], [(0, slice(i, i + 1)) for i in range(len(pairs))]
  rows = [
    Passage(
      array(before + after), np.arange(len(before) - 1, len(before) + len(after) - 1, dtype=np.int32), array(after)
    )
    for before, after in pairs
  ]
  return rows, [(i, slice(None)) for i in range(len(pairs))]


def lay_out(questions: Sequence[Question], tokenizer: Tokenizer) -> tuple[list[Passage], list[list[Span]]]:
  """The rows of all questions in one list, and the spans of each question (`rows_of`) in that list."""
  rows: list[Passage] = []
  spans: list[list[Span]] = []
  for question in questions:
    own, parts = rows_of(question, tokenizer)
    spans.append([(len(rows) + row, part) for row, part in parts])
    rows += own
  return rows, spans


def _target_logprobs(
  model: Model, hidden: Float[Array, "B T D"], positions: Int[Array, "B C"], targets: Int[Array, "B C"]
) -> tuple[Float[Array, "B C"], Bool[Array, "B C"]]:
  """log p(targets | tokens up to positions) in nats, and whether each target is the likeliest token."""
  hidden = jnp.take_along_axis(hidden, positions[..., None], axis=1)
  split = lambda x: jnp.moveaxis(x.reshape(x.shape[0], -1, TARGETS, *x.shape[2:]), 1, 0)

  def part(args):
    states, wanted = args
    return _chosen(unembed(model, states), wanted)

  join = lambda x: jnp.moveaxis(x, 0, 1).reshape(targets.shape)
  logprobs, greedy = jax.lax.map(part, (split(hidden), split(targets)))
  return join(logprobs), join(greedy)


def _chosen(
  logits: Float[Array, "B #C V"], targets: Int[Array, "B C"]
) -> tuple[Float[Array, "B C"], Bool[Array, "B C"]]:
  """Log-probabilities of targets in nats, and whether each has the largest logit, the first of equal ones."""
  chosen = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
  return chosen - jax.nn.logsumexp(logits, axis=-1), jnp.argmax(logits, axis=-1) == targets


@jax.jit
@on_mesh(spmd.ROWS, spmd.ROWS, spmd.HEADS)
def token_logprobs(
  model: Model, tokens: Int[Array, "B T"], lengths: Int[Array, "B"], positions: Int[Array, "B C"],
  targets: Int[Array, "B C"], threshold: Float[Array, ""] | None,
) -> tuple[Float[Array, "B C"], Bool[Array, "B C"], Int[Array, "L B K"] | None]:  # fmt: skip
  """(log p(targets | tokens up to positions) in nats, whether each target is the likeliest token, tokens held at the
  end of each row); reads whole texts at once.

  Args:
    tokens: right-padded; row b's first `lengths[b]` are real.
    positions: C is a multiple of `TARGETS`.
    threshold: a token is evicted if its gate logit exceeds it. None evicts and counts nothing.
  """
  eviction = None if threshold is None else Eviction(threshold=threshold)
  hidden, z = forward(model, tokens, eviction=eviction)
  scored = _target_logprobs(model, hidden, positions, targets)
  if eviction is None:
    return *scored, None
  return *scored, masks.held_tokens(*evicted_keys(model, z, threshold), lengths[:, None])


@jax.jit
@on_mesh(spmd.ROWS, spmd.ROWS, spmd.HEADS)
def _continued_logprobs(
  model: Model, policy: Policy, cache: Cache, logits: Float[Array, "B V"], tokens: Int[Array, "B T"],
  lengths: Int[Array, "B"], positions: Int[Array, "B C"], targets: Int[Array, "B C"],
) -> tuple[Float[Array, "B C"], Bool[Array, "B C"], Int[Array, "L B K"]]:  # fmt: skip
  """`token_logprobs` of `tokens` that follow the text in `cache`; targets at position -1 are scored by `logits`."""
  hidden, usage = decode_text(model, policy, cache, tokens, lengths)
  first = _chosen(logits[:, None], targets)
  later = _target_logprobs(model, hidden, jnp.maximum(positions, 0), targets)
  logprobs, greedy = (jnp.where(positions < 0, a, b) for a, b in zip(first, later, strict=True))
  return logprobs, greedy, usage.live


def policy_logprobs(
  model: Model, policy: Policy, rows: Sequence[Passage], *, batch: int, length: int, width: int, steps: int, chunk: int
) -> tuple[Float[Array, "B C"], Bool[Array, "B C"], Int[Array, "L B K"]]:
  """`token_logprobs` under a policy, as `generate` would read and write the rows.

  A row's prompt is its tokens up to the first scored position. It is read in chunks of `chunk` tokens, and the row's
  other tokens are decoded one by one.

  Args:
    policy: resolved (`check_policy`).
    rows: at most `batch`; the results have B = `batch` rows.
    length: tokens of the longest row.
    width: C.
    steps: most decoded tokens of a row. Calls with equal length, width and steps share a compilation.
  """
  ends = [int(row.positions.min()) + 1 for row in rows]
  prompts = [row.tokens[:end] for row, end in zip(rows, ends, strict=True)] + [np.zeros(0, np.int32)] * (
    batch - len(rows)
  )
  tokens, lengths = np.zeros((batch, max(steps, 1)), np.int32), np.zeros(batch, np.int32)
  positions, targets = np.zeros((2, batch, width), np.int32)
  for b, (row, end) in enumerate(zip(rows, ends, strict=True)):
    lengths[b] = len(row.tokens) - end
    tokens[b, : lengths[b]] = row.tokens[end:]
    positions[b, : len(row.positions)], targets[b, : len(row.targets)] = row.positions - end, row.targets
  cache = cache_for_text(model, policy, batch, length)
  logits = place_like(model, np.zeros((batch, model.config.vocab_size), np.float32))

  def feed(part: Chunk) -> np.ndarray:
    nonlocal cache, logits
    cache, logits, stalled, _ = read_chunk(model, policy, cache, part.tokens, part.lengths, part.remaining, logits)
    return fetch(stalled)

  done = read_prompts(prompts, policy.chunk(chunk), feed)
  assert (done == [len(prompt) for prompt in prompts]).all(), "the cache has a slot for every token"
  return _continued_logprobs(model, policy, cache, logits, tokens, lengths, positions, targets)


def score(
  models: Sequence[tuple[Model, float | Policy | None]],
  rows: Sequence[Passage],
  *,
  batch: int = 1,
  chunk: int = 256,
  progress: Callable[[Any], Any] = lambda items: items,
  shaped_like: Sequence[Passage] | None = None,
) -> list[list[Scored]]:
  """The scores of every row under every model, [models][rows].

  Args:
    models: each with a policy, a threshold or None. Under a policy it reads the rows through a cache
      (`policy_logprobs`); the policy's numbers may be one for each of `rows`. With a threshold of its gates, or None to
      evict nothing, it scores whole texts at once; the results equal those of `DMS(threshold=...)` and `Vanilla()`.
    batch: rows at a time; the longest come first. On a mesh as many more as its devices need for equal parts.
    chunk: prompt tokens that are read at once under a policy.
    progress: wraps the iteration over batches.
    shaped_like: rows, of which `rows` are some, that set the compiled shapes; default `rows`. Batches of all rows, in
      calls of their own, then share compilations.

  Raises:
    ValueError: a policy that a model, or its mesh, cannot follow.
  """
  batch = max(rounded_rows(model, batch) for model, _ in models)
  models = [(model, check_policy(model, limit) if isinstance(limit, Policy) else limit) for model, limit in models]
  like = rows if shaped_like is None else shaped_like
  width = -(-max(len(row.targets) for row in like) // TARGETS) * TARGETS
  steps = max(len(row.tokens) - 1 - int(row.positions.min()) for row in like)
  order = sorted(range(len(rows)), key=lambda number: -len(rows[number].tokens))
  batches = [order[i : i + batch] for i in range(0, len(rows), batch)]
  out: list[list[Any]] = [[None] * len(rows) for _ in models]
  for numbers in progress(batches):
    length = -(-len(rows[numbers[0]].tokens) // BUCKET) * BUCKET
    tokens = np.zeros((batch, length), np.int32)
    lengths = np.ones(batch, np.int32)
    positions, targets = np.zeros((2, batch, width), np.int32)
    for b, number in enumerate(numbers):
      row = rows[number]
      tokens[b, : len(row.tokens)], lengths[b] = row.tokens, len(row.tokens)
      positions[b, : len(row.positions)], targets[b, : len(row.targets)] = row.positions, row.targets
    for scored, (model, limit) in zip(out, models, strict=True):
      if isinstance(limit, Policy):
        part = [rows[number] for number in numbers]
        own = of_rows(limit, len(rows), [*numbers, *numbers[:1] * (batch - len(numbers))])
        results = policy_logprobs(model, own, part, batch=batch, length=length, width=width, steps=steps, chunk=chunk)
      else:
        threshold = None if limit is None else np.float32(limit)
        results = token_logprobs(model, tokens, lengths, positions, targets, threshold)
      logprobs, greedy, held = fetch(results)
      for b, number in enumerate(numbers):
        count = len(rows[number].targets)
        own = None if held is None else held[:, b]
        scored[number] = Scored(logprobs[b, :count].astype(np.float64), greedy[b, :count], own)
  return out


def scores(question: Question, logprobs: Sequence[np.ndarray]) -> dict[str, float]:
  """All metrics of one question, from the log-probabilities [c] of each choice's tokens.

  `acc`: 100 if the likeliest choice is right, else 0. `acc_norm`: the same for the log-probability per character.
  `answer_loglik`: log-likelihood of the right choice, nats per token.
  """
  total = np.array([values.sum() for values in logprobs])
  characters = np.array([len(choice) for choice in question.choices])
  return {
    "acc": 100.0 * (total.argmax() == question.answer),
    "acc_norm": 100.0 * ((total / characters).argmax() == question.answer),
    "answer_loglik": float(logprobs[question.answer].mean()),
  }
