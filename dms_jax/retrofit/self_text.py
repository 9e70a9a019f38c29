"""Text sampled from the model itself, to train on: a retrofit then needs no data set.

Batches are saved one by one, so an interrupted run resumes; the output file appears once it is complete.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path

import jax
import numpy as np

from dms_jax.decoder import Model
from dms_jax.disk import write_text
from dms_jax.execution import fastest_form
from dms_jax.generation.detokenize import REPLACEMENT
from dms_jax.generation.generate import generate
from dms_jax.generation.prompts import check_positions
from dms_jax.json_files import has_half_pair, is_number, json_value, parse_json, read_json, to_json
from dms_jax.policies import Vanilla
from dms_jax.retrofit.config import SelfTextConfig
from dms_jax.retrofit.data import read_text, warn_left_out
from dms_jax.tokenizer import Tokenizer

QUESTION_TOKENS = 128  # the most tokens of a question that the model asks itself
CAPACITY = 256  # the cache's capacity is rounded up to a multiple of this
MARK = "QUESTION-GOES-HERE"
FREE, ASK = "free", "ask"  # rows without a prompt: they start at an end of text, or with the model's own question


def prompts(config: SelfTextConfig, tokenizer: Tokenizer) -> list[list[int] | str]:
  """Each row's prompt as token ids, or FREE or ASK; prefixes come before questions.

  Raises:
    ValueError: a source is too small, or a record has no question.
  """
  rng = np.random.default_rng(config.seed)
  rows: list[list[int] | str]
  if not config.prefixes and not config.questions:
    free = (FREE, ASK) if user_opening(tokenizer) is not None else (FREE,)
    rows = [free[i % len(free)] for i in range(config.rows)]
    if config.start_tokens:
      words = whole_words(tokenizer)
      rows = [rng.choice(words, config.start_tokens).tolist() if row == FREE else row for row in rows]
    return rows
  asked = (config.rows // 2 if config.prefixes else config.rows) if config.questions else 0
  rows = []
  if config.prefixes:
    ids = np.asarray(tokenizer.encode(_read(config.prefixes, "prefixes")), np.int32)
    if len(ids) <= config.prefix_tokens:
      raise ValueError(f"prefixes={config.prefixes} has {len(ids)} tokens, no more than one prefix")
    starts = rng.integers(0, len(ids) - config.prefix_tokens, config.rows - asked)
    rows += [ids[s : s + config.prefix_tokens].tolist() for s in starts]
  if asked:
    source = f"questions={config.questions}"
    lines = [(n, x) for n, x in enumerate(_read(config.questions, "questions").split("\n"), 1) if x.strip()]
    escaped = {n for n, x in lines if "\\ud" in x.lower() and has_half_pair(json_value(x, f"{source}, line {n}"))}
    warn_left_out(source, sorted(escaped))
    lines = [(n, x) for n, x in lines if n not in escaped]
    if not lines:
      raise ValueError(f"{source} is empty")
    for index in rng.choice(len(lines), asked, replace=asked > len(lines)):
      number, line = lines[index]
      where = f"{source}, line {number}"
      record = json_value(line, where)
      question = record.get(config.question_field) if isinstance(record, dict) else None
      messages = record.get("messages") if isinstance(record, dict) else None
      if not (messages and isinstance(messages, list)) and not (question and isinstance(question, str)):
        raise ValueError(f"{where}: neither a list `messages` nor a text `{config.question_field}` (question_field)")
      messages = messages or [{"role": "user", "content": question}]
      if isinstance(messages[-1], dict) and messages[-1].get("role") == "assistant":  # the model gives its own answer
        messages = messages[:-1]
      try:
        rows.append(tokenizer.encode(tokenizer.chat(messages)))
      except ValueError as error:
        raise ValueError(f"{where}: {error}") from None
  return rows


def whole_words(tokenizer: Tokenizer) -> list[int]:
  """The tokens that a text may start with: neither special nor parts of a character, nor ids without a token.

  Raises:
    ValueError: there are none.
  """
  special, texts = tokenizer.hidden_ids, ((i, tokenizer.decode([i])) for i in range(tokenizer.vocab_size))
  if not (words := [i for i, text in texts if i not in special and text and REPLACEMENT not in text]):
    raise ValueError("self_text.start_tokens: the tokenizer has no token that is a text by itself")
  return words


def _read(path: str, name: str) -> str:
  if not Path(path).is_file():
    raise ValueError(f"{name}={path}: no such file")
  try:
    return read_text(Path(path))
  except ValueError as error:
    raise ValueError(f"{name}={error}") from None


def user_opening(tokenizer: Tokenizer) -> str | None:
  """The text that the chat template puts before a user's message; None without a template that copies the message."""
  try:
    text = tokenizer.chat([{"role": "user", "content": MARK}], add_generation_prompt=False)
  except ValueError:
    return None
  return text[: text.index(MARK)] if MARK in text else None


