"""Rows of whole documents: a document is never cut, and never loses its prompt.

Documents come from paths (`WholePacker`) or from a generator in worker processes (`StreamPacker`). Documents that are
longer than a row are left out, counted and named. Both pack best-fit decreasing: the longest document first, each into
the fullest row that still holds it.
"""

from __future__ import annotations

import bisect
import collections
import concurrent.futures
import contextlib
import dataclasses
import functools
import multiprocessing
import os
import signal
import threading
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures.process import BrokenProcessPool
from typing import Any

import numpy as np

from dms_jax.retrofit.config import DataConfig, RetrofitConfig
from dms_jax.retrofit.data import Batches, Packer, Source, encode
from dms_jax.retrofit.step import Batch

# documents(seed, start, count) -> (prompt, text) of documents start, start + 1, ...; picklable. Document i depends only
# on (seed, i). The text is None where the generator gave up because the document would be longer than a row.
Documents = Callable[[int, int, int], Iterable[tuple[str, str | None]]]
FIRST = 64  # documents that stand for all in fingerprints
HOPELESS = 64  # documents in a row that are too long, after which the generator is given up
GRACE = 10.0  # seconds that a worker process goes on after SIGTERM


@dataclasses.dataclass(frozen=True)
class Document:
  """Its number in its source, from 0, its token ids, and how many of them are its prompt's."""

  number: int
  tokens: Sequence[int] | np.ndarray
  prompt: int


def best_fit(lengths: Sequence[int], length: int, rows: int | None = None) -> list[list[int]] | None:
  """Indices of `lengths` by row of at most `length` tokens, best-fit decreasing; None if they need more than `rows`."""
  packed: list[list[int]] = []
  free: list[tuple[int, int]] = []  # (tokens left, row), ascending
  for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
    size = lengths[index]
    at = bisect.bisect_left(free, (size, 0))
    if at == len(free):
      if len(packed) == rows:
        return None
      packed.append([])
      left, row = length, len(packed) - 1
    else:
      left, row = free.pop(at)
    packed[row].append(index)
    bisect.insort(free, (left - size, row))
  return packed


