"""Damages files at random, and checks that what reads them answers in one line and soon.

Neither may it take much memory, nor leave files. `DMS_FUZZ` inputs are drawn in all, from the seed `DMS_FUZZ_SEED`.
"""

from __future__ import annotations

import contextlib
import csv
import dataclasses
import io
import json
import os
import shutil
import signal
import time
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np

COUNT = int(os.environ.get("DMS_FUZZ", 1000 if os.environ.get("DMS_QUICK") else 2000))
SEED = int(os.environ.get("DMS_FUZZ_SEED", 0))
SECONDS = 5.0  # of one input, as a processor counts them; the files are small
MEGABYTES = 64  # of one input beyond three times its file: what a compilation takes
CHARACTERS = 6000  # of a message, which may list forty tensors
PARTS = ("some", "others")  # of the inputs: a quarter, and the rest

VALUES = [
  None, True, False, 0, -1, 1, 2, 3, 255, 2**31, 2**32 - 1, 2**63, 2**64, 10**40, 10**400, 0.0, 0.5, -0.0, 1e-300,
  1e300, -1e300, float("nan"), float("inf"), "", "x", "0", "llama", "\ud800", "../x", "\0", "é\u2028", " ", "a\nb", [],
  [0], [None], {}, {"a": 1}, [[[[]]]], ["x"], {"": None}, "(a*)*b", "{{ 1", "9" * 5000,
]  # fmt: skip


# Changes: (content, random numbers) -> content ------------------------------------------------------------------------


def garbled(data: bytes, rng: np.random.Generator) -> bytes:
  """`data` with bytes changed, cut, doubled or replaced by numbers that counters dislike."""
  out = bytearray(data)
  for _ in range(rng.integers(1, 4)):
    place, kind = int(rng.integers(0, max(len(out), 1))), rng.integers(0, 6)
    # Headers lie at the start: half of the changes are there.
    place = place if rng.integers(2) else min(place, int(rng.integers(0, 400)))
    if kind == 0 and out:
      out[place] = rng.integers(256)
    elif kind == 1 and out:
      out[place] ^= 1 << rng.integers(8)
    elif kind == 2:
      del out[place:]
    elif kind == 3:
      del out[place : place + int(rng.integers(1, 16))]
    elif kind == 4:
      out[place:place] = out[place : place + int(rng.integers(1, 64))]
    else:
      size = int(rng.choice([1, 2, 4, 8]))
      number = int(rng.choice([0, 1, 2**7, 2**15, 2**31, 2**32 - 1, 2**40, 2**63 - 1])) & (2 ** (8 * size) - 1)
      out[place : place + size] = number.to_bytes(size, "little")
  return bytes(out)


def replaced(value, rng: np.random.Generator):
  """A JSON value with one value in it replaced, dropped, or repeated under another name."""
  if not isinstance(value, dict | list) or not value or rng.integers(6) == 0:
    return VALUES[rng.integers(len(VALUES))]
  if isinstance(value, list):
    index = int(rng.integers(len(value)))
    return [*value[:index], replaced(value[index], rng), *value[index + 1 :]]
  keys = list(value)
  key = keys[rng.integers(len(keys))]
  action = rng.integers(8)
  if action == 0:
    return {k: v for k, v in value.items() if k != key}
  if action == 1:
    return {**value, f"{key}_": value[key], "dms_window_size": VALUES[rng.integers(len(VALUES))]}
  return {**value, key: replaced(value[key], rng)}


def garbled_json(data: bytes, rng: np.random.Generator) -> bytes:
  """A JSON value of which one or two values are replaced; sometimes its bytes, or one nested 100,000 deep."""
  kind = rng.integers(12)
  if kind == 0:
    return garbled(data, rng)
  if kind == 1:
    return rng.choice([b"[", b'{"a":']) * int(rng.choice([10, 1000, 100_000]))
  values = json.loads(data)
  for _ in range(rng.integers(1, 3)):
    values = replaced(values, rng)
  text = json.dumps(values)
  if kind == 2 and (colon := text.find(": ")) > 0:  # a key twice
    text = text[:1] + text[1:colon] + ": " + json.dumps(VALUES[rng.integers(len(VALUES))]) + ", " + text[1:]
  return text.encode()


def garbled_lines(data: bytes, rng: np.random.Generator) -> bytes:
  """Lines of which one is changed as JSON, dropped or doubled; sometimes any bytes."""
  kind, lines = rng.integers(8), data.split(b"\n")
  if kind == 0:
    return garbled(data, rng)
  index = int(rng.integers(len(lines)))
  if kind == 1:
    lines[index : index + 1] = []
  elif kind == 2:
    lines[index : index + 1] = [lines[index]] * 2
  else:
    lines[index] = garbled_json(lines[index] or b"{}", rng)
  return b"\n".join(lines)


def garbled_cells(data: bytes, rng: np.random.Generator) -> bytes:
  """CSV of which one cell is changed, dropped or doubled; sometimes any bytes."""
  if rng.integers(4) == 0:
    return garbled(data, rng)
  rows = list(csv.reader(io.StringIO(data.decode())))
  row = rows[rng.integers(len(rows))]
  index = int(rng.integers(len(row)))
  value = VALUES[rng.integers(len(VALUES))]
  row[index : index + 1] = [[], [row[index]] * 2, [str(value)]][rng.integers(3)]
  text = io.StringIO()
  csv.writer(text).writerows(rows)
  return text.getvalue().encode("utf-8", "surrogatepass")


