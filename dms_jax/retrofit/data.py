"""Text to train on: documents from paths, cut into rows. A step's batch depends only on the seed and the step.

A resumed run therefore reads the same rows as an uninterrupted one. `dms_jax/retrofit/packing.py` has rows of whole
documents.
"""

from __future__ import annotations

import abc
import dataclasses
import glob
import os
import warnings
import zlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np

from dms_jax.json_files import HALF_PAIR, has_half_pair, json_value
from dms_jax.retrofit.config import DataConfig, RetrofitConfig
from dms_jax.retrofit.step import Batch


@dataclasses.dataclass(frozen=True)
class Source:
  """The tokens of one path, int32 [n], and the number of each token's document, int32 [n], from 1.

  `loss_mask` bool [n], False on prompts; None if no document has one.
  """

  name: str
  tokens: np.ndarray
  document: np.ndarray
  loss_mask: np.ndarray | None = None


def _files(pattern: str) -> list[Path]:
  path = Path(pattern)
  if path.is_dir():
    found = sorted(p for p in path.rglob("*") if p.is_file() and p.suffix in (".txt", ".md", ".py", ".json", ".jsonl"))
  else:
    found = [path] if path.is_file() else sorted(Path(p) for p in glob.glob(pattern, recursive=True))
  if not found:
    raise ValueError(f"data.paths: {pattern!r} is no file, no folder with text, and matches nothing")
  return found


def _record_text(record, tokenizer, fields: tuple[str, ...], where: str) -> tuple[str, str]:
  if isinstance(record, dict):
    if isinstance(record.get("text"), str):
      if not isinstance(prompt := record.get("prompt", ""), str):
        raise ValueError(f"{where}: `prompt` must be a string, found {type(prompt).__name__}")
      return prompt, record["text"]
    if isinstance(record.get("messages"), list):
      try:
        return "", tokenizer.chat(record["messages"], add_generation_prompt=False)
      except ValueError as error:
        raise ValueError(f"{where}: {error}") from None
    if all(isinstance(record.get(f), str) for f in fields):
      return "", "\n".join(record[f] for f in fields)
  keys = sorted(record) if isinstance(record, dict) else type(record).__name__
  raise ValueError(f"{where}: a record needs `text`, `messages` or the fields {fields} (data.fields); it has {keys}")


def read_text(path: Path) -> str:
  """The text of a UTF-8 file without a byte order mark.

  Lines that hold half of a surrogate pair are left out, with one warning that names them.

  Raises:
    ValueError: the file cannot be read, or is not UTF-8; names the file.
  """
  text = _decoded(path)
  if not has_half_pair(text):
    return text
  lines = text.split("\n")
  wrong = {number for number, line in enumerate(lines, 1) if has_half_pair(line)}
  warn_left_out(path, sorted(wrong))
  return "\n".join(line for number, line in enumerate(lines, 1) if number not in wrong)


def _decoded(path: Path) -> str:
  try:
    if path.is_char_device() and str(path) != os.devnull:  # such as /dev/zero, which has no end
      raise ValueError(f"{path}: a device, where a file is expected")
    return path.read_text(encoding="utf-8-sig", errors="surrogatepass")
  except UnicodeDecodeError as error:
    line = error.object.count(b"\n", 0, error.start) + 1
    raise ValueError(f"{path}:{line}: not UTF-8 text ({error})") from None
  except OSError as error:
    raise ValueError(f"{path}: cannot be read ({error.strerror})") from None


def warn_left_out(path: str | Path, numbers: Sequence[int], what: str = "line") -> None:
  """One warning that names the lines or records of a file that are left out; none if there are none."""
  if numbers:
    named = ", ".join(map(str, numbers[:8])) + (f" and {len(numbers) - 8} more" if len(numbers) > 8 else "")
    warnings.warn(f"{path}: {what} {named}: {HALF_PAIR}; left out", stacklevel=3)


def documents(path: Path, tokenizer, fields: tuple[str, ...]) -> Iterator[tuple[str, str]]:
  """The documents of one file, (prompt, text) each, the prompt mostly empty; see `DataConfig`.

  Records and lines of text that hold half of a surrogate pair are left out, with one warning a file.

  Raises:
    ValueError: the file is not UTF-8 or not JSON, or a record has no text; names the file and line.
  """
  if path.suffix not in (".jsonl", ".json"):
    yield "", read_text(path)
    return
  text, left_out, what = _decoded(path), [], "line"
  if path.suffix == ".jsonl":
    lines = enumerate(text.split("\n"), 1)  # records may hold other line separators
    records = (
      (number, f"{path}:{number}", json_value(line, f"{path}:{number}")) for number, line in lines if line.strip()
    )
  else:
    values, what = json_value(text, str(path)), "record"
    listed = values if isinstance(values, list) else [values]
    records = ((number, f"{path}[{number}]", record) for number, record in enumerate(listed))
  for number, where, record in records:
    if has_half_pair(record):
      left_out.append(number)
    else:
      yield _record_text(record, tokenizer, fields, where)
  warn_left_out(path, left_out, what)


