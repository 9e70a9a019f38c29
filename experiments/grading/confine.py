"""Confines the calling Linux process for good: files, network, processes, memory and time.

`experiments.grading.worker` calls `confine` before it runs a program that nobody has read. Standard library only: the
calls that Python lacks go through ctypes. A confinement cannot be lifted by the process, nor by what it runs.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import platform
import resource
import signal
import socket
import struct
import sys
from collections.abc import Sequence
from typing import NamedTuple

MACHINES = {"x86_64": (0, 0xC000003E), "aarch64": (1, 0xC00000B7)}  # column of SYSCALLS, AUDIT_ARCH of linux/audit.h

# Landlock, linux/landlock.h ------------------------------------------------------------------------------------------
LANDLOCK_CREATE, LANDLOCK_ADD, LANDLOCK_RESTRICT = 444, 445, 446  # system calls, the same on every machine
EXECUTE, WRITE_FILE, READ_FILE, READ_DIR = 1 << 0, 1 << 1, 1 << 2, 1 << 3
MAKE_CHAR, MAKE_SOCK, MAKE_BLOCK = 1 << 6, 1 << 9, 1 << 11
REFER, TRUNCATE, IOCTL_DEV = 1 << 13, 1 << 14, 1 << 15  # of ABI 2, 3 and 5
FS_V1 = (1 << 13) - 1
NET_TCP = 0b11  # bind and connect, ABI 4
SCOPES = 0b11  # abstract Unix sockets and signals, ABI 6

# What a running interpreter reads beside its own prefix: shared libraries and time zones. Not /home, /proc, /tmp.
READABLE = ("/usr", "/lib", "/lib32", "/lib64", "/nix/store", "/etc/ld.so.cache", "/etc/localtime")
DEVICES = ("/dev/null", "/dev/zero", "/dev/urandom", "/dev/random")

# Namespaces, linux/sched.h -------------------------------------------------------------------------------------------
NEWNS, NEWUTS, NEWIPC, NEWUSER, NEWNET = 0x20000, 0x4000000, 0x8000000, 0x10000000, 0x40000000
NAMESPACES = {"user": NEWUSER | NEWNS | NEWUTS | NEWIPC | NEWNET, "root": NEWNS | NEWUTS | NEWIPC | NEWNET, "none": 0}
MS_NOSUID, MS_NODEV, MS_NOEXEC, MS_REC, MS_PRIVATE = 2, 4, 8, 0x4000, 0x40000

# Seccomp: every system call that a program may make, with its numbers on x86_64 and aarch64. None opens a socket, makes
# a process, runs another file, signals or traces another process, changes owners, modes or times of files, or mounts.
SYSCALLS = """
  read 0 63; write 1 64; readv 19 65; writev 20 66; pread64 17 67; pwrite64 18 68; lseek 8 62; close 3 57;
  close_range 436 436; dup 32 23; dup2 33 -; dup3 292 24; pipe 22 -; pipe2 293 59; poll 7 -; ppoll 271 73;
  select 23 -; pselect6 270 72; epoll_create 213 -; epoll_create1 291 20; epoll_ctl 233 21; epoll_wait 232 -;
  epoll_pwait 281 22; epoll_pwait2 441 441; eventfd2 290 19; stat 4 -; lstat 6 -; fstat 5 80; newfstatat 262 79;
  statx 332 291; statfs 137 43; fstatfs 138 44; access 21 -; faccessat 269 48; faccessat2 439 439; readlink 89 -;
  readlinkat 267 78; getdents 78 -; getdents64 217 61; getcwd 79 17; chdir 80 49; fchdir 81 50; umask 95 166;
  mkdir 83 -; mkdirat 258 34; rmdir 84 -; unlink 87 -; unlinkat 263 35; rename 82 -; renameat 264 38;
  renameat2 316 276; link 86 -; linkat 265 37; symlink 88 -; symlinkat 266 36; ftruncate 77 46; fallocate 285 47;
  fsync 74 82; fdatasync 75 83; sendfile 40 71; copy_file_range 326 285; fadvise64 221 223; mmap 9 222; munmap 11 215;
  mprotect 10 226; mremap 25 216; madvise 28 233; brk 12 214; membarrier 324 283; exit 60 93; exit_group 231 94;
  rt_sigaction 13 134; rt_sigprocmask 14 135; rt_sigreturn 15 139; rt_sigpending 127 136; rt_sigsuspend 130 133;
  rt_sigtimedwait 128 137; sigaltstack 131 132; restart_syscall 219 128; pause 34 -; wait4 61 260; waitid 247 95;
  alarm 37 -; getitimer 36 102; setitimer 38 103; clock_gettime 228 113; clock_getres 229 114;
  clock_nanosleep 230 115; nanosleep 35 101; gettimeofday 96 169; time 201 -; times 100 153; getrusage 98 165;
  futex 202 98; set_robust_list 273 99; set_tid_address 218 96; rseq 334 293; sched_yield 24 124;
  sched_getaffinity 204 123; sched_getparam 143 121; sched_getscheduler 145 120; sched_get_priority_max 146 125;
  sched_get_priority_min 147 126; getcpu 309 168; getpid 39 172; getppid 110 173; gettid 186 178; getuid 102 174;
  geteuid 107 175; getgid 104 176; getegid 108 177; getresuid 118 148; getresgid 120 150; getgroups 115 158;
  getpgrp 111 -; getrlimit 97 163; uname 63 160; sysinfo 99 179; getrandom 318 278
