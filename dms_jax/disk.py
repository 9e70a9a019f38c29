"""Places on disk: files and folders that are whole or absent, room, names that libraries take."""

from __future__ import annotations

import contextlib
import glob
import os
import secrets
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

from dms_jax.json_files import has_half_pair


class NoFileError(ValueError):
  """Something else than a file stands where one is to be written."""


@contextlib.contextmanager
def whole(path: Path) -> Iterator[Path]:
  """The path of a file to write, which replaces `path` when the block ends, and goes if the block fails.

  Makes the folder. Where `path` is a link, what it points to is replaced. The content is on the disk before the name
  is, should the machine lose its power.

  Raises:
    NoFileError: there is something else than a file, such as a device.
  """
  path = Path(os.path.realpath(path))
  if path.exists() and not path.is_file():
    raise NoFileError(f"{path}: exists and is no file; choose another place")
  path.parent.mkdir(parents=True, exist_ok=True)
  part = path.with_name(f".part.{path.name}")  # keeps the ending, which says what to write
  try:
    yield part
    with part.open("rb+") as file:
      os.fsync(file.fileno())
    os.replace(part, path)
  finally:
    part.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
  """Writes a small file whole (`whole`)."""
  with whole(path) as part:
    part.write_text(text, encoding="utf-8")


@contextlib.contextmanager
def atomic_directory(path: str | Path, replaces: Callable[[Path], bool]) -> Iterator[Path]:
  """A temporary directory that becomes `path` when the block succeeds, and is removed when it fails.

  Where `path` is a link, what it points to is replaced, and the link stays.

  Args:
    replaces: whether an existing directory may be replaced; an empty one always may.

  Raises:
    ValueError: `path` holds something that must not be replaced.
  """
  path = Path(os.path.realpath(path))
  path.parent.mkdir(parents=True, exist_ok=True)
  for leftover in sorted(path.parent.glob(f".{glob.escape(path.name)}.partial-*")):  # left by a killed process
    if _is_running(leftover.name.rpartition("-")[2]):
      continue
    if "-old-" in leftover.name and not path.exists():  # the process was killed between the two renames below
      leftover.rename(path)
    else:
      shutil.rmtree(leftover, ignore_errors=True)
  if path.exists() and not (path.is_dir() and (not any(path.iterdir()) or replaces(path))):
    what = "exists and is not something this program wrote, or holds other files, too"
    raise ValueError(f"{path}: {what}; choose another place or remove it")
  mark = f"{secrets.token_hex(4)}-{os.getpid()}"
  partial = path.parent / f".{path.name}.partial-{mark}"
  partial.mkdir()
  try:
    yield partial
    if path.exists():
      old = partial.with_name(f".{path.name}.partial-old-{mark}")
      path.rename(old)
      try:
        partial.rename(path)
      except OSError:
        old.rename(path)
        raise
      shutil.rmtree(old)
    else:
      partial.rename(path)
  finally:
    shutil.rmtree(partial, ignore_errors=True)


def _is_running(pid: str) -> bool:
  """Whether another process with this id runs. A folder with our own id is from an earlier process of the same id."""
  try:
    if int(pid) == os.getpid():
      return False
    os.kill(int(pid), 0)
  except (ValueError, ProcessLookupError):
    return False
  except PermissionError:
    return True
  return True


def check_writable(path: str | Path) -> None:
  """Checks, before the work, that a folder can be made at `path`.

  Raises:
    ValueError: it cannot: a parent is a file, or the disk is read-only or full.
  """
  parent = Path(os.path.realpath(path)).parent
  try:
    parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=parent) as file:
      file.write(bytes(4096))
  except OSError as error:
    raise ValueError(f"{path}: cannot be written ({error.strerror}); choose another place") from None


def check_room(path: str | Path, size: int) -> None:
  """Checks, before the work, that the disk of `path`, which need not exist, has room for `size` more bytes.

  Raises:
    ValueError: it has not.
  """
  place = Path(path).absolute()
  while not place.exists():
    place = place.parent
  disk = shutil.disk_usage(place)
  if 0 < disk.total and disk.free < size:  # some network file systems do not tell
    need, free = (f"{count / 1e6:,.1f} MB" for count in (size, disk.free))
    raise ValueError(f"{path}: about {need} will be written, and the disk has {free} free; make room or choose another")


@contextlib.contextmanager
def clear_full_disk(path: str | Path) -> Iterator[None]:
  """Turns a library's pages of errors into one OSError where the disk is full."""
  try:
    yield
  except Exception as error:
    full = "No space left" in str(error) or "Disk quota exceeded" in str(error) or "RESOURCE_EXHAUSTED" in str(error)
    if not full:
      raise
    raise OSError(f"{path}: the disk is full; nothing was written") from None


@contextlib.contextmanager
def plain_name(directory: Path) -> Iterator[Path]:
  """`directory` by a name that Orbax takes: a link, if need be.

  It takes `[`, `]`, `*` and `?` for a pattern, and no name that the locale (such as C) cannot decode.
  """
  directory = directory.absolute()
  if not (glob.has_magic(str(directory)) or has_half_pair(str(directory))):
    yield directory
    return
  with tempfile.TemporaryDirectory(prefix="dms_jax-") as folder:
    link = Path(folder) / "link"
    link.symlink_to(directory, target_is_directory=True)
    yield link
