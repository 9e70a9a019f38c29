"""`generate`: prompts in, text out, against a cache that DMS keeps small. The host's part of generation.

    model, tokenizer = dms_jax.load(path)
    out = dms_jax.generate(model, ["What is a cache?"], policy=dms_jax.DMS(window=64), max_new_tokens=256)
    out.text[0], out.metrics.achieved_cr
    more = dms_jax.generate(model, ["And a page?"], continue_from=out, max_new_tokens=256)

Prompts are read in chunks, tokens are decoded in compiled decode blocks (`decoding`); between them the host grows the cache
where it must, and streams what has been generated.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dms_jax import cache as caches
from dms_jax.cache import Cache
from dms_jax.cache.base import rounded
from dms_jax.execution import fastest_form
from dms_jax.generation import decode as decoding
from dms_jax.generation import stops
from dms_jax.generation.conversation import Conversation, place_like
from dms_jax.generation.decode import LENGTH, REASONS, RUNNING, Rows, StopCriteria
from dms_jax.generation.sampling import Sampling, row_keys
from dms_jax.metrics import Metrics
from dms_jax.model import Model, check_policy, decision_lag
from dms_jax.policies import DMS, Policy, Vanilla

Stream = Callable[[int, list[int], str], None]


@dataclasses.dataclass(frozen=True)
class Output:
  """What `generate` returns; lists have one entry a row.

  `text`: cut before a stop string, None without a tokenizer. `tokens`: all that were generated, an ending EOS or stop
  string included. `logprobs`: log_softmax of the raw logits at them. `finish_reason`: "eos", "stop", "length", or
  "capacity" where a fixed `capacity` was full (`continue_from` with a larger one goes on). `cache` holds everything but
  the last token and continues the conversation.
  """

  tokens: list[list[int]]
  logprobs: list[list[float]]
  finish_reason: list[str]
  metrics: Metrics
  cache: Conversation
  text: list[str] | None = None


def generate(
  model: Model,
  prompts: str | Sequence[str] | Sequence[int] | Sequence[Sequence[int]] | np.ndarray | None = None,
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

  Args:
    prompts: a string, strings, ids, lists of ids, or an id matrix [B, T], whose padding (on any side) `mask` excludes.
    policy: what becomes of tokens; default that of `continue_from`, else `DMS()` if the model has gates, `Vanilla()` if
      not.
    max_new_tokens: 0 only reads the prompts.
    key: one key, or one a row: row b's n-th token depends on its own key and n alone. Needed if temperature > 0.
    temperature: 0 is greedy; `top_k` and `top_p` then change nothing.
    stop: strings that end a row; looked for in what this call generates.
    eos: end rows at the tokenizer's and the model's EOS; or the ids that do.
    cache: "paged" (frees what each head evicts), "contiguous" (every head has the slots that the fullest needs) or "masked"
      (keeps and masks; for ablations). Default: pages where heads may hold different amounts, as with `DMS`, else
      slots. Pages take a half to a third of the memory of slots there; on a CPU a step takes 15 % longer, and each size
      to which a pool grows is compiled. `continue_from` brings its own.
    capacity: fixed slots a head, of pages on the average (tokens a row of a masked cache); default: starts small and
      grows as needed.
    continue_from: an earlier output or its `.cache`; prompts are the next turn, one a row, and may be empty (None: all
      empty) to simply go on. It is copied, not consumed.
    mask: bool [B, T], true where `prompts` holds a token.
    tokenizer: default `model.tokenizer`; needed for strings and `stop`.
    stream: called as `stream(row, tokens, text)` after each decode block with what is new; texts add up to `Output.text`.
    prefill_chunk, decode_block: tokens a prompt is read by, and decode steps a compiled call makes.
    history: keep `metrics.history`, tokens held by every head after every decode step.

  Raises:
    ValueError: bad arguments, prompts that are empty or do not fit the context or `capacity`; before any work, except
      where a fixed capacity proves too small for a prompt under a policy whose evictions cannot be foreseen.
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
    if value < least:
      raise ValueError(f"{name}={value} must be {least} or more")
  reader, stop_criteria = stop_criteria_of(model, tokenizer, (stop,) if isinstance(stop, str) else tuple(stop), eos)
  past = continue_from.cache if isinstance(continue_from, Output) else continue_from
  if policy is None:
    policy = past.policy if past is not None else DMS() if model.dms is not None else Vanilla()
  policy = check_policy(model, policy)
  if cache is None:
    cache = "paged" if policy.data_dependent else "contiguous"
  ids = read_prompts(model, prompts, mask, tokenizer, None if past is None else past.pending)
  batch = len(ids)
  if past is None:
    generated, seen = np.zeros(batch, np.int32), np.zeros(batch, np.int64)
  else:
    generated, seen = np.asarray(past.generated), np.asarray(past.cache.seen).astype(np.int64)
  lengths = seen + [len(row) for row in ids]
  _check_lengths(model, policy, cache, capacity, past, lengths, max_new_tokens)
  most = int(lengths.max()) + max(max_new_tokens - 1, 0)
  if cache != "masked" and (past is None or not isinstance(past.cache, caches.MaskedCache)):
    most = int(policy.capacity(most))  # slots that suffice whatever is kept
  store = _start(model, policy, cache, capacity, past, batch, most, prefill_chunk)

  metrics = Metrics.zero(model.config.num_layers, batch, model.config.num_kv_heads)
  rows = place_like(
    model,
    Rows(
      token=jnp.asarray(np.array([row[-1] for row in ids], np.int32)),
      keys=None if sampling.temperature is None else row_keys(key, batch),
      count=jnp.asarray(generated),
      limit=jnp.asarray(generated + max_new_tokens, jnp.int32),
      state=jnp.zeros(batch, jnp.int32),
      reason=jnp.full(batch, RUNNING if max_new_tokens else LENGTH, jnp.int32),
    ),
  )
  written = _Written([[] for _ in ids], [[] for _ in ids], [0] * batch)
  reason = np.asarray(rows.reason)
  if past is None or prompts is not None:  # else the pending tokens are all there is to read: decoding simply goes on
    store, logits, metrics = _prefill(model, policy, store, ids, metrics, prefill_chunk, capacity, most)
    if max_new_tokens:
      rows, emitted = decoding.first_token(rows, logits, sampling, stop_criteria)
      reason = _write(written, emitted, rows, reader, stream)
  steps = 0
  while (reason == RUNNING).any():
    store = store if capacity else store.ensure_capacity(policy, np.where(reason == RUNNING, decode_block, 0), most)
    store, rows, emitted, counts = decoding.decode_block(
      model, policy, store, rows, sampling, stop_criteria, steps=decode_block, history=history
    )
    metrics = metrics.add(counts, decode=True)
    steps += int(emitted.valid.any(axis=1).sum())
    reason = _write(written, emitted, rows, reader, stream)
  read_only = not max_new_tokens and prompts is not None
  pending = jnp.full(batch, -1, jnp.int32) if read_only else rows.token
  metrics = metrics.replace(
    seen=np.asarray(store.seen).astype(np.int64),
    new_tokens=np.array([len(t) for t in written.tokens]),
    bytes_live=store.bytes_live(),
    bytes_allocated=store.nbytes,
    history=None if metrics.history is None else metrics.history[:steps],
  )
  reasons = [REASONS[r] for r in np.asarray(rows.reason)]
  text = None
  if reader is not None:
    text = [reader.text(t, r) for t, r in zip(written.tokens, reasons, strict=True)]
  conversation = Conversation(store, pending, rows.count, policy)
  return Output(written.tokens, written.logprobs, reasons, metrics, conversation, text)


# Before any work ------------------------------------------------------------------------------------------------------


def stop_criteria_of(model: Model, tokenizer, stop: tuple[str, ...], eos: bool | Sequence[int]):
  """What turns tokens into text (None without a tokenizer), and what ends a row, for the graph."""
  if isinstance(eos, bool):
    ids = set(model.config.eos_token_ids) | set(getattr(tokenizer, "eos_token_ids", ())) if eos else set()
  else:
    ids = set(eos)
  stop_criteria = StopCriteria(jnp.asarray(np.array(sorted(ids), np.int32)))
  if not stop:
    return None if tokenizer is None else Detokenizer(tokenizer), stop_criteria
  if tokenizer is None:
    raise ValueError("stop: stop strings need a tokenizer; pass tokenizer=")
  reader = Detokenizer(tokenizer, stops.build(stop), tokenizer.token_bytes())
  table = stops.token_table(reader.automaton, reader.pieces, model.config.vocab_size)
  return reader, stop_criteria.replace(table=jnp.asarray(table))


def read_prompts(model: Model, prompts, mask, tokenizer, pending) -> list[np.ndarray]:
  """Each row's ids int32; in a conversation its `pending` token [B] comes before them, -1 for none."""
  if prompts is None:
    if pending is None:
      raise ValueError("prompts: nothing to generate from")
    prompts = [[]] * len(pending)
  if isinstance(prompts, str):
    prompts = [prompts]
  elif hasattr(prompts, "ndim"):
    prompts = np.atleast_2d(np.asarray(prompts))
  if mask is not None or (hasattr(prompts, "ndim") and prompts.ndim == 2):
    matrix = np.asarray(prompts)
    mask = np.ones(matrix.shape, bool) if mask is None else np.asarray(mask).astype(bool)
    if matrix.ndim != 2 or mask.shape != matrix.shape:
      raise ValueError(f"mask {mask.shape} does not fit prompts {matrix.shape}; both must be [B, T]")
    prompts = [row[keep] for row, keep in zip(matrix, mask, strict=True)]
  elif len(prompts) and all(isinstance(p, int | np.integer) for p in prompts):
    prompts = [prompts]
  if not len(prompts):
    raise ValueError("prompts: there are none")
  if any(isinstance(p, str) for p in prompts):
    if tokenizer is None:
      raise ValueError("prompts: strings need a tokenizer, and this model brings none; pass tokenizer=")
    prompts = [tokenizer.encode(p) if isinstance(p, str) else p for p in prompts]
    if pending is not None and tokenizer.adds_bos:  # a later turn does not begin a text
      prompts = [p[1:] if p[:1] == [tokenizer.bos_token_id] else p for p in prompts]
  if pending is not None:
    pending = np.asarray(pending)
    if len(pending) != len(prompts):
      raise ValueError(f"prompts: {len(prompts)}, but the conversation to continue has {len(pending)} rows")
    prompts = [[*([p] if p >= 0 else []), *ids] for p, ids in zip(pending, prompts, strict=True)]
  ids = [np.asarray(p, np.int32).reshape(-1) for p in prompts]
  for row, values in enumerate(ids):
    if not values.size:
      raise ValueError(f"prompts[{row}] is empty; give it at least one token")
    if values.min() < 0 or values.max() >= model.config.vocab_size:
      raise ValueError(f"prompts[{row}] has token ids outside 0..{model.config.vocab_size - 1}")
  return ids