"""
# System calls that are allowed for some values of one argument: numbers, the argument, its mask, the values allowed.
CLONE_THREAD, CLONE_OTHERS = 0x10000, 0x7E022000  # new namespaces and tracing
ANY = 0xFFFFFFFF
CHECKED = {
  "clone": ((56, 220), 0, CLONE_THREAD | CLONE_OTHERS, (CLONE_THREAD,)),  # threads, no processes
  "fcntl": ((72, 25), 1, ANY, (0, 1, 2, 3, 4, 1030, 1032)),  # F_DUPFD to F_SETFL, F_DUPFD_CLOEXEC, F_GETPIPE_SZ
  "ioctl": ((16, 29), 1, ANY, (0x5401, 0x5413, 0x541B, 0x5450, 0x5451)),  # terminal?, its size, bytes waiting, FIO*CLEX
  "prlimit64": ((302, 261), 0, ANY, (0,)),  # of this process
  "kill": ((62, 129), 0, ANY, ("pid",)),
  "tgkill": ((234, 131), 0, ANY, ("pid",)),
}
O_READ_AND_TRUNCATE = os.O_ACCMODE | os.O_TRUNC  # read-only, yet it truncates, and Landlock before ABI 3 lets it
EPERM, ENOSYS, NEW_SYSCALLS = 1, 38, 424  # libc falls back to older calls where newer ones give ENOSYS


class Bounds(NamedTuple):
  """What one process may use.

  `cpu` seconds; `memory` bytes of address space; `disk` bytes of all files and of one; `files` open at once;
  `stack` bytes of the main thread.
  """

  cpu: int
  memory: int
  disk: int
  files: int
  stack: int = 64 << 20


class ConfineError(Exception):
  """A protection is not available; the message says which and why."""


_libc = ctypes.CDLL(None, use_errno=True)


def _call(what: str, function, *arguments) -> int:
  result = function(*arguments)
  if result < 0:
    raise ConfineError(f"{what}: {os.strerror(ctypes.get_errno())}")
  return result


def _syscall(what: str, number: int, *arguments) -> int:
  return _call(what, _libc.syscall, ctypes.c_long(number), *arguments)


def _prctl(what: str, *arguments: int) -> int:
  return _call(what, _libc.prctl, *map(ctypes.c_ulong, (*arguments, 0, 0, 0, 0)[:5]))


# The steps ------------------------------------------------------------------------------------------------------------


def limit(bounds: Bounds) -> None:
  """Resource limits of the kernel; soft and hard ones are equal, so that none can be raised again."""
  for name, value in {
    "AS": bounds.memory, "FSIZE": bounds.disk, "NOFILE": bounds.files, "STACK": bounds.stack, "CORE": 0, "MEMLOCK": 0,
    "MSGQUEUE": 0, "NICE": 0, "RTPRIO": 0, "CPU": bounds.cpu,
  }.items():  # fmt: skip
    number = getattr(resource, f"RLIMIT_{name}", None)
    if number is not None:
      hard = resource.getrlimit(number)[1]
      value = value if hard == resource.RLIM_INFINITY else min(value, hard)
      resource.setrlimit(number, (value, value))


def separate(isolation: str, folder: str, disk: int) -> None:
  """New namespaces: no network device but a loopback that is down; `folder` is a file system in memory of `disk` bytes.

  Args:
    isolation: "user", new namespaces in a new user namespace; "root", for root without one; "none", nothing.
  """
  if isolation == "none":
    return
  uid, gid = os.geteuid(), os.getegid()
  _call("unshare", _libc.unshare, NAMESPACES[isolation])
  try:
    if isolation == "user":
      for name, text in (("setgroups", "deny"), ("uid_map", f"{uid} {uid} 1"), ("gid_map", f"{gid} {gid} 1")):
        with open(f"/proc/self/{name}", "w") as file:
          file.write(text)
  except OSError as error:
    raise ConfineError(f"user namespace: {error}") from None
  _call("private mounts", _libc.mount, b"none", b"/", None, ctypes.c_ulong(MS_REC | MS_PRIVATE), None)
  options = f"size={disk},nr_inodes=4096,mode=700".encode()
  flags = ctypes.c_ulong(MS_NOSUID | MS_NODEV | MS_NOEXEC)
  _call("tmpfs", _libc.mount, b"tmpfs", os.fsencode(folder), b"tmpfs", flags, options)


def drop_privileges(parent: int) -> None:
  """No capabilities, and none through any file run later; no core files; death with process `parent`."""
  _prctl("no_new_privs", 38, 1)
  _prctl("dumpable", 4, 0)
  header = struct.pack("Ii", 0x20080522, 0)  # version 3, this process
  _call("capset", _libc.capset, header, bytes(24))
  _prctl("death signal", 1, signal.SIGKILL)
  if os.getppid() != parent:
    raise ConfineError("the process that waits has ended")


def landlock_abi() -> int:
  """The version of Landlock of the running kernel; 0 if there is none."""
  return max(0, _libc.syscall(ctypes.c_long(LANDLOCK_CREATE), None, ctypes.c_size_t(0), ctypes.c_uint32(1)))


def restrict_files(folder: str, writable: bool, libraries: Sequence[str]) -> None:
  """Landlock: reading is left for the interpreter's own files and `libraries`, writing for a `writable` `folder`."""
  abi = landlock_abi()
  if not abi:
    raise ConfineError("Landlock (Linux 5.13 or newer, in the kernel's list of security modules) is not available")
  files = FS_V1 | (REFER if abi >= 2 else 0) | (TRUNCATE if abi >= 3 else 0) | (IOCTL_DEV if abi >= 5 else 0)
  handled = struct.pack("QQQ", files, NET_TCP if abi >= 4 else 0, SCOPES if abi >= 6 else 0)
  ruleset = _syscall("Landlock", LANDLOCK_CREATE, handled, ctypes.c_size_t(len(handled)), ctypes.c_uint32(0))
  inside = files & ~(EXECUTE | MAKE_CHAR | MAKE_SOCK | MAKE_BLOCK | IOCTL_DEV) if writable else READ_DIR
  rules = {path: READ_FILE | READ_DIR for path in (*READABLE, sys.base_prefix, sys.base_exec_prefix, *libraries)}
  rules |= {path: READ_FILE | (WRITE_FILE | files & TRUNCATE if path == "/dev/null" else 0) for path in DEVICES}
  for path, rights in (*rules.items(), (folder, inside)):
    try:
      place = os.open(path, os.O_PATH | os.O_CLOEXEC)
    except OSError:
      continue  # not on this machine: nothing to allow
    if not os.path.isdir(path):
      rights &= ~READ_DIR
    rule = struct.pack("=Qi", rights, place)
    _syscall("Landlock rule", LANDLOCK_ADD, ruleset, ctypes.c_int(1), rule, ctypes.c_uint32(0))
    os.close(place)
  _syscall("Landlock", LANDLOCK_RESTRICT, ruleset, ctypes.c_uint32(0))
  os.close(ruleset)