def garbled_header(data: bytes, rng: np.random.Generator) -> bytes:
  """A safetensors file whose header is other JSON, of the length that the file says."""
  size = int.from_bytes(data[:8], "little")
  header = garbled_json(data[8 : 8 + size], rng)
  return len(header).to_bytes(8, "little") + header + data[8 + size :]


# The check ------------------------------------------------------------------------------------------------------------


class _Hangs(BaseException):
  """An input takes much longer than `SECONDS`."""


@dataclasses.dataclass(frozen=True)
class Reader:
  """A program's reader of one kind of file.

  Fields:
    share: of a thousand inputs.
    whole: a folder that `read` reads.
    name: the file in it that is damaged; a folder for any file in it.
    change: (content, random numbers) -> content.
    read: takes the folder's path.
    after: puts the folder in order after the change, such as its checksums.
    said: what a message may say instead of the file's path.
    refuses: the least share of inputs that are refused.
  """

  share: int
  whole: Path
  name: str
  change: Callable[[bytes, np.random.Generator], bytes]
  read: Callable[[Path], object]
  after: Callable[[Path], None] | None = None
  said: str | None = None
  refuses: float = 0.25

  def check(self, folder: Path, part: str) -> None:
    """Damages the file many times in a copy at `folder`; an AssertionError lists all that goes wrong."""
    shutil.copytree(self.whole, folder)
    self.read(folder)  # the whole one is read, and what it compiles is no part of the times below
    refused, problems, count = 0, [], max(COUNT * self.share // 1000, 1)
    some = -(-count // 4)
    numbers = range(some) if part == "some" else range(some, count)
    before = {path: path.read_bytes() for path in _files(folder)}
    for number in numbers:
      times = {path: path.stat().st_mtime_ns for path in before}
      file = self._damage(folder, np.random.default_rng([SEED, number]))
      size = file.stat().st_size
      start, held = time.process_time(), _reset_peak()
      said = self._said(folder, file)
      refused += said is not None
      wrong = [] if said in (None, "") else [said]
      if (seconds := time.process_time() - start) > SECONDS:
        wrong.append(f"{seconds:.1f} s")
      if held is not None and (grown := _peak() - held) > MEGABYTES * 2**20 + 3 * size:
        wrong.append(f"{grown / 2**20:.0f} MiB more, for a file of {size} bytes")
      if left := _files(folder) - set(before):
        wrong.append(f"left {sorted(path.name for path in left)}")
      problems += [f"input {number}: {one}" for one in wrong]
      for path in left:
        path.unlink()
      for path, content in before.items():
        if path.stat().st_mtime_ns != times[path]:
          path.write_bytes(content)
    shown = "\n".join(problems[:6])
    assert not problems, f"{len(problems)} of {len(numbers)}: {shown}"
    assert refused >= self.refuses * len(numbers) - 2, f"only {refused} of {len(numbers)} were refused"

  def _damage(self, folder: Path, rng: np.random.Generator) -> Path:
    file = folder / self.name
    if file.is_dir():
      files = sorted(p for p in file.rglob("*") if p.is_file() and p.stat().st_size)
      file = files[rng.integers(len(files))]
    file.write_bytes(self.change(file.read_bytes(), rng))
    if self.after is not None:
      self.after(folder)
    return file

  def _said(self, folder: Path, file: Path) -> str | None:
    """None if the file was read, "" if it was refused well, else what was wrong."""
    try:
      with warnings.catch_warnings(), _limited(20 * SECONDS):
        warnings.simplefilter("ignore", UserWarning)  # such as of a head that differs from the embedding
        self.read(folder)
    except ValueError as error:
      message = str(error)
      named = str(folder) in message or (self.said is not None and self.said in message)
      if type(error) is not ValueError or not named or "\n" in message or len(message) > CHARACTERS:
        where = "".join(traceback.format_tb(error.__traceback__)[-2:])
        return f"{type(error).__name__} {message[:300]!r} is not one line that names the file {where}"
      return ""
    except BaseException as error:  # a library's panic is no Exception
      if isinstance(error, KeyboardInterrupt):
        raise
      return "".join(traceback.format_exception(error)[-5:])
    return None


def _files(folder: Path) -> set[Path]:
  return {path for path in folder.rglob("*") if path.is_file()}


@contextlib.contextmanager
def _limited(seconds: float):
  """Ends Python code that runs for too long."""

  def stop(*_):
    raise _Hangs(f"more than {seconds:g} s")

  before = signal.signal(signal.SIGALRM, stop)
  signal.setitimer(signal.ITIMER_REAL, seconds)
  try:
    yield
  finally:
    signal.setitimer(signal.ITIMER_REAL, 0)
    signal.signal(signal.SIGALRM, before)


def _reset_peak() -> int | None:
  """Bytes that the process holds, after its peak is set to that; None where the system cannot (only Linux can)."""
  try:
    Path("/proc/self/clear_refs").write_text("5")
    return _peak()
  except OSError:
    return None


def _peak() -> int:
  for line in Path("/proc/self/status").read_text().splitlines():
    if line.startswith("VmHWM:"):
      return int(line.split()[1]) * 1024
  return 0
