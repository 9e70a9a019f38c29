"""The console scripts `dms-NAME`: each runs the program `experiments.NAME` as `python -m` does."""

from __future__ import annotations

import functools
import runpy
from collections.abc import Callable

from experiments.common import early, stopping


def run(module: str) -> None:
  """Runs the program of this module with the command line of the process."""
  early.check(module)
  stopping.install()
  runpy.run_module(module, run_name="__main__", alter_sys=True)


def __getattr__(name: str) -> Callable[[], None]:
  """A program by its name, as entry points look it up."""
  if name.startswith("_"):
    raise AttributeError(name)
  return functools.partial(run, f"experiments.{name}")
