"""Programs that must not harm the machine nor fake a verdict: sandbox, its filter, its refusals."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import os
import re
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from experiments.grading import confine, sandbox, wire

QUICK = sandbox.Limits(seconds=10.0, memory=1 << 28, disk=4 << 20, output=1 << 20)
ROOT = Path(__file__).parents[2]


try:
  MISSING = not sandbox.isolation()
except sandbox.SandboxError:
  MISSING = True
confined = pytest.mark.skipif(MISSING, reason="this machine has no Landlock or seccomp")


def children(parent: int = 0, busy: float = 0.0) -> list[int]:
  """Workers that process `parent`, by default this one, has started; those that computed for `busy` seconds."""
  found = []
  for path in Path("/proc").glob("[0-9]*"):
    with contextlib.suppress(OSError):
      stat = (path / "stat").read_text().rpartition(")")[2].split()
      used = int(stat[11]) / os.sysconf("SC_CLK_TCK")
      if int(stat[1]) == (parent or os.getpid()) and used >= busy and b"worker.py" in (path / "cmdline").read_bytes():
        found.append(int(path.name))
  return found


@pytest.fixture(params=["strongest", "none"])
def kind(request, monkeypatch):
  """The isolation in which programs run: what the machine has, and that of one without namespaces."""
  if request.param == "none":
    monkeypatch.setattr(sandbox, "isolation", lambda: "none")
  return sandbox.isolation()


# Programs that do harm: (how they end, code, what they print). {outside} is a folder that they must leave alone.
HARM = {
  "loops": ("time", "while True: pass", ""),
  "sleeps": ("time", "import time; time.sleep(99)", ""),
  "ignores SIGXCPU and SIGTERM": (
    "time", "import signal\nfor s in (24, 15, 2): signal.signal(s, signal.SIG_IGN)\nwhile True: pass", ""
  ),
  "closes its output and sleeps": ("time", "import os, time\nos.close(1)\nos.close(2)\ntime.sleep(99)", ""),
  "forks": ("error", "import os\nwhile True: os.fork()", ""),
  "insists on forking": (
    "exit", "import os\nfor i in range(99):\n  try: os.fork()\n  except OSError: pass\nprint('alone')", "alone\n"
  ),
  "leaves a process behind": ("error", "import subprocess\nsubprocess.Popen(['sleep', '99'])", ""),
  "runs a shell": ("exit", "import os\nprint(os.system('touch {outside}/new'))", "32512\n"),  # status 127: no such
  "becomes another program": ("error", "import os\nos.execv('/bin/sh', ['sh', '-c', 'touch {outside}/new'])", ""),
  "eats memory": ("error", "kept = []\nwhile True: kept.append(bytearray(1 << 24))", ""),
  "makes threads": (
    "threads",
    "import threading, time\nthreading.stack_size(1 << 15)\n"
    "for i in range(99999): threading.Thread(target=time.sleep, args=(99,)).start()", ""
  ),
  "opens files": ("error", "import os\nkept = []\nwhile True: kept.append(os.pipe())", ""),
  "prints forever": ("output", "while True: print('x' * 999)", ""),
  "prints errors forever": ("output", "import sys\nwhile True: print('x' * 999, file=sys.stderr)", ""),
  "opens a socket": ("error", "import socket\nsocket.create_connection(('127.0.0.1', 9))", ""),
  "opens a Unix socket": ("error", "import socket\nsocket.socketpair()", ""),
  "kills its parent": ("error", "import os\nos.kill(os.getppid(), 9)", ""),
  "kills all": ("error", "import os\nos.kill(-1, 9)", ""),
  "kills its group": ("error", "import os\nos.killpg(0, 9)", ""),
  "has its parent killed by a pipe": (
    "error", "import fcntl, os\nr, w = os.pipe()\nfcntl.fcntl(r, fcntl.F_SETOWN, os.getppid())", ""
  ),
  "limits its parent": (
    "error", "import os, resource as r\nr.prlimit(os.getppid(), r.RLIMIT_NOFILE, (1, 1))", ""
  ),
  "lifts its limits": ("error", "import resource as r\nr.setrlimit(r.RLIMIT_CPU, (999, 999))", ""),
  "writes outside": ("error", "open('{outside}/new', 'w')", ""),
  "overwrites outside": ("error", "open('{outside}/kept', 'w')", ""),
  "truncates outside": ("error", "import os\nos.truncate('{outside}/kept', 0)", ""),
  "truncates what it may read": (
    "error", "import os\nos.open(os.__file__, os.O_RDONLY | os.O_TRUNC)", ""
  ),
  "removes outside": ("error", "import os\nos.remove('{outside}/kept')", ""),
  "renames outside": ("error", "import os\nos.rename('{outside}/kept', '{outside}/new')", ""),
  "moves in": ("error", "import os\nos.rename('{outside}/kept', 'kept')", ""),
  "makes a folder outside": ("error", "import os\nos.mkdir('{outside}/new')", ""),
  "makes a file without a name outside": (
    "error", "import os\nos.open('{outside}', os.O_TMPFILE | os.O_RDWR)", ""
  ),
  "looks into other processes": (
    "exit",
    "import os\nfor pid in (1, *range(os.getpid() - 300, os.getpid() + 9)):\n"
    "  for name in ('mem', 'environ', 'maps', 'fd/0', 'fd/3'):\n"
    "    if pid == os.getpid(): continue\n"
    "    try: os.open('/proc/%d/%s' % (pid, name), os.O_RDONLY)\n    except OSError: continue\n    print(pid, name)", ""
  ),
  "writes through a link": ("error", "import os\nos.symlink('{outside}', 'link')\nopen('link/new', 'w')", ""),
  "writes by a relative path": (
    "error", "import os\nopen(os.path.relpath('{outside}/new', os.getcwd()), 'w')", ""
  ),
  "changes a mode": ("error", "import os\nos.chmod('{outside}/kept', 0o777)", ""),
  "changes a time": ("error", "import os\nos.utime('{outside}/kept', (0, 0))", ""),
  "sets an attribute": ("error", "import os\nos.setxattr('{outside}/kept', 'user.x', b'1')", ""),
  "reads outside": ("error", "print(open('{outside}/kept').read())", ""),
  "reads its parent's environment": ("error", "import os\nopen('/proc/%d/environ' % os.getppid())", ""),
  "opens its parent's files": (
    "error", "import os\nopen('/proc/%d/fd/0' % os.getppid())", ""
  ),
  "mounts": (
    "exit", "import ctypes\nprint(ctypes.CDLL(None).mount(b'none', b'{outside}', b'tmpfs', 0, None))", "-1\n"
  ),
  "leaves its namespaces": ("exit", "import ctypes\nprint(ctypes.CDLL(None).unshare(0x10000000))", "-1\n"),
  "traces its parent": (
    "exit", "import ctypes, os\nprint(ctypes.CDLL(None).ptrace(16, os.getppid(), 0, 0))", "-1\n"
  ),
  "makes a ring": ("exit", "import ctypes\nprint(ctypes.CDLL(None).syscall(425, 8, bytes(400)))", "-1\n"),
  "reads other files": (
    "exit",
    "import os\nfor f in range(3, 64):\n  try: os.fstat(f)\n  except OSError: continue\n  print(f)", ""
  ),
  "has an environment": (
    "exit", "import os\nprint(*sorted(os.environ))",
    "HOME LANG MKL_NUM_THREADS OMP_NUM_THREADS OPENBLAS_NUM_THREADS PATH TMPDIR\n",
  ),
  "crashes": ("error", "import ctypes\nctypes.string_at(0)", ""),
  "is no program": ("error", "this is prose\x00", ""),
}  # fmt: skip


REFUSED = r"PermissionError|MemoryError|Too many open files|cross-device link|not allowed to raise|null bytes"


@confined
@pytest.mark.parametrize("name", HARM)
def test_harm(name, kind, tmp_path, monkeypatch):
  monkeypatch.delenv("LD_LIBRARY_PATH", raising=False)
  ended, code, printed = HARM[name]
  kept = tmp_path / "kept"
  kept.write_text("untouched")
  kept.chmod(0o600)
  before = kept.stat()
  limits = dataclasses.replace(QUICK, seconds=0.3) if ended == "time" else QUICK
  outcome = sandbox.run_program(code.replace("{outside}", str(tmp_path)), "", limits)
  assert outcome.ended == ended, outcome
  if ended != "output":
    assert outcome.stdout == printed, outcome
  assert ended != "time" or outcome.seconds < 3
  if ended == "error" and name != "crashes":  # for this reason, and not for an error in the program
    assert re.search(REFUSED, outcome.stderr), outcome
  assert [path.name for path in tmp_path.iterdir()] == ["kept"]
  assert kept.read_text() == "untouched" and (kept.stat().st_mode, kept.stat().st_mtime) == (
    before.st_mode, before.st_mtime
  )  # fmt: skip
  assert not children()


@confined
def test_a_folder_that_fills_and_goes(kind, monkeypatch):
  made = []
  monkeypatch.setattr(sandbox.tempfile, "mkdtemp", lambda prefix, real=sandbox.tempfile.mkdtemp: made.append(
    real(prefix=prefix)) or made[-1])  # fmt: skip
  code = "number = 0\ntry:\n  while True:\n    open(f'{number}', 'wb').write(bytes(1 << 20))\n    number += 1\n"
  code += "except OSError as error:\n  print(number, error.strerror)"
  outcome = sandbox.run_program(code, "", QUICK)
  full = "0 Permission denied\n" if kind == "none" else "4 No space left on device\n"
  assert (outcome.ended, outcome.stdout) == ("exit", full)
  assert len(made) == 1 and not os.path.exists(made[0])


# Programs that are right, or do what is harmless
FINE = {
  "reads its input": ("a, b = map(int, input().split())\nprint(a + b, input())", "3 4\nlast", "7 last\n"),
  "reads all of it": ("import sys\nprint(len(sys.stdin.read()), sys.stdin.read() == '')", "ä\n" * 9, "18 True\n"),
  "reads bytes": ("import sys\nprint(sys.stdin.buffer.readline())", "x\ny", "b'x\\n'\n"),
  "reads past the end": ("try: input()\nexcept EOFError: print('end')", "", "end\n"),
  "ends early": ("print('done')\nexit()\nprint('more')", "", "done\n"),
  "ends early with a status": ("import sys\nprint('done')\nsys.exit(3)", "", "done\n"),
  "is a script": ("if __name__ == '__main__': print(__name__)", "", "__main__\n"),
  "pickles its classes": (
    "import dataclasses, pickle\n@dataclasses.dataclass\nclass A: x: int\nprint(pickle.loads(pickle.dumps(A(1))))", "",
    "A(x=1)\n",
  ),
  "recurses in a thread": (
    "import sys, threading\nsys.setrecursionlimit(10**6)\nthreading.stack_size(1 << 27)\n"
    "def f(n): return n and 1 + f(n - 1)\nt = threading.Thread(target=lambda: print(f(20000)))\nt.start()\nt.join()",
    "", "20000\n",
  ),
  "uses numpy": ("import numpy as np\nprint(int((np.eye(9) @ np.ones(9)).sum()))", "", "9\n"),
  "prints large numbers": ("print(len(str(10**40000)))", "", "40001\n"),
  "runs a pool of threads": (
    "from concurrent.futures import ThreadPoolExecutor as T\nwith T(4) as t: print(*t.map(abs, [-1, 2]))", "", "1 2\n"
  ),
  "knows time zones": ("import zoneinfo\nprint(zoneinfo.ZoneInfo('UTC'))", "", "UTC\n"),
}  # fmt: skip


@confined
@pytest.mark.parametrize("name", FINE)
def test_fine(name):
  code, given, printed = FINE[name]
  outcome = sandbox.run_program(code, given, sandbox.Limits(seconds=20))
  assert (outcome.ended, outcome.stdout, outcome.stderr) == ("exit", printed, "")


@confined
def test_many_at_once():
  codes = [f"print({number})" if number % 3 else "while True: pass" for number in range(12)]
  limits = dataclasses.replace(QUICK, seconds=1.0)
  ran = sandbox.in_parallel(lambda code: sandbox.run_program(code, "", limits), codes, workers=4)
  for number, outcome in enumerate(ran):
    assert (outcome.ended, outcome.stdout) == (("exit", f"{number}\n") if number % 3 else ("time", ""))
  assert not children()


@confined
def test_a_program_ends_with_the_process_that_waits(tmp_path):
  code = "from experiments.grading import sandbox\nsandbox.isolation()\nsandbox.run_program('while True: pass')"
  here = os.environ | {"TMPDIR": str(tmp_path)}  # the killed process leaves a folder
  waiting = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, start_new_session=True, env=here)
  try:
    workers, until = [], time.monotonic() + 30
    while not workers and time.monotonic() < until:
      time.sleep(0.05)
      workers = children(waiting.pid, busy=0.3)  # the program, and not the first one by which the machine is tried
    assert workers
  finally:
    waiting.kill()
    waiting.wait()
  time.sleep(0.3)
  gone = [
    not Path(f"/proc/{pid}").exists() or "\nState:\tZ" in Path(f"/proc/{pid}/status").read_text() for pid in workers
  ]
  assert all(gone)


# Verdicts -------------------------------------------------------------------------------------------------------------

TESTS = "assert f(2) == 4\nassert f('a') == 'aa' and f([1]) == [1, 1]\n"


def verdict(code: str, tests: str = TESTS, setup: str = "", seconds: float = 5.0) -> str:
  return sandbox.run_tests(code, ["f"], tests, setup, sandbox.Limits(seconds=seconds, memory=1 << 30))[0]


@confined
def test_tests_of_a_right_program():
  assert verdict("def f(x): return x + x") == "passed"
  assert verdict("print('f' * 999)\ndef f(x):\n  print(x)\n  return x + x") == "passed"
  assert (
    verdict("f = lambda x: {x: (x, None)}", "assert f(1.5) == {1.5: (1.5, None)}\nassert next(iter(f(1))) == 1")
    == "passed"
  )
  raises = "try:\n  f(1)\nexcept ValueError as error:\n  assert str(error) == 'odd'\nelse:\n  assert False\n"
  assert verdict("def f(x): raise ValueError('odd')", raises) == "passed"
  assert verdict("def f(x): return x + x", "assert g(f(1)) == 4", "g = lambda x: 2 * x") == "passed"


FAKES = {
  "is wrong": "def f(x): return x",
  "is nothing": "",
  "is no Python": "def f(x) return",
  "has another name": "def g(x): return x + x",
  "exits at once": "import os\nos._exit(0)",
  "exits when called": "import os\ndef f(x): os._exit(0)",
  "raises SystemExit": "def f(x): raise SystemExit(0)",
  "ends at once": "raise SystemExit(0)",
  "equals everything": "class E(int):\n  __eq__ = lambda *a: True\ndef f(x): return E()",
  "equals some things": "class E(str):\n  __eq__ = lambda *a: True\ndef f(x): return E('x') if x == 'a' else x + x",
  "changes builtins": (
    "import builtins\nbuiltins.AssertionError = type('A', (Exception,), {})\nbuiltins.isinstance = lambda *a: True\n"
    "def f(x): return x"
  ),
  "writes a verdict everywhere": (
    "import os\nfor n in range(3, 64):\n  try: os.write(n, b'passed')\n  except OSError: pass\ndef f(x): os._exit(0)"
  ),
  "answers before it is asked": (
    'import os\nfor n in range(3, 64):\n  try: os.write(n, b\'{"tuple": ["returned", 4]}\\n\' * 9)\n'
    "  except OSError: pass\ndef f(x): os._exit(0)"
  ),
  "answers a bomb": (
    "import os\nfor n in range(3, 64):\n  try: os.write(n, b'[' * 99999 + b'\\n')\n  except OSError: pass\nf = abs"
  ),
  "answers without end": "import itertools\ndef f(x): return itertools.count()",
  "answers something else": "def f(x): return object()",
  "answers a function": "def f(x): return f",
  "looks for the tests": (
    "import gc, sys\n"
    "def f(x):\n"
    "  seen = [o for o in gc.get_objects() if isinstance(o, (dict, list, tuple))]\n"
    "  texts = [v for o in seen for v in (o.values() if isinstance(o, dict) else o) if isinstance(v, str)]\n"
    "  return 4 if any('assert ' + 'f(' in t for t in texts) else x\n"
  ),
  "never answers": "def f(x):\n  while True: pass",
  "hides its error": "import sys, os\nsys.excepthook = lambda *a: os._exit(0)\nraise RuntimeError",
}


@confined
@pytest.mark.parametrize("name", FAKES)
def test_fakes(name):
  assert verdict(FAKES[name], seconds=1.0) != "passed"
  assert not children()


@confined
def test_a_program_ends_no_loop_of_the_tests():
  assert verdict("def f(x): raise StopIteration", "assert all(map(lambda x: f(x) == 2 * x, (1, 2)))") != "passed"
  assert verdict("def f(x): return x + x", "assert all(map(lambda x: f(x) == 2 * x, (1, 2)))") == "passed"


@confined
def test_tests_that_are_wrong_themselves():
  assert verdict("def f(x): return x", "assert False, 'no call'") == "AssertionError: no call"
  assert verdict("def f(x): return x", "assert f(1) ==").startswith("SyntaxError")
  assert verdict("def f(x): return x", "import os\nos._exit(0)") == "ended: exit"


@confined
def test_calls():
  limits = sandbox.Limits(seconds=1.0)
  code = "class Solution:\n  def f(self, a, b):\n    while a < 0: pass\n    return (a + b, [a])\n"
  outcome, replies = sandbox.call_function(code, "f", [(1, 2), (3, 4)], limits)
  assert outcome.ended == "exit" and [wire.result(line) for line in replies] == [(3, [1]), (7, [3])]
  outcome, replies = sandbox.call_function(code, "f", [(1, 2), (-1, 4), (5, 6)], limits)
  assert outcome.ended == "time" and [wire.result(line) for line in replies] == [(3, [1])]
  slow = "import time\ndef f():\n  time.sleep(0.6)\n  return 1"  # each call has a second
  outcome, replies = sandbox.call_function(slow, "f", [()] * 3, limits)
  assert outcome.ended == "exit" and len(replies) == 3
  outcome, replies = sandbox.call_function("def f(): return 'x' * 9999", "f", [()], limits, cap=999)
  assert outcome.ended == "output"


# Values ---------------------------------------------------------------------------------------------------------------


def test_values_survive():
  values = [None, True, 0, -(10**30), 1.5, math.inf, "a\n\ud800", b"\x00", 1j, (1, (2,)), [[]], {1, 2}, frozenset({3})]
  values += [{(1, 2): {"x": [None]}}, {}, {"tuple": 1}]
  for value in values:
    back = wire.loads(wire.dumps(value))
    assert back == value and type(back) is type(value)
  assert math.isnan(wire.loads(wire.dumps(math.nan)))
  assert list(wire.loads(wire.dumps(map(abs, [-1, 2])))) == [1, 2]
  np = pytest.importorskip("numpy")
  back = wire.loads(wire.dumps([np.int64(3), np.float32(0.5), np.bool_(True)]))
  assert back == [3, 0.5, True] and [type(item) for item in back] == [int, float, bool]


def test_lines_that_are_no_values():
  lines = [b"", b"1", b"x\n", b"[" * 99999 + b"\n", b'{"a": 1}\n', b'{"tuple": 1}\n', b'{"set": [[1]]}\n', b"{}\n"]
  lines += [b'{"dict": [[1]]}\n', b'{"bytes": "x"}\n', b'{"complex": ["a", 1]}\n', b'{"dict": [[[1], 2]]}\n', b"\xff\n"]
  for line in lines:
    with pytest.raises(wire.WireError):
      wire.loads(line)
  for value in ({"tuple": (1,)}, (), ("returned",), ("raised", 1, 2), 1):
    with pytest.raises(wire.WireError, match="not an answer"):
      wire.result(wire.dumps(value))
  for name, kind in (
    ("KeyError", KeyError),
    ("UnicodeDecodeError", RuntimeError),
    ("exec", RuntimeError),
    ("StopIteration", RuntimeError),
  ):
    with pytest.raises(kind):
      wire.result(wire.dumps(("raised", name, "text")))


@pytest.mark.parametrize("kind", ["set", "frozenset", "dict"])
def test_items_that_collide_do_not_keep_their_reader_busy(kind):
  """Multiples of 2^61 - 1 all have the hash 0: the time of a set of them grows with its square, 2 s for 20,000."""
  items = [str(number * (2**61 - 1)) for number in range(1, 20_000)]
  items = [f"[{item}, 0]" for item in items] if kind == "dict" else items
  line = f'{{"tuple": ["returned", {{"{kind}": [{", ".join(items)}]}}]}}\n'.encode()
  start = time.process_time()
  with pytest.raises(wire.WireError, match="made to collide"):
    wire.result(line)
  assert time.process_time() - start < 1
  assert wire.loads(wire.dumps(set(range(20_000)))) == set(range(20_000))


# The filter, followed by hand -----------------------------------------------------------------------------------------


def filtered(machine: str, number: int, *arguments: int, arch: int | None = None, pid: int = 77) -> str:
  """What the filter answers to a system call: a plain interpreter of the BPF that it uses."""
  arch = confine.MACHINES[machine][1] if arch is None else arch
  words = {0: number, 4: arch} | {16 + 8 * i: value & 0xFFFFFFFF for i, value in enumerate(arguments)}
  code, at, value = confine.bpf(pid, machine), 0, 0
  while True:
    name, yes, no, k = code[at]
    at += 1
    if name == 0x20:
      value = words.get(k, 0)
    elif name == 0x54:
      value &= k
    elif name == 0x06:
      return {0x7FFF0000: "allow", 0x80000000: "kill", 0x50001: "EPERM", 0x50026: "ENOSYS"}[k]
    else:
      at += yes if (value == k if name == 0x15 else value >= k) else no


@pytest.mark.parametrize("machine, numbers", [
  # read, socket, execve, fork or vfork, mount, ptrace, chmod, clone, openat, kill, fcntl, prlimit64, clone3, io_uring
  ("x86_64", (0, 41, 59, 57, 165, 101, 90, 56, 257, 62, 72, 302, 435, 425)),
  ("aarch64", (63, 198, 221, 221, 40, 117, 53, 220, 56, 129, 25, 261, 435, 425)),
])  # fmt: skip
def test_the_filter(machine, numbers):
  read, *refused, clone, openat, kill, fcntl, prlimit, clone3, ring = numbers
  assert filtered(machine, read) == "allow" and filtered(machine, read, arch=0x40000003) == "kill"
  assert {filtered(machine, number) for number in refused} == {"EPERM"}
  assert filtered(machine, clone3) == filtered(machine, ring) == filtered(machine, 999) == "ENOSYS"
  thread = 0x3D0F00  # of glibc's pthread_create
  assert filtered(machine, clone, thread) == "allow"
  assert filtered(machine, clone, signal.SIGCHLD) == filtered(machine, clone, thread | 0x40000000) == "EPERM"
  assert filtered(machine, openat, 0, 0, os.O_RDONLY | os.O_CLOEXEC) == "allow"
  assert filtered(machine, openat, 0, 0, os.O_WRONLY | os.O_TRUNC | os.O_CREAT) == "allow"  # Landlock decides
  assert filtered(machine, openat, 0, 0, os.O_TRUNC) == "EPERM"
  assert filtered(machine, kill, 77, 9) == "allow"
  assert {filtered(machine, kill, pid, 9) for pid in (1, 0, -1, -77, 78)} == {"EPERM"}
  assert filtered(machine, fcntl, 3, 1) == "allow" and filtered(machine, fcntl, 3, 8) == "EPERM"
  assert filtered(machine, prlimit, 0) == "allow" and filtered(machine, prlimit, 1) == "EPERM"
  assert filtered("x86_64", 0x40000000 + 41) == "ENOSYS"  # the x32 ABI


# Machines without a protection ----------------------------------------------------------------------------------------

WORKER = """
import sys
sys.path.insert(0, {root!r})
from experiments.grading import confine, worker
{change}
worker.main()
"""
LACKS = {
  "Landlock": ("confine.landlock_abi = lambda: 0", r"Landlock \(Linux 5.13 or newer, .*\) is not available"),
  "seccomp": ("confine.platform.machine = lambda: 'riscv64'", "no table of system calls for riscv64"),
  "a filter that works": ("confine.filter_calls = lambda: None", "a confined process still opens sockets"),
  "rules that work": (
    "confine.restrict_files = lambda *a: None", "a confined process still (writes outside its folder|reads /proc)"
  ),
  "a Python that starts": ("raise RuntimeError('no start')", "RuntimeError: no start"),
}  # fmt: skip


@pytest.fixture
def machine(tmp_path, monkeypatch):
  """Changes what the worker finds on this machine."""

  def changed(change: str):
    path = tmp_path / "worker.py"
    path.write_text(WORKER.format(root=str(ROOT), change=textwrap.dedent(change)))
    monkeypatch.setattr(sandbox, "WORKER", path)
    sandbox.isolation.cache_clear()

  yield changed
  sandbox.isolation.cache_clear()


@confined
@pytest.mark.parametrize("name", LACKS)
def test_machines_that_cannot_run_programs(name, machine, tmp_path, monkeypatch):
  change, message = LACKS[name]
  machine(change)
  monkeypatch.setattr(sandbox.tempfile, "tempdir", str(tmp_path))
  with pytest.raises(sandbox.SandboxError, match=f"programs cannot run here safely: .*{message}"):
    sandbox.run_program("print(1)")
  assert not children() and [path.name for path in tmp_path.iterdir()] == ["worker.py"]


@confined
def test_a_machine_without_namespaces(machine):
  machine("confine.NAMESPACES = {'user': 1, 'root': 1, 'none': 0}")  # flags that the kernel refuses
  assert sandbox.isolation() == "none"
  assert sandbox.run_program("print(1)").stdout == "1\n"


def test_other_systems(monkeypatch):
  sandbox.isolation.cache_clear()
  monkeypatch.setattr(sandbox.sys, "platform", "darwin")
  with pytest.raises(sandbox.SandboxError, match=r"they need Linux .*, not darwin"):
    sandbox.run_program("print(1)")
