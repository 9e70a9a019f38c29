"""Text to train on: documents from paths, packed into rows. A step's batch depends only on the seed and the step.

A resumed run therefore reads the same rows as an uninterrupted one.
"""

from __future__ import annotations

import dataclasses
import glob
import json
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from dms_jax.retrofit.config import DataConfig, RetrofitConfig
from dms_jax.retrofit.step import Batch


@dataclasses.dataclass(frozen=True)
class Source:
  """The tokens of one path, int32 [n], and the number of each token's document, int32 [n], from 1."""

  name: str
  tokens: np.ndarray
  document: np.ndarray


def _files(pattern: str) -> list[Path]:
  path = Path(pattern)
  if path.is_dir():
    found = sorted(p for p in path.rglob("*") if p.is_file() and p.suffix in (".txt", ".md", ".py", ".json", ".jsonl"))
  else:
    found = [path] if path.is_file() else sorted(Path(p) for p in glob.glob(pattern, recursive=True))
  if not found:
    raise ValueError(f"data.paths: {pattern!r} is no file, no folder with text, and matches nothing")
  return found


def _record_text(record, tokenizer, fields: tuple[str, ...], where: str) -> str:
  if isinstance(record, dict):
    if isinstance(record.get("text"), str):
      return record["text"]
    if isinstance(record.get("messages"), list):
      return tokenizer.chat(record["messages"], add_generation_prompt=False)
    if all(isinstance(record.get(f), str) for f in fields):
      return "\n".join(record[f] for f in fields)
  keys = sorted(record) if isinstance(record, dict) else type(record).__name__
  raise ValueError(f"{where}: a record needs `text`, `messages` or the fields {fields} (data.fields); it has {keys}")


def documents(path: Path, tokenizer, fields: tuple[str, ...]) -> Iterator[str]:
  """The documents of one file; see `DataConfig`.

  Raises:
    ValueError: the file is not UTF-8 or not JSON, or a record has no text; names the file and line.
  """
  try:
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".jsonl":
      for number, line in enumerate(text.split("\n"), 1):  # records may hold other line separators
        if line.strip():
          try:
            record = json.loads(line)
          except json.JSONDecodeError as error:
            raise ValueError(f"{path}:{number}: not valid JSON ({error})") from None
          yield _record_text(record, tokenizer, fields, f"{path}:{number}")
    elif path.suffix == ".json":
      records = json.loads(text)
      for number, record in enumerate(records if isinstance(records, list) else [records]):
        yield _record_text(record, tokenizer, fields, f"{path}[{number}]")
    else:
      yield text
  except UnicodeDecodeError as error:
    raise ValueError(f"{path}: not UTF-8 text ({error})") from None
  except json.JSONDecodeError as error:
    raise ValueError(f"{path}: not valid JSON ({error})") from None


def load_sources(config: DataConfig, tokenizer, self_text: Path | None = None) -> list[Source]:
  """Reads and tokenizes every path. Each document ends with the tokenizer's end-of-text token.

  Args:
    self_text: the file written for `config.self_text`; it becomes the last source.

  Raises:
    ValueError: there is no text, or a file cannot be read.
  """
  named = [(pattern, pattern) for pattern in config.paths] + (
    [] if self_text is None else [("self_text", str(self_text))]
  )
  if not named:
    raise ValueError(
      "data.paths is empty: name text, .jsonl files or folders, or let the model write: --data.self_text.rows=256"
    )
  end = list(tokenizer.eos_token_ids[:1])
  sources = []
  for name, pattern in named:
    pieces, numbers, number = [], [], 0
    for path in _files(pattern):
      for text in documents(path, tokenizer, config.fields):
        ids = tokenizer.encode(text)
        if ids:
          number += 1
          pieces.append(np.asarray(ids + end, np.int32))
          numbers.append(np.full(len(pieces[-1]), number, np.int32))
    if not pieces:
      raise ValueError(f"data.paths: {pattern!r} holds no text")
    sources.append(Source(name, np.concatenate(pieces), np.concatenate(numbers)))
  return sources


class Packer:
  """Rows of `seq_len` tokens. Row r is a random slice of a source sampled by weight; both depend only on (seed, r)."""

  def __init__(self, sources: list[Source], data: DataConfig, config: RetrofitConfig):
    for source in sources:
      if len(source.tokens) < config.seq_len:
        raise ValueError(
          f"data.paths: {source.name!r} holds {len(source.tokens)} tokens, less than a row of "
          f"retrofit.seq_len={config.seq_len}: add text or shorten the rows"
        )
    weights = np.asarray(data.weights or [1.0] * len(sources), np.float64)
    self.sources, self.config, self.weights = sources, config, weights / weights.sum()
    # If no row can hold two documents, attention need not compare segments.
    self.separate = data.separate_documents and any(s.document[-1] > 1 for s in sources)

  def fingerprints(self) -> dict[str, str]:
    """Length and checksum of each source, by its name; a resumed run must find the same."""
    return {s.name: f"{len(s.tokens)} tokens, CRC-32 {zlib.crc32(s.tokens.tobytes()):08x}" for s in self.sources}

  def row(self, number: int) -> tuple[np.ndarray, np.ndarray]:
    """(tokens, segment ids from 1) of row `number`, int32 [T] each."""
    rng = np.random.default_rng([self.config.seed, number])
    source = self.sources[rng.choice(len(self.weights), p=self.weights)]
    start = int(rng.integers(0, len(source.tokens) - self.config.seq_len + 1))
    cut = slice(start, start + self.config.seq_len)
    return source.tokens[cut], source.document[cut] - source.document[start] + 1

  def batch(self, step: int, only: Sequence[int] | None = None) -> Batch:
    """The batch of training step `step`; with `only`, just these of its rows, counted from 0."""
    size = self.config.batch_size
    rows = [self.row(step * size + i) for i in (range(size) if only is None else only)]
    tokens, segments = (np.stack(column) for column in zip(*rows, strict=True))
    return Batch(tokens, segments if self.separate else None)