def _check_lengths(model, policy, kind, capacity, past, lengths, max_new_tokens) -> None:
  """Refuses what is known not to fit."""
  row = int(lengths.argmax())
  what = f"prompts[{row}]: {lengths[row]} tokens with earlier turns, and max_new_tokens={max_new_tokens},"
  total = int(lengths[row]) + max_new_tokens
  if total > model.config.max_position_embeddings:
    raise ValueError(
      f"{what} need {total} positions; the model has max_position_embeddings={model.config.max_position_embeddings}"
    )
  masked = kind == "masked"
  if past is not None:
    masked = isinstance(past.cache, caches.MaskedCache)
    if past.cache.window != policy.window:
      raise ValueError(f"policy window={policy.window}, but the conversation has window={past.cache.window}")
    if not policy.continues(type(past.policy)):
      names = " cannot go on under ".join(type(p).__name__ for p in (past.policy, policy))
      raise ValueError(f"policy: a conversation held under {names}, as their caches hold different tokens")
    past.cache.check(policy)
  if capacity is not None and capacity < 1:
    raise ValueError(f"capacity={capacity} must be 1 or more")
  if masked or not policy.data_dependent:
    needed = total if masked else int(policy.capacity(total))
    if capacity is not None and needed > capacity:
      raise ValueError(f"{what} need {needed} slots; capacity={capacity} is too small")


