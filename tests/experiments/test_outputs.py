"""Outputs: one writer at a time, whoever dies; places that take nothing; a full disk in one line."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from dms_jax import disk
from experiments.common import outputs, program, stopping

ROOT = Path(__file__).parents[2]
HOLD = """
import sys, time
from experiments.common import outputs
with outputs.locked("output", sys.argv[1], sys.argv[2]):
  print("ready", flush=True)
  if sys.argv[3] == "child":
    import subprocess
    print(subprocess.Popen(["sleep", "60"], stdout=2).pid, flush=True)
  input()
"""


@contextlib.contextmanager
def holder(path: Path, kind: str, child: str = ""):
  """Another process that has locked `path`; it is killed at the end, if a line on its stdin has not ended it."""
  command = [sys.executable, "-c", HOLD, str(path), kind, child]
  with subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
    assert process.stdout.readline() == "ready\n"
    yield process
    process.kill()


@pytest.mark.parametrize("kind", ["folder", "file", "tree"])
def test_one_writer_by_whatever_name(tmp_path, kind):
  """A link, with or without what it points to, is its target."""
  (tmp_path / "link").symlink_to(tmp_path / "new" / "x")
  with outputs.locked("output", tmp_path / "link", kind):
    with pytest.raises(ValueError, match="another run writes"), outputs.locked("output", tmp_path / "new" / "x", kind):
      pass
  assert (tmp_path / "link").is_symlink()


@pytest.mark.parametrize("kind", ["folder", "file"])
def test_one_writer_until_it_ends_or_is_killed(tmp_path, kind):
  path = tmp_path / "new" / "x.jsonl"
  with holder(path, kind, "child") as other:
    child = int(other.stdout.readline())
    says = rf"--output={path}: another run writes there: process {other.pid} on \S+ since .* \(.*python.*\); let it end"
    with pytest.raises(ValueError, match=says), outputs.locked("output", path, kind):
      pass
  with outputs.locked("output", path, kind):  # its child lives and has not inherited the lock
    lock = path / ".lock" if kind == "folder" else path.parent / ".x.jsonl.lock"
    assert json.loads(lock.read_text())["pid"] == os.getpid()
  os.kill(child, signal.SIGKILL)
  with holder(path, kind) as other:
    other.communicate("\n", timeout=60)
  assert other.returncode == 0 and not list(tmp_path.rglob(".*"))


def test_the_folder_of_a_run_that_wrote_nothing_goes(tmp_path):
  with pytest.raises(KeyError), outputs.locked("output", tmp_path / "a"):
    raise KeyError
  assert not list(tmp_path.iterdir())
  with outputs.locked("output", tmp_path / "a") as folder:
    (folder / "result").write_text("")
  assert [p.name for p in (tmp_path / "a").iterdir()] == ["result"]


def test_a_lock_file_removed_by_its_owner_is_no_lock(tmp_path, monkeypatch):
  """Between opening and locking it another run may end, and a third one begin: two would hold two files."""
  take, calls = outputs._take, []

  def late(handle, where):
    calls.append(handle)
    if len(calls) == 1:
      os.unlink(tmp_path / ".lock")
    return take(handle, where)

  monkeypatch.setattr(outputs, "_take", late)
  with outputs.locked("output", tmp_path):
    assert len(calls) == 2 and (tmp_path / ".lock").exists()


def test_a_file_system_without_locks_gets_a_warning(tmp_path, monkeypatch, capsys):
  def none(handle, how):
    raise OSError(errno.ENOLCK, "No locks available")

  monkeypatch.setattr(fcntl, "flock", none)
  with outputs.locked("output", tmp_path / "a") as folder:
    (folder / "result").write_text("")
  assert [p.name for p in folder.iterdir()] == ["result"]
  (line,) = capsys.readouterr().err.splitlines()
  assert line.startswith(f"warning: --output={folder}: this file system has no locks (No locks available)")


def test_a_place_that_takes_nothing_is_refused(tmp_path, monkeypatch):
  (tmp_path / "file").write_text("")
  for path in (tmp_path / "file", tmp_path / "file" / "below"):
    with pytest.raises(ValueError, match=r"--output=\S+: no folder can be made there"), outputs.locked("output", path):
      pass
  with pytest.raises(ValueError, match=r"--output=\S+: a folder, where a file is"):
    with outputs.locked("output", tmp_path, "file"):
      pass
  if Path("/proc/self").exists():
    with pytest.raises(ValueError, match="--output=/proc/x: not writable"), outputs.locked("output", "/proc/x", "file"):
      pass
  monkeypatch.setattr(os, "pwrite", lambda *args: 0)
  with pytest.raises(ValueError, match=r"not writable \(No space left on device\); make room, or name another place"):
    with outputs.locked("output", tmp_path / "full"):
      pass
  assert sorted(p.name for p in tmp_path.iterdir()) == ["file"]


def test_a_disk_that_fills_says_what_is_kept(tmp_path):
  message = rf"--output={tmp_path}: the disk is full \(a.json\); what was finished is in .*; make room, and the same "
  with pytest.raises(OSError, match=message), outputs.locked("output", tmp_path):
    raise OSError(errno.ENOSPC, "No space left on device", "a.json")
  with pytest.raises(OSError, match=r"the disk is full \(RuntimeError\)"), outputs.locked("output", tmp_path):
    raise RuntimeError("worker failed") from ValueError("writing chunk: No space left on device")
  with pytest.raises(OSError, match=r"^x: the disk is full; nothing was written$"), outputs.locked("output", tmp_path):
    raise OSError("x: the disk is full; nothing was written")
  with pytest.raises(KeyError), outputs.locked("output", tmp_path):
    raise KeyError("another error")


def test_an_interruption_says_what_is_kept(tmp_path):
  for goes_on, said in ((True, "goes on"), (False, "begins again")):
    with pytest.raises(KeyboardInterrupt) as caught, outputs.locked("output", tmp_path / "x", "folder", goes_on):
      raise stopping.Stopped(number=2)
    line = f"stopped by SIGINT: what was finished is in {tmp_path / 'x'}; the same command {said}"
    assert stopping.line(caught.value) == line


LIMITED = """
import resource, sys
from pathlib import Path
from experiments.common import files, program
resource.setrlimit(resource.RLIMIT_FSIZE, (4096, resource.RLIM_INFINITY))  # a disk that is full beyond 4096 bytes
folder, failed = Path(sys.argv[1]), 0
for write in (
  lambda: files.append_text(folder / "lines.jsonl", "x" * 3000 + "\\n"),
  lambda: files.append_text(folder / "lines.jsonl", "y" * 3000 + "\\n"),
  lambda: files.append_text(folder / "new.jsonl", "z" * 5000),
  lambda: program.save_json(folder / "old.json", ["x" * 5000]),
):
  try:
    write()
  except OSError as error:
    print(error.errno, error.filename)
