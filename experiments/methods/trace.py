"""Traces: which tokens of a chain each layer and head still holds when the chain ends.

A trace is made after the fact: the chain's tokens are read again through a `MaskedCache`, the prompt in chunks and the
written tokens one by one, as generation does. The masked cache keeps every token at its own position, so its decisions
say which tokens are held. Traces are optional JSON lines, `traces.jsonl` beside the records of a run.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int

from dms_jax import cache as caches
from dms_jax import spmd
from dms_jax.cache.base import rounded
from dms_jax.generation.prefill import Chunk, read_prompts
from dms_jax.model import Model, cached_forward, check_policy
from dms_jax.policies import Policy
from dms_jax.processes import fetch
from dms_jax.spmd import on_mesh, row_parts
from dms_jax.tokenizer import Tokenizer
from experiments.common import files, program
from experiments.methods.method import Method
from experiments.methods.records import START, Chain, Record, build, field_types

FILE = "traces.jsonl"


@dataclasses.dataclass(frozen=True)
class Trace(Chain):
  """What the cache holds at the end of one chain.

  Fields:
    read: tokens of the prompt; the others are written.
    tokens: text of each token. A character of several tokens stands at the last of them.
    held: for each token the share of (layer, KV head) pairs that hold it, 0 to 1. The window counts as held. A token
      that a policy merged into another is not held.
    retention: [L][K], share of the chain's tokens that each KV head holds, 0 to 1.
  """

  read: int
  tokens: list[str]
  held: list[float]
  retention: list[list[float]]


FIELDS = field_types(Trace)


def chain_of(about: Chain) -> tuple:
  """Identifies the chain of a record or trace within a run: its key without the seed, which earlier traces lack."""
  return dataclasses.replace(about, seed=None).key


@partial(jax.jit, donate_argnames="cache")
@on_mesh(spmd.CACHE)
def _read(model: Model, policy: Policy, cache: caches.MaskedCache, tokens, lengths, remaining):
  return (cached_forward(model, policy, cache, tokens, lengths, remaining=remaining)[1],)


@jax.jit
@on_mesh(spmd.HEADS)
def _decode(
  model: Model, policy: Policy, cache: caches.MaskedCache, tokens: Int[Array, "B T"], lengths: Int[Array, "B"]
) -> tuple[Bool[Array, "L B K S"]]:
  """Which positions each head holds after `lengths` more tokens."""

  def step(cache, inputs):
    index, token = inputs
    return cached_forward(model, policy, cache, token[:, None], (index < lengths).astype(jnp.int32))[1], None

  cache, _ = jax.lax.scan(step, cache, (jnp.arange(tokens.shape[1]), tokens.T))
  age = (cache.seen[:, None] - 1 - jnp.arange(cache.slots))[:, None]
  return ((age >= 0) & ((age <= cache.window) | ~cache.evicted),)


def held_at_end(
  model: Model, policy: Policy, tokens: Sequence[int], read: int, *, chunk: int = 256
) -> Bool[np.ndarray, "L K T"]:
  """Whether each KV head holds each token after the last one was read; a merged token counts as forgotten.

  Args:
    policy: under which the chain was written.
    tokens: ids of the prompt and of the text written after it.
    read: tokens of the prompt, which are read in chunks of `chunk`; the others are decoded one by one.

  Raises:
    ValueError: there are no tokens, `read` is not among them, or the model cannot follow the policy.
  """
  ids = np.asarray(tokens, np.int32)
  if not 0 < read <= len(ids):
    raise ValueError(f"a trace needs 1 to {len(ids)} tokens of a prompt, not {read}")
  policy, rows = check_policy(model, policy), row_parts(model)  # on a mesh all but one device's rows are empty
  size = rounded(len(ids))  # few sizes, so that chains of similar length share a compilation
  cache = caches.for_model(model, policy, batch=rows, capacity=size, kind="masked")

  def feed(part: Chunk) -> np.ndarray:
    nonlocal cache
    (cache,) = _read(model, policy, cache, part.tokens, part.lengths, part.remaining)
    return np.zeros(rows, bool)

  read_prompts([ids[:read], *[ids[:0]] * (rows - 1)], policy.chunk(chunk), feed)
  written, lengths = np.zeros((rows, rounded(len(ids) - read)), np.int32), np.zeros(rows, np.int32)
  lengths[0] = len(ids) - read
  written[0, : lengths[0]] = ids[read:]
  (held,) = fetch(_decode(model, policy, cache, written, lengths))
  return held[:, 0, :, : len(ids)]


def pieces(tokenizer: Tokenizer, tokens: Sequence[int]) -> list[str]:
  """The text of each token; bytes of an unfinished character wait for the token that completes it."""
  table, waiting, found = tokenizer.token_bytes(), b"", []
  for token in tokens:
    waiting += table[int(token)]
    try:
      found.append(waiting.decode())
      waiting = b""
    except UnicodeDecodeError as error:
      unfinished = error.reason == "unexpected end of data" and len(waiting) - error.start < 4
      end = error.start if unfinished else len(waiting)
      found.append(waiting[:end].decode(errors="replace"))
      waiting = waiting[end:]
  return [*found[:-1], found[-1] + waiting.decode(errors="replace")] if found else []


def trace(
  model: Model, policy: Policy, tokenizer: Tokenizer, tokens: Sequence[int], read: int, record: Record,
  *, chunk: int = 256,
) -> Trace:  # fmt: skip
  """The trace of a chain.

  Args:
    tokens, read, chunk: see `held_at_end`.
    record: of the chain.
  """
  held = held_at_end(model, policy, tokens, read, chunk=chunk)
  about = {field.name: getattr(record, field.name) for field in dataclasses.fields(Chain)}
  share = lambda values: np.round(values.astype(float), 4).tolist()
  return Trace(
    **about, read=read, tokens=pieces(tokenizer, tokens), held=share(held.mean(axis=(0, 1))),
    retention=share(held.mean(axis=2)),
  )  # fmt: skip


# The file -------------------------------------------------------------------------------------------------------------


def append(path: Path, traces: Iterable[Trace]) -> None:
  """Appends a line for each trace; creates the file and its folder if they are missing."""
  files.append_text(path, "".join(json.dumps(program.to_plain(each)) + "\n" for each in traces))


def add(path: Path, job: Any, method: Method, tokenizer: Tokenizer, records: Sequence[Record], prompts: int) -> None:
  """Appends the traces of a method on a job that the file lacks: of the first `prompts` prompts, at the largest L.

  The first chain of each is traced. The prompt's tokens are known; the text is tokenized again and may then differ from
  the tokens sampled.

  Args:
    job: as `experiments.methods.run.prepare` makes it; nothing is traced if it only scores given continuations.
    records: of the job, by any methods.
  """
  most = max(job.max_tokens)
  own = [
    record
    for record in records
    if record.cell == (*method.key, job.task.name, job.length) and record.text is not None
    if (record.chain, record.max_tokens) == (0, most) and record.prompt in range(prompts)
  ]  # fmt: skip
  if not own:
    return
  files.cut_half_line(path, START)
  there = {chain_of(each) for each in read("output", path)}
  group, _ = method.fitted(job, most)
  for place, row in enumerate(group.rows):
    policy, prompt = group.policy.replace(**group.of_row(place)), job.asked[row].tokens
    for record in [each for each in own if each.prompt == row and chain_of(each) not in there]:
      ids = [*prompt, *tokenizer.encode(record.text, continues=True)]
      append(path, [trace(method.model, policy, tokenizer, ids, len(prompt), record)])


def read(flag: str, path: Path) -> list[Trace]:
  """The traces of a file; none if it is missing. Those of earlier versions have no seed.

  Args:
    flag: the flag that named the file's folder, for errors.

  Raises:
    ValueError: a line is not a trace; the message names the flag and the line.
  """
  found = []
  for where, values in files.json_records(flag, path, FIELDS) if path.exists() else ():
    each = build(Trace, where, {"seed": None, **values})
    is_share = lambda share: isinstance(share, int | float) and 0 <= share <= 1
    if not all(isinstance(row, list) and all(map(is_share, row)) for row in [each.held, *each.retention]):
      raise ValueError(f"{where}: 'held' and 'retention' must be shares from 0 to 1")
    if not all(isinstance(token, str) for token in each.tokens):
      raise ValueError(f"{where}: 'tokens' must be texts")
    if len(each.held) != len(each.tokens) or not each.retention or len({len(row) for row in each.retention}) != 1:
      raise ValueError(f"{where}: 'held' needs a share for each token, 'retention' one row of heads for each layer")
    found.append(each)
  return found