# The cache ------------------------------------------------------------------------------------------------------------


def _start(model, policy, kind, capacity, past, batch, most, chunk) -> Cache:
  """An empty cache, or a copy of the conversation's: compiled calls donate theirs."""
  longest = rounded(most)  # few shapes: each is compiled
  if past is not None:
    copy = jax.tree.map(jnp.copy, past.cache)
    return copy if capacity is None else copy.with_capacity(capacity, longest)
  if capacity is None:  # half of what the text could need at most; of pages, which grow with less waste, an eighth
    small = policy.data_dependent and kind != "masked"
    start = chunk + most // 8 if kind == "paged" else max(chunk, most // 2)
    capacity = rounded(min(policy.window + 1 + start, most) if small else most)
  store = caches.create(
    kind, model.config, batch=batch, capacity=capacity, longest=longest, policy=policy,
    lag=decision_lag(model, policy.window), dtype=model.dtype,
  )  # fmt: skip
  return place_like(model, store)


def _prefill(model, policy, store, ids, metrics, chunk, capacity, most):
  """Reads all prompts, each row from its own start in chunks of its own; returns (cache, logits [B, V], metrics)."""
  batch, done = len(ids), np.zeros(len(ids), np.int64)
  total = np.array([len(row) for row in ids])
  logits = place_like(model, jnp.zeros((batch, model.config.vocab_size), jnp.float32))
  while (done < total).any():
    take = np.minimum(total - done, chunk)
    store = store if capacity else store.ensure_capacity(policy, take, most)
    width = chunk
    if capacity:
      take = np.minimum(take, np.asarray(store.free_tokens(policy)).clip(0))
    if not take.any():  # A fixed cache is nearly full: single tokens know what they displace, chunks must assume.
      width, take = 1, np.minimum(total - done, 1)
    tokens = np.zeros((batch, width), np.int32)
    for b, n in enumerate(take):
      tokens[b, :n] = ids[b][done[b] : done[b] + n]
    store, logits, stalled, counts = decoding.prefill_chunk(
      model, policy, store, tokens, take.astype(np.int32), (take > 0) & (done + take == total), logits
    )
    metrics = metrics.add(counts, decode=False)
    took = np.where(np.asarray(stalled), 0, take)
    if not took.any():
      row = int((done < total).argmax())
      raise ValueError(
        f"prompts[{row}]: {done[row]} of {total[row]} tokens fill capacity={store.slots}; give a larger one, or "
        "none to let the cache grow"
      )
    done += took
  return store, logits, metrics