def encode(tokenizer, prompt: str, text: str) -> tuple[list[int], int]:
  """(token ids of a document, how many of them are its prompt's); the end-of-text token is the last.

  A document with a prompt that already ends with that token gets no second one. A document without text has no tokens.
  """
  end = list(tokenizer.eos_token_ids[:1])
  if not prompt:
    ids = tokenizer.encode(text)
    return (ids + end if ids else []), 0
  before, after = tokenizer.encode(prompt), tokenizer.encode(text, continues=True)
  return before + after + (end if after[-1:] != end else []), len(before)


def load_sources(config: DataConfig, tokenizer, written: Mapping[str, Path] | None = None) -> list[Source]:
  """Reads and tokenizes every path. Each document ends with the tokenizer's end-of-text token.

  Args:
    written: the files written for `config.self_text` and `config.recall_text`, by name; they become the last sources.

  Raises:
    ValueError: there is no text, or a file cannot be read.
  """
  named = [(pattern, pattern) for pattern in config.paths]
  named += [(name, str(path)) for name, path in (written or {}).items()]
  if not named:
    raise ValueError(
      "data.paths is empty: name text, .jsonl files or folders, or let the model write: --data.self_text.rows=256"
    )
  sources = []
  for name, pattern in named:
    pieces, numbers, masks, number = [], [], [], 0
    for path in _files(pattern):
      for prompt, text in documents(path, tokenizer, config.fields):
        ids, before = encode(tokenizer, prompt, text)
        if ids:
          number += 1
          pieces.append(np.asarray(ids, np.int32))
          numbers.append(np.full(len(ids), number, np.int32))
          masks.append(np.arange(len(ids)) >= before)
    if not pieces:
      raise ValueError(f"data.paths: {pattern!r} holds no text")
    mask = np.concatenate(masks)
    sources.append(Source(name, np.concatenate(pieces), np.concatenate(numbers), None if mask.all() else mask))
  return sources


class Batches(abc.ABC):
  """The batches of a run, by step."""

  config: RetrofitConfig

  @abc.abstractmethod
  def fingerprints(self) -> dict[str, str]:
    """A description of the content of each source, by its name; a resumed run must find the same."""

  @abc.abstractmethod
  def batch(self, step: int, only: Sequence[int] | None = None) -> Batch:
    """The batch of training step `step`; with `only`, just these of its rows, counted from 0."""

  def notes(self, step: int) -> dict[str, float]:
    """Figures about the batch of `step` for the log, once after `batch(step)`."""
    return {}

  def close(self) -> None:  # noqa: B027
    """Ends the processes that make batches, if there are any."""


class Packer(Batches):
  """Rows of `seq_len` tokens. Row r is a random slice of a source sampled by weight; both depend only on (seed, r)."""

  def __init__(self, sources: list[Source], data: DataConfig, config: RetrofitConfig):
    for source in sources:
      if len(source.tokens) < config.seq_len:
        raise ValueError(
          f"data.paths: {source.name!r} holds {len(source.tokens)} tokens, less than a row of "
          f"retrofit.seq_len={config.seq_len}: add text or shorten the rows"
        )
    self._prepare(sources, data, config)
    # If no row can hold two documents, attention need not compare segments.
    self.separate = data.separate_documents and any(s.document[-1] > 1 for s in sources)
    self.masked = any(s.loss_mask is not None for s in sources)

  def _prepare(self, sources: list[Source], data: DataConfig, config: RetrofitConfig) -> None:
    weights = np.asarray(data.weights or [1.0] * len(sources), np.float64)
    self.sources, self.config, self.weights = sources, config, weights / weights.sum()

  def fingerprints(self) -> dict[str, str]:
    """Length and checksum of each source, by its name; a resumed run must find the same."""

    def crc(source: Source) -> int:
      mask = b"" if source.loss_mask is None else source.loss_mask.tobytes()
      return zlib.crc32(mask, zlib.crc32(source.tokens.tobytes()))

    return {s.name: f"{len(s.tokens)} tokens, CRC-32 {crc(s):08x}" for s in self.sources}

  def row(self, number: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(tokens int32 [T], segment ids int32 [T] from 1, loss mask bool [T]) of row `number`."""
    rng = np.random.default_rng([self.config.seed, number])
    source = self.sources[rng.choice(len(self.weights), p=self.weights)]
    start = int(rng.integers(0, len(source.tokens) - self.config.seq_len + 1))
    cut = slice(start, start + self.config.seq_len)
    mask = np.ones(self.config.seq_len, bool) if source.loss_mask is None else source.loss_mask[cut]
    return source.tokens[cut], source.document[cut] - source.document[start] + 1, mask

  def batch(self, step: int, only: Sequence[int] | None = None) -> Batch:
    size = self.config.batch_size
    rows = [self.row(step * size + i) for i in (range(size) if only is None else only)]
    tokens, segments, mask = (np.stack(column) for column in zip(*rows, strict=True))
    return Batch(tokens, segments if self.separate else None, mask if self.masked else None)
