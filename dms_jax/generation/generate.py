"""`generate`: the host's part of generation, from prompts to text.

    model, tokenizer = dms_jax.load(path)
    out = dms_jax.generate(model, ["What is a cache?"], policy=dms_jax.DMS(window=64), max_new_tokens=256)
    out.text[0], out.metrics.achieved_cr
    more = dms_jax.generate(model, ["And a page?"], continue_from=out, max_new_tokens=256)

Prompts are read in chunks (`prefill`), and tokens are decoded in compiled blocks (`decode`). Between them the host
grows the cache if needed, and streams the new tokens and text.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from dms_jax import cache as caches
from dms_jax.cache import Cache
from dms_jax.cache.base import rounded
from dms_jax.cache.sliding import most_slots
from dms_jax.decoder import Model
from dms_jax.execution import fastest_form
from dms_jax.generation import decode as decoding
from dms_jax.generation.conversation import Conversation, conversation_of, moved, place_like
from dms_jax.generation.decode import (
  LENGTH,
  NAN,
  NOT_FINITE,
  NOT_FINITE_ADVICE,
  REASONS,
  RUNNING,
  DecodeState,
  Emitted,
)  # fmt: skip
from dms_jax.generation.detokenize import Detokenizer
from dms_jax.generation.growth import Growth
from dms_jax.generation.layerwise import decode_block as decode_steps
from dms_jax.generation.layerwise import lower_steps, read_chunk, steps_apart
from dms_jax.generation.prefill import Chunk, read_prompts
from dms_jax.generation.prompts import Prompts, check_lengths, prompt_ids
from dms_jax.generation.results import ChainUsage, Used, add_prompts
from dms_jax.generation.sampling import Sampling, row_keys
from dms_jax.generation.stops import StopStrings, stop_criteria
from dms_jax.metrics import Counts, Metrics
from dms_jax.model import check_policy
from dms_jax.policies import Policy
from dms_jax.policies.base import is_whole
from dms_jax.processes import fetch
from dms_jax.spmd import check as check_mesh

Stream = Callable[[int, list[int], str], None]


@dataclasses.dataclass(frozen=True)
class Output(Used):
  """What `generate` returns; lists have one entry a row.

  `text`: cut before a stop string; None without a tokenizer. `tokens`: all generated tokens, including the EOS or stop
  string that ended the row. `logprobs`: log-probabilities of the tokens by the raw logits, nats. `finish_reason`:
  "eos", "stop", "length", or "capacity" if a fixed `capacity` was full (pass `continue_from` and a larger one to
  continue). `conversation`: what a later turn needs; its `cache` holds all tokens but the last. `usage`: tokens held
  and keys read by each step of each row, and `seen`, `held`, `peak` and `reads` its sums.
  """

  tokens: list[list[int]]
  logprobs: list[list[float]]
  finish_reason: list[str]
  metrics: Metrics
  conversation: Conversation
  text: list[str] | None = None
  usage: list[ChainUsage] = dataclasses.field(default_factory=list)


def generate(
  model: Model,
  prompts: Prompts | None = None,
  *,
  policy: Policy | None = None,
  max_new_tokens: int = 256,
  key: jax.Array | None = None,
  temperature: float = 0.0,
  top_k: int | None = None,
  top_p: float | None = None,
  stop: str | Sequence[str] = (),
  eos: bool | Sequence[int] = True,
  cache: str | None = None,
  capacity: int | None = None,
  continue_from: Output | Conversation | None = None,
  mask: np.ndarray | None = None,
  tokenizer: Any = None,
  stream: Stream | None = None,
  prefill_chunk: int = 256,
  decode_block: int = 32,
  history: bool = False,
) -> Output:
  """Continues each prompt by up to `max_new_tokens` tokens.

  All rows begin together, and a row that has ended keeps its place and its memory until the last one ends: a step costs
  what it costs with all rows running. `Generator` gives the place to another request.

  Args:
    prompts: a string, strings, ids, lists of ids, or an id matrix [B, T], whose padding (on any side) `mask` excludes.
    policy: decides what the cache keeps. Default: the policy of `continue_from`; without it `DMS()` for a model with
      gates, else `Vanilla()`. Where all rows have one CR and the model has low-rank updates by each row's CR
      (`LoRAConfig.by_cr`), `model.at(cr)` with `DMS()` instead of `DMS(cr=cr)` decodes faster: its updates are merged.
      That is not done here, because a row's numbers would then depend on the CRs of the rows beside it.
    max_new_tokens: 0 only reads the prompts.
    key: one key, or one a row; needed if temperature > 0. Row b's n-th token depends only on its key and n.
    temperature: 0 is greedy; `top_k` and `top_p` then change nothing.
    stop: strings that end a row when this call generates them.
    eos: true: the end tokens of the tokenizer and the model's config end a row; false: none; or the ids that end it.
    cache: "paged" (frees the tokens that each head evicts), "contiguous" (every head has as many slots as the fullest
      head needs) or "masked" (keeps and masks all tokens, for ablations). Default: "paged" if heads may hold different
      numbers of tokens, as with `DMS`, else "contiguous". A paged cache then takes a half to a third of the memory of a
      contiguous one; on a CPU a step takes 15 % longer, and each size of the growing pool is compiled. `continue_from`
      has its own cache.
    capacity: fixed slots a head; in a paged cache the mean over heads, in a masked cache tokens a row. Default: the
      cache starts small and grows as needed.
    continue_from: an earlier output or conversation, which is copied, not consumed. `prompts` are then the next turn,
      one a row; an empty prompt (None: all empty) continues the answer.
    mask: bool [B, T], true where `prompts` holds a token.
    tokenizer: default `model.tokenizer`; needed for strings and `stop`.
    stream: called as `stream(row, new tokens, new text)` after each decode block; the texts add up to `Output.text`.
    prefill_chunk: prompt tokens of each row that one compiled call reads.
    decode_block: decode steps of one compiled call.
    history: keep `metrics.history`, the tokens that each head holds after each decode step.

  Returns:
    An `Output` of B rows.

  Raises:
    ValueError: bad arguments, or prompts that are empty or do not fit the context or `capacity`. It comes before any
      work, unless evictions depend on the data and a fixed capacity turns out too small for a prompt, or a row's logits
      are not finite.
  """
  tokenizer = model.tokenizer if tokenizer is None else tokenizer
  model = fastest_form(model.replace(tokenizer=None))
  sampling = Sampling.create(temperature, top_k, top_p)
  if sampling.temperature is not None and key is None:
    raise ValueError("sampling at temperature > 0 needs key=jax.random.key(seed)")
  for name, value, least in (
    ("max_new_tokens", max_new_tokens, 0),
    ("prefill_chunk", prefill_chunk, 1),
    ("decode_block", decode_block, 1),
  ):
    if not is_whole(value) or value < least:
      raise ValueError(f"{name}={value!r:.80} must be {least} or more, a whole number")
  longest = model.config.max_position_embeddings  # no more tokens are ever read, decoded or held
  prefill_chunk, decode_block = min(prefill_chunk, longest), min(decode_block, longest)
  if capacity is not None:
    if not is_whole(capacity) or capacity < 1:
      raise ValueError(f"capacity={capacity!r:.80} must be 1 or more slots, a whole number")
    capacity = min(capacity, rounded(longest))
  strings = StopStrings.create(stop, tokenizer)
  criteria = stop_criteria(model, tokenizer, strings, eos)
  if stream is not None and not callable(stream):
    raise ValueError(f"stream={stream!r:.80} must be a function of (row, new tokens, new text)")
  past, pending = conversation_of(continue_from), None
  if not isinstance(past, Conversation | None):
    raise ValueError(f"continue_from={past!r:.80} must be an earlier output or conversation")
  if past is not None:
    past = moved(model, past)
    pending, generated = fetch((past.pending, past.generated))
  policy = check_policy(model, past.policy if policy is None and past is not None else policy)
  prefill_chunk = policy.chunk(prefill_chunk)
  cache = cache or caches.default_kind(policy, model.config)
  ids = prompt_ids(model, prompts, mask, tokenizer, pending)
  batch = len(ids)
  if past is None:
    generated, seen = np.zeros(batch, np.int32), np.zeros(batch, np.int64)
  else:
    seen = np.asarray(past.cache.seen).astype(np.int64)
  lengths = seen + [len(row) for row in ids]
  check_lengths(model, policy, cache, capacity, past, lengths, max_new_tokens)
  most = int(lengths.max()) + max(max_new_tokens - 1, 0)
  if cache != "masked" and (past is None or caches.kind_of(past.cache) != "masked"):
    most = most_slots(policy, model.config, most)  # slots that suffice for any evictions
  if model.mesh is not None:
    check_mesh(model, model.mesh, policy)
  store = _start(model, policy, cache, capacity, past, batch, most, prefill_chunk)

  # A row without a prompt in this turn has its pending token alone, which decoding feeds.
  goes_on = np.array([past is not None and pending[row] >= 0 and len(new) == 1 for row, new in enumerate(ids)])
  usage = _usage(model, past, np.where(goes_on, seen, lengths), ~goes_on & (max_new_tokens > 0))
  metrics = Metrics.zero(model.config.num_layers, batch, model.config.num_kv_heads)
  state = place_like(
    model,
    DecodeState(
      token=np.array([row[-1] for row in ids], np.int32),
      keys=None if sampling.temperature is None else row_keys(key, batch),
      count=generated,
      limit=generated + np.int32(max_new_tokens),
      stop_state=np.zeros(batch, np.int32),
      reason=(reason := np.full(batch, RUNNING if max_new_tokens else LENGTH, np.int32)),
    ),
  )
  written = [_Row(Detokenizer.create(tokenizer, strings, new), own) for new, own in zip(ids, usage, strict=True)]
  if not goes_on.all():
    new = [row[:0] if going else row for row, going in zip(ids, goes_on, strict=True)]
    store, logits, metrics = _read(model, policy, store, new, metrics, usage, prefill_chunk, capacity, most)
    if max_new_tokens:
      state, emitted = decoding.first_token(state, logits, ~goes_on, sampling, criteria)
      reason = _write(written, emitted, state, stream)
  lower = lambda shapes: lower_steps(
    model, policy, shapes, state, sampling, criteria, steps=decode_block, history=history
  )
  growth = Growth(policy, most, lower if model.mesh is None and steps_apart(model, policy, store) else None)
  steps = 0
  while (reason == RUNNING).any():
    if capacity is None:
      left = np.array([max_new_tokens - len(row.tokens) for row in written])
      store = growth.fit(store, np.where(reason == RUNNING, decode_block, 0), left)
    store, state, emitted, counts = decode_steps(
      model, policy, store, state, sampling, criteria, steps=decode_block, history=history
    )
    metrics = metrics.add(counts, decode=True)
    emitted = fetch(emitted)
    steps += int(emitted.valid.any(axis=1).sum())
    reason = _write(written, emitted, state, stream, counts)
  if (broken := np.flatnonzero(reason == NAN)).size:
    raise ValueError(
      f"prompts[{broken[0]}]: {NOT_FINITE}, after {len(written[broken[0]].tokens)} new tokens; {NOT_FINITE_ADVICE}"
    )
  for own in usage:
    own.join()
  tokens = [row.tokens for row in written]
  metrics = metrics.replace(
    seen=np.asarray(store.seen).astype(np.int64),
    new_tokens=np.array([len(row) for row in tokens]),
    bytes_live=store.bytes_live(),
    bytes_allocated=store.nbytes,
    history=None if metrics.history is None else metrics.history[:steps],
  )
  pending = state.token if max_new_tokens else jnp.where(goes_on, state.token, -1)
  reasons = [REASONS[r] for r in reason]
  text = None if tokenizer is None else [row.text(why) for row, why in zip(written, reasons, strict=True)]
  conversation = Conversation(store, pending, state.count, policy)
  return Output(tokens, [row.logprobs for row in written], reasons, metrics, conversation, text, usage)


def _usage(model, past, read, sampled) -> list[ChainUsage]:
  """The usage of rows that begin.

  Args:
    read: tokens [B] that each row will have read before its first decode step.
    sampled: rows [B] whose first token follows their prompt.
  """
  held = np.zeros(len(read), np.int64) if past is None else np.asarray(past.cache.live()).sum(axis=(0, 2))
  heads = model.config.num_layers * model.config.num_kv_heads
  return [
    ChainUsage(heads, int(total), int(before), int(before), sampled=int(first))
    for total, before, first in zip(read, held, sampled, strict=True)
  ]


def _start(model, policy, kind, capacity, past, batch, most, chunk) -> Cache | caches.ShardedCache:
  """An empty cache, or a copy of the conversation's cache, because compiled calls donate their cache."""
  longest = rounded(most)  # few shapes, because each is compiled
  if past is not None:
    copy = jax.tree.map(jnp.copy, past.cache)
    return copy if capacity is None else copy.with_capacity(capacity, longest)
  if capacity is None:  # start with half of `most`; with an eighth in pages, which grow with less waste
    small = (policy.data_dependent or model.config.sliding_layers) and kind != "masked"
    start = chunk + most // 8 if kind == "paged" else max(chunk, most // 2)
    capacity = rounded(min(policy.window + 1 + start, most) if small else most)
  store = caches.for_model(model, policy, batch=batch, capacity=capacity, kind=kind, longest=longest)
  return place_like(model, store)