# What has been generated ----------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Detokenizer:
  """Turns generated tokens into text. `automaton` (of the stop strings) and `pieces` (bytes of each id) or neither."""

  tokenizer: Any
  automaton: stops.Automaton | None = None
  pieces: Sequence[bytes] = ()

  def text(self, tokens: Sequence[int], reason: str) -> str:
    """The text of a row's generated tokens as far as it is resolved.

    A row that ended at a stop string is cut before it. Of a row still "running", what may become a stop string, or is
    not a whole character yet, is held back.
    """
    text = self.tokenizer.decode(list(tokens))
    if reason == "running":
      text = text.rstrip("\ufffd")
    if self.automaton is None or reason not in ("running", "stop"):
      return text
    data = b"".join(self.pieces[t] for t in tokens if t < len(self.pieces))
    if reason == "stop":
      tail = data[stops.find(self.automaton, data) :].decode("utf-8", "replace")
    else:
      tail = data[len(data) - stops.unsettled(self.automaton, data) :].decode("utf-8", "ignore")
    return text[: len(text) - len(tail)] if tail and text.endswith(tail) else text


@dataclasses.dataclass
class _Written:
  """The rows' tokens and log-probabilities so far, and how many characters have been streamed."""

  tokens: list[list[int]]
  logprobs: list[list[float]]
  streamed: list[int]


def _write(written: _Written, emitted, rows: Rows, reader: Detokenizer | None, stream: Stream | None) -> np.ndarray:
  """Appends a decode block's tokens, streams them, and returns each row's reason [B]."""
  emitted, reason = jax.device_get((emitted, rows.reason))
  for b, valid in enumerate(emitted.valid.T):
    new = emitted.tokens[valid, b].tolist()
    written.tokens[b] += new
    written.logprobs[b] += emitted.logprobs[valid, b].tolist()
    text = ""
    if stream is not None and reader is not None:
      whole = reader.text(written.tokens[b], REASONS[reason[b]])
      text, written.streamed[b] = whole[written.streamed[b] :], len(whole)
    if stream is not None and (new or text):
      stream(b, new, text)
  return reason
