"""Prompts as token ids, one array a row, and the check that they fit the model and the cache."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Int

from dms_jax import cache as caches
from dms_jax.generation.conversation import Conversation, check_continues
from dms_jax.model import Model
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
    if len(pending) != len(prompts):
      raise ValueError(f"prompts: {len(prompts)}, but the conversation to continue has {len(pending)} rows")
    prompts = [[*([p] if p >= 0 else []), *ids] for p, ids in zip(pending, prompts, strict=True)]
  rows = [np.asarray(p, np.int32).reshape(-1) for p in prompts]
  for row, values in enumerate(rows):
    if not values.size:
      raise ValueError(f"prompts[{row}] is empty; give it at least one token")
    if values.min() < 0 or values.max() >= model.config.vocab_size:
      raise ValueError(f"prompts[{row}] has token ids outside 0..{model.config.vocab_size - 1}")
  return rows


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
  if total > model.config.max_position_embeddings:
    raise ValueError(
      f"{what} need {total} positions; the model has max_position_embeddings={model.config.max_position_embeddings}"
    )
  masked = kind == "masked"
  if past is not None:
    masked = isinstance(past.cache, caches.MaskedCache)
    held, seen = np.asarray(past.cache.live()).max(axis=(0, 2)), np.asarray(past.cache.seen)
    try:
      check_continues(policy, past.policy, held, seen)
    except ValueError as error:
      raise ValueError(f"policy: {error}") from None
    past.cache.check(policy)
  if capacity is not None and capacity < 1:
    raise ValueError(f"capacity={capacity} must be 1 or more")
  if masked or not policy.data_dependent:
    needed = total if masked else int(np.max(policy.capacity(total)))
    if capacity is not None and needed > capacity:
      raise ValueError(f"{what} need {needed} slots; capacity={capacity} is too small")
