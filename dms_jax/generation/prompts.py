"""Prompts as token ids, one array a row, and the check that they fit the model and the cache."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Int

from dms_jax import cache as caches
from dms_jax.cache.sliding import most_slots
from dms_jax.decoder import Model
from dms_jax.generation.conversation import Conversation, check_continues
from dms_jax.policies import Policy, check_rows

Prompts = str | Sequence[str] | Sequence[int] | Sequence[Sequence[int]] | np.ndarray


def prompt_ids(
  model: Model, prompts: Prompts | None, mask: Any, tokenizer: Any, pending: Int[np.ndarray, "B"] | None
) -> list[Int[np.ndarray, "T"]]:
  """The token ids of each row, int32.

  Args:
    prompts: a string, strings, ids, lists of ids, or an id matrix [B, T]; None: an empty prompt for each row of
      the conversation.
    mask: bool [B, T], true where `prompts` holds a token; None: everywhere.
    tokenizer: needed only for strings.
    pending: in a conversation, the token [B] that comes before each row's prompt, -1 for none; None: no conversation.

  Raises:
    ValueError: no rows, an empty row, ids outside the vocabulary, strings without a tokenizer, or arguments of
      different shapes.
  """
  if prompts is None:
    if pending is None:
      raise ValueError("prompts: nothing to generate from")
    prompts = [[]] * len(pending)
  if isinstance(prompts, str):
    prompts = [prompts]
  elif hasattr(prompts, "ndim"):
    prompts = np.atleast_2d(np.asarray(prompts))
  elif not isinstance(prompts, Sequence) or isinstance(prompts, bytes | bytearray):
    raise ValueError(f"prompts: {type(prompts).__name__}; pass a string, strings, ids, lists of ids, or an id matrix")
  if mask is not None or (hasattr(prompts, "ndim") and prompts.ndim == 2):
    try:
      matrix = np.asarray(prompts)
    except ValueError:
      raise ValueError("mask: needs prompts as an id matrix [B, T]; these have different lengths") from None
    mask = np.ones(matrix.shape, bool) if mask is None else np.asarray(mask)
    if matrix.ndim != 2 or mask.shape != matrix.shape:
      raise ValueError(f"mask {mask.shape} does not fit prompts {matrix.shape}; both must be [B, T]")
    if mask.dtype != bool and not np.isin(mask, (0, 1)).all():
      raise ValueError(f"mask: {mask.dtype} values that are not 0 or 1; pass bool [B, T]")
    prompts = [row[keep] for row, keep in zip(matrix, mask.astype(bool), strict=True)]
  elif len(prompts) and all(isinstance(p, int | np.integer) for p in prompts):
    prompts = [prompts]
  if not len(prompts):
    raise ValueError("prompts: there are none")
  if any(isinstance(p, str) for p in prompts):
    if tokenizer is None:
      raise ValueError("prompts: strings need a tokenizer, and this model brings none; pass tokenizer=")
    prompts = [_encoded(tokenizer, row, p, pending is not None) for row, p in enumerate(prompts)]
  rows = [_ids(row, p, model.config.vocab_size) for row, p in enumerate(prompts)]
  if pending is not None:
    if len(pending) != len(rows):
      raise ValueError(f"prompts: {len(rows)}, but the conversation to continue has {len(pending)} rows")
    before = [np.array([p] if p >= 0 else [], np.int32) for p in pending]
    rows = [np.concatenate(parts) for parts in zip(before, rows, strict=True)]
  for row, values in enumerate(rows):
    if not values.size:
      raise ValueError(f"prompts[{row}] is empty; give it at least one token")
  return rows


def _encoded(tokenizer: Any, row: int, prompt: Any, later: bool) -> Any:
  """The ids of a string; a later turn does not begin a text. Ids stay as they are."""
  if not isinstance(prompt, str):
    return prompt
  try:
    ids = tokenizer.encode(prompt)
  except ValueError as error:
    raise ValueError(f"prompts[{row}]: {error}") from None
  first = getattr(tokenizer, "prefix_ids", []) if later else []
  return ids[len(first) :] if ids[: len(first)] == first else ids


def _ids(row: int, prompt: Any, vocab_size: int) -> Int[np.ndarray, "T"]:
  """One row's ids as int32, checked before they are converted, which would cut and wrap them."""
  try:
    ids = np.asarray(prompt)
  except ValueError:
    raise ValueError(f"prompts[{row}] is nested; a row is a list of token ids") from None
  if ids.ndim != 1:
    raise ValueError(f"prompts[{row}] has shape {ids.shape}; a row is a list of token ids")
  if ids.size and ids.dtype.kind not in "iu":  # whole numbers beyond 64 bits are objects
    wrong = next((one for one in ids.tolist() if type(one) is not int), None)
    if wrong is not None:
      raise ValueError(f"prompts[{row}] holds {wrong!r:.80}; token ids are whole numbers")
  if ids.size and (ids.min() < 0 or ids.max() >= vocab_size):
    raise ValueError(f"prompts[{row}] has token ids outside 0..{vocab_size - 1}")
  return ids.astype(np.int32)


def check_positions(model: Model, tokens: int, max_new_tokens: int, what: str) -> None:
  """Raises ValueError, of `what`, if `tokens` tokens of a prompt and the new ones are more than the model's context."""
  needed = tokens + max_new_tokens - (max_new_tokens > 0)  # the last token is sampled and not read
  if needed > (most := model.config.max_position_embeddings):
    raise ValueError(f"{what} need {needed} positions; the model has max_position_embeddings={most}")


def check_lengths(
  model: Model, policy: Policy, kind: str, capacity: int | None, past: Conversation | None,
  lengths: Int[np.ndarray, "B"], max_new_tokens: int,
) -> None:  # fmt: skip
  """Refuses prompts that are known not to fit, before any work.

  Args:
    kind: the kind of cache of a new conversation; `past` has its own cache.
    capacity: slots a head; None: the cache grows as needed.
    lengths: tokens of each row after its prompt, earlier turns included.

  Raises:
    ValueError: a text longer than the model's context or the capacity, or a policy that cannot continue `past`.
  """
  check_rows(policy, len(lengths))
  row = int(lengths.argmax())
  what = f"prompts[{row}]: {lengths[row]} tokens with earlier turns, and max_new_tokens={max_new_tokens},"
  total = int(lengths[row]) + max_new_tokens
  check_positions(model, int(lengths[row]), max_new_tokens, what)
  masked = kind == "masked"
  if past is not None:
    masked = isinstance(past.cache, caches.MaskedCache)
    held, seen = np.asarray(past.cache.live()), np.asarray(past.cache.seen)
    held = held[model.config.global_layers].max(axis=(0, 2))
    try:
      check_continues(policy, past.policy, held, seen)
    except ValueError as error:
      raise ValueError(f"policy: {error}") from None
    past.cache.check(policy)
  if masked or not policy.data_dependent:
    needed = total if masked else most_slots(policy, model.config, total)
    if capacity is not None and needed > capacity:
      raise ValueError(f"{what} need {needed} slots; capacity={capacity} is too small")