def _read(
  model, policy, store, ids, metrics, usage, chunk, capacity, most
) -> tuple[Cache | caches.ShardedCache, Array, Metrics]:
  """Reads all prompts; returns (cache, logits [B, V] after them, metrics)."""
  logits = place_like(model, np.zeros((len(ids), model.config.vocab_size), np.float32))

  def fitting(lengths: np.ndarray) -> np.ndarray:
    nonlocal store
    if capacity is not None:
      return np.minimum(lengths, np.asarray(store.free_tokens(policy)).clip(0))
    store = store.ensure_capacity(policy, lengths, most)
    return lengths

  def feed(part: Chunk) -> np.ndarray:
    nonlocal store, logits, metrics
    store, logits, stalled, counts = read_chunk(model, policy, store, part.tokens, part.lengths, part.remaining, logits)
    stalled, counts = fetch((stalled, counts))
    metrics = metrics.add(counts, decode=False)
    add_prompts(usage, counts)
    return stalled

  read = read_prompts(ids, chunk, feed, fitting=fitting)
  for row, (done, total) in enumerate(zip(read, map(len, ids), strict=True)):
    if done < total:
      raise ValueError(
        f"prompts[{row}]: {done} of {total} tokens fill capacity={store.slots}; give a larger one, or "
        "none to let the cache grow"
      )
  return store, logits, metrics


