"""Runs programs that nobody has read: confined, limited, killed whole, and judged from outside.

A program runs in a process of its own (`worker`), which confines itself (`confine`) before it reads the program's first
line. It inherits only LD_LIBRARY_PATH and its own input and pipes, and leads a session of its own.

- It opens no socket and reaches no network: seccomp has no `socket`; where namespaces may be made, its network has no
  device.
- It writes, removes and renames nothing outside its folder: Landlock, no capabilities, and no system call that changes
  modes, owners or times.
- It writes at most `disk` bytes: its folder is a file system in memory of that size. Without mount namespaces nothing
  bounds the sum, so there the folder is not writable.
- It reads no data sets, home folders, /proc or /tmp: Landlock leaves the interpreter, its packages, and the
  libraries of /usr and /lib.
- It makes no process and runs no other program, so it leaves none behind: seccomp has `clone` for threads and no
  `execve`.
- It signals, traces and limits no other process: seccomp has `kill`, `tgkill` and `prlimit64` for itself alone and no
  `ptrace`.
- It is bounded in address space, open files, stack and processor time by resource limits. It is killed when it exceeds
  its wall time, output or threads; the waiting process looks every 20 ms.
- It dies with the process that waits: PR_SET_PDEATHSIG.
- It sees neither tests nor expected values, and has no part in the verdict: other processes hold them. It sees its
  standard input, or the arguments of calls, which it answers in JSON.

Before its program starts, a worker tries to open sockets, write outside, fork, run, signal and read /proc, and ends if
any of it works. A machine without Landlock (Linux 5.13) or seccomp runs no programs: SandboxError.

Not guaranteed: safety from errors in the kernel. Paths outside may become known, since `stat` is not restricted. What
/usr and the interpreter's folders hold can be read. Within 20 ms a program may have more than `threads` threads. Each
program has limits of its own; nothing bounds all together. A program's empty folder stays if the process that waits is
killed. As root, a program runs as user 0 without capabilities, because an interpreter may be readable by root alone.
Programs that need what is refused are wrong: asyncio (a pair of sockets), multiprocessing, subprocess.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import functools
import json
import math
import os
import selectors
import shutil
import signal
import site
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

from experiments.grading import confine, wire

WORKER = Path(__file__).with_name("worker.py")
TICK = 0.02  # seconds between two looks at a running program
START_SECONDS = 60.0  # for an interpreter to start and confine itself, on a busy machine
UNSAFE = "programs cannot run here safely"
SEALS = ("F_SEAL_WRITE", "F_SEAL_GROW", "F_SEAL_SHRINK", "F_SEAL_SEAL")


class SandboxError(ValueError):
  """This machine cannot run programs safely; the message says why."""


@dataclasses.dataclass(frozen=True)
class Limits:
  """What one program may use.

  `seconds` of wall time, for each test where a program answers several; `memory` bytes of address space, libraries
  included; `disk` bytes of files; `files` open at once; `threads`; `output` bytes of standard output and error.
  """

  seconds: float = 10.0
  memory: int = 2 << 30
  disk: int = 32 << 20
  files: int = 64
  threads: int = 32
  output: int = 8 << 20


@dataclasses.dataclass(frozen=True)
class Outcome:
  """How a program ended, and what it wrote.

  `ended`: "exit" at its end or by sys.exit of any status; "error" by an exception, a signal or otherwise; "time",
  "output", "threads": killed at that limit. `replies`: what it answered to calls, as bytes.
  """

  ended: Literal["exit", "error", "time", "output", "threads"]
  stdout: str
  stderr: str
  seconds: float
  replies: bytes = b""


# One confined process ------------------------------------------------------------------------------------------------


def _sealed(name: str, data: bytes) -> int:
  """An open file in memory that can only be read, from its start."""
  number = os.memfd_create(name, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
  with open(os.dup(number), "wb") as file:
    file.write(data)
  os.lseek(number, 0, os.SEEK_SET)
  fcntl.fcntl(number, fcntl.F_ADD_SEALS, functools.reduce(lambda a, b: a | getattr(fcntl, b), SEALS, 0))
  return number


class _Process:
  """A worker: `kept` maps names to the ends of pipes that this process reads, `text` to what came out of them."""

  def __init__(
    self, stack: contextlib.ExitStack, spec: dict[str, Any], limits: Limits, isolation: str, folder: str, tests: int,
    stdin: str = "", given: Sequence[int] = (), keep: dict[str, int] | None = None,
  ):  # fmt: skip
    self.limits, self.kept = limits, dict(keep or {})
    bounds = confine.Bounds(math.ceil(limits.seconds * tests) + 1, limits.memory, limits.disk, limits.files)
    spec |= {"isolation": isolation, "folder": folder, "bounds": bounds._asdict(), "parent": os.getpid()}
    spec["libraries"] = _libraries()
    with contextlib.ExitStack() as ours:  # the child's ends are closed here once it has them
      ends = {"spec": _sealed("spec", json.dumps(spec).encode())}
      ends["stdin"] = _sealed("stdin", stdin.encode(errors="surrogatepass"))
      for name in ("stdout", "stderr", "status"):
        self.kept[name], ends[name] = os.pipe()
        stack.callback(os.close, self.kept[name])
      for end in ends.values():
        ours.callback(os.close, end)
      self.process = subprocess.Popen(
        [sys.executable, "-I", "-S", "-B", "-X", "utf8", str(WORKER), str(ends["spec"]), str(ends["status"])],
        stdin=ends["stdin"], stdout=ends["stdout"], stderr=ends["stderr"],
        pass_fds=(ends["spec"], ends["status"], *given),
        env=_environment(folder), cwd=folder, start_new_session=True,
      )  # fmt: skip
    stack.callback(self.end)
    self.text = {name: bytearray() for name in self.kept}

  def end(self) -> None:
    """Kills the process with its session, and waits for it."""
    if self.process.poll() is None:
      with contextlib.suppress(ProcessLookupError):
        os.killpg(self.process.pid, signal.SIGKILL)
      self.process.kill()
    self.process.wait()

  def threads(self) -> int:
    """Threads of the process now; 0 if it has ended."""
    try:
      return int(Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(")")[2].split()[17])
    except (OSError, IndexError):
      return 0

  def exceeded(self) -> str | None:
    """The limit that the process exceeds, if any."""
    if sum(len(text) for name, text in self.text.items() if name != "replies") > self.limits.output:
      return "output"
    return "threads" if self.threads() > self.limits.threads else None

  def refuse(self) -> None:
    """Raises SandboxError with what a worker said that could not be confined."""
    self.end()
    with contextlib.suppress(BlockingIOError):
      while data := os.read(self.kept["stderr"], 1 << 16):
        self.text["stderr"] += data
    said = self.text["status"] or self.text["stderr"].strip().rpartition(b"\n")[2] or b"the worker ended"
    raise SandboxError(f"{UNSAFE}: {said.decode(errors='replace')}")


def _environment(folder: str) -> dict[str, str]:
  one = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
  library = {"LD_LIBRARY_PATH": path} if (path := os.environ.get("LD_LIBRARY_PATH")) else {}
  return {"PATH": "/usr/bin:/bin", "HOME": folder, "TMPDIR": folder, "LANG": "C.UTF-8", **one, **library}


def _libraries() -> list[str]:
  """Folders of the packages that this interpreter finds, without those of the user and of the project itself."""
  places = [sysconfig.get_path("purelib"), sysconfig.get_path("platlib"), *site.getsitepackages()]
  return [place for place in dict.fromkeys(places) if os.path.isdir(place)]


def _watch(processes: Sequence[_Process], main: _Process, seconds: float, tests: int, cap: int) -> tuple[str, float]:
  """Reads what the processes write until `main` ends or a limit is exceeded: (how it ended, seconds).

  Time counts from the moment when every process is confined. All tests have `tests` times `seconds`, and each line of
  replies comes within `seconds`. Replies hold at most `cap` bytes.

  Raises:
    SandboxError: a process could not be confined.
  """
  with selectors.DefaultSelector() as selector, contextlib.ExitStack() as stack:
    ended = os.pidfd_open(main.process.pid)
    stack.callback(os.close, ended)
    selector.register(ended, selectors.EVENT_READ)
    for process in processes:
      for name, number in process.kept.items():
        os.set_blocking(number, False)
        selector.register(number, selectors.EVENT_READ, (process, name))
    unread = {key.fd for key in selector.get_map().values() if key.data is None or key.data[0] is main}
    confined, begun, looked = False, time.monotonic(), 0.0
    last = begun + START_SECONDS
    while not (confined and not unread):
      for key, _ in selector.select(TICK):
        data = os.read(key.fd, 1 << 16) if key.data else b""
        if not data:
          selector.unregister(key.fd)
          unread.discard(key.fd)
        if key.data:
          process, name = key.data
          process.text[name] += data
          if name == "status" and not data and process.text[name] != b"ready":
            process.refuse()
          if name == "replies" and b"\n" in data:
            last = min(time.monotonic() + seconds, begun + seconds * tests)
      now = time.monotonic()
      if not confined and all(process.text["status"] == b"ready" for process in processes):
        confined, begun, last = True, now, now + seconds
        if not all(process.threads() for process in processes):
          raise SandboxError(f"{UNSAFE}: /proc does not tell the threads of a process")
      if now - looked >= TICK or not unread:
        looked = now
        for process in processes:
          if limit := process.exceeded():
            return limit, now - begun
      if len(main.text.get("replies", b"")) > cap:
        return "output", now - begun
      if now > last:
        if not confined:
          raise SandboxError(f"{UNSAFE}: the worker did not start within {START_SECONDS:g} s")
        return "time", now - begun
    return ("error" if main.process.wait() else "exit"), time.monotonic() - begun


# Which protections this machine has ----------------------------------------------------------------------------------


@functools.cache
def isolation() -> str:
  """The strongest of `confine.NAMESPACES` in which a program runs here.

  Raises:
    SandboxError: not even the weakest works; the message says why.
  """
  if sys.platform != "linux":
    raise SandboxError(f"{UNSAFE}: they need Linux (Landlock and seccomp), not {sys.platform}")
  for kind in confine.NAMESPACES:
    try:
      if _run("pass", "", Limits(), kind).ended == "exit":
        return kind
    except SandboxError as error:
      reason = error
  raise reason


# What runs -----------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _folder() -> Iterator[str]:
  folder = tempfile.mkdtemp(prefix="program-")
  try:
    yield folder
  finally:
    shutil.rmtree(folder)


def _outcome(process: _Process, ended: str, seconds: float) -> Outcome:
  out, err = (bytes(process.text[name]).decode(errors="replace") for name in ("stdout", "stderr"))
  return Outcome(ended, out, err, seconds, bytes(process.text.get("replies", b"")))


def _run(code: str, stdin: str, limits: Limits, kind: str, prelude: bool = False) -> Outcome:
  with _folder() as folder, contextlib.ExitStack() as stack:
    spec = {"mode": "program", "code": code, "prelude": prelude}
    process = _Process(stack, spec, limits, kind, folder, 1, stdin)
    return _outcome(process, *_watch([process], process, limits.seconds, 1, 0))


def run_program(code: str, stdin: str = "", limits: Limits | None = None, prelude: bool = False) -> Outcome:
  """Runs a program from its first line to its end.

  Args:
    prelude: LiveCodeBench's imports come first.

  Raises:
    SandboxError: this machine lacks a protection.
  """
  return _run(code, stdin, limits or Limits(), isolation(), prelude)


def call_function(
  code: str, name: str, arguments: Sequence[Sequence[Any]], limits: Limits | None = None, prelude: bool = False,
  cap: int = 1 << 20,
) -> tuple[Outcome, list[bytes]]:  # fmt: skip
  """Calls one function of a program once for each of `arguments`; each call has `limits.seconds`.

  Args:
    cap: most bytes that all replies may hold.

  Returns:
    The outcome, and a line for each call that was answered, to be read by `wire.result`.

  Raises:
    SandboxError: this machine lacks a protection.
  """
  limits, kind = limits or Limits(), isolation()
  with _folder() as folder, contextlib.ExitStack() as stack:
    requests = _sealed("requests", b"".join(wire.dumps((name, list(each))) for each in arguments))
    kept, replies = os.pipe()
    stack.callback(os.close, kept)
    spec = {"mode": "serve", "code": code, "prelude": prelude, "requests": requests, "replies": replies}
    try:
      process = _Process(
        stack, spec, limits, kind, folder, len(arguments), given=(requests, replies), keep={"replies": kept}
      )
    finally:
      os.close(requests)
      os.close(replies)
    outcome = _outcome(process, *_watch([process], process, limits.seconds, len(arguments), cap))
    return outcome, outcome.replies.splitlines(keepends=True)


def run_tests(
  code: str, calls: Sequence[str], tests: str, setup: str = "", limits: Limits | None = None
) -> tuple[str, Outcome]:
  """Runs a benchmark's own tests against functions of a program.

  Tests and program are confined in two processes. The tests call the program through a pipe and compare what comes
  back, values of Python's own types; the program cannot reach its judge.

  Args:
    calls: names of the functions that the tests call.
    setup: Python run before the tests, such as what the prompt defines.
    limits: of each of the two processes; `seconds` is for all tests together.

  Returns:
    "passed", or the reason why not, and the outcome of the tests' process.

  Raises:
    SandboxError: this machine lacks a protection.
  """
  limits, kind = limits or Limits(), isolation()
  with _folder() as one, _folder() as other, contextlib.ExitStack() as stack:
    pipes = [os.pipe() for _ in range(3)]
    (asked, requests), (answered, replies), (kept, verdict) = pipes
    try:
      spec = {"mode": "serve", "code": code, "prelude": False, "requests": asked, "replies": replies}
      program = _Process(stack, spec, limits, kind, one, 1, given=(asked, replies))
      spec = {
        "mode": "judge", "setup": setup, "tests": tests, "calls": list(calls), "prelude": False,
        "requests": requests, "replies": answered, "verdict": verdict,
      }  # fmt: skip
      judge = _Process(stack, spec, limits, kind, other, 1, given=(requests, answered, verdict), keep={"verdict": kept})
    finally:
      for number in (asked, requests, answered, replies, verdict):
        os.close(number)
      stack.callback(os.close, kept)
    outcome = _outcome(judge, *_watch([program, judge], judge, limits.seconds, 1, 0))
    said = judge.text["verdict"].decode(errors="replace")
    return (said if outcome.ended == "exit" and said else f"ended: {outcome.ended}"), outcome


def in_parallel(function: Callable, items: Sequence, workers: int | None = None) -> list:
  """`function` of each item, in order; `workers` at a time, by default one for each two processors, at most 8."""
  from concurrent.futures import ThreadPoolExecutor  # each item waits for processes of its own

  with ThreadPoolExecutor(workers or min(8, max(1, (os.cpu_count() or 2) // 2))) as pool:
    return list(pool.map(function, items))