def filled(documents: Sequence[Document], length: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
  """One row: (tokens int32 [T], segment ids int32 [T], loss mask bool [T]); 0, 0 and False behind the last document."""
  tokens, segments, mask = np.zeros(length, np.int32), np.zeros(length, np.int32), np.zeros(length, bool)
  start = 0
  for number, document in enumerate(documents, 1):
    end = start + len(document.tokens)
    tokens[start:end], segments[start:end] = document.tokens, number
    mask[start + document.prompt : end] = True
    start = end
  return tokens, segments, mask


class WholePacker(Packer):
  """Rows of whole documents of sources. Each document is in one row; rows are sampled as `Packer` samples slices.

  `left_out` are the (source, document from 1, tokens) that are longer than a row.
  """

  def __init__(self, sources: list[Source], data: DataConfig, config: RetrofitConfig):
    self.left_out: list[tuple[str, int, int]] = []
    self._rows: dict[str, list[list[Document]]] = {}
    for source in sources:
      starts = np.flatnonzero(np.diff(source.document, prepend=0))
      ends = [*starts[1:], len(source.tokens)]
      fitting = []
      for number, (start, end) in enumerate(zip(starts, ends, strict=True)):
        if end - start > config.seq_len:
          self.left_out.append((source.name, number + 1, int(end - start)))
          continue
        prompt = 0 if source.loss_mask is None else int(np.sum(~source.loss_mask[start:end]))
        fitting.append(Document(number, source.tokens[start:end], prompt))
      if not fitting:
        raise ValueError(
          f"data.paths: every document of {source.name!r} is longer than a row of retrofit.seq_len={config.seq_len}; "
          f"the shortest has {min(size for name, _, size in self.left_out if name == source.name)} tokens"
        )
      packed = best_fit([len(d.tokens) for d in fitting], config.seq_len) or []
      self._rows[source.name] = [[fitting[i] for i in row] for row in packed]
    self._prepare(sources, data, config)
    self.separate = self.masked = True

  def row(self, number: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    rng = np.random.default_rng([self.config.seed, number])
    source = self.sources[rng.choice(len(self.weights), p=self.weights)]
    rows = self._rows[source.name]
    return filled(rows[int(rng.integers(len(rows)))], self.config.seq_len)


# Generated documents --------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Stream:
  """What makes a batch of generated documents: the generator, the tokenizer, the seed and the batch's shape."""

  documents: Documents
  tokenizer: Any
  seed: int
  batch_size: int
  seq_len: int

  def batch(self, step: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, int]:
    """(tokens, segment ids, loss mask, [B, T] each; how many documents were left out) of batch `step`.

    The batch holds documents step * B * T, step * B * T + 1, ...: as many as fit whole, in this order, but for those
    longer than a row.

    Raises:
      ValueError: the generator yields no document, or none that fits into a row.
    """
    most = self.batch_size * self.seq_len
    drawn: list[Document] = []
    left_out: list[int] = []
    total = 0
    for number, (prompt, text) in enumerate(self.documents(self.seed, step * most, most), step * most):
      tokens, before = ([], 0) if text is None else encode(self.tokenizer, prompt, text)
      if text is None or len(tokens) > self.seq_len:
        left_out.append(number)
        if not drawn and len(left_out) == HOPELESS:
          break
        continue
      drawn.append(Document(number, tokens, before))
      total += len(tokens)
      if total >= most:
        break
    if not drawn:
      raise ValueError(
        f"data.families: no document fits into a row of retrofit.seq_len={self.seq_len} tokens; all of the first "
        f"{len(left_out)} are longer"
      )
    lengths = [len(d.tokens) for d in drawn]
    # The largest number of documents that fit: one document fits, and all of them may not.
    least, beyond = 1, len(drawn) + 1
    while beyond - least > 1:
      middle = (least + beyond) // 2
      if best_fit(lengths[:middle], self.seq_len, self.batch_size) is None:
        beyond = middle
      else:
        least = middle
    packed = best_fit(lengths[:least], self.seq_len, self.batch_size) or []
    packed += [[]] * (self.batch_size - len(packed))
    rows = [filled([drawn[i] for i in row], self.seq_len) for row in packed]
    ids, segments, mask = (np.stack(column) for column in zip(*rows, strict=True))
    return ids, segments, mask, sum(number < drawn[least - 1].number for number in left_out)


_stream: Stream | None = None  # of a worker process


def _start_worker(stream: Stream, grace: float) -> None:
  """Runs in each worker: signals are its parent's business, and it ends when its parent does, however that ends.

  SIGTERM leaves the parent `grace` seconds to use what the worker makes. A worker cannot ignore it altogether: where
  another one died, the pool sends it and waits for the worker, from Python 3.12.2 on with the lock that `submit` needs.
  """
  global _stream
  _stream = stream
  os.environ["TOKENIZERS_PARALLELISM"] = "false"
  parent = multiprocessing.parent_process()

  def follow():
    parent.join()
    os._exit(1)

  def end_later(number, frame):
    signal.signal(number, signal.SIG_IGN)  # a second one does not start the time again
    signal.setitimer(signal.ITIMER_REAL, grace)  # SIGALRM ends a process that does not handle it

  threading.Thread(target=follow, daemon=True).start()
  signal.signal(signal.SIGINT, signal.SIG_IGN)
  signal.signal(signal.SIGTERM, end_later)
  if hasattr(signal, "pthread_sigmask"):
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, (signal.SIGINT, signal.SIGTERM))  # held back until here


@contextlib.contextmanager
def _signals_held_back() -> Iterator[None]:
  """SIGINT and SIGTERM wait in this thread, and for ever in processes started meanwhile, unless they take them up."""
  if not hasattr(signal, "pthread_sigmask"):
    yield
    return
  before = signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGINT, signal.SIGTERM))
  try:
    yield
  finally:
    signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _batch_in_worker(step: int):
  return _stream.batch(step)