def bpf(pid: int, machine: str) -> list[tuple[int, int, int, int]]:
  """The seccomp filter of process `pid` as classic BPF: (code, jump if true, jump if false, value)."""
  if machine not in MACHINES:
    raise ConfineError(f"seccomp: no table of system calls for {machine}; there are {', '.join(MACHINES)}")
  column, arch = MACHINES[machine]
  load, equal, least, mask, answer = 0x20, 0x15, 0x35, 0x54, 0x06
  allow, kill, refuse = 0x7FFF0000, 0x80000000, 0x50000
  code = [(load, 0, 0, 4), (equal, 1, 0, arch), (answer, 0, 0, kill), (load, 0, 0, 0)]
  for entry in SYSCALLS.strip().split(";"):
    number = entry.split()[1 + column]
    if number != "-":
      code += [(equal, 0, 1, int(number)), (answer, 0, 0, allow)]
  for numbers, argument, bits, values in CHECKED.values():
    tests = [(load, 0, 0, 16 + 8 * argument), (mask, 0, 0, bits)]  # low half of a little-endian word
    for value in values:
      tests += [(equal, 0, 1, pid if value == "pid" else value), (answer, 0, 0, allow)]
    tests.append((answer, 0, 0, refuse | EPERM))
    code += [(equal, 0, len(tests), numbers[column]), *tests]
  for number, argument in ((2, 1), (257, 2)) if column == 0 else ((56, 2),):  # open, openat
    code += [
      (equal, 0, 5, number), (load, 0, 0, 16 + 8 * argument), (mask, 0, 0, O_READ_AND_TRUNCATE),
      (equal, 0, 1, os.O_TRUNC), (answer, 0, 0, refuse | EPERM), (answer, 0, 0, allow),
    ]  # fmt: skip
  return [*code, (least, 0, 1, NEW_SYSCALLS), (answer, 0, 0, refuse | ENOSYS), (answer, 0, 0, refuse | EPERM)]