"""


def test_a_full_disk_leaves_files_as_they_were(tmp_path):
  (tmp_path / "old.json").write_text("1")
  done = subprocess.run([sys.executable, "-c", LIMITED, str(tmp_path)], cwd=ROOT, capture_output=True, text=True)
  assert done.returncode == 0, done.stderr
  assert len(done.stdout.splitlines()) == 3
  assert {p.name: p.read_text() for p in tmp_path.iterdir()} == {"lines.jsonl": "x" * 3000 + "\n", "old.json": "1"}


def test_files_are_whole_or_absent(tmp_path):
  with pytest.raises(KeyboardInterrupt), disk.whole(tmp_path / "a.txt") as part:
    part.write_text("half")
    raise KeyboardInterrupt
  assert not list(tmp_path.iterdir())
  assert json.loads(program.save_json(tmp_path / "b.json", {"a": 1}).read_text()) == {"a": 1}
  (tmp_path / "link").symlink_to(tmp_path / "b.json")
  program.save_json(tmp_path / "link", {"a": 2})
  assert (tmp_path / "link").is_symlink() and json.loads((tmp_path / "b.json").read_text()) == {"a": 2}
  with pytest.raises(ValueError, match="/dev/null: exists and is no file"):  # root could replace it
    program.save_json("/dev/null", {})
