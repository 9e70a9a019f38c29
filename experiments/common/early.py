"""A command line checked before numpy and jax are imported: a child process imports them as blanks.

`python -m experiments.NAME` imports `experiments` first, which calls `check`. A forked child then runs the program's
module with every third-party package but absl replaced by a `_Blank`, which takes any use at import: as a decorator, a
base class, a number. Own modules, and so all flags with their defaults and descriptions, are the real ones. Where
`program.run` finds a mistake in the flags, or is asked for help, the child answers and this process ends with its exit
code. In any other case, also when a blank does not do, the program starts as usual and checks its flags again.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.abc
import importlib.machinery
import os
import runpy
import signal
import sys
import types
from typing import Any

from experiments.common import stopping

GO_ON = 64  # exit code of a child that has nothing to say
checking = False  # in the child

_OWN = {"absl", "dms_jax", "experiments", "pallas_kernels"}
_OPERATORS = (
  "call getitem add radd sub rsub mul rmul truediv rtruediv floordiv rfloordiv mod pow rpow neg and rand or ror invert"
)


class _Blank(types.ModuleType):
  """A module, function, class and number in one; all its attributes and results are blanks."""

  def __init__(self):
    super().__init__("blank")
    self.__path__: list[str] = []

  def __getattr__(self, name: str) -> Any:
    if name.startswith("__") and "version" not in name:
      raise AttributeError(name)
    return {"dataclass": _dataclass, "field": _field}.get(name) or _Blank()

  def __mro_entries__(self, bases):
    return (type("BlankBase", (), {}),)

  def __iter__(self):
    return iter(())

  def __bool__(self):
    raise TypeError("a blank decides nothing")

  def __index__(self):
    return 1

  def __float__(self):
    return 1.0

  def __ge__(self, other):  # versions
    return True

  __lt__ = __le__ = __gt__ = __contains__ = __ge__


for _name in _OPERATORS.split():
  setattr(_Blank, f"__{_name}__", lambda self, *_, **__: self)


def _dataclass(cls: type | None = None, **settings: Any) -> Any:
  """flax.struct.dataclass, without jax."""
  return dataclasses.dataclass(cls, frozen=True, **settings)


def _field(pytree_node: bool = True, **settings: Any) -> Any:
  """flax.struct.field, without jax."""
  return dataclasses.field(**settings)


class _Blanks(importlib.abc.MetaPathFinder, importlib.abc.Loader):
  """Finds third-party packages, installed or not, and gives blanks."""

  def find_spec(self, fullname, path=None, target=None):
    if (top := fullname.partition(".")[0]) in _OWN or top in sys.stdlib_module_names:
      return None
    return importlib.machinery.ModuleSpec(fullname, self, is_package=True)

  def create_module(self, spec):
    return _Blank()

  def exec_module(self, module):
    pass


def program_name() -> str | None:
  """The module NAME of `python ... -m NAME`; None where this process runs no program of `experiments`."""
  words = sys.orig_argv
  at = len(words) - len(sys.argv)  # sys.argv is ["-m", flags...] while the module is looked for
  name = words[at].removeprefix("-m") if sys.argv[:1] == ["-m"] else ""
  return name if name.startswith("experiments.") else None


def check(module: str) -> None:
  """Ends this process if a child finds that the command line of the program `module` asks for help or is wrong."""
  if not hasattr(os, "fork"):
    return
  if child := os.fork():
    stopping.install()  # now, as the child shall not have its thread
    _, status = os.waitpid(child, 0)
    if os.WIFEXITED(status) and (code := os.WEXITSTATUS(status)) != GO_ON:
      sys.exit(code)
    return
  global checking
  checking, code = True, GO_ON
  try:
    for number in (signal.SIGINT, signal.SIGTERM):
      if signal.getsignal(number) is not signal.SIG_IGN:
        signal.signal(number, signal.SIG_DFL)
    sys.meta_path.insert(0, _Blanks())
    runpy.run_module(module, run_name="__main__", alter_sys=True)
  except SystemExit as end:
    code = end.code if isinstance(end.code, int) else GO_ON
  except BaseException:  # a blank did not do: the program itself checks
    pass
  for stream in (sys.stdout, sys.stderr):
    with contextlib.suppress(OSError):  # a reader such as head may have gone
      stream.flush()
  os._exit(code)