def available_cores() -> int:
  """Cores that this process may use."""
  return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class StreamPacker(Batches):
  """Rows of whole generated documents, made by worker processes ahead of the device that trains on them.

  A batch depends only on (seed, step), however many workers there are. `left_out` counts the documents so far that were
  longer than a row.
  """

  def __init__(self, documents: Documents, tokenizer, data: DataConfig, config: RetrofitConfig):
    self.stream = Stream(documents, tokenizer, config.seed, config.batch_size, config.seq_len)
    self.config, self.name = config, ",".join(data.families)
    self.workers = available_cores() if data.workers < 0 else data.workers
    self.left_out = 0
    self._notes: dict[int, dict[str, float]] = {}
    self._pool: concurrent.futures.ProcessPoolExecutor | None = None
    self._ahead: collections.deque[tuple[int, concurrent.futures.Future]] = collections.deque()

  @functools.cached_property
  def _first(self) -> list[list[int]]:
    """The token ids of the first documents; of those whose generator gave up, none."""
    documents = self.stream.documents(self.config.seed, 0, FIRST)
    return [[] if text is None else encode(self.stream.tokenizer, prompt, text)[0] for prompt, text in documents]

  def sizes(self) -> list[int]:
    """Tokens of each of the first documents that fit into a row."""
    return [len(ids) for ids in self._first if 0 < len(ids) <= self.config.seq_len]

  def fingerprints(self) -> dict[str, str]:
    """A checksum of the first documents: another version of a generator is another text."""
    crc = zlib.crc32(np.concatenate([np.asarray(ids, np.int32) for ids in self._first]).tobytes())
    return {self.name: f"the first {len(self._first)} documents have CRC-32 {crc:08x}"}

  def batch(self, step: int, only: Sequence[int] | None = None) -> Batch:
    *arrays, left_out = self._made(step) if self.workers else self.stream.batch(step)
    self.left_out += left_out
    self._notes[step] = {"filled": round(float(np.mean(arrays[1] > 0)), 4), "left_out": left_out}
    return Batch(*(x if only is None else x[list(only)] for x in arrays))

  def notes(self, step: int) -> dict[str, float]:
    """`filled`, the share of the batch that is no padding, and `left_out`, documents that were longer than a row."""
    return self._notes.pop(step, {})

  def _made(self, step: int):
    """Batch `step` from the workers, which go on with the next ones."""
    if self._pool is None:
      self._pool = concurrent.futures.ProcessPoolExecutor(
        self.workers,
        mp_context=multiprocessing.get_context("spawn"),  # JAX has threads, which do not survive a fork
        initializer=_start_worker,
        initargs=(self.stream, GRACE),
      )
    if self._ahead and self._ahead[0][0] != step:
      while self._ahead:
        self._ahead.popleft()[1].cancel()
    try:
      first = self._ahead[-1][0] + 1 if self._ahead else step
      last = max(min(step + 2 * self.workers, self.config.schedule.steps), step + 1)
      with _signals_held_back():  # a worker that starts does not handle them yet
        for number in range(first, last):
          self._ahead.append((number, self._pool.submit(_batch_in_worker, number)))
      return self._ahead.popleft()[1].result()
    except BrokenProcessPool:
      self.close()
      raise OSError(
        f"a worker process that makes training data ended ({self.workers} of them; out of memory?): run the command "
        "again, with fewer --data.workers"
      ) from None

  def close(self) -> None:
    if self._pool is not None:
      for process in list((self._pool._processes or {}).values()):
        process.kill()  # nobody wants the batch that it makes, for which it would go on after the pool's SIGTERM
      self._pool.shutdown(wait=True, cancel_futures=True)
      self._pool = None
    self._ahead.clear()