def filter_calls() -> None:
  """Seccomp: what `SYSCALLS` and `CHECKED` do not list fails; the other ABI of x86_64 kills the process."""
  code = b"".join(struct.pack("HBBI", *instruction) for instruction in bpf(os.getpid(), platform.machine()))
  held = ctypes.create_string_buffer(code)
  program = struct.pack("HxxxxxxQ", len(code) // 8, ctypes.addressof(held))
  pointer = ctypes.create_string_buffer(program)
  _call("seccomp", _libc.prctl, *map(ctypes.c_ulong, (22, 2, ctypes.addressof(pointer), 0, 0)))


def verify(folder: str, parent: int) -> None:
  """Tries what must not work.

  Raises:
    ConfineError: something worked.
  """
  outside = os.path.join(os.path.dirname(folder), f"outside-{os.path.basename(folder)}")
  attempts = {
    "opens sockets": lambda: socket.socket(),
    "makes Unix sockets": lambda: socket.socket(socket.AF_UNIX),
    "writes outside its folder": lambda: _writes(outside),
    "changes modes of files": lambda: os.chmod(folder, 0o700),
    "reads /proc": lambda: os.open("/proc/self/environ", os.O_RDONLY),
    "signals its parent": lambda: os.kill(parent, 0),
    "makes processes": _forks,
    "runs programs": lambda: os.execv(sys.executable, [sys.executable, "-c", "raise SystemExit(86)"]),
  }
  for what, attempt in attempts.items():
    try:
      attempt()
    except OSError:
      continue
    raise ConfineError(f"a confined process still {what}")


def _writes(path: str) -> None:
  os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL))
  os.unlink(path)


def _forks() -> None:
  if os.fork() == 0:
    os._exit(0)


def confine(isolation: str, folder: str, bounds: Bounds, libraries: Sequence[str], parent: int) -> None:
  """All steps in the one order that works; `folder` becomes the current one.

  Args:
    isolation: as in `separate`; with "none" the folder is not writable, because nothing bounds the sum of its files.
    libraries: folders of packages, which can be read.
    parent: the process that waits; this one is killed when it ends.

  Raises:
    ConfineError: a protection is not available.
  """
  with contextlib.suppress(OSError), open("/proc/self/oom_score_adj", "w") as file:
    file.write("1000")  # a machine that runs out of memory ends this process first
  separate(isolation, folder, bounds.disk)
  os.chdir(folder)
  drop_privileges(parent)
  limit(bounds)
  restrict_files(folder, isolation != "none", libraries)
  filter_calls()
  verify(folder, parent)