# Generated text -------------------------------------------------------------------------------------------------------


@dataclasses.dataclass
class _Row:
  """The tokens that a row has generated so far."""

  detokenizer: Detokenizer | None
  usage: ChainUsage
  tokens: list[int] = dataclasses.field(default_factory=list)
  logprobs: list[float] = dataclasses.field(default_factory=list)

  def text(self, reason: str) -> str:
    """The whole text of the row."""
    self.detokenizer.advance(self.tokens, reason)
    return self.detokenizer.text


def _write(
  written: list[_Row], emitted: Emitted, state: DecodeState, stream: Stream | None, counts: Counts | None = None
) -> np.ndarray:
  """Appends a decode block's tokens and usage, streams the tokens, and returns each row's reason [B].

  Args:
    counts: of the block; None for tokens that no step made.
  """
  spent = None if counts is None else (counts.held, counts.step_reads)
  emitted, reason, spent = fetch((emitted, state.reason, spent))
  for b, (row, valid) in enumerate(zip(written, emitted.valid.T, strict=True)):
    new = emitted.tokens[valid, b].tolist()
    row.tokens += new
    row.logprobs += emitted.logprobs[valid, b].tolist()
    if new and spent is not None:
      row.usage.steps.append((spent[0][valid, b], spent[1][valid, b]))
    if stream is None:
      continue
    text = "" if row.detokenizer is None else row.detokenizer.advance(row.tokens, REASONS[reason[b]])
    if new or text:
      stream(b, new, text)
  return reason
