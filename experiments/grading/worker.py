"""Runs in the sandbox: confines itself, then runs a program, answers calls to it, or judges it.

`experiments.grading.sandbox` starts it as `python -I -S worker.py SPEC STATUS`, two numbers of open files: what to do,
as JSON, and where to report that the confinement holds. Both are closed when the program starts.
"""

from __future__ import annotations

import _sitebuiltins
import builtins
import json
import os
import sys
import types

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
sys.path.append(ROOT)  # `-I` leaves it out; `-S` leaves out the packages, whose .pth files would run unconfined
from experiments.grading import confine, wire  # noqa: E402

sys.path.remove(ROOT)

# What LiveCodeBench's harness imports before every program, as solutions written for LeetCode expect.
PRELUDE = """
from string import *
from re import *
from datetime import *
from collections import *
from heapq import *
from bisect import *
from copy import *
from math import *
from random import *
from statistics import *
from itertools import *
from functools import *
from operator import *
from io import *
from sys import *
from json import *
from builtins import *
from typing import *
import string, re, datetime, collections, heapq, bisect, copy, math, random, statistics, itertools, functools
import operator, io, sys, json
"""


def run(code: str, prelude: bool, name: str) -> dict:
  """Runs a program as the module `name`; its names."""
  module = sys.modules[name] = types.ModuleType(name)
  names = module.__dict__
  if prelude:
    exec(PRELUDE, names)
  exec(compile(code, "program.py", "exec"), names)
  return names


def program(spec: dict) -> None:
  """A whole program that reads standard input and writes standard output."""
  sys.argv = ["program.py"]
  run(spec["code"], spec["prelude"], "__main__")


def serve(spec: dict) -> None:
  """A program whose functions are called from outside; `Solution` is made once if it is there, as on LeetCode."""
  names = run(spec["code"], spec["prelude"], "program")
  solution = names["Solution"]() if "Solution" in names else None

  def find(name: str):
    return getattr(solution, name) if hasattr(solution, name) else names[name]

  with open(spec["requests"], "rb") as requests, open(spec["replies"], "wb") as replies:
    wire.answers(requests, replies, find)


def judge(spec: dict) -> None:
  """A benchmark's own tests in a process that the program cannot reach; the names in `calls` are called there."""
  with open(spec["requests"], "wb", buffering=0) as requests, open(spec["replies"], "rb") as replies:

    def remote(name: str):
      def call(*arguments):
        line = memoryview(wire.dumps((name, arguments)))
        while line:
          line = line[requests.write(line) :]
        return wire.result(replies.readline(wire.MOST_BYTES))

      return call

    names: dict = {"__name__": "tests"}
    try:
      exec(compile(spec["setup"], "setup.py", "exec"), names)
      names.update({name: remote(name) for name in spec["calls"]})
      exec(compile(spec["tests"], "tests.py", "exec"), names)
      verdict = "passed"
    except BaseException as error:  # tests fail with anything, and a wrong answer may be of any type
      verdict = f"{type(error).__name__}: {error}"[:300]
  with open(spec["verdict"], "w") as file:
    file.write(verdict)


def main() -> None:
  with open(int(sys.argv[1])) as file:
    spec = json.load(file)
  with open(int(sys.argv[2]), "w") as status:
    try:
      bounds = confine.Bounds(**spec["bounds"])
      confine.confine(spec["isolation"], spec["folder"], bounds, spec["libraries"], spec["parent"])
    except confine.ConfineError as error:
      status.write(str(error))
      status.close()
      os._exit(1)
    status.write("ready")
  sys.path += spec["libraries"]
  for name in ("exit", "quit"):  # `-S` leaves them out
    setattr(builtins, name, _sitebuiltins.Quitter(name, "Ctrl-D"))
  sys.set_int_max_str_digits(wire.MOST_DIGITS)
  sys.setrecursionlimit(50_000 if spec["prelude"] else sys.getrecursionlimit())
  try:
    {"program": program, "serve": serve, "judge": judge}[spec["mode"]](spec)
  except SystemExit:
    pass  # a program may end itself early; what it printed counts


if __name__ == "__main__":
  main()
