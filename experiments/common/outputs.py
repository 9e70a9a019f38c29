"""Where a program writes: one writer at a time, writable before the work, a full disk in one line."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shlex
import socket
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

from experiments.common import stopping

LOCK = ".lock"
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
SAID = "the disk is full"
BLOCK = 4096  # bytes; a disk without room for a block takes no file


@contextlib.contextmanager
def locked(
  flag: str, path: str | Path, kind: Literal["folder", "file", "tree"] = "folder", goes_on: bool = True
) -> Iterator[Path]:
  """Keeps other runs from writing to `path` until the block or this process ends, however it ends.

  The lock is one of the operating system on a small file that says who writes: `path`/.lock in a folder, made if it is
  missing, and .NAME.lock beside a file or a "tree", a folder that is written as a whole. A file system without locks
  gets a warning.

  Args:
    flag: names the path.
    goes_on: whether the same command goes on after an interruption; otherwise it begins again.

  Raises:
    ValueError: another run writes there, or nothing can be written there; names the flag.
  """
  path = Path(path)
  real = Path(os.path.realpath(path))  # by whatever name: one lock
  file = real / LOCK if kind == "folder" else real.with_name(f".{real.name}{LOCK}")
  where, made = f"--{flag}={path}", not file.parent.exists()
  kept = f"what was finished is in {path}" if kind == "folder" or goes_on else f"{path} is as it was before"
  if kind == "file" and real.is_dir():
    raise ValueError(f"{where}: a folder, where a file is to be written; name another place")
  again = f"the same command {'goes on' if goes_on else 'begins again'}"
  try:
    handle = _lock(file, where)
  except OSError as error:
    if made:
      with contextlib.suppress(OSError):
        file.parent.rmdir()
    what = "no folder can be made there" if isinstance(error, FileExistsError | NotADirectoryError) else "not writable"
    advice = "make room, or name another place" if error.errno in FULL else "name another place"
    raise ValueError(f"{where}: {what} ({error.strerror}); {advice}") from None
  try:
    with stopping.leaving(f"{kept}; {again}"):
      yield path
  except Exception as error:
    if not is_full(error) or SAID in str(error):
      raise
    name = getattr(error, "filename", None) or type(error).__name__
    raise OSError(f"{where}: {SAID} ({name}); {kept}; make room, and {again}") from error
  finally:
    if handle is not None:
      file.unlink(missing_ok=True)  # while it is locked: `_lock` of another run then finds another file, or none
      os.close(handle)
    if made:
      with contextlib.suppress(OSError):  # it holds results
        file.parent.rmdir()


def _lock(file: Path, where: str) -> int | None:
  """Locks a file, made if it is missing, and writes into it who writes; None where there are no locks."""
  file.parent.mkdir(parents=True, exist_ok=True)
  while True:
    # For reading and writing, without which NFS locks nothing.
    handle, ours = os.open(file, os.O_RDWR | os.O_CREAT, 0o644), False
    try:
      locks = _take(handle, where)
      try:
        current = os.path.samestat(os.stat(file), os.fstat(handle))
      except FileNotFoundError:  # its owner has ended between the two calls, and removed it
        current = False
      ours = current
      if current:
        os.ftruncate(handle, 0)
        if os.pwrite(handle, who := _who().ljust(BLOCK), 0) < len(who):
          raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        if locks:
          return handle
        os.unlink(file)
    except BaseException:
      if ours:
        file.unlink(missing_ok=True)
      os.close(handle)
      raise
    os.close(handle)
    if current:
      return None


def _take(handle: int, where: str) -> bool:
  """Whether the file system locked an open file for this process.

  Raises:
    ValueError: another process has locked it.
  """
  try:
    import fcntl
  except ImportError:  # Windows
    return False
  try:
    fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    return True
  except BlockingIOError:
    who = _owner(handle)
    raise ValueError(f"{where}: another run writes there{who}; let it end, or name another place") from None
  except OSError as error:
    print(
      f"warning: {where}: this file system has no locks ({error.strerror}); make sure that no other run writes there",
      file=sys.stderr, flush=True,
    )  # fmt: skip
    return False


def _who() -> bytes:
  """This process, in JSON."""
  arguments = getattr(sys, "orig_argv", sys.argv)
  about = {
    "pid": os.getpid(), "host": socket.gethostname(), "since": time.strftime("%Y-%m-%d %H:%M:%S"),
    "command": shlex.join(arguments)[:2000],
  }  # fmt: skip
  return json.dumps(about).encode()


def _owner(handle: int) -> str:
  """Who wrote into a lock file, for a message; "" if it does not say yet."""
  try:
    about = json.loads(os.pread(handle, 1 << 16, 0))
    command = " ".join(about["command"].split())
    short = command if len(command) <= 160 else f"{command[:157]}..."
    return f": process {about['pid']} on {about['host']} since {about['since']} ({short})"
  except (OSError, ValueError, KeyError, TypeError):
    return ""


def is_full(error: BaseException | None) -> bool:
  """Whether an error, or one that it comes from, is a full disk, a used quota or a file as large as it may be.

  Errors of libraries say so only in their message.
  """
  seen = 0
  while error is not None and seen < 20:
    said = ("No space left on device", "Disk quota exceeded", "File too large", "RESOURCE_EXHAUSTED: Failed to", SAID)
    if getattr(error, "errno", None) in FULL or any(text in str(error) for text in said):
      return True
    if isinstance(error, BaseExceptionGroup) and any(map(is_full, error.exceptions)):
      return True
    error, seen = error.__cause__ or error.__context__, seen + 1
  return False