def write(
  model: Model,
  tokenizer: Tokenizer,
  config: SelfTextConfig,
  path: str | Path,
  *,
  progress: Callable[[Iterable], Iterable] = lambda items: items,
) -> int:
  """Writes `config.rows` records {"text": ...} to the .jsonl file `path`; returns the number of tokens sampled.

  Finished batches are kept in a folder PATH.rows until all are done; after an interruption the same call resumes from
  them. A row's text depends only on the seed and its number (and, by rounding, on the batch).

  Raises:
    ValueError: there are no rows, a source is bad, rows are longer than the model takes, or PATH.rows holds text of
      other settings.
  """
  path = Path(path)
  if not config.rows:
    raise ValueError("self_text.rows=0: say how many rows to write")
  rows = prompts(config, tokenizer)
  longest = max(1 if isinstance(row, str) else len(row) for row in rows)
  new = config.max_new_tokens
  check_positions(model, longest, new, f"self_text: rows that start with {longest} tokens, and max_new_tokens={new},")
  model = fastest_form(model.replace(tokenizer=tokenizer))
  keys = jax.random.split(jax.random.key(config.seed), config.rows)
  folder = path.with_name(path.name + ".rows")
  settings = {"self_text": to_json(config), "model": to_json(model.config), "dtype": str(model.dtype)}
  if (folder / "settings.json").exists() and read_json(folder / "settings.json") != settings:
    raise ValueError(f"{folder} holds rows of other settings; remove it to start over, or choose another path")
  folder.mkdir(parents=True, exist_ok=True)
  write_text(folder / "settings.json", json.dumps(settings))
  parts = []
  for first in progress(range(0, config.rows, config.batch)):
    part = folder / f"{first:08d}.jsonl"
    parts.append(part)
    if not part.exists():
      cut = slice(first, first + config.batch)
      records = _sample(model, tokenizer, config, rows[cut], keys[cut])
      write_text(part, "".join(json.dumps(r) + "\n" for r in records))
  records = [record for part in parts for record in _finished(part)]
  write_text(path, "".join(json.dumps({"text": r["text"]}) + "\n" for r in records))
  shutil.rmtree(folder)
  return sum(r["sampled"] for r in records)


def _finished(part: Path) -> list[dict]:
  """The records of a finished batch; a ValueError names a damaged line."""
  records = []
  for number, line in enumerate(read_text(part).splitlines(), 1):
    record = parse_json(line, f"{part}:{number}")
    if not isinstance(record.get("text"), str) or not is_number(record.get("sampled"), int):
      raise ValueError(f"{part}:{number}: needs a text and a number `sampled`; remove the file to sample it again")
    records.append(record)
  return records


def _sample(model: Model, tokenizer: Tokenizer, config: SelfTextConfig, rows: list, keys: jax.Array) -> list[dict]:
  def continued(batch: list[list[int]], keys: jax.Array, limit: int, size: int) -> list[list[int]]:
    # Each shape is a compilation: the last row is repeated up to `size` rows, and the capacity is rounded up.
    missing = max(size - len(batch), 0)
    keys = keys[np.minimum(np.arange(len(batch) + missing), len(batch) - 1)]
    batch_size, batch = len(batch), batch + batch[-1:] * missing
    capacity = -(-(max(map(len, batch)) + limit) // CAPACITY) * CAPACITY
    out = generate(
      model, batch, policy=Vanilla(), max_new_tokens=limit, temperature=config.temperature, top_p=config.top_p,
      key=keys, capacity=capacity,
    )  # fmt: skip
    return out.tokens[:batch_size]

  start = tokenizer.bos_token_id if tokenizer.adds_bos or not tokenizer.eos_token_ids else tokenizer.eos_token_ids[0]
  nothing = [0 if start is None else start]
  sampled, size = [0] * len(rows), min(config.batch, config.rows)
  asks = [i for i, row in enumerate(rows) if row == ASK]
  prompt = [nothing if isinstance(row, str) else row for row in rows]
  if asks:
    opening = tokenizer.encode(user_opening(tokenizer))
    own = jax.vmap(jax.random.fold_in, (0, None))(keys[np.asarray(asks)], 1)
    questions = continued([opening] * len(asks), own, min(QUESTION_TOKENS, config.max_new_tokens), -(-size // 2))
    for i, ids in zip(asks, questions, strict=True):
      sampled[i] = len(ids)
      if question := tokenizer.decode(ids).strip():
        prompt[i] = tokenizer.encode(tokenizer.chat([{"role": "user", "content": question}]))
  records = []
  for i, answer in enumerate(continued(prompt, keys, config.max_new_tokens, size)):
    ids = answer if prompt[i] is nothing else [*prompt[i], *answer]
    if answer and answer[-1] in tokenizer.eos_token_ids[:1]:
      ids = ids[:-1]  # `load_sources` ends each document with it
    records.append({"text": tokenizer.decode(ids, skip_special=False), "sampled": sampled[i] + len(answer)})
  return records
